"""Attention of a few new tokens to a compressed context, reading the codes: no key or value is ever decoded to memory.

Four steps: scores of the coded keys (`key_scores`), softmax-weighted sums of the coded values (`value_histogram`, or
`value_gather` where that cannot run), attention to the exact tokens, and the merge of the parts by log-sum-exp.

How far a text has come is read from the device, and grids are those of a full cache, so that a step captured in a
CUDA graph can be replayed while the text grows. Each program finds its tokens from the counts of its row; one without
leaves at once, and what it would have written is not read.

Triton compiles a kernel anew for integers that are 1 or multiples of 16. The kernels do without for what changes as a
text grows: another variant in the middle of it would hold it up for seconds, and the machine code is all but the same.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from . import NUM_CENTROIDS, PAGE_TOKENS, Count, gluon_reason, unsupported_decode_reason
from .key_scores import SCORE_SCALE, Launch, Splits, plan_key_scores
from .key_tables import KeyTables, prepare_keys
from .merge import plan_combine, plan_exact, plan_merge
from .value_gather import BLOCK_TOKENS, plan_value_gather

__all__ = [
    "Count",
    "DecodePlan",
    "KeyTables",
    "decode_attention",
    "decode_workspace_bytes",
    "plan_decode",
    "prepare_keys",
]

# Scores are in steps of a log2.
KEY_SCALE = 1.4426950408889634 * SCORE_SCALE


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """What shapes, capacity and the device decide of a decode step. Places in the workspace are counted in 16 bytes.

    Attributes:
        keys: Launch of the scores.
        values: Launch of the coded values.
        exact: Launch of the exact tokens, with or without the histograms of values.
        merge: Launch of the merge.
        gluon: Whether values are summed by histograms.
        scores_bytes: Bytes of scores, with which the workspace begins.
        query_bytes: Bytes of the workspace from which to which a query is made contiguous.
        workspace_bytes: Bytes of the workspace.
    """

    keys: Launch | None
    values: Launch
    exact: Launch
    merge: Launch
    gluon: bool
    scores_bytes: int
    query_bytes: tuple[int, int]
    workspace_bytes: int


@cache
def _device_size(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that a program may have."""
    if device.type != "cuda":
        # The interpreter runs programs one by one; a few show that splits are merged.
        return 4, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


@lru_cache(maxsize=4096)
def _plan_values(
    batch: int,
    num_heads: int,
    num_query_heads: int,
    num_queries: int,
    head_dim: int,
    num_stages: int,
    subspace_dim: int,
    capacity: int,
    device: torch.device,
) -> DecodePlan:
    """What the workspace depends on: launches of all but the keys, without what else decides their options."""
    num_sms, _ = _device_size(device)
    num_rows = num_query_heads // num_heads * num_queries
    exact = plan_exact(batch, num_heads, num_rows, num_queries, head_dim)
    shape = (batch, num_heads, num_rows, num_queries, head_dim, num_stages, subspace_dim, capacity, num_sms)
    gluon = gluon_reason(num_rows) is None
    bins = 0
    if gluon:
        from .value_histogram import STEPS, plan_value_histogram

        launch = plan_value_histogram(*shape)
        chunks, streams = launch.grid[1], launch.sizes[-2]
        bins = batch * num_heads * chunks * num_rows * (streams * 256 + 1)
        num_parts, block_tokens, splits = num_stages, launch.options["BT"], Splits(1, 1, 0)
        exact = plan_combine(exact, num_stages, subspace_dim, chunks, block_tokens, STEPS)
    else:
        launch, num_parts = plan_value_gather(*shape)
        block_tokens, splits = BLOCK_TOKENS, Splits(*launch.sizes[-3:])
    rows = batch * num_heads * num_rows
    # Numbers of four bytes, but for the query.
    sizes = (rows * capacity, rows * (head_dim + 2), rows * splits.splits * (num_parts * head_dim + 2), bins)
    places = [0]
    for size in (*sizes, rows * head_dim // 2):
        places.append(places[-1] + -(-size // 4))
    _, exact_place, sums_place, bins_place, query_place, end = places
    merge = plan_merge(exact, batch, num_parts, splits, block_tokens)
    if gluon:
        launch = launch._replace(sizes=(*launch.sizes, bins_place))
        exact = exact._replace(sizes=(*exact.sizes, bins_place, sums_place))
    else:
        launch = launch._replace(sizes=(*launch.sizes, sums_place))
    merge = merge._replace(sizes=(*merge.sizes, sums_place, exact_place))
    return DecodePlan(
        keys=None,
        values=launch,
        exact=exact._replace(sizes=(exact_place, *exact.sizes)),
        merge=merge,
        gluon=gluon,
        scores_bytes=16 * exact_place,
        query_bytes=(16 * query_place, 16 * query_place + 2 * rows * head_dim),
        workspace_bytes=16 * end,
    )


@lru_cache(maxsize=4096)
def plan_decode(
    *,
    batch: int,
    num_heads: int,
    num_query_heads: int,
    num_queries: int,
    head_dim: int,
    key_subspaces: int,
    key_tables: tuple[int, ...],
    rotary_dim: int,
    paired: bool,
    value_stages: int,
    value_subspace_dim: int,
    capacity: int,
    ring_length: int,
    sink_length: int,
    paged: bool,
    masked: bool,
    capped: bool,
    device: torch.device,
) -> DecodePlan:
    """Plan decode steps; from shapes and the device only, so one plan holds as long as a cache keeps its capacity.

    Args:
        batch: B.
        num_heads: H.
        num_query_heads: Hq.
        num_queries: Q.
        head_dim: D.
        key_subspaces: M.
        key_tables: Shape of `KeyTables.tables`.
        rotary_dim: As in `KeyTables`.
        paired: As in `KeyTables`.
        value_stages: R'.
        value_subspace_dim: S'.
        capacity: C, the most coded tokens.
        ring_length: W.
        sink_length: Slots of sinks.
        paged: Whether there is a block table.
        masked: Whether there is a mask.
        capped: Whether there is a soft cap.
        device: Device of all tensors.
    """
    num_rows = num_query_heads // num_heads * num_queries
    shape = (batch, num_heads, num_rows, head_dim, key_subspaces, key_tables, rotary_dim)
    plan = _plan_values(
        batch, num_heads, num_query_heads, num_queries, head_dim, value_stages, value_subspace_dim, capacity, device
    )
    num_sms, shared_bytes = _device_size(device)
    keys = None
    if plan.gluon:
        from .key_scores_shared import STAGE_BYTES, plan_key_scores_shared, supports

        if supports(key_tables, paired, num_rows) and shared_bytes >= STAGE_BYTES:
            keys = plan_key_scores_shared(*shape, capacity, paged, num_sms, shared_bytes)
    if keys is None:
        keys = plan_key_scores(*shape, paired, capacity, paged, num_sms)
    seen = {"HAS_MASK": masked, "HAS_CAP": capped}
    return replace(
        plan,
        keys=keys,
        values=plan.values._replace(
            sizes=(*plan.values.sizes, sink_length), options={**plan.values.options, **seen, "PAGED": paged}
        ),
        exact=plan.exact._replace(
            sizes=(batch, ring_length, sink_length, *plan.exact.sizes), options={**plan.exact.options, **seen}
        ),
    )


def decode_workspace_bytes(
    *,
    batch: int,
    num_heads: int,
    num_query_heads: int,
    num_queries: int,
    head_dim: int,
    value_stages: int,
    value_subspace_dim: int,
    capacity: int,
    device: torch.device,
) -> int:
    """Bytes of workspace that decode steps of up to `num_queries` tokens need.

    Args:
        batch: B.
        num_heads: H.
        num_query_heads: Hq.
        num_queries: The most Q.
        head_dim: D.
        value_stages: R'.
        value_subspace_dim: S'.
        capacity: C, the most coded tokens.
        device: The device, with its index.
    """
    return max(
        _plan_values(
            batch, num_heads, num_query_heads, queries, head_dim, value_stages, value_subspace_dim, capacity, device
        ).workspace_bytes
        for queries in range(1, num_queries + 1)
    )


class _Facts(NamedTuple):
    """What is checked of a tensor."""

    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _check(name: str, found: _Facts, dtype: torch.dtype, shape: tuple[int, ...], contiguous: bool = True) -> None:
    if found.shape != shape or found.dtype != dtype:
        raise ValueError(f"{name} must be {dtype} {list(shape)}, got {found.dtype} {list(found.shape)}.")
    if contiguous and not torch.empty_strided(found.shape, found.strides, device="meta").is_contiguous():
        raise ValueError(f"{name} must be contiguous, got {list(found.shape)} with strides {list(found.strides)}.")
    if found.strides[-1] != 1 and shape[-1] != 1:
        raise ValueError(f"The last axis of {name} must be contiguous, got strides {list(found.strides)}.")


@lru_cache(maxsize=4096)
def _prepare(
    query: tuple,
    key: tuple,
    value: tuple,
    key_codes: tuple,
    value_codes: tuple,
    tables: tuple,
    value_centroids: tuple,
    exact_keys: tuple,
    exact_values: tuple,
    counts: tuple,
    workspace: tuple,
    block_table: tuple | None,
    mask: tuple | None,
    misaligned: int,
    rotary_dim: int,
    paired: bool,
    sink_length: int,
    capped: bool,
) -> tuple[DecodePlan, tuple[int, ...]]:
    """Check a call by its tensors' facts, once for all calls that share them.

    Returns:
        The plan, and the strides of new keys and new values.

    Raises:
        ValueError: if the kernels cannot run on this input, with the reason.
    """
    query, key, value, key_codes, value_codes, tables = (
        _Facts(*found) for found in (query, key, value, key_codes, value_codes, tables)
    )
    value_centroids, exact_keys, exact_values, counts, workspace = (
        _Facts(*found) for found in (value_centroids, exact_keys, exact_values, counts, workspace)
    )
    batch, num_query_heads, num_queries, head_dim = query.shape
    num_heads, num_slots = exact_keys.shape[1:3]
    subspace_dim = value_centroids.shape[-1]
    reason = unsupported_decode_reason(
        query.device,
        query.dtype,
        num_heads=num_heads,
        head_dim=head_dim,
        key_subspace_dim=num_heads * head_dim // key_codes.shape[1],
        value_subspace_dim=subspace_dim,
        rotary_dim=rotary_dim,
        num_centroids=value_centroids.shape[-2],
        num_queries=num_queries,
    )
    if reason:
        raise ValueError(f"decode_attention cannot run: {reason}.")
    mask, block_table = (None if found is None else _Facts(*found) for found in (mask, block_table))
    states = (key, value, exact_keys, exact_values)
    for found in (*states, key_codes, value_codes, tables, value_centroids, counts, workspace, mask, block_table):
        if found is not None and found.device != query.device:
            raise ValueError(f"All tensors must be on {query.device}, the query's device; one is on {found.device}.")
    for name, found in (("key", key), ("value", value)):
        _check(name, found, query.dtype, (batch, num_heads, num_queries, head_dim), contiguous=False)
    for name, found in (("exact_keys", exact_keys), ("exact_values", exact_values)):
        _check(name, found, query.dtype, (batch, num_heads, num_slots, head_dim))
    ring_length = num_slots - sink_length
    if ring_length < num_queries:
        raise ValueError(
            f"{num_slots} slots for exact tokens, {sink_length} of them for sinks, leave a ring of {ring_length}, too "
            f"short for {num_queries} new tokens."
        )
    value_subspaces, value_stages = num_heads * head_dim // subspace_dim, value_codes.shape[2]
    _check(
        "value_centroids", value_centroids, query.dtype, (value_subspaces, value_stages, NUM_CENTROIDS, subspace_dim)
    )
    rows, capacity = batch, key_codes.shape[-1]
    if block_table is not None:
        rows, capacity = key_codes.shape[0], PAGE_TOKENS
        _check("block_table", block_table, torch.int32, (batch, block_table.shape[-1]))
    _check("key_codes", key_codes, torch.uint8, (rows, key_codes.shape[1], tables.shape[1], capacity))
    _check("value_codes", value_codes, torch.uint8, (rows, value_subspaces, value_stages, capacity))
    if capacity % PAGE_TOKENS or not capacity or misaligned:
        raise ValueError(
            f"Codes must have room for a multiple of {PAGE_TOKENS} tokens, and codes and workspace begin at multiples "
            f"of 16 bytes; got room for {capacity}{', and one that begins elsewhere' if misaligned else ''}."
        )
    _check("counts", counts, torch.int32, (len(Count), batch))
    if mask is not None:
        if mask.shape not in ((b, h, num_queries) for b in (1, batch) for h in (1, num_query_heads)):
            raise ValueError(
                f"The mask must be [1 or {batch}, 1 or {num_query_heads}, {num_queries}, tokens], got "
                f"{[*mask.shape, 'tokens']}."
            )
        if mask.dtype != torch.bool or mask.strides != (1,):
            raise ValueError(f"The mask must be torch.bool with tokens contiguous, got {mask.dtype}.")
    plan = plan_decode(
        batch=batch,
        num_heads=num_heads,
        num_query_heads=num_query_heads,
        num_queries=num_queries,
        head_dim=head_dim,
        key_subspaces=key_codes.shape[1],
        key_tables=tables.shape,
        rotary_dim=rotary_dim,
        paired=paired,
        value_stages=value_stages,
        value_subspace_dim=subspace_dim,
        capacity=capacity if block_table is None else PAGE_TOKENS * block_table.shape[-1],
        ring_length=ring_length,
        sink_length=sink_length,
        paged=block_table is not None,
        masked=mask is not None,
        capped=capped,
        device=query.device,
    )
    if workspace.dtype != torch.uint8 or len(workspace.shape) != 1 or workspace.shape[0] < plan.workspace_bytes:
        raise ValueError(
            f"The workspace must be torch.uint8 [{plan.workspace_bytes} or more] (decode_workspace_bytes), got "
            f"{workspace.dtype} {list(workspace.shape)}."
        )
    return plan, (*key.strides[:3], *value.strides[:3])


def _decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    tables: torch.Tensor,
    subspaces: torch.Tensor,
    frequencies: torch.Tensor,
    amplitudes: torch.Tensor,
    value_centroids: torch.Tensor,
    exact_keys: torch.Tensor,
    exact_values: torch.Tensor,
    counts: torch.Tensor,
    workspace: torch.Tensor,
    mask: torch.Tensor | None,
    block_table: torch.Tensor | None,
    exponent: int,
    rotary_dim: int,
    paired: bool,
    sink_length: int,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    plan, strides = _prepare(
        *[
            None if part is None else (part.shape, part.stride(), part.dtype, part.device)
            for part in (
                query, key, value, key_codes, value_codes, tables, value_centroids, exact_keys, exact_values, counts,
                workspace, block_table,
            )
        ],
        # All but its length, which may change at every token.
        None if mask is None else (mask.shape[:-1], mask.stride()[-1:], mask.dtype, mask.device),
        (key_codes.storage_offset() | value_codes.storage_offset() | workspace.storage_offset()) % 16,
        rotary_dim,
        paired,
        sink_length,
        softcap is not None,
    )  # fmt: skip
    batch, num_query_heads, num_queries, head_dim = query.shape
    # What is absent is not read.
    block_table = counts if block_table is None else block_table
    if mask is None:
        mask, mask_strides = counts, (0, 0, 0)
    else:
        mask_strides = [
            0 if size == 1 else stride for size, stride in zip(mask.shape[:3], mask.stride(), strict=False)
        ]
        mask = mask.view(torch.uint8)
    softcap = 0.0 if softcap is None else softcap
    keys, values, exact, merge = plan.keys, plan.values, plan.exact, plan.merge
    with torch.cuda.device_of(query):
        out = query.new_empty(batch, num_queries, num_query_heads, head_dim)
        if not query.is_contiguous():
            first, last = plan.query_bytes
            query = workspace[first:last].view(query.dtype).view(query.shape).copy_(query)
        workspace[: plan.scores_bytes].zero_()
        keys.kernel[keys.grid](
            query, key_codes, tables, subspaces, frequencies, amplitudes, block_table, counts, workspace,
            scaling * KEY_SCALE * 2.0**exponent, *keys.sizes, **keys.options,
        )  # fmt: skip
        values.kernel[values.grid](
            value_codes, value_centroids, block_table, counts, mask, workspace, softcap,
            *mask_strides, *values.sizes, **values.options,
        )  # fmt: skip
        exact.kernel[exact.grid](
            query, key, value, exact_keys, exact_values, value_centroids, counts, mask, workspace, scaling, softcap,
            *strides, *mask_strides, *exact.sizes, **exact.options,
        )  # fmt: skip
        merge.kernel[merge.grid](counts, workspace, out, *merge.sizes, **merge.options)
    return out


_decode_attention_op = torch.library.custom_op(
    "transformers_gsrq::decode_attention",
    _decode_attention,
    mutates_args=("exact_keys", "exact_values", "workspace"),
)


@_decode_attention_op.register_fake
def _(query, *args):
    batch, num_query_heads, num_queries, head_dim = query.shape
    return query.new_empty(batch, num_queries, num_query_heads, head_dim)


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_codes: torch.Tensor,
    value_codes: torch.Tensor,
    keys: KeyTables,
    value_centroids: torch.Tensor,
    exact_keys: torch.Tensor,
    exact_values: torch.Tensor,
    counts: torch.Tensor,
    workspace: torch.Tensor,
    *,
    sink_length: int,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    block_table: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of new tokens to sinks, coded tokens, the ring and themselves; the new tokens join the ring.

    Code j of row b is seen if FIRST_CODE <= j < NUM_CODES, sink slot s if s < NUM_SINKS, every token of the ring, and
    a new token by itself and those after it. `counts` are not advanced: a step that is run again does the same again.
    No synchronization, and no shape depends on a count, so a step can be captured in a graph and replayed.

    Error against exact arithmetic: coded keys are summed and rotated in float16 (2^-11), scores kept to 2^-15 of a
    log2, softmax weights to 2^-9 of a chunk's total in the worst case (`value_histogram`).

    Args:
        query: `[B, Hq, Q, D]`, float16 or bfloat16, rotated, Hq = H * G, up to 16 tokens.
        key: `[B, H, Q, D]`, the new keys, rotated; channels contiguous.
        value: `[B, H, Q, D]`, the new values; channels contiguous.
        key_codes: uint8 `[B, M, R, C]`, C a multiple of 64; with `block_table` pages `[P, M, R, 64]`.
        value_codes: uint8 `[B, M', R', C]`, or pages `[P, M', R', 64]`.
        keys: The key codebook, by `prepare_keys`.
        value_centroids: `[M', R', K, S']` in the dtype of `query`.
        exact_keys: `[B, H, sink_length + W, D]`, rotated: slots for sinks, then a ring of W slots, whose oldest token
            is in slot RING_HEAD; new token i is written to slot (RING_HEAD + NUM_EXACT + i) % W. NUM_EXACT + Q must
            not exceed W.
        exact_values: `[B, H, sink_length + W, D]`.
        counts: int32 `[len(Count), B]`, rows as in `Count`.
        workspace: uint8, at least `decode_workspace_bytes`; what it holds before or after means nothing.
        sink_length: Slots for sinks.
        mask: Boolean `[B or 1, 1 or Hq, Q, T]`, True where visible, over tokens: code j is token sink_length + j, sink
            slot s token FIRST_TOKEN + s, then come from NUM_STORED on the ring and the new tokens. It must reach the
            last of them; it decides alone which new tokens see one another. None for causal attention.
        scaling: Factor of the scores.
        softcap: Soft cap of the scaled scores, or None.
        block_table: int32 `[B, C / 64]`: token j of row b is token j % 64 of page block_table[b, j // 64], of keys
            and values alike; or None. Entries behind NUM_CODES are not read.

    Returns:
        `[B, Q, Hq, D]`, contiguous; zeros for a query that sees nothing.

    Raises:
        ValueError: if the kernels cannot run on this input, with the reason.
    """
    # The operator is for torch.compile; going through it in eager mode costs some 50 microseconds a call.
    run = _decode_attention_op if torch.compiler.is_compiling() else _decode_attention
    return run(
        query,
        key,
        value,
        key_codes,
        value_codes,
        keys.tables,
        keys.subspaces,
        keys.frequencies,
        keys.amplitudes,
        value_centroids,
        exact_keys,
        exact_values,
        counts,
        workspace,
        mask,
        block_table,
        keys.exponent,
        keys.rotary_dim,
        keys.paired,
        sink_length,
        scaling,
        softcap,
    )
