"""Scores of queries against coded keys: centroid rows are gathered from L1, summed, rotated and multiplied on chip.

A query's score is linear in the stages and in the channel pairs of a key, so a program takes few of both: its part of
the codebook (`ROW` bytes x 256 x `GROUP` stages, 128 KiB) stays in the SM's L1 cache, and gathering a row costs one
cache line instead of a trip to L2. Partial scores are added in integers, so their order does not matter.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from .key_tables import KeyTables

# Scores are kept in units of 2^-14 of a log2: rounding eight partial sums changes a softmax weight by less than 1e-4
# of itself (bfloat16 rounds to 4e-3), and an int32 holds logits up to 90,000 in magnitude. Partial sums may wrap.
SCORE_SCALE = 1 << 14
MAX_GROUP = 4
BLOCK_TOKENS = 64
NUM_WARPS = 4
PROGRAMS_PER_SM = 4


@triton.jit
def load_words(codes, word, stage, stages, stride_stage, num_words, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """Codes of GROUP stages, four tokens a word."""
    words = ()
    for i in tl.static_range(GROUP):
        if EVEN:
            valid = word < num_words
        else:
            valid = (word < num_words) & (word * 0 + stage + i < stages)
        words = words + (tl.load(codes + (stage + i) * stride_stage + word, mask=valid, other=0),)
    return words


@triton.jit
def gather_rows(
    table, words, columns, rest,
    ROW: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, BT: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Sum of GROUP centroid rows for each token, [BT, columns]; row j * BT/4 + i is token 4i + j."""
    # So the four tokens of a word belong to one thread.
    shifts = tl.arange(0, 4) * 8
    total = tl.zeros([BT, columns.shape[0]], DTYPE)
    for i in tl.static_range(GROUP):
        code = ((words[i][None, :] >> shifts[:, None]) & 255).reshape([BT])
        pointers = table + i * (256 * ROW) + code[:, None] * ROW + columns[None, :]
        if EVEN or i == 0:
            part = tl.load(pointers)
        else:
            part = tl.load(pointers, mask=code[:, None] * 0 + i < rest, other=0.0)
        total = part.to(DTYPE) if i == 0 else total + part.to(DTYPE)
    return total


@triton.jit(
    do_not_specialize=["num_tokens", "num_blocks"], do_not_specialize_on_alignment=["num_groups", "blocks_per_program"]
)
def _key_scores(
    query,  # [B, H, N, D]
    codes,  # int32 words of [B, M, R, C]
    tables,
    subspaces,
    frequencies,
    amplitudes,
    first_position,  # int32 [B]
    scores,  # int32 [B, H, N, scores_stride], added to
    num_tokens,
    stages,
    num_slices,
    num_groups,
    num_blocks,
    blocks_per_program,
    scale,
    stride_batch,
    stride_subspace,
    stride_stage,
    scores_stride,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRED: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    stage = unit % num_groups * GROUP
    head_slice = unit // num_groups % (num_slices * H)
    row = unit // (num_groups * num_slices * H)
    head = head_slice // num_slices
    first = tl.program_id(1) * blocks_per_program
    last = tl.minimum(first + blocks_per_program, num_blocks)

    i = tl.arange(0, P)
    pair = head_slice % num_slices * P + i
    frequency = tl.load(frequencies + pair)
    amplitude = tl.load(amplitudes + pair)
    HALF: tl.constexpr = ROTARY // 2
    channel_a = tl.where(pair < HALF, pair, pair + HALF)
    channel_b = channel_a + tl.where(pair < HALF, HALF, (D - ROTARY) // 2)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    q_row = query + ((row * H + head) * N + n[:, None]) * D
    q_a = tl.load(q_row + channel_a[None, :], mask=n[:, None] < N, other=0.0).to(tl.float32) * amplitude[None, :]
    q_b = tl.load(q_row + channel_b[None, :], mask=n[:, None] < N, other=0.0).to(tl.float32) * amplitude[None, :]
    # q . R(p + j) k = (R(-p) q) . R(j) k: the query turns back by the position p of the block's first token, each key
    # by its place j in the block, whose cosines are the same for all blocks and stay in registers.
    angle = (tl.load(first_position + row) + first * BT).to(tl.float32) * frequency
    cos = tl.cos(angle)[None, :]
    sin = tl.sin(angle)[None, :]
    q_a, q_b = q_a * cos + q_b * sin, q_b * cos - q_a * sin
    step_cos = tl.cos(frequency * BT)[None, :]
    step_sin = tl.sin(frequency * BT)[None, :]
    # The order of tokens in `gather_rows`.
    slots = tl.arange(0, BT)
    offsets = slots % (BT // 4) * 4 + slots // (BT // 4)
    angle = offsets.to(tl.float32)[:, None] * frequency[None, :]
    cos = tl.cos(angle).to(tl.float16).reshape([BT, P // 2, 2])
    sin = tl.sin(angle).to(tl.float16).reshape([BT, P // 2, 2])

    rest = stages - stage
    table = tables + (head_slice * stages + stage) * (256 * 2 * P)
    codes_a = codes + row * stride_batch + tl.load(subspaces + head_slice * 2).to(tl.int64) * stride_subspace
    codes_b = codes + row * stride_batch + tl.load(subspaces + head_slice * 2 + 1).to(tl.int64) * stride_subspace
    out = scores + (row * H + head) * N * scores_stride
    num_words = (num_tokens + 3) // 4
    word = first * (BT // 4) + tl.arange(0, BT // 4)
    # Codes are loaded one block ahead: nothing else hides the way to memory.
    next_a = load_words(codes_a, word, stage, stages, stride_stage, num_words, GROUP, EVEN)
    if not PAIRED:
        next_b = load_words(codes_b, word, stage, stages, stride_stage, num_words, GROUP, EVEN)
    for block in range(first, last):
        words_a = next_a
        word += BT // 4
        next_a = load_words(codes_a, word, stage, stages, stride_stage, num_words, GROUP, EVEN)
        if PAIRED:
            # At most GROUP - 1 roundings to 2^-11, where the keys that bfloat16 attention reads have one to 2^-8.
            total = gather_rows(table, words_a, tl.arange(0, 2 * P), rest, 2 * P, GROUP, EVEN, BT, tl.float16)
            x_a, x_b = tl.split(total.reshape([BT, P // 2, 2, 2]).permute([0, 1, 3, 2]))
        else:
            words_b = next_b
            next_b = load_words(codes_b, word, stage, stages, stride_stage, num_words, GROUP, EVEN)
            x_a = gather_rows(table, words_a, i, rest, 2 * P, GROUP, EVEN, BT, tl.float16).reshape([BT, P // 2, 2])
            x_b = gather_rows(table, words_b, i + P, rest, 2 * P, GROUP, EVEN, BT, tl.float16).reshape([BT, P // 2, 2])
        # Pairs stay next to each other through the rotation, so that it compiles to two-at-a-time arithmetic.
        y = tl.join(x_a * cos - x_b * sin, x_b * cos + x_a * sin).permute([0, 1, 3, 2]).reshape([BT, 2 * P])
        q = tl.join(q_a.to(tl.float16).reshape([BN, P // 2, 2]), q_b.to(tl.float16).reshape([BN, P // 2, 2]))
        s = tl.dot(y, tl.trans(q.permute([0, 1, 3, 2]).reshape([BN, 2 * P]))) * scale
        q_a, q_b = q_a * step_cos + q_b * step_sin, q_b * step_cos - q_a * step_sin
        t = block * BT + offsets
        valid = (n[None, :] < N) & (t[:, None] < num_tokens)
        fixed = (s + tl.where(s > 0, 0.5, -0.5)).to(tl.int32)
        tl.atomic_add(out + n.to(tl.int64)[None, :] * scores_stride + t[:, None], fixed, mask=valid, sem="relaxed")


def key_scores(
    query: torch.Tensor,
    words: torch.Tensor,
    num_tokens: int,
    keys: KeyTables,
    first_position: torch.Tensor,
    scaling: float,
    num_sms: int,
) -> torch.Tensor:
    """Scores of every query against every coded key.

    Args:
        query: `[B, H, N, D]`, contiguous, float16 or bfloat16, rotated; N = G * Q.
        words: int32 view of codes `[B, M, R, C]`, four tokens a word.
        num_tokens: C.
        keys: The prepared codebook.
        first_position: int32 `[B]`: position of code 0 of each row.
        scaling: Factor of the scores.
        num_sms: Multiprocessors of the device.

    Returns:
        int32 `[B, H, N, C rounded up to 16]`: scaling * q.k * log2(e) in units of 1 / `SCORE_SCALE`.
    """
    batch, num_heads, num_rows, head_dim = query.shape
    num_stages = keys.tables.shape[1]
    pairs = keys.tables.shape[-1] // 2
    num_slices = keys.tables.shape[0] // num_heads
    # A group of 64-pair rows takes as many bytes as one of twice as many stages of 32 pairs.
    num_groups = -(-num_stages // max(1, MAX_GROUP * 32 // max(pairs, 32)))
    group = -(-num_stages // num_groups)
    units = batch * num_heads * num_slices * num_groups
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    splits = choose_splits(units, num_blocks, num_sms * PROGRAMS_PER_SM)
    block_rows = min(32, max(8, 1 << (num_rows - 1).bit_length()))
    scores = torch.zeros(batch, num_heads, num_rows, -(-num_tokens // 16) * 16, dtype=torch.int32, device=query.device)
    blocks_per_program = -(-num_blocks // splits)
    grid = (units, -(-num_blocks // blocks_per_program), -(-num_rows // block_rows))
    _key_scores[grid](
        query,
        words,
        keys.tables,
        keys.subspaces,
        keys.frequencies,
        keys.amplitudes,
        first_position,
        scores,
        num_tokens,
        num_stages,
        num_slices,
        num_groups,
        num_blocks,
        blocks_per_program,
        scaling * 1.4426950408889634 * SCORE_SCALE * 2.0**keys.exponent,
        *words.stride()[:3],
        scores.shape[-1],
        H=num_heads,
        N=num_rows,
        D=head_dim,
        ROTARY=keys.rotary_dim,
        P=pairs,
        GROUP=group,
        EVEN=num_stages % group == 0,
        PAIRED=keys.paired,
        BN=block_rows,
        BT=BLOCK_TOKENS,
        num_warps=NUM_WARPS,
        # Prefetching through shared memory, Triton's default, would cost a round trip for every gathered row.
        num_stages=1,
    )
    return scores


@lru_cache(maxsize=4096)
def choose_splits(units: int, num_blocks: int, slots: int, startup: float = 4.0) -> int:
    """Into how many programs to split the blocks of each unit so that whole waves of programs are full.

    Args:
        units: Independent pieces of work.
        num_blocks: Token blocks of each.
        slots: Programs that run at a time.
        startup: Cost of starting a program, in blocks: its part of the codebook comes from L2.
    """

    def cost(splits: int) -> float:
        waves = -(-units * splits // slots)
        return waves * (-(-num_blocks // splits) + startup)

    most = max(1, min(num_blocks, 4 * slots // units + 1))
    return min(range(1, most + 1), key=cost)
