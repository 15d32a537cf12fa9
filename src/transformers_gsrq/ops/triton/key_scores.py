"""Scores of queries against coded keys: centroid rows are gathered from L1, summed, rotated and multiplied on chip.

A query's score is linear in the stages and in the channel pairs of a key, so a program takes few of both: its part of
the codebook (`ROW` bytes x 256 x `GROUP` stages, 128 KiB) stays in the SM's L1 cache, and gathering a row costs one
cache line instead of a trip to L2. Partial scores are added in integers, so their order does not matter.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import PAGE_TOKENS, Count

# Scores are kept in units of 2^-14 of a log2: rounding eight partial sums changes a softmax weight by less than 1e-4
# of itself (bfloat16 rounds to 4e-3), and an int32 holds logits up to 90,000 in magnitude. Partial sums may wrap.
SCORE_SCALE = 1 << 14
MAX_GROUP = 4
BLOCK_TOKENS = PAGE_TOKENS
NUM_WARPS = 4
PROGRAMS_PER_SM = 4
NUM_CODES = tl.constexpr(int(Count.NUM_CODES))
FIRST_POSITION = tl.constexpr(int(Count.FIRST_POSITION))


class Launch(NamedTuple):
    """A kernel's grid, its integers and its constants: what is decided by shapes and the device."""

    kernel: Any
    grid: tuple[int, ...]
    sizes: tuple[int, ...]
    options: dict[str, Any]


class Splits(NamedTuple):
    """Into how many programs the token blocks of a unit are split; each finds its own on the device, by `find_blocks`.

    Attributes:
        splits: Programs of a long text.
        few_splits: Programs of a short text.
        few_blocks: Texts of up to so many blocks are short.
    """

    splits: int
    few_splits: int
    few_blocks: int


@triton.jit
def find_blocks(num_codes, split, splits, few_splits, few_blocks, BT: tl.constexpr):
    """First block of a program, the one behind its last, and the blocks of each; the last programs may get none."""
    num_blocks = (num_codes + BT - 1) // BT
    splits = tl.where(num_blocks <= few_blocks, few_splits, splits)
    share = (num_blocks + splits - 1) // splits
    first = tl.minimum(split * share, num_blocks)
    return first, tl.minimum(first + share, num_blocks), share


@triton.jit
def find_codes(codes, block_table, row, block, last, page_stride, stage_stride, capacity, PAGED: tl.constexpr):
    """Where the first stage of a block of 64 tokens begins, in words of four tokens."""
    if PAGED:
        # Entries behind the last block may name no page.
        page = tl.load(block_table + row * (capacity // 64) + block, mask=block < last, other=0)
        return codes + page.to(tl.int64) * page_stride
    else:
        return codes + row * page_stride + block * 16


@triton.jit
def load_words(place, stage, stages, stage_stride, block, num_codes, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """Codes of GROUP stages of a block, four tokens a word."""
    word = tl.arange(0, 16)
    words = ()
    for i in tl.static_range(GROUP):
        valid = (block * 16 + word) * 4 < num_codes
        if not EVEN:
            valid = valid & (word * 0 + stage + i < stages)
        words = words + (tl.load(place + (stage + i) * stage_stride + word, mask=valid, other=0),)
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
    do_not_specialize=["batch", "capacity_blocks", "splits", "few_splits", "few_blocks"],
    do_not_specialize_on_alignment=["num_groups"],
)
def _key_scores(
    query,  # [B, H, N, D]
    codes,  # uint8 [B, M, R, C], or pages [P, M, R, 64]
    tables,
    subspaces,
    frequencies,
    amplitudes,
    block_table,  # int32 [B, C / 64], or anything
    counts,  # int32 [.., B]
    workspace,  # begins with scores, int32 [B, H, N, C], added to
    scale,
    batch,
    capacity_blocks,
    stages,
    num_slices,
    num_groups,
    splits,
    few_splits,
    few_blocks,
    H: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ROTARY: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    PAIRED: tl.constexpr,
    PAGED: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
):
    unit = tl.program_id(0).to(tl.int64)
    stage = unit % num_groups * GROUP
    head_slice = unit // num_groups % (num_slices * H)
    row = unit // (num_groups * num_slices * H)
    head = head_slice // num_slices
    num_codes = tl.load(counts + NUM_CODES * batch + row)
    first, last, _ = find_blocks(num_codes, tl.program_id(1), splits, few_splits, few_blocks, BT)
    if first >= last:
        return
    capacity = capacity_blocks * 64
    scores = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
    codes = codes.to(tl.pointer_type(tl.int32), bitcast=True)

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
    angle = (tl.load(counts + FIRST_POSITION * batch + row) + first * BT).to(tl.float32) * frequency
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
    stage_stride = 16 if PAGED else capacity // 4
    page_stride = M * stages * stage_stride
    codes_a = codes + tl.load(subspaces + head_slice * 2).to(tl.int64) * stages * stage_stride
    codes_b = codes + tl.load(subspaces + head_slice * 2 + 1).to(tl.int64) * stages * stage_stride
    out = scores + (row * H + head) * N * capacity
    # Codes are loaded one block ahead: nothing else hides the way to memory.
    place = find_codes(codes_a, block_table, row, first, last, page_stride, stage_stride, capacity, PAGED)
    next_a = load_words(place, stage, stages, stage_stride, first, num_codes, GROUP, EVEN)
    if not PAIRED:
        place = find_codes(codes_b, block_table, row, first, last, page_stride, stage_stride, capacity, PAGED)
        next_b = load_words(place, stage, stages, stage_stride, first, num_codes, GROUP, EVEN)
    for block in range(first, last):
        words_a = next_a
        place = find_codes(codes_a, block_table, row, block + 1, last, page_stride, stage_stride, capacity, PAGED)
        next_a = load_words(place, stage, stages, stage_stride, block + 1, num_codes, GROUP, EVEN)
        if PAIRED:
            # At most GROUP - 1 roundings to 2^-11, where the keys that bfloat16 attention reads have one to 2^-8.
            total = gather_rows(table, words_a, tl.arange(0, 2 * P), rest, 2 * P, GROUP, EVEN, BT, tl.float16)
            x_a, x_b = tl.split(total.reshape([BT, P // 2, 2, 2]).permute([0, 1, 3, 2]))
        else:
            words_b = next_b
            place = find_codes(codes_b, block_table, row, block + 1, last, page_stride, stage_stride, capacity, PAGED)
            next_b = load_words(place, stage, stages, stage_stride, block + 1, num_codes, GROUP, EVEN)
            x_a = gather_rows(table, words_a, i, rest, 2 * P, GROUP, EVEN, BT, tl.float16).reshape([BT, P // 2, 2])
            x_b = gather_rows(table, words_b, i + P, rest, 2 * P, GROUP, EVEN, BT, tl.float16).reshape([BT, P // 2, 2])
        # Pairs stay next to each other through the rotation, so that it compiles to two-at-a-time arithmetic.
        y = tl.join(x_a * cos - x_b * sin, x_b * cos + x_a * sin).permute([0, 1, 3, 2]).reshape([BT, 2 * P])
        q = tl.join(q_a.to(tl.float16).reshape([BN, P // 2, 2]), q_b.to(tl.float16).reshape([BN, P // 2, 2]))
        s = tl.dot(y, tl.trans(q.permute([0, 1, 3, 2]).reshape([BN, 2 * P]))) * scale
        q_a, q_b = q_a * step_cos + q_b * step_sin, q_b * step_cos - q_a * step_sin
        t = block * BT + offsets
        valid = (n[None, :] < N) & (t[:, None] < num_codes)
        fixed = (s + tl.where(s > 0, 0.5, -0.5)).to(tl.int32)
        tl.atomic_add(out + n.to(tl.int64)[None, :] * capacity + t[:, None], fixed, mask=valid, sem="relaxed")


def plan_key_scores(
    batch: int,
    num_heads: int,
    num_rows: int,
    head_dim: int,
    num_subspaces: int,
    tables: tuple[int, ...],
    rotary_dim: int,
    paired: bool,
    capacity: int,
    paged: bool,
    num_sms: int,
) -> Launch:
    """How to launch the scores of every query against every coded key.

    The kernel adds to the int32 `[B, H, N, C]` that the workspace begins with: scaling * q.k * log2(e) in units of
    1 / `SCORE_SCALE`.

    Args:
        batch: B.
        num_heads: H.
        num_rows: N = G * Q.
        head_dim: D.
        num_subspaces: M.
        tables: Shape of `KeyTables.tables`.
        rotary_dim: Rotating channels of a head.
        paired: As in `KeyTables`.
        capacity: C, the most coded tokens.
        paged: Whether codes are read through a block table.
        num_sms: Multiprocessors of the device.
    """
    num_stages, pairs = tables[1], tables[-1] // 2
    num_slices = tables[0] // num_heads
    # A group of 64-pair rows takes as many bytes as one of twice as many stages of 32 pairs.
    num_groups = -(-num_stages // max(1, MAX_GROUP * 32 // max(pairs, 32)))
    group = -(-num_stages // num_groups)
    units = batch * num_heads * num_slices * num_groups
    splits, _ = choose_splits(units, capacity // BLOCK_TOKENS, num_sms * PROGRAMS_PER_SM)
    block_rows = min(32, max(8, 1 << (num_rows - 1).bit_length()))
    return Launch(
        _key_scores,
        (units, splits.splits, -(-num_rows // block_rows)),
        (batch, capacity // PAGE_TOKENS, num_stages, num_slices, num_groups, *splits),
        {
            "H": num_heads,
            "N": num_rows,
            "D": head_dim,
            "M": num_subspaces,
            "ROTARY": rotary_dim,
            "P": pairs,
            "GROUP": group,
            "EVEN": num_stages % group == 0,
            "PAIRED": paired,
            "PAGED": paged,
            "BN": block_rows,
            "BT": BLOCK_TOKENS,
            "num_warps": NUM_WARPS,
            # Prefetching through shared memory, Triton's default, would cost a round trip for every gathered row.
            "num_stages": 1,
        },
    )


@lru_cache(maxsize=4096)
def choose_splits(
    units: int, num_blocks: int, slots: int, startup: float = 4.0, waves: int = 4
) -> tuple[Splits, float]:
    """Into how many programs to split the blocks of each unit so that whole waves of programs are full.

    Args:
        units: Independent pieces of work.
        num_blocks: Token blocks of each, at capacity.
        slots: Programs that run at a time.
        startup: Cost of starting a program, in blocks: its part of the codebook comes from L2.
        waves: Programs that may run one after another.

    Returns:
        The splits, and the time at capacity, in blocks.
    """

    def cost(splits: int, blocks: int) -> float:
        share = -(-blocks // splits)
        return -(-units * -(-blocks // share) // slots) * (share + startup)

    most = max(1, min(num_blocks, waves * slots // units + 1))
    splits = min(range(1, most + 1), key=lambda splits: cost(splits, num_blocks))
    # Several waves are for a long text; in a short one, starting programs would take most of the time.
    few = max(1, min(splits, slots // units))
    lengths = (1 << bits for bits in range(num_blocks.bit_length()))
    few_blocks = max((blocks for blocks in lengths if cost(few, blocks) < cost(splits, blocks)), default=0)
    return Splits(splits, few, few_blocks), cost(splits, num_blocks)
