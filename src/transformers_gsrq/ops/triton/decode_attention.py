"""Attention of a few new tokens to a compressed context, reading the codes: no key or value is ever decoded to memory.

Four steps: scores of the coded keys (`key_scores`), softmax-weighted sums of the coded values (`value_histogram`, or
`value_gather` where that cannot run), attention to the exact tokens, and the merge of the parts by log-sum-exp.

Triton compiles a kernel anew for integers that are 1 or multiples of 16. The kernels do without for what changes as a
text grows: another variant in the middle of it would hold it up for seconds, and the machine code is all but the same.
"""

from __future__ import annotations

from functools import cache

import torch

from . import gluon_reason, unsupported_decode_reason
from .key_scores import key_scores
from .key_tables import KeyTables, prepare_keys
from .merge import EXACT_BLOCK, EXACT_TILE, PARTS_BLOCK, _combine_histograms, _exact_attention, _merge
from .value_gather import value_gather

__all__ = ["KeyTables", "decode_attention", "prepare_keys"]


@cache
def _device_size(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":
        # The interpreter runs programs one by one; a few show that splits are merged.
        return 4, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _as_words(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[B, M, R, C]` as int32 words of four tokens, without a copy where alignment and capacity allow."""
    padded = -(-codes.shape[-1] // 4) * 4
    end = (
        codes.storage_offset()
        + padded
        + sum((n - 1) * s for n, s in zip(codes.shape[:3], codes.stride(), strict=False))
    )
    aligned = codes.data_ptr() % 4 == 0 and all(stride % 4 == 0 for stride in codes.stride()[:3])
    if not aligned or codes.stride(-1) != 1 or end > codes.untyped_storage().nbytes():
        copy = codes.new_zeros(*codes.shape[:3], padded)
        copy[..., : codes.shape[-1]] = codes
        codes = copy
    return codes.as_strided((*codes.shape[:3], padded), codes.stride()).view(torch.int32)


def _decode_attention(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    tables: torch.Tensor,
    subspaces: torch.Tensor,
    frequencies: torch.Tensor,
    amplitudes: torch.Tensor,
    value_centroids: torch.Tensor,
    exact_keys: torch.Tensor,
    exact_values: torch.Tensor,
    starts: torch.Tensor,
    sink_counts: torch.Tensor,
    first_position: torch.Tensor,
    mask: torch.Tensor | None,
    exponent: int,
    rotary_dim: int,
    paired: bool,
    sink_length: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    batch, num_query_heads, num_queries, head_dim = query.shape
    num_heads, num_exact = exact_keys.shape[1:3]
    reason = unsupported_decode_reason(
        query.device,
        query.dtype,
        num_heads=num_heads,
        head_dim=head_dim,
        key_subspace_dim=num_heads * head_dim // key_codes.shape[1],
        value_subspace_dim=value_centroids.shape[-1],
        rotary_dim=rotary_dim,
        num_queries=num_queries,
    )
    if reason:
        raise ValueError(f"decode_attention cannot run: {reason}.")
    parts = (key_codes, value_codes, tables, value_centroids, exact_keys, exact_values)
    for part in (*parts, starts, sink_counts, first_position):
        if part.device != query.device:
            raise ValueError(f"All tensors must be on {query.device}, the query's device; one is on {part.device}.")
    num_rows = num_query_heads // num_heads * num_queries
    num_tokens = key_codes.shape[-1]
    rows = query.contiguous().view(batch, num_heads, num_rows, head_dim)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts, sink_counts, first_position = (
        part.to(torch.int32).contiguous() for part in (starts, sink_counts, first_position)
    )
    if mask is not None:
        if mask.shape not in ((batch, heads, num_queries, num_tokens + num_exact) for heads in (1, num_query_heads)):
            raise ValueError(
                f"The mask must be [{batch}, 1 or {num_query_heads}, {num_queries}, {num_tokens + num_exact}], got "
                f"{list(mask.shape)}."
            )
        mask = (mask if mask.stride(-1) == 1 else mask.contiguous()).view(torch.uint8)
    exact_keys, exact_values = (
        part if part.stride(-1) == 1 else part.contiguous() for part in (exact_keys, exact_values)
    )
    make = {"dtype": torch.float32, "device": query.device}
    exact_sums = torch.empty(batch, num_heads, num_rows, head_dim, **make)
    exact_maxima = torch.empty(batch, num_heads, num_rows, **make)
    exact_weights = torch.empty_like(exact_maxima)
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask_strides = (mask.stride(0), 0 if mask.shape[1] == 1 else mask.stride(1), mask.stride(2))
    exact = (
        rows, exact_keys, exact_values, sink_counts, starts if mask is None else mask,
        exact_sums, exact_maxima, exact_weights,
        num_tokens, num_exact, sink_length, scaling, 0.0 if softcap is None else softcap,
        *exact_keys.stride()[:3], *exact_values.stride()[:3], *mask_strides,
    )  # fmt: skip
    block_rows = min(32, max(16, (1 << (num_rows - 1).bit_length())))
    block_dim = 1 << (head_dim - 1).bit_length()
    shape = {
        "H": num_heads,
        "N": num_rows,
        "Q": num_queries,
        "D": head_dim,
        "HAS_MASK": mask is not None,
        "HAS_CAP": softcap is not None,
        "BN": block_rows,
        "BD": block_dim,
        "BE": min(EXACT_BLOCK, EXACT_TILE // block_dim),
    }
    with torch.cuda.device_of(query):
        num_sms, shared_bytes = _device_size(query.device)
        gluon = num_tokens > 0 and gluon_reason(num_rows) is None
        if num_tokens:
            keys = KeyTables(tables, subspaces, frequencies, amplitudes, exponent, rotary_dim, paired)
            scores = _key_scores(
                rows, _as_words(key_codes), num_tokens, keys, first_position, scaling, num_sms, shared_bytes, gluon
            )
            value_centroids = value_centroids.contiguous()
            if value_codes.stride(-1) != 1:
                value_codes = value_codes.contiguous()
        if gluon:
            sums, maxima, weights = _count_values(
                scores,
                _as_words(value_codes).view(torch.uint8),
                num_tokens,
                value_centroids,
                starts,
                mask,
                softcap,
                num_queries,
                num_sms,
                exact,
                shape,
            )
        else:
            _exact_attention[batch * num_heads, -(-num_rows // block_rows)](*exact, **shape)
            if num_tokens:
                sums, maxima, weights = value_gather(
                    scores,
                    _as_words(value_codes),
                    num_tokens,
                    value_centroids,
                    starts,
                    mask,
                    softcap,
                    head_dim,
                    num_queries,
                    num_sms,
                )
            else:
                sums = torch.empty(batch, num_heads, 0, 1, num_rows, head_dim, **make)
                maxima = weights = torch.empty(batch, num_heads, 0, num_rows, **make)
        _merge[batch * num_heads, num_rows](
            sums,
            maxima,
            weights,
            exact_sums,
            exact_maxima,
            exact_weights,
            out,
            sums.shape[2],
            sums.shape[3],
            N=num_rows,
            D=head_dim,
            BD=block_dim,
            BS=1 << (max(1, sums.shape[2]) - 1).bit_length(),
            BP=PARTS_BLOCK,
        )
    return out


def _key_scores(
    rows: torch.Tensor,
    words: torch.Tensor,
    num_tokens: int,
    keys: KeyTables,
    first_position: torch.Tensor,
    scaling: float,
    num_sms: int,
    shared_bytes: int,
    gluon: bool,
) -> torch.Tensor:
    """Scores of the coded keys by the faster kernel that can take them."""
    if gluon:
        from .key_scores_shared import STAGE_BYTES, key_scores_shared, supports

        if supports(keys, rows.shape[2]) and shared_bytes >= STAGE_BYTES:
            return key_scores_shared(rows, words, num_tokens, keys, first_position, scaling, num_sms, shared_bytes)
    return key_scores(rows, words, num_tokens, keys, first_position, scaling, num_sms)


def _count_values(
    scores: torch.Tensor,
    codes: torch.Tensor,
    num_tokens: int,
    centroids: torch.Tensor,
    starts: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
    num_queries: int,
    num_sms: int,
    exact: tuple,
    shape: dict,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Histograms of the coded values, their products with the centroids, and in the same launch the exact tokens."""
    from .value_histogram import value_histogram

    batch, num_heads, num_rows, _ = scores.shape
    num_stages, subspace_dim = codes.shape[2], centroids.shape[-1]
    head_dim = shape["D"]
    bins, chunk_maxima, steps = value_histogram(
        scores, codes, num_tokens, starts, mask, softcap, head_dim, subspace_dim, num_queries, num_sms
    )
    num_streams = bins.shape[3]
    rows = 1 << (num_rows - 1).bit_length()
    width = min(subspace_dim, head_dim)
    sums = torch.empty(batch, num_heads, 1, num_stages, num_rows, head_dim, dtype=torch.float32, device=codes.device)
    maxima = torch.empty(batch, num_heads, 1, num_rows, dtype=torch.float32, device=codes.device)
    weights = torch.empty_like(maxima)
    _combine_histograms[batch * num_heads, num_streams + 1](
        bins,
        chunk_maxima,
        centroids,
        sums,
        maxima,
        weights,
        bins.shape[2],
        num_stages,
        num_streams,
        steps,
        *exact,
        **shape,
        S=subspace_dim,
        WIDTH=width,
        BW=max(16, min(64, 1 << (width - 1).bit_length())),
        NP=rows,
        BC=32 // rows,
        num_warps=8,
    )
    return sums, maxima, weights


_decode_attention_op = torch.library.custom_op(
    "transformers_gsrq::decode_attention", _decode_attention, mutates_args=()
)


@_decode_attention_op.register_fake
def _(query, *args):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


def decode_attention(
    query: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    keys: KeyTables,
    value_centroids: torch.Tensor,
    exact_keys: torch.Tensor,
    exact_values: torch.Tensor,
    *,
    starts: torch.Tensor,
    sink_counts: torch.Tensor,
    sink_length: int,
    first_position: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention to sinks, coded tokens and window in one call; no synchronization, so it can be captured in a graph.

    Error against exact arithmetic: coded keys are summed and rotated in float16 (2^-11), scores kept to 2^-15 of a
    log2, softmax weights to 2^-9 of a chunk's total in the worst case (`value_histogram`).

    Args:
        query: `[B, Hq, Q, D]`, float16 or bfloat16, rotated, Hq = H * G, up to 16 tokens.
        key_codes: uint8 `[B, M, R, C]`, tokens contiguous; copied where rows do not begin at multiples of 4 bytes.
        value_codes: uint8 `[B, M', R', C]`, tokens contiguous.
        keys: The key codebook, by `prepare_keys`.
        value_centroids: `[M', R', K, S']` in the dtype of `query`.
        exact_keys: `[B, H, E, D]`, rotated: `sink_length` slots for sinks, then the window, the Q new tokens last.
        exact_values: `[B, H, E, D]`.
        starts: int32 `[B]`: row b sees its codes j >= starts[b]; earlier ones are padding or sinks.
        sink_counts: int32 `[B]`: slots of sinks that row b fills.
        sink_length: Slots for sinks.
        first_position: int32 `[B]`: position of code 0; code j stands at first_position[b] + j.
        mask: Boolean `[B, 1 or Hq, Q, C + E]`, True where visible, coded tokens first; None for causal attention, in
            which new token i does not see those after it.
        scaling: Factor of the scores.
        softcap: Soft cap of the scaled scores, or None.

    Returns:
        `[B, Hq, Q, D]`; zeros for a query that sees nothing.

    Raises:
        ValueError: if the kernels cannot run on this input, with the reason.
    """
    # The operator is for torch.compile; going through it in eager mode costs some 50 microseconds a call.
    run = _decode_attention_op if torch.compiler.is_compiling() else _decode_attention
    return run(
        query,
        key_codes,
        value_codes,
        keys.tables,
        keys.subspaces,
        keys.frequencies,
        keys.amplitudes,
        value_centroids,
        exact_keys,
        exact_values,
        starts,
        sink_counts,
        first_position,
        mask,
        keys.exponent,
        keys.rotary_dim,
        keys.paired,
        sink_length,
        scaling,
        softcap,
    )
