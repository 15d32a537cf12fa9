"""Histograms of softmax weights over value codes, by integer atomics in shared memory (Gluon, Triton 3.8 or newer).

The sum over tokens of p_t * C[code_t] is a product of the centroids with the weight that each code collects, so values
are never decoded and the cost does not depend on the width of a subspace.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .key_scores import SCORE_SCALE

# Weights are fixed-point numbers with 2^32 / MAX_CHUNK steps of the largest weight p = 1 in a chunk of tokens, so a
# bin cannot overflow 32 bits even when all tokens share one code. Each token is off by at most half a step, together
# by MAX_CHUNK^2 / 2^33 = 2^-9 of the chunk's total, which is at least 1: one rounding to bfloat16, in the worst case.
MAX_CHUNK = 4096
MIN_CHUNK = 512
NUM_WARPS = 16
MAX_ROWS = 8
# Shared memory that one program's histograms may take; three such programs fit on an SM of compute capability 9.
MAX_SHARED = 96 * 1024


@gluon.jit
def _load_logits(
    place, t, n, mask_place, mask, start, stop, softcap,
    N: gl.constexpr, HAS_MASK: gl.constexpr, HAS_CAP: gl.constexpr, SCALE: gl.constexpr,
):  # fmt: skip
    # Logits times log2(e), [n, t], minus infinity where a query does not see a token.
    visible = (n[:, None] < N) & (t[None, :] >= start) & (t[None, :] < stop)
    # Four tokens at a time, so that loads are wide: rows of scores are padded.
    loaded = (n[:, None] < N) & (t[None, :] // 4 < (stop + 3) // 4)
    if HAS_MASK:
        visible = visible & (gl.load(mask + mask_place[:, None] + t[None, :], mask=visible, other=0) != 0)
    logits = gl.load(place[:, None] + t[None, :], mask=loaded, other=0).to(gl.float32) * (1.0 / SCALE)
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^(2x) + 1)
        logits = softcap * (1.4426950408889634 - 2.8853900817779268 / (gl.exp2(logits * (2.0 / softcap)) + 1.0))
    return gl.where(visible, logits, float("-inf"))


@gluon.jit(do_not_specialize=["num_tokens", "mask_batch", "mask_head", "mask_query"])
def _value_histogram(
    scores,  # int32 [B, H, N, scores_stride]
    codes,  # uint8 [B, M, R, C]
    starts,  # int32 [B]
    mask,
    bins,  # int32, read as unsigned: [B, H, splits, streams, N, 256]
    maxima,  # float32 [B, H, splits, N]
    num_tokens,
    stages,
    num_streams,
    chunk,
    softcap,
    scores_stride,
    stride_batch,
    stride_subspace,
    stride_stage,
    mask_batch,
    mask_head,
    mask_query,
    H: gl.constexpr,
    N: gl.constexpr,
    Q: gl.constexpr,
    D: gl.constexpr,
    S: gl.constexpr,
    ROWS: gl.constexpr,
    STREAMS: gl.constexpr,
    HAS_MASK: gl.constexpr,
    HAS_CAP: gl.constexpr,
    SCALE: gl.constexpr,
    STEPS: gl.constexpr,
    WARPS: gl.constexpr,
):
    BT: gl.constexpr = 128 * WARPS
    TOKENS: gl.constexpr = gl.BlockedLayout([ROWS, 4], [1, 32], [1, WARPS], [1, 0])
    BINS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    row_head = gl.program_id(0).to(gl.int64)
    row = row_head // H
    head = row_head % H
    split = gl.program_id(1)
    first_stream = gl.program_id(2) * STREAMS
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TOKENS))
    offsets = gl.arange(0, BT, layout=gl.SliceLayout(0, TOKENS))
    place = scores + (row_head * N + n) * scores_stride
    mask_place = row * mask_batch + (head * (N // Q) + n // Q) * mask_head + n % Q * mask_query
    first = split * chunk
    stop = gl.minimum(first + chunk, num_tokens)
    start = gl.load(starts + row)

    histogram = gl.allocate_shared_memory(gl.int32, [STREAMS, ROWS, 256], SHARED)
    for i in gl.static_range(STREAMS):
        histogram.index(i).store(gl.zeros([ROWS, 256], gl.int32, BINS))
    top = gl.full([ROWS, BT], float("-inf"), gl.float32, TOKENS)
    for block in range(first, stop, BT):
        logits = _load_logits(
            place, block + offsets, n, mask_place, mask, start, stop, softcap, N, HAS_MASK, HAS_CAP, SCALE
        )
        top = gl.maximum(top, logits)
    largest = gl.max(top, 1)
    # A query that sees nothing in this chunk has weights 0 and maximum minus infinity.
    base = gl.where(largest == float("-inf"), 0.0, largest)
    gl.barrier()
    for block in range(first, stop, BT):
        t = block + offsets
        logits = _load_logits(place, t, n, mask_place, mask, start, stop, softcap, N, HAS_MASK, HAS_CAP, SCALE)
        weight = (gl.exp2(logits - base[:, None]) * STEPS + 0.5).to(gl.int32)
        for i in gl.static_range(STREAMS):
            stream = first_stream + i
            if stream < num_streams:
                if S < D:
                    subspace = head * (D // S) + stream // stages
                    place_codes = codes + row * stride_batch + subspace * stride_subspace
                    place_codes += (stream % stages).to(gl.int64) * stride_stage
                else:
                    place_codes = codes + row * stride_batch + head * D // S * stride_subspace + stream * stride_stage
                # Weights beyond the last token are 0, so any code does there.
                code = gl.load(place_codes + t, mask=t // 4 < (stop + 3) // 4, other=0).to(gl.int32)
                histogram.index(i).atomic_scatter_add(weight, code[None, :], axis=1)
    gl.barrier()
    b = gl.arange(0, 256, layout=gl.SliceLayout(0, BINS))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BINS))
    out = bins + ((row_head * gl.num_programs(1) + split) * num_streams + first_stream) * (N * 256)
    for i in gl.static_range(STREAMS):
        valid = (r[:, None] < N) & (first_stream + i < num_streams)
        gl.store(out + (i * N + r[:, None]) * 256 + b[None, :], histogram.index(i).load(BINS), mask=valid)
    if first_stream == 0:
        gl.store(maxima + (row_head * gl.num_programs(1) + split) * N + n, largest, mask=n < N)


def value_histogram(
    scores: torch.Tensor,
    codes: torch.Tensor,
    num_tokens: int,
    starts: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
    head_dim: int,
    subspace_dim: int,
    num_queries: int,
    num_sms: int,
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Weight that each code collects, for chunks of tokens.

    Args:
        scores: int32 `[B, H, N, >= C]` of `key_scores`, N up to `MAX_ROWS`.
        codes: uint8 `[B, M, R, C rounded up to 4]`, tokens contiguous, rows at multiples of 4 bytes.
        num_tokens: C.
        starts: int32 `[B]`: the first visible token of each row.
        mask: Boolean `[B, 1 or H * G, Q, >= C]` with tokens contiguous, True where visible; or None.
        softcap: Soft cap of the logits, or None.
        head_dim: D.
        subspace_dim: S.
        num_queries: Q.
        num_sms: Multiprocessors of the device.

    Returns:
        Unsigned fixed-point weights int32 `[B, H, chunks, streams, N, 256]`, where the streams are the stages of the
        head's max(1, D/S) subspaces; the maxima (log2 units) float32 `[B, H, chunks, N]` that they are relative to;
        and the steps of a weight of 1.
    """
    batch, num_heads, num_rows, _ = scores.shape
    num_stages = codes.shape[2]
    num_streams = num_stages * max(1, head_dim // subspace_dim)
    rows = 1 << (num_rows - 1).bit_length()
    num_groups = -(-(num_streams * rows * 1024) // (MAX_SHARED))
    streams = -(-(num_streams) // (num_groups))
    wanted = -(-(num_tokens * batch * num_heads * num_groups) // (num_sms))
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, 1 << (wanted - 1).bit_length()))
    warps = min(NUM_WARPS, max(4, chunk // 128))
    chunks = -(-(num_tokens) // (chunk))
    bins = torch.empty(batch, num_heads, chunks, num_streams, num_rows, 256, dtype=torch.int32, device=codes.device)
    maxima = torch.empty(batch, num_heads, chunks, num_rows, dtype=torch.float32, device=codes.device)
    strides = (
        (0, 0, 0) if mask is None else (mask.stride(0), 0 if mask.shape[1] == 1 else mask.stride(1), mask.stride(2))
    )
    steps = (2**32 - 1) // MAX_CHUNK
    _value_histogram[batch * num_heads, chunks, num_groups](
        scores,
        codes,
        starts,
        starts if mask is None else mask,
        bins,
        maxima,
        num_tokens,
        num_stages,
        num_streams,
        chunk,
        0.0 if softcap is None else softcap,
        scores.shape[-1],
        *codes.stride()[:3],
        *strides,
        H=num_heads,
        N=num_rows,
        Q=num_queries,
        D=head_dim,
        S=subspace_dim,
        ROWS=rows,
        STREAMS=streams,
        HAS_MASK=mask is not None,
        HAS_CAP=softcap is not None,
        SCALE=SCORE_SCALE,
        STEPS=steps,
        WARPS=warps,
        num_warps=warps,
    )
    return bins, maxima, float(steps)
