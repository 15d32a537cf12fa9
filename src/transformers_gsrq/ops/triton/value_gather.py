"""Softmax-weighted sums of coded values by gathering centroid rows: any Triton, any number of queries."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .key_scores import SCORE_SCALE, choose_splits, gather_rows, load_words

BLOCK_TOKENS = 64
NUM_WARPS = 4
PROGRAMS_PER_SM = 4
# Stages that a program sums: with rows of 64 channels, 128 KiB of codebook in L1 for two programs of one unit.
MAX_GROUP = 4


@triton.jit
def _load_logits(
    scores, t, n, row, head, start, num_tokens, mask, mask_batch, mask_head, mask_query,
    softcap, N: tl.constexpr, Q: tl.constexpr, G: tl.constexpr, HAS_MASK: tl.constexpr, HAS_CAP: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    # Logits times log2(e), [n, t], minus infinity where a query does not see a token.
    visible = (n[:, None] < N) & (t[None, :] >= start) & (t[None, :] < num_tokens)
    if HAS_MASK:
        place = row * mask_batch + (head * G + n // Q) * mask_head + n % Q * mask_query
        visible = visible & (tl.load(mask + place[:, None] + t[None, :], mask=visible, other=0) != 0)
    logits = tl.load(scores + t[None, :], mask=visible, other=0).to(tl.float32) * (1.0 / SCALE)
    if HAS_CAP:
        # tanh(x) = 1 - 2 / (e^(2x) + 1)
        logits = softcap * (1.4426950408889634 - 2.8853900817779268 / (tl.exp2(logits * (2.0 / softcap)) + 1.0))
    return tl.where(visible, logits, float("-inf"))


@triton.jit(
    do_not_specialize=["num_tokens", "num_blocks", "mask_batch", "mask_head", "mask_query"],
    do_not_specialize_on_alignment=["num_groups", "blocks_per_program"],
)
def _value_gather(
    scores,  # int32 [B, H, N, scores_stride]
    codes,  # int32 words of [B, M, R, C]
    centroids,  # [M, R, 256, S]
    starts,  # int32 [B]
    mask,
    sums,  # float32 [B, H, splits, groups, N, D]
    maxima,  # float32 [B, H, splits, N]
    weights,  # float32 [B, H, splits, N]
    num_tokens,
    stages,
    num_groups,
    num_blocks,
    blocks_per_program,
    softcap,
    scores_stride,
    stride_batch,
    stride_subspace,
    stride_stage,
    mask_batch,
    mask_head,
    mask_query,
    H: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
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
    num_splits = tl.num_programs(1)
    first = split * blocks_per_program
    last = tl.minimum(first + blocks_per_program, num_blocks)
    subspace = (head * D + channel) // S
    column = (head * D + channel) % S
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    start = tl.load(starts + row)
    place = scores + (row_head * N + n[:, None]) * scores_stride
    codes += row * stride_batch + subspace * stride_subspace
    stage = group * GROUP
    columns = tl.multiple_of(column, W) + tl.arange(0, W)
    table = centroids + (subspace * stages + stage) * (256 * S)
    slots = tl.arange(0, BT)
    offsets = slots % (BT // 4) * 4 + slots // (BT // 4)
    num_words = (num_tokens + 3) // 4
    word = first * (BT // 4) + tl.arange(0, BT // 4)
    next_words = load_words(codes, word, stage, stages, stride_stage, num_words, GROUP, EVEN)
    top = tl.full([BN], float("-inf"), tl.float32)
    weight = tl.zeros([BN], tl.float32)
    acc = tl.zeros([BN, W], tl.float32)
    for block in range(first, last):
        words = next_words
        word += BT // 4
        next_words = load_words(codes, word, stage, stages, stride_stage, num_words, GROUP, EVEN)
        t = block * BT + offsets
        logits = _load_logits(
            place, t, n, row, head, start, num_tokens, mask, mask_batch, mask_head, mask_query,
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
    part = (row_head * num_splits + split) * num_groups + group
    w = tl.arange(0, W)
    tl.store(sums + (part * N + n[:, None]) * D + channel + w[None, :], acc, mask=n[:, None] < N)
    # All programs of a split compute the same statistics; one of them stores.
    if (group == 0) & (channel == 0):
        stats = (row_head * num_splits + split) * N + n
        tl.store(maxima + stats, top, mask=n < N)
        tl.store(weights + stats, weight, mask=n < N)


def value_gather(
    scores: torch.Tensor,
    words: torch.Tensor,
    num_tokens: int,
    centroids: torch.Tensor,
    starts: torch.Tensor,
    mask: torch.Tensor | None,
    softcap: float | None,
    head_dim: int,
    num_queries: int,
    num_sms: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weighted sums of coded values, split over tokens and stages.

    Args:
        scores: int32 `[B, H, N, >= C]` of `key_scores`.
        words: int32 view of codes `[B, M, R, C]`, four tokens a word.
        num_tokens: C.
        centroids: `[M, R, K, S]`, contiguous.
        starts: int32 `[B]`: the first visible token of each row.
        mask: Boolean `[B, 1 or H * G, Q, >= C]` with tokens contiguous, True where visible; or None.
        softcap: Soft cap of the logits, or None.
        head_dim: D.
        num_queries: Q.
        num_sms: Multiprocessors of the device.

    Returns:
        Sums float32 `[B, H, splits, parts, N, D]` relative to the maxima (log2 units) `[B, H, splits, N]`, and the
        weights' sums `[B, H, splits, N]`.
    """
    batch, num_heads, num_rows, _ = scores.shape
    num_stages, subspace_dim = words.shape[2], centroids.shape[-1]
    width = next(w for w in (64, 32, 16, 8, 4, 2, 1) if head_dim % w == 0 and subspace_dim % w == 0)
    num_groups = -(-num_stages // MAX_GROUP)
    group = -(-num_stages // num_groups)
    units = batch * num_heads * (head_dim // width) * num_groups
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    splits = choose_splits(units, num_blocks, num_sms * PROGRAMS_PER_SM, startup=8.0)
    blocks_per_program = -(-num_blocks // splits)
    splits = -(-num_blocks // blocks_per_program)
    block_rows = min(32, max(16, 1 << (num_rows - 1).bit_length()))
    make = {"dtype": torch.float32, "device": words.device}
    sums = torch.empty(batch, num_heads, splits, num_groups, num_rows, head_dim, **make)
    maxima = torch.empty(batch, num_heads, splits, num_rows, **make)
    weights = torch.empty_like(maxima)
    strides = (
        (0, 0, 0) if mask is None else (mask.stride(0), 0 if mask.shape[1] == 1 else mask.stride(1), mask.stride(2))
    )
    _value_gather[units, splits, -(-num_rows // block_rows)](
        scores,
        words,
        centroids,
        starts,
        starts if mask is None else mask,
        sums,
        maxima,
        weights,
        num_tokens,
        num_stages,
        num_groups,
        num_blocks,
        blocks_per_program,
        0.0 if softcap is None else softcap,
        scores.shape[-1],
        *words.stride()[:3],
        *strides,
        H=num_heads,
        N=num_rows,
        Q=num_queries,
        D=head_dim,
        S=subspace_dim,
        W=width,
        GROUP=group,
        EVEN=num_stages % group == 0,
        HAS_MASK=mask is not None,
        HAS_CAP=softcap is not None,
        SCALE=SCORE_SCALE,
        BN=block_rows,
        BT=BLOCK_TOKENS,
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return sums, maxima, weights
