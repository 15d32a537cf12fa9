"""The end of decode attention: exact tokens, products of histograms with centroids, and the merge of all parts."""

from __future__ import annotations

import triton
import triton.language as tl

EXACT_BLOCK = 64
# Keys of a block, in numbers; those of two blocks and their values are in flight, within 99 KiB of shared memory.
EXACT_TILE = 64 * 128
PARTS_BLOCK = 32


@triton.jit
def _attend_exact(
    query, exact_keys, exact_values, sink_counts, mask, sums, maxima, weights,
    row_head, first_row, num_codes, num_exact, sink_length, scaling, softcap,
    key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head, mask_query,
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    # Attention of one head to its sinks and window: sums, maxima (log2 units) and weights like those of coded tokens.
    row = row_head // H
    head = row_head % H
    n = first_row + tl.arange(0, BN)
    d = tl.arange(0, BD)
    q = tl.load(
        query + (row_head * N + n[:, None]) * D + d[None, :], mask=(n[:, None] < N) & (d[None, :] < D), other=0.0
    )
    keys = exact_keys + row * key_batch + head * key_head
    values = exact_values + row * value_batch + head * value_head
    sinks = tl.load(sink_counts + row)
    top = tl.full([BN], float("-inf"), tl.float32)
    weight = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, BD], tl.float32)
    for block in range(0, num_exact, BE):
        e = block + tl.arange(0, BE)
        here = (e[:, None] < num_exact) & (d[None, :] < D)
        k = tl.load(keys + e[:, None] * key_token + d[None, :], mask=here, other=0.0)
        v = tl.load(values + e[:, None] * value_token + d[None, :], mask=here, other=0.0)
        logits = tl.dot(q, tl.trans(k)) * (scaling * 1.4426950408889634)
        if HAS_CAP:
            # tanh(x) = 1 - 2 / (e^(2x) + 1)
            logits = softcap * (1.4426950408889634 - 2.8853900817779268 / (tl.exp2(logits * (2.0 / softcap)) + 1.0))
        visible = (n[:, None] < N) & (e[None, :] < num_exact) & ((e >= sink_length) | (e < sinks))[None, :]
        if HAS_MASK:
            place = row * mask_batch + (head * (N // Q) + n // Q) * mask_head + n % Q * mask_query + num_codes
            visible = visible & (tl.load(mask + place[:, None] + e[None, :], mask=visible, other=0) != 0)
        else:
            visible = visible & (e[None, :] <= num_exact - Q + n[:, None] % Q)
        logits = tl.where(visible, logits, float("-inf"))
        new_top = tl.maximum(top, tl.max(logits, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        weight = weight * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    stats = row_head * N + n
    tl.store(sums + stats[:, None] * D + d[None, :], acc, mask=(n[:, None] < N) & (d[None, :] < D))
    tl.store(maxima + stats, top, mask=n < N)
    tl.store(weights + stats, weight, mask=n < N)


@triton.jit(do_not_specialize=["num_codes", "num_exact", "mask_batch", "mask_head", "mask_query"])
def _exact_attention(
    query, exact_keys, exact_values, sink_counts, mask, sums, maxima, weights,
    num_codes, num_exact, sink_length, scaling, softcap,
    key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head, mask_query,
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    _attend_exact(
        query, exact_keys, exact_values, sink_counts, mask, sums, maxima, weights,
        tl.program_id(0).to(tl.int64), tl.program_id(1) * BN, num_codes, num_exact, sink_length, scaling, softcap,
        key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head, mask_query,
        H, N, Q, D, HAS_MASK, HAS_CAP, BN, BD, BE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_chunks", "num_codes", "num_exact", "mask_batch", "mask_head", "mask_query"])
def _combine_histograms(
    bins,  # int32, read as unsigned: [B, H, chunks, streams, N, 256]
    chunk_maxima,  # float32 [B, H, chunks, N]
    centroids,  # [M, R, 256, S]
    code_sums,  # float32 [B, H, 1, R, N, D]
    code_maxima,  # float32 [B, H, 1, N]
    code_weights,
    num_chunks,
    stages,
    num_streams,
    steps,
    query, exact_keys, exact_values, sink_counts, mask, sums, maxima, weights,
    num_codes, num_exact, sink_length, scaling, softcap,
    key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head, mask_query,
    H: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, D: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, S: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    NP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    row_head = tl.program_id(0).to(tl.int64)
    stream = tl.program_id(1)
    if stream == num_streams:
        # The exact tokens need no launch of their own.
        _attend_exact(
            query, exact_keys, exact_values, sink_counts, mask, sums, maxima, weights,
            row_head, 0, num_codes, num_exact, sink_length, scaling, softcap,
            key_batch, key_head, key_token, value_batch, value_head, value_token, mask_batch, mask_head, mask_query,
            H, N, Q, D, HAS_MASK, HAS_CAP, BN, BD, BE,
        )  # fmt: skip
    else:
        n = tl.arange(0, NP)
        b = tl.arange(0, 256)
        c = tl.arange(0, BC)
        stats = chunk_maxima + row_head * num_chunks * N
        # All chunks at once where registers allow: every step of a loop would wait for memory again.
        top = tl.full([NP], float("-inf"), tl.float32)
        for first in range(0, num_chunks, BC):
            here = (first + c[:, None] < num_chunks) & (n[None, :] < N)
            tops = tl.load(stats + (first + c[:, None]) * N + n[None, :], mask=here, other=float("-inf"))
            top = tl.maximum(top, tl.max(tops, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        total = tl.zeros([NP, 256], tl.float32)
        place = bins + (row_head * num_chunks * num_streams + stream) * (N * 256)
        for first in range(0, num_chunks, BC):
            here = (first + c[:, None] < num_chunks) & (n[None, :] < N)
            tops = tl.load(stats + (first + c[:, None]) * N + n[None, :], mask=here, other=float("-inf"))
            shrink = tl.exp2(tops - base[None, :]) / steps
            chunk = (first + c).to(tl.int64)[:, None] * num_streams * (N * 256) + n[None, :] * 256
            counts = tl.load(place + chunk[:, :, None] + b[None, None, :], mask=here[:, :, None], other=0)
            total += tl.sum(counts.to(tl.uint32, bitcast=True).to(tl.float32) * shrink[:, :, None], 0)
        weight = tl.sum(total, 1)
        # Weights up to 2^14 in two numbers of the centroids' dtype, so that the product is as good as float32.
        unit = tl.where(weight > 0, weight / 16384.0, 1.0)
        total = total / unit[:, None]
        high = total.to(centroids.dtype.element_ty)
        low = (total - high.to(tl.float32)).to(centroids.dtype.element_ty)
        head = row_head % H
        part = stream // stages
        stage = stream % stages
        table = centroids + ((head * D // S + part) * stages + stage) * (256 * S) + head * D % S
        out = code_sums + ((row_head * stages + stage) * N + n[:, None]) * D + part * WIDTH
        for column in range(0, WIDTH, BW):
            w = column + tl.arange(0, BW)
            valid = w[None, :] < WIDTH
            centroid = tl.load(table + b[:, None] * S + w[None, :], mask=valid, other=0.0)
            product = tl.dot(low, centroid, tl.dot(high, centroid)) * unit[:, None]
            tl.store(out + w[None, :], product, mask=(n[:, None] < N) & valid)
        if stream == 0:
            tl.store(code_maxima + row_head * N + n, top, mask=n < N)
            tl.store(code_weights + row_head * N + n, weight, mask=n < N)


@triton.jit(do_not_specialize_on_alignment=["num_splits"])
def _merge(
    code_sums,  # float32 [B, H, splits, parts, N, D]
    code_maxima,  # float32 [B, H, splits, N]
    code_weights,
    exact_sums,  # float32 [B, H, N, D]
    exact_maxima,
    exact_weights,
    out,  # [B, H, N, D]
    num_splits,
    num_parts,
    N: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
):
    row_head = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1)
    d = tl.arange(0, BD)
    s = tl.arange(0, BS)
    stats = row_head * num_splits * N + n
    code_top = tl.load(code_maxima + stats + s * N, mask=s < num_splits, other=float("-inf"))
    code_weight = tl.load(code_weights + stats + s * N, mask=s < num_splits, other=0.0)
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
        place = ((row_head * num_splits * num_parts + p[:, None]) * N + n) * D + d[None, :]
        part = tl.load(code_sums + place, mask=here[:, None] & (d[None, :] < D), other=0.0)
        acc += tl.sum(part * scale[:, None], 0)
    # A query that sees nothing at all gets zeros; one that is NaN must not look like it.
    acc = tl.where(weight == 0, 0.0, acc / weight)
    tl.store(out + (row_head * N + n) * D + d, acc, mask=d < D)
