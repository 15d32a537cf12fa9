"""Softmax-weighted sums of coded values by gathering centroid rows: any Triton, any number of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from . import PAGE_TOKENS, Count
from .key_scores import SCORE_SCALE, Launch, choose_splits, find_blocks, find_codes, gather_rows, load_words

BLOCK_TOKENS = PAGE_TOKENS
NUM_WARPS = 4
PROGRAMS_PER_SM = 4
# Stages that a program sums: with rows of 64 channels, 128 KiB of codebook in L1 for two programs of one unit.
MAX_GROUP = 4
NUM_CODES = tl.constexpr(int(Count.NUM_CODES))
FIRST_CODE = tl.constexpr(int(Count.FIRST_CODE))


@triton.jit
def part(workspace, place):
    """Float32 numbers of the workspace from `place` on, counted in 16 bytes."""
    return (workspace + place.to(tl.int64) * 16).to(tl.pointer_type(tl.float32), bitcast=True)


@triton.jit
def _load_logits(
    scores, t, n, row, head, first_code, num_codes, mask, mask_batch, mask_head, mask_query,
    softcap, N: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    # Logits times log2(e), [n, t], minus infinity where a query does not see a token.
    visible = (n[:, None] < N) & (t[None, :] >= first_code) & (t[None, :] < num_codes)
    if HAS_MASK:
        place = row * mask_batch + (head * G + n // Q) * mask_head + n % Q * mask_query
        visible = visible & (tl.load(mask + place[:, None] + t[None, :], mask=visible, other=0) != 0)
    logits = tl.load(scores + t[None, :], mask=visible, other=0).to(tl.float32) * (1.0 / SCALE)
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^(2x) + 1)
        logits = softcap * (1.4426950408889634 - 2.8853900817779268 / (tl.exp2(logits * (2.0 / softcap)) + 1.0))
    return tl.where(visible, logits, float("-inf"))


@triton.jit(
    do_not_specialize=[
        "batch", "capacity_blocks", "splits", "few_splits", "few_blocks", "sums_place", "sink_length",
        "mask_batch", "mask_head", "mask_query",
    ],
    do_not_specialize_on_alignment=["num_groups"],
)  # fmt: skip
def _value_gather(
    codes,  # uint8 [B, M, R, C], or pages [P, M, R, 64]
    centroids,  # [M, R, 256, S]
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
    num_groups,
    splits,
    few_splits,
    few_blocks,
    sums_place,  # float32 sums [B, H, splits, groups, N, D], then maxima and weights [B, H, splits, N]
    sink_length,
    H: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    group = unit % num_groups
    channel = unit // num_groups % (D // W) * W
    row_head = unit // (num_groups * (D // W))
    row = row_head // H
    head = row_head % H
    split = tl.program_id(1)
    num_codes = tl.load(counts + NUM_CODES * batch + row)
    first, last, _ = find_blocks(num_codes, split, splits, few_splits, few_blocks, BT)
    if first >= last:
        return
    capacity = capacity_blocks * 64
    subspace = (head * D + channel) // S
    column = (head * D + channel) % S
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    first_code = tl.load(counts + FIRST_CODE * batch + row)
    scores = workspace.to(tl.pointer_type(tl.int32), bitcast=True) + (row_head * N + n[:, None]) * capacity
    # Code 0 is the token after the slots of sinks.
    mask += sink_length
    stage_stride = 16 if PAGED else capacity // 4
    page_stride = H * D // S * stages * stage_stride
    codes = codes.to(tl.pointer_type(tl.int32), bitcast=True) + subspace * stages * stage_stride
    stage = group * GROUP
    columns = tl.multiple_of(column, W) + tl.arange(0, W)
    table = centroids + (subspace * stages + stage) * (256 * S)
    slots = tl.arange(0, BT)
    offsets = slots % (BT // 4) * 4 + slots // (BT // 4)
    place = find_codes(codes, block_table, row, first, last, page_stride, stage_stride, capacity, PAGED)
    next_words = load_words(place, stage, stages, stage_stride, first, num_codes, GROUP, EVEN)
    top = tl.full([BN], float("-inf"), tl.float32)
    weight = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, W], tl.float32)
    for block in range(first, last):
        words = next_words
        place = find_codes(codes, block_table, row, block + 1, last, page_stride, stage_stride, capacity, PAGED)
        next_words = load_words(place, stage, stages, stage_stride, block + 1, num_codes, GROUP, EVEN)
        t = block * BT + offsets
        logits = _load_logits(
            scores, t, n, row, head, first_code, num_codes, mask, mask_batch, mask_head, mask_query,
            softcap, N, Q, N // Q, HAS_MASK, HAS_CAP, SCALE,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(logits, 1))
        # A block in which a query sees nothing leaves everything as it is.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(logits - base[:, None])
        shrink = tl.exp2(top - base)
        value = gather_rows(table, words, columns, stages - stage, S, GROUP, EVEN, BT, tl.float32)
        weight = weight * shrink + tl.sum(p, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(p.to(centroids.dtype.element_ty), value.to(centroids.dtype.element_ty), acc)
        top = new_top
    num_splits = tl.num_programs(1)
    sums = part(workspace, sums_place)
    maxima = sums + batch.to(tl.int64) * H * num_splits * num_groups * (N * D)
    weights = maxima + batch.to(tl.int64) * H * num_splits * N
    row_split = row_head * num_splits + split
    w = tl.arange(0, W)
    place = sums + ((row_split * num_groups + group) * N + n[:, None]) * D + channel + w[None, :]
    tl.store(place, acc, mask=n[:, None] < N)
    # All programs of a split compute the same statistics; one of them stores.
    if (group == 0) & (channel == 0):
        tl.store(maxima + row_split * N + n, top, mask=n < N)
        tl.store(weights + row_split * N + n, weight, mask=n < N)


def plan_value_gather(
    batch: int,
    num_heads: int,
    num_rows: int,
    num_queries: int,
    head_dim: int,
    num_stages: int,
    subspace_dim: int,
    capacity: int,
    num_sms: int,
) -> tuple[Launch, int]:
    """How to launch the weighted sums of coded values, split over tokens and stages, and the parts a split is made of.

    The kernel leaves sums float32 `[B, H, splits, parts, N, D]` relative to the maxima (log2 units) `[B, H, splits,
    N]`, and the weights' sums `[B, H, splits, N]`, one after another; only of splits that have tokens.

    Args:
        batch: B.
        num_heads: H.
        num_rows: N = G * Q.
        num_queries: Q.
        head_dim: D.
        num_stages: R.
        subspace_dim: S.
        capacity: C, the most coded tokens.
        num_sms: Multiprocessors of the device.
    """
    width = next(w for w in (64, 32, 16, 8, 4, 2, 1) if head_dim % w == 0 and subspace_dim % w == 0)
    num_groups = -(-num_stages // MAX_GROUP)
    group = -(-num_stages // num_groups)
    units = batch * num_heads * (head_dim // width) * num_groups
    splits, _ = choose_splits(units, capacity // BLOCK_TOKENS, num_sms * PROGRAMS_PER_SM, startup=8.0)
    block_rows = min(32, max(16, 1 << (num_rows - 1).bit_length()))
    launch = Launch(
        _value_gather,
        (units, splits.splits, -(-num_rows // block_rows)),
        (batch, capacity // PAGE_TOKENS, num_stages, num_groups, *splits),
        {
            "H": num_heads,
            "N": num_rows,
            "Q": num_queries,
            "D": head_dim,
            "S": subspace_dim,
            "W": width,
            "GROUP": group,
            "EVEN": num_stages % group == 0,
            "SCALE": SCORE_SCALE,
            "BN": block_rows,
            "BT": BLOCK_TOKENS,
            "num_warps": NUM_WARPS,
            "num_stages": 1,
        },
    )
    return launch, num_groups
