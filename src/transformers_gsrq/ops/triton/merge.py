"""The end of decode attention: exact tokens, products of histograms with centroids, and the merge of all parts."""

from __future__ import annotations

import triton
import triton.language as tl

from . import MAX_QUERIES, Count
from .key_scores import Launch, Splits, find_blocks
from .value_gather import part

EXACT_BLOCK = 64
# Keys of a block, in numbers; those of two blocks and their values are in flight, within 99 KiB of shared memory.
EXACT_TILE = 64 * 128
PARTS_BLOCK = 32
# Tensor cores want tiles of 16.
NEW_TILE = tl.constexpr(MAX_QUERIES)
NUM_CODES = tl.constexpr(int(Count.NUM_CODES))
NUM_SINKS = tl.constexpr(int(Count.NUM_SINKS))
FIRST_TOKEN = tl.constexpr(int(Count.FIRST_TOKEN))
NUM_STORED = tl.constexpr(int(Count.NUM_STORED))
RING_HEAD = tl.constexpr(int(Count.RING_HEAD))
NUM_EXACT = tl.constexpr(int(Count.NUM_EXACT))
EXACT_SIZES = ["mask_batch", "mask_head", "mask_query", "batch", "ring_length", "sink_length", "exact_place"]


@triton.jit
def _attend_tile(q, k, v, visible, top, weight, acc, scaling, softcap, HAS_CAP: tl.constexpr):
    # One step of the softmax over tiles of keys and values.
    logits = tl.dot(q, tl.trans(k)) * (scaling * 1.4426950408889634)
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^(2x) + 1)
        logits = softcap * (1.4426950408889634 - 2.8853900817779268 / (tl.exp2(logits * (2.0 / softcap)) + 1.0))
    logits = tl.where(visible, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(logits - base[:, None])
    shrink = tl.exp2(top - base)
    return new_top, weight * shrink + tl.sum(p, 1), tl.dot(p.to(v.dtype), v, acc * shrink[:, None])


@triton.jit
def _attend_exact(
    query, key, value, exact_keys, exact_values, counts, mask, workspace, row_head, first_row, scaling, softcap,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    mask_batch, mask_head, mask_query, batch, ring_length, sink_length, exact_place,
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    # Attention of one head to its sinks, its ring and the new tokens, which join the ring: sums, maxima (log2 units)
    # and weights like those of coded tokens.
    row = row_head // H
    head = row_head % H
    n = first_row + tl.arange(0, BN)
    d = tl.arange(0, BD)
    q = tl.load(
        query + (row_head * N + n[:, None]) * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0
    )
    counts += row
    num_sinks = tl.load(counts + NUM_SINKS * batch)
    first_token = tl.load(counts + FIRST_TOKEN * batch)
    num_stored = tl.load(counts + NUM_STORED * batch)
    ring_head = tl.load(counts + RING_HEAD * batch)
    num_exact = tl.load(counts + NUM_EXACT * batch)
    seen = mask + row * mask_batch + (head * (N // Q) + n // Q) * mask_head + n % Q * mask_query
    slots = sink_length + ring_length
    keys = exact_keys + row_head * slots * D
    values = exact_values + row_head * slots * D
    top = tl.full([BN], float("-inf"), tl.float32)
    weight = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, BD], tl.float32)
    # In the order of slots, which does not matter to a softmax.
    for block in range(0, sink_length + tl.minimum(ring_length, ring_head + num_exact), BE):
        e = block + tl.arange(0, BE)
        is_sink = e < sink_length
        # How many tokens are older than that of a ring slot.
        age = e - sink_length - ring_head
        age = tl.where(age < 0, age + ring_length, age)
        filled = tl.where(is_sink, e < num_sinks, (age < num_exact) & (e < slots))
        # What lies in empty slots may be NaN, and 0 * NaN is NaN.
        here = filled[:, None] & (d[None, :] < D)
        k = tl.load(keys + e[:, None] * D + d[None, :], mask=here, other=0.0)
        v = tl.load(values + e[:, None] * D + d[None, :], mask=here, other=0.0)
        visible = (n[:, None] < N) & filled[None, :]
        if HAS_MASK:
            token = tl.where(is_sink, first_token + e, num_stored + age)
            visible = visible & (tl.load(seen[:, None] + token[None, :], mask=visible, other=0) != 0)
        top, weight, acc = _attend_tile(q, k, v, visible, top, weight, acc, scaling, softcap, HAS_CAP)
    i = tl.arange(0, NEW_TILE)
    here = (i[:, None] < Q) & (d[None, :] < D)
    key += row * key_batch + head * key_head
    value += row * value_batch + head * value_head
    k = tl.load(key + i[:, None] * key_token + d[None, :], mask=here, other=0.0)
    v = tl.load(value + i[:, None] * value_token + d[None, :], mask=here, other=0.0)
    slot = sink_length + (ring_head + num_exact + i) % ring_length
    # All programs of a head store the same.
    tl.store(keys + slot[:, None] * D + d[None, :], k, mask=here)
    tl.store(values + slot[:, None] * D + d[None, :], v, mask=here)
    visible = (n[:, None] < N) & (i[None, :] < Q)
    if HAS_MASK:
        token = num_stored + num_exact + i
        visible = visible & (tl.load(seen[:, None] + token[None, :], mask=visible, other=0) != 0)
    else:
        visible = visible & (i[None, :] <= n[:, None] % Q)
    top, weight, acc = _attend_tile(q, k, v, visible, top, weight, acc, scaling, softcap, HAS_CAP)
    sums = part(workspace, exact_place)
    maxima = sums + batch.to(tl.int64) * (H * N * D)
    weights = maxima + batch.to(tl.int64) * (H * N)
    stats = row_head * N + n
    tl.store(sums + stats[:, None] * D + d[None, :], acc, mask=(n[:, None] < N) & (d[None, :] < D))
    tl.store(maxima + stats, top, mask=n < N)
    tl.store(weights + stats, weight, mask=n < N)


@triton.jit(do_not_specialize=EXACT_SIZES)
def _exact_attention(
    query, key, value, exact_keys, exact_values,
    centroids,  # not read: this is launched like `_combine_histograms`
    counts, mask, workspace, scaling, softcap,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    mask_batch, mask_head, mask_query, batch, ring_length, sink_length, exact_place,
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    _attend_exact(
        query, key, value, exact_keys, exact_values, counts, mask, workspace,
        tl.program_id(0).to(tl.int64), tl.program_id(1) * BN, scaling, softcap,
        key_batch, key_head, key_token, value_batch, value_head, value_token,
        mask_batch, mask_head, mask_query, batch, ring_length, sink_length, exact_place,
        H, N, Q, D, HAS_MASK, HAS_CAP, BN, BD, BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=[*EXACT_SIZES, "chunks", "bins_place", "sums_place"])
def _combine_histograms(
    query, key, value, exact_keys, exact_values,
    centroids,  # [M, R, 256, S]
    counts, mask, workspace, scaling, softcap,
    key_batch, key_head, key_token, value_batch, value_head, value_token,
    mask_batch, mask_head, mask_query, batch, ring_length, sink_length, exact_place,
    chunks,
    stages,
    num_streams,
    bins_place,  # as `value_histogram` leaves them
    sums_place,  # float32 [B, H, 1, R, N, D], then maxima and weights [B, H, 1, N]
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    NP: tl.constexpr, BC: tl.constexpr, BT: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    if stream == num_streams:
        # The exact tokens need no launch of their own.
        _attend_exact(
            query, key, value, exact_keys, exact_values, counts, mask, workspace, row_head, 0, scaling, softcap,
            key_batch, key_head, key_token, value_batch, value_head, value_token,
            mask_batch, mask_head, mask_query, batch, ring_length, sink_length, exact_place,
            H, N, Q, D, HAS_MASK, HAS_CAP, BN, BD, BE,
        )  # fmt: skip
    else:
        n = tl.arange(0, NP)
        b = tl.arange(0, 256)
        c = tl.arange(0, BC)
        # Chunks as `value_histogram` makes them; the others were not written.
        num_codes = tl.load(counts + NUM_CODES * batch + row_head // H)
        _, _, share = find_blocks(num_codes, 0, chunks, chunks, 0, BT)
        num_chunks = (num_codes + share * BT - 1) // tl.maximum(share * BT, 1)
        bins = (workspace + bins_place.to(tl.int64) * 16).to(tl.pointer_type(tl.uint32), bitcast=True)
        stats = part(workspace, bins_place) + batch.to(tl.int64) * H * chunks * num_streams * (N * 256)
        stats += row_head * chunks * N
        # All chunks at once where registers allow: every step of a loop would wait for memory again.
        top = tl.full([NP], float("-inf"), tl.float32)
        for first in range(0, num_chunks, BC):
            here = (first + c[:, None] < num_chunks) & (n[None, :] < N)
            tops = tl.load(stats + (first + c[:, None]) * N + n[None, :], mask=here, other=float("-inf"))
            top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([NP, 256], tl.float32)
        place = bins + (row_head * chunks * num_streams + stream) * (N * 256)
        for first in range(0, num_chunks, BC):
            here = (first + c[:, None] < num_chunks) & (n[None, :] < N)
            tops = tl.load(stats + (first + c[:, None]) * N + n[None, :], mask=here, other=float("-inf"))
            shrink = tl.exp2(tops - base[None, :]) / STEPS
            chunk = (first + c).to(tl.int64)[:, None] * num_streams * (N * 256) + n[None, :] * 256
            counted = tl.load(place + chunk[:, :, None] + b[None, None, :], mask=here[:, :, None], other=0)
            total += tl.sum(counted.to(tl.float32) * shrink[:, :, None], 0)
        weight = tl.sum(total, 1)
        # Weights up to 2^14 in two numbers of the centroids' dtype, so that the product is as good as float32.
        unit = tl.where(weight > 0, weight / 16384.0, 1.0)
        total = total / unit[:, None]
        high = total.to(centroids.dtype.element_ty)
        low = (total - high.to(tl.float32)).to(centroids.dtype.element_ty)
        head = row_head % H
        slice_ = stream // stages
        stage = stream % stages
        table = centroids + ((head * D // S + slice_) * stages + stage) * (256 * S) + head * D % S
        sums = part(workspace, sums_place)
        maxima = sums + batch.to(tl.int64) * H * stages * (N * D)
        weights = maxima + batch.to(tl.int64) * (H * N)
        out = sums + ((row_head * stages + stage) * N + n[:, None]) * D + slice_ * WIDTH
        for column in range(0, WIDTH, BW):
            w = column + tl.arange(0, BW)
            valid = w[None, :] < WIDTH
            centroid = tl.load(table + b[:, None] * S + w[None, :], mask=valid, other=0.0)
            product = tl.dot(low, centroid, tl.dot(high, centroid)) * unit[:, None]
            tl.store(out + w[None, :], product, mask=(n[:, None] < N) & valid)
        if stream == 0:
            tl.store(maxima + row_head * N + n, top, mask=n < N)
            tl.store(weights + row_head * N + n, weight, mask=n < N)


@triton.jit(do_not_specialize=["batch", "splits", "few_splits", "few_blocks", "sums_place", "exact_place"])
def _merge(
    counts,
    workspace,
    out,  # [B, Q, H, G, D]
    batch,
    num_parts,
    splits,
    few_splits,
    few_blocks,
    sums_place,  # float32 [B, H, splits, parts, N, D], then maxima and weights [B, H, splits, N]
    exact_place,  # float32 [B, H, N, D], then maxima and weights [B, H, N]
    H: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    BT: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    row = row_head // H
    n = tl.program_id(1)
    d = tl.arange(0, BD)
    s = tl.arange(0, BS)
    # Splits without tokens were not written.
    num_codes = tl.load(counts + NUM_CODES * batch + row)
    _, _, share = find_blocks(num_codes, 0, splits, few_splits, few_blocks, BT)
    num_splits = (num_codes + share * BT - 1) // tl.maximum(share * BT, 1)
    heads = batch.to(tl.int64) * H
    code_sums = part(workspace, sums_place) + row_head * splits * num_parts * (N * D)
    code_maxima = part(workspace, sums_place) + heads * splits * num_parts * (N * D)
    code_weights = code_maxima + heads * splits * N
    stats = row_head * splits * N + n
    code_top = tl.load(code_maxima + stats + s * N, mask=s < num_splits, other=float("-inf"))
    code_weight = tl.load(code_weights + stats + s * N, mask=s < num_splits, other=0.0)
    exact_sums = part(workspace, exact_place)
    exact_maxima = exact_sums + heads * (N * D)
    exact_weights = exact_maxima + heads * N
    exact_top = tl.load(exact_maxima + row_head * N + n)
    top = tl.maximum(tl.max(code_top, 0), exact_top)
    top = tl.where(top == float("-inf"), 0.0, top)
    exact_scale = tl.exp2(exact_top - top)
    weight = tl.sum(tl.exp2(code_top - top) * code_weight, 0) + exact_scale * tl.load(exact_weights + row_head * N + n)
    acc = exact_scale * tl.load(exact_sums + (row_head * N + n) * D + d, mask=d < D, other=0.0)
    for first in range(0, num_splits * num_parts, BP):
        p = first + tl.arange(0, BP)
        here = p < num_splits * num_parts
        scale = tl.exp2(tl.load(code_maxima + stats + p // num_parts * N, mask=here, other=float("-inf")) - top)
        place = code_sums + (p[:, None] * N + n) * D + d[None, :]
        sums = tl.load(place, mask=here[:, None] & (d[None, :] < D), other=0.0)
        acc += tl.sum(sums * scale[:, None], 0)
    # A query that sees nothing at all gets zeros; one that is NaN must not look like it.
    acc = tl.where(weight == 0, 0.0, acc / weight)
    place = ((row * Q + n % Q) * H + row_head % H) * (N // Q) + n // Q
    tl.store(out + place * D + d, acc, mask=d < D)


def plan_exact(batch: int, num_heads: int, num_rows: int, num_queries: int, head_dim: int) -> Launch:
    """How to launch attention to the exact tokens alone.

    Args:
        batch: B.
        num_heads: H.
        num_rows: N = G * Q.
        num_queries: Q.
        head_dim: D.
    """
    block_rows = min(32, max(16, 1 << (num_rows - 1).bit_length()))
    block_dim = 1 << (head_dim - 1).bit_length()
    options = {
        "H": num_heads,
        "N": num_rows,
        "Q": num_queries,
        "D": head_dim,
        "BN": block_rows,
        "BD": block_dim,
        "BE": min(EXACT_BLOCK, EXACT_TILE // block_dim),
    }
    return Launch(_exact_attention, (batch * num_heads, -(-num_rows // block_rows)), (), options)


def plan_combine(
    exact: Launch, num_stages: int, subspace_dim: int, chunks: int, block_tokens: int, steps: int
) -> Launch:
    """How to launch the products of histograms with centroids, with attention to the exact tokens beside them.

    Args:
        exact: The plan of the exact tokens.
        num_stages: R.
        subspace_dim: S.
        chunks: Most chunks of histograms.
        block_tokens: What sizes of chunks are multiples of.
        steps: Steps of a weight of 1.
    """
    head_dim, num_rows = exact.options["D"], exact.options["N"]
    num_streams = num_stages * max(1, head_dim // subspace_dim)
    rows = 1 << (num_rows - 1).bit_length()
    width = min(subspace_dim, head_dim)
    options = {
        **exact.options,
        "S": subspace_dim,
        "WIDTH": width,
        "BW": max(16, min(64, 1 << (width - 1).bit_length())),
        "NP": rows,
        "BC": 32 // rows,
        "BT": block_tokens,
        "STEPS": float(steps),
        "num_warps": 8,
    }
    return Launch(_combine_histograms, (exact.grid[0], num_streams + 1), (chunks, num_stages, num_streams), options)


def plan_merge(exact: Launch, batch: int, num_parts: int, splits: Splits, block_tokens: int) -> Launch:
    """How to launch the merge of coded and exact tokens.

    Args:
        exact: The plan of the exact tokens.
        batch: B.
        num_parts: Sums of each split.
        splits: Into how many programs the tokens were split.
        block_tokens: Tokens of a block of those.
    """
    options = {name: exact.options[name] for name in ("H", "N", "Q", "D", "BD")}
    options |= {"BS": 1 << (splits.splits - 1).bit_length(), "BP": PARTS_BLOCK, "BT": block_tokens}
    return Launch(_merge, (exact.grid[0], exact.options["N"]), (batch, num_parts, *splits), options)
