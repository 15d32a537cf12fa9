"""Histograms of softmax weights over value codes, by integer atomics in shared memory (Gluon, Triton 3.8 or newer).

The sum over tokens of p_t * C[code_t] is a product of the centroids with the weight that each code collects, so values
are never decoded and the cost does not depend on the width of a subspace.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import PAGE_TOKENS, Count
from .key_scores import SCORE_SCALE, Launch

# Weights are fixed-point numbers with 2^32 / MAX_CHUNK steps of the largest weight p = 1 in a chunk of tokens, so a
# bin cannot overflow 32 bits even when all tokens share one code. Each token is off by at most half a step, together
# by MAX_CHUNK^2 / 2^33 = 2^-9 of the chunk's total, which is at least 1: one rounding to bfloat16, in the worst case.
MAX_CHUNK = 4096
MIN_CHUNK = 512
NUM_WARPS = 16
MAX_ROWS = 8
# Shared memory that one program's histograms may take; three such programs fit on an SM of compute capability 9.
MAX_SHARED = 96 * 1024
STEPS = (2**32 - 1) // MAX_CHUNK
NUM_CODES = gl.constexpr(int(Count.NUM_CODES))
FIRST_CODE = gl.constexpr(int(Count.FIRST_CODE))


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


@gluon.jit(
    do_not_specialize=[
        "batch", "capacity_blocks", "chunks", "sink_length", "bins_place", "mask_batch", "mask_head", "mask_query",
    ]
)  # fmt: skip
def _value_histogram(
    codes,  # uint8 [B, M, R, C], or pages [P, M, R, 64]
    centroids,  # not read: their product is `_combine_histograms`'s
    block_table,  # int32 [B, C / 64], or anything
    counts,  # int32 [.., B]
    mask,
    workspace,  # begins with scores, int32 [B, H, N, C]
    softcap,
    mask_batch,
    mask_head,
    mask_query,
    batch,
    capacity_blocks,
    stages,
    num_streams,
    chunks,
    bins_place,  # int32, read as unsigned: bins [B, H, chunks, streams, N, 256], then float32 maxima [B, H, chunks, N]
    sink_length,
    H: gl.constexpr,
    N: gl.constexpr,
    Q: gl.constexpr,
    D: gl.constexpr,
    S: gl.constexpr,
    ROWS: gl.constexpr,
    STREAMS: gl.constexpr,
    PAGED: gl.constexpr,
    HAS_MASK: gl.constexpr,
    HAS_CAP: gl.constexpr,
    SCALE: gl.constexpr,
    STEPS: gl.constexpr,
    BT: gl.constexpr,
    WARPS: gl.constexpr,
):
    TOKENS: gl.constexpr = gl.BlockedLayout([ROWS, 4], [1, 32], [1, WARPS], [1, 0])
    BINS: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, WARPS], [1, 0])
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0])
    row_head = gl.program_id(0).to(gl.int64)
    row = row_head // H
    head = row_head % H
    split = gl.program_id(1)
    first_stream = gl.program_id(2) * STREAMS
    # Blocks are shared out to chunks as by `find_blocks`.
    num_codes = gl.load(counts + NUM_CODES * batch + row)
    num_blocks = (num_codes + BT - 1) // BT
    chunk = (num_blocks + chunks - 1) // chunks * BT
    first = split * chunk
    if first >= num_codes:
        return
    stop = gl.minimum(first + chunk, num_codes)
    start = gl.load(counts + FIRST_CODE * batch + row)
    capacity = capacity_blocks * 64
    n = gl.arange(0, ROWS, layout=gl.SliceLayout(1, TOKENS))
    offsets = gl.arange(0, BT, layout=gl.SliceLayout(0, TOKENS))
    place = workspace.to(gl.pointer_type(gl.int32), bitcast=True) + (row_head * N + n) * capacity
    # Code 0 is the token after the slots of sinks.
    mask_place = row * mask_batch + (head * (N // Q) + n // Q) * mask_head + n % Q * mask_query + sink_length
    stage_stride = 64 if PAGED else capacity
    page_stride = H * D // S * stages * stage_stride

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
        present = t // 4 < (stop + 3) // 4
        if PAGED:
            page = gl.load(block_table + row * capacity_blocks + t // 64, mask=t < stop, other=0).to(gl.int64)
            # Four tokens are neighbours, so that loads are as wide as without pages.
            token = gl.max_contiguous(gl.multiple_of(page * page_stride + t % 64, 4), 4)
        else:
            token = row * page_stride + t
        for i in gl.static_range(STREAMS):
            stream = first_stream + i
            if stream < num_streams:
                stage = (head * D // S * stages + stream) * stage_stride
                # Weights beyond the last token are 0, so any code does there.
                code = gl.load(codes + stage + token, mask=present, other=0).to(gl.int32)
                histogram.index(i).atomic_scatter_add(weight, code[None, :], axis=1)
    gl.barrier()
    b = gl.arange(0, 256, layout=gl.SliceLayout(0, BINS))
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, BINS))
    bins = (workspace + bins_place.to(gl.int64) * 16).to(gl.pointer_type(gl.int32), bitcast=True)
    out = bins + ((row_head * chunks + split) * num_streams + first_stream) * (N * 256)
    for i in gl.static_range(STREAMS):
        valid = (r[:, None] < N) & (first_stream + i < num_streams)
        gl.store(out + (i * N + r[:, None]) * 256 + b[None, :], histogram.index(i).load(BINS), mask=valid)
    if first_stream == 0:
        maxima = bins.to(gl.pointer_type(gl.float32), bitcast=True)
        maxima += batch.to(gl.int64) * H * chunks * num_streams * (N * 256)
        gl.store(maxima + (row_head * chunks + split) * N + n, largest, mask=n < N)


def plan_value_histogram(
    batch: int,
    num_heads: int,
    num_rows: int,
    num_queries: int,
    head_dim: int,
    num_stages: int,
    subspace_dim: int,
    capacity: int,
    num_sms: int,
) -> Launch:
    """How to launch the weight that each code collects, for chunks of tokens.

    The kernel leaves unsigned fixed-point weights int32 `[B, H, chunks, streams, N, 256]`, where the streams are the
    stages of the head's max(1, D/S) subspaces and a weight of 1 has `STEPS` steps, and behind them the maxima (log2
    units) float32 `[B, H, chunks, N]` that they are relative to; only of chunks that have tokens.

    Args:
        batch: B.
        num_heads: H.
        num_rows: N, up to `MAX_ROWS`.
        num_queries: Q.
        head_dim: D.
        num_stages: R.
        subspace_dim: S.
        capacity: C, the most coded tokens.
        num_sms: Multiprocessors of the device.
    """
    num_streams = num_stages * max(1, head_dim // subspace_dim)
    rows = 1 << (num_rows - 1).bit_length()
    num_groups = -(-(num_streams * rows * 1024) // MAX_SHARED)
    streams = -(-num_streams // num_groups)
    # What a chunk has at capacity; shorter texts have smaller ones, of whole blocks.
    wanted = -(-(capacity * batch * num_heads * num_groups) // num_sms)
    chunk = min(MAX_CHUNK, max(MIN_CHUNK, 1 << (wanted - 1).bit_length()))
    warps = min(NUM_WARPS, max(4, chunk // 128))
    chunks = -(-capacity // chunk)
    return Launch(
        _value_histogram,
        (batch * num_heads, chunks, num_groups),
        (batch, capacity // PAGE_TOKENS, num_stages, num_streams, chunks),
        {
            "H": num_heads,
            "N": num_rows,
            "Q": num_queries,
            "D": head_dim,
            "S": subspace_dim,
            "ROWS": rows,
            "STREAMS": streams,
            "SCALE": SCORE_SCALE,
            "STEPS": STEPS,
            "BT": 128 * warps,
            "WARPS": warps,
            "num_warps": warps,
        },
    )
