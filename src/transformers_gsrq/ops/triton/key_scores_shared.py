"""Scores of queries against coded keys with the codebook in shared memory (Gluon, Triton 3.8 or newer).

The plan of `key_scores`, with every step laid out by hand: each warp works on its own tokens without a barrier, rows
are gathered from shared memory without bank conflicts, straight into the registers in which the tensor cores take
them.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from . import PAGE_TOKENS, Count
from .key_scores import Launch, choose_splits

# Shared memory that the tables of one stage take.
STAGE_BYTES = 32 * 1024
MAX_GROUP = 6
NUM_WARPS = 16
BLOCK_TOKENS = 64 * NUM_WARPS
MAX_ROWS = 8
# What a block costs beside its stages, a program before its first block, and the tables of each of its stages, in
# units of one stage of one block (0.7 us on an H100). Without the second, the plan for 131,072 tokens and 16 stages
# was three waves of programs, and took a third longer than in proportion.
BLOCK_OVERHEAD = 3.0
PROLOGUE = 16.0
STARTUP = 1.0
MAX_WAVES = 8
NUM_CODES = gl.constexpr(int(Count.NUM_CODES))
FIRST_POSITION = gl.constexpr(int(Count.FIRST_POSITION))


@gluon.jit
def _add(x, y):
    return gl.inline_asm_elementwise(
        "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _turn(x, y, cos, sin):
    # x cos - y sin and y cos + x sin, two channels a word.
    return gl.inline_asm_elementwise(
        """{
        .reg .b32 t;
        mul.rn.f16x2 t, $3, $5;
        neg.f16x2 t, t;
        fma.rn.f16x2 $0, $2, $4, t;
        mul.rn.f16x2 t, $2, $5;
        fma.rn.f16x2 $1, $3, $4, t;
        }""",
        "=&r,=&r,r,r,r,r",
        [x, y, cos, sin],
        dtype=(gl.int32, gl.int32),
        is_pure=True,
        pack=1,
    )


@gluon.jit
def _pack(low, high):
    return gl.inline_asm_elementwise(
        "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _unpack(word):
    return gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [word], dtype=(gl.float16, gl.float16), is_pure=True, pack=1
    )


@gluon.jit
def _pack_pairs(x):
    # [8, 32] float32 to [8, 16] words of two float16.
    low, high = gl.split(x.reshape([8, 16, 2]))
    return _pack(low, high)


@gluon.jit
def _load_words(
    codes, block_table, page_stride, stage_stride, word, rest, num_codes,
    GROUP: gl.constexpr, EVEN: gl.constexpr, PAGED: gl.constexpr,
):  # fmt: skip
    present = word * 4 < num_codes
    if PAGED:
        page = gl.load(block_table + word // 16, mask=present, other=0).to(gl.int64)
        place = codes + page * page_stride + word % 16
    else:
        place = codes + word
    words = ()
    for i in gl.static_range(GROUP):
        valid = present
        if not EVEN:
            valid = valid & (word * 0 + i < rest)
        words = words + (gl.load(place + i * stage_stride, mask=valid, other=0),)
    return words


@gluon.jit
def _round(x):
    return gl.inline_asm_elementwise("cvt.rni.s32.f32 $0, $1;", "=r,f", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _swap_columns(x, turned, ROWS: gl.constexpr):
    # Column c of row r moves to c ^ turned, with turned = r % 4: undoes the order in which rows were read.
    even, odd = gl.split(x.reshape([ROWS, 4, 2, 2]))
    swap, _ = gl.split((turned & 1).reshape([ROWS, 4, 2, 2]))
    x = gl.join(gl.where(swap != 0, odd, even), gl.where(swap != 0, even, odd)).permute([0, 1, 3, 2])
    low, high = gl.split(x)
    swap, _ = gl.split((turned & 2).reshape([ROWS, 4, 2, 2]).permute([0, 1, 3, 2]))
    return (
        gl.join(gl.where(swap != 0, high, low), gl.where(swap != 0, low, high))
        .permute([0, 1, 3, 2])
        .reshape([ROWS, 16])
    )


@gluon.jit(
    do_not_specialize=["batch", "capacity_blocks", "splits", "few_splits", "few_blocks"],
    do_not_specialize_on_alignment=["num_groups"],
)
def _key_scores_shared(
    query,  # [B, H, N, D]
    codes,  # uint8 [B, M, R, C], or pages [P, M, R, 64]
    tables,  # float16 [H * slices, R, 256, 64]
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
    H: gl.constexpr,
    N: gl.constexpr,
    D: gl.constexpr,
    M: gl.constexpr,
    ROTARY: gl.constexpr,
    GROUP: gl.constexpr,
    EVEN: gl.constexpr,
    PAGED: gl.constexpr,
    WARPS: gl.constexpr,
):
    # A step takes 16 tokens a warp, one of each word of codes; a block is the four steps of its words.
    ROWS: gl.constexpr = 16 * WARPS
    WARP_BASES: gl.constexpr = [[16, 0], [32, 0], [64, 0], [128, 0]] if WARPS == 16 else [[16, 0], [32, 0], [64, 0]]
    WORDS: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], WARP_BASES, [], [ROWS, 16]
    )
    QUERY: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    COPY: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    MMA: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    KEY_OPERAND: gl.constexpr = gl.DotOperandLayout(0, MMA, 2)
    QUERY_OPERAND: gl.constexpr = gl.DotOperandLayout(1, MMA, 2)
    SHARED: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])

    unit = gl.program_id(0).to(gl.int64)
    stage = unit % num_groups * GROUP
    head_slice = unit // num_groups % (num_slices * H)
    row = unit // (num_groups * num_slices * H)
    head = head_slice // num_slices
    first_pair = head_slice % num_slices * 32
    # Blocks are shared out as by `find_blocks`.
    num_codes = gl.load(counts + NUM_CODES * batch + row)
    num_blocks = (num_codes + 4 * ROWS - 1) // (4 * ROWS)
    splits = gl.where(num_blocks <= few_blocks, few_splits, splits)
    share = (num_blocks + splits - 1) // splits
    first = gl.program_id(1) * share
    last = gl.minimum(first + share, num_blocks)
    if first >= last:
        return
    capacity = capacity_blocks * 64
    scores = workspace.to(gl.pointer_type(gl.int32), bitcast=True)
    codes = codes.to(gl.pointer_type(gl.int32), bitcast=True)
    tables = tables.to(gl.pointer_type(gl.int64), bitcast=True)

    table = gl.allocate_shared_memory(gl.int64, [GROUP, 4096], SHARED)
    words = gl.arange(0, 4096, layout=COPY)
    for i in gl.static_range(GROUP):
        source = tables + (head_slice * stages + stage + i) * 4096
        # Stages that a last group lacks count as zeros.
        table.index(i).store(gl.load(source + words, mask=words * 0 + i < stages - stage, other=0))

    # q . R(p + j) k = (R(-p) q) . R(j) k, as in `key_scores`; here p moves with the step as well.
    n = gl.arange(0, 8, layout=gl.SliceLayout(1, QUERY))
    pair = first_pair + gl.arange(0, 32, layout=gl.SliceLayout(0, QUERY))
    HALF: gl.constexpr = ROTARY // 2
    channel_a = gl.where(pair < HALF, pair, pair + HALF)
    channel_b = channel_a + gl.where(pair < HALF, HALF, (D - ROTARY) // 2)
    frequency = gl.load(frequencies + pair)
    amplitude = gl.load(amplitudes + pair)[None, :]
    place = query + ((row * H + head) * N + n[:, None]) * D
    q_a = gl.load(place + channel_a[None, :], mask=n[:, None] < N, other=0.0).to(gl.float32) * amplitude
    q_b = gl.load(place + channel_b[None, :], mask=n[:, None] < N, other=0.0).to(gl.float32) * amplitude
    angle = (gl.load(counts + FIRST_POSITION * batch + row) + first * (4 * ROWS)).to(gl.float32) * frequency
    cos = gl.cos(angle)[None, :]
    sin = gl.sin(angle)[None, :]
    q_a, q_b = q_a * cos + q_b * sin, q_b * cos - q_a * sin
    block_cos = gl.cos(frequency * (4 * ROWS))[None, :]
    block_sin = gl.sin(frequency * (4 * ROWS))[None, :]
    step_cos = _pack_pairs(gl.cos(frequency)[None, :] + q_a * 0.0)
    step_sin = _pack_pairs(gl.sin(-frequency)[None, :] + q_a * 0.0)

    # Half a warp reads four rows at a time. Were they read in the same order, all would want the same banks; so row r
    # reads its words in the order c ^ (r % 4).
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, WORDS))
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, WORDS))[None, :]
    turned = (r % 4)[:, None] + column * 0
    column = column ^ turned
    turn = (4 * r).to(gl.float32)[:, None]
    even = turn * gl.load(frequencies + first_pair + 2 * column)
    odd = turn * gl.load(frequencies + first_pair + 2 * column + 1)
    key_cos = _pack(gl.cos(even), gl.cos(odd))
    key_sin = _pack(gl.sin(even), gl.sin(odd))

    stage_stride = 16 if PAGED else capacity // 4
    page_stride = M * stages * stage_stride
    codes += (gl.load(subspaces + head_slice * 2).to(gl.int64) * stages + stage) * stage_stride
    if PAGED:
        block_table += row * capacity_blocks
    else:
        codes += row * page_stride
    m = gl.arange(0, ROWS, layout=gl.SliceLayout(1, MMA))
    o = gl.arange(0, 8, layout=gl.SliceLayout(0, MMA))
    out = scores + ((row * H + head) * N + o[None, :]) * capacity
    word = first * ROWS + r
    rest = stages - stage
    next_words = _load_words(codes, block_table, page_stride, stage_stride, word, rest, num_codes, GROUP, EVEN, PAGED)
    gl.barrier()
    for block in range(first, last):
        # Codes are loaded one block ahead.
        packed = next_words
        word += ROWS
        next_words = _load_words(
            codes, block_table, page_stride, stage_stride, word, rest, num_codes, GROUP, EVEN, PAGED
        )
        # The query turns by a block in float32 and inside a block, three times by a token, in float16.
        half_a = _pack_pairs(q_a)
        half_b = _pack_pairs(q_b)
        q_a, q_b = q_a * block_cos + q_b * block_sin, q_b * block_cos - q_a * block_sin
        for j in gl.static_range(4):
            for i in gl.static_range(GROUP):
                code = (packed[i] >> (8 * j)) & 255
                index = (code * 16)[:, None] + column
                pairs = table.index(i).gather(index.reshape([ROWS * 16]), axis=0).reshape([ROWS, 16])
                part_a = pairs.to(gl.int32)
                part_b = (pairs >> 32).to(gl.int32)
                if i == 0:
                    a = part_a
                    b = part_b
                else:
                    a = _add(a, part_a)
                    b = _add(b, part_b)
            a, b = _turn(a, b, key_cos, key_sin)
            a = _swap_columns(a, turned, ROWS)
            b = _swap_columns(b, turned, ROWS)
            # Operands name their channels (column % 4, half of the pair, column // 4, channel of the half), so that a
            # thread holds what it gathered.
            a0, a1 = _unpack(a)
            b0, b1 = _unpack(b)
            key = gl.join(gl.join(a0, a1), gl.join(b0, b1)).reshape([ROWS, 4, 4, 2, 2])
            key = key.permute([0, 2, 4, 1, 3]).reshape([ROWS, 64])
            qa0, qa1 = _unpack(half_a)
            qb0, qb1 = _unpack(half_b)
            q = gl.join(gl.join(qa0, qa1), gl.join(qb0, qb1)).reshape([8, 4, 4, 2, 2])
            q = q.permute([0, 2, 4, 1, 3]).reshape([8, 64]).permute([1, 0])
            s = mma_v2(
                gl.convert_layout(key, KEY_OPERAND),
                gl.convert_layout(q, QUERY_OPERAND),
                gl.zeros([ROWS, 8], gl.float32, MMA),
            )
            fixed = _round(s * scale)
            t = (block * ROWS + m) * 4 + j
            gl.atomic_add(out + t[:, None], fixed, mask=(t[:, None] < num_codes) & (o[None, :] < N), sem="relaxed")
            if j < 3:
                # Back by an angle is forth by its negative.
                half_a, half_b = _turn(half_a, half_b, step_cos, step_sin)


def supports(tables: tuple[int, ...], paired: bool, num_rows: int) -> bool:
    """Whether the kernel can take `KeyTables.tables` of this shape and N = `num_rows` queries of each KV head."""
    return paired and tables[-1] == 64 and num_rows <= MAX_ROWS


def plan_key_scores_shared(
    batch: int,
    num_heads: int,
    num_rows: int,
    head_dim: int,
    num_subspaces: int,
    tables: tuple[int, ...],
    rotary_dim: int,
    capacity: int,
    paged: bool,
    num_sms: int,
    shared_bytes: int,
) -> Launch:
    """The same as `plan_key_scores`, where `supports` says so; stages and splits keep all SMs busy the shortest time.

    Args:
        batch: B.
        num_heads: H.
        num_rows: N = G * Q.
        head_dim: D.
        num_subspaces: M.
        tables: Shape of `KeyTables.tables`.
        rotary_dim: Rotating channels of a head.
        capacity: C, the most coded tokens.
        paged: Whether codes are read through a block table.
        num_sms: Multiprocessors of the device; each runs one program.
        shared_bytes: Shared memory that a program may have on the device.
    """
    num_stages, num_slices = tables[1], tables[0] // num_heads
    max_group = min(MAX_GROUP, shared_bytes // STAGE_BYTES)
    num_blocks = -(-capacity // BLOCK_TOKENS)
    best = None
    for groups in range(-(-num_stages // max_group), num_stages + 1):
        group = -(-num_stages // groups)
        units = batch * num_heads * num_slices * groups
        step = group + BLOCK_OVERHEAD
        startup = (group * STARTUP + PROLOGUE) / step
        splits, blocks = choose_splits(units, num_blocks, num_sms, startup, MAX_WAVES)
        if best is None or blocks * step < best[0]:
            best = blocks * step, group, splits
    _, group, splits = best
    groups = -(-num_stages // group)
    return Launch(
        _key_scores_shared,
        (batch * num_heads * num_slices * groups, splits.splits),
        (batch, capacity // PAGE_TOKENS, num_stages, num_slices, groups, *splits),
        {
            "H": num_heads,
            "N": num_rows,
            "D": head_dim,
            "M": num_subspaces,
            "ROTARY": rotary_dim,
            "GROUP": group,
            "EVEN": num_stages % group == 0,
            "PAGED": paged,
            "WARPS": NUM_WARPS,
            "num_warps": NUM_WARPS,
        },
    )
