"""Encoding in one launch: un-rotation, all residual stages and the codes' place in the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 128
NUM_WARPS = 8
BLOCK_CENTROIDS = 64
MAX_REGISTERS = 128


@triton.jit
def _load_plain(
    base, cos, sin, t, num_tokens, subspace, s, stride_head,
    D: tl.constexpr, S: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    # Channels s of a subspace as they were before rotary embedding, [t, s] float32; zeros beyond the subspace.
    channel = subspace * S + s
    d = channel % D
    here = (t[:, None] < num_tokens) & (s[None, :] < S)
    place = base + (channel // D).to(tl.int64)[None, :] * stride_head
    x = tl.load(place + d[None, :], mask=here, other=0.0).to(tl.float32)
    if PAIRS > 0:
        # The inverse of y1 = x1 c - x2 s, y2 = x2 c + x1 s, whatever factor was folded into c and s.
        turns = here & (d[None, :] < 2 * PAIRS)
        partner = tl.where(d < PAIRS, d + PAIRS, d - PAIRS)
        other = tl.load(place + partner[None, :], mask=turns, other=0.0).to(tl.float32)
        c = tl.load(cos + (d % PAIRS)[None, :], mask=turns, other=1.0)
        z = tl.load(sin + (d % PAIRS)[None, :], mask=turns, other=0.0)
        x = (x * c + other * z * tl.where(d < PAIRS, 1.0, -1.0)[None, :]) / (c * c + z * z)
    return x


@triton.jit
def _load_head(base, cos, sin, t, num_tokens, head, s, stride_head, HALF: tl.constexpr):
    # The same where a subspace is a head that rotates as a whole: its halves are each other's partners.
    here = (t[:, None] < num_tokens) & (s[None, :] < HALF)
    place = base + head.to(tl.int64) * stride_head + s[None, :]
    x = tl.load(place, mask=here, other=0.0).to(tl.float32)
    y = tl.load(place + HALF, mask=here, other=0.0).to(tl.float32)
    c = tl.load(cos + s[None, :], mask=here, other=1.0)
    z = tl.load(sin + s[None, :], mask=here, other=0.0)
    shrink = 1.0 / (c * c + z * z)
    return (x * c + y * z) * shrink, (y * c - x * z) * shrink


@triton.jit(do_not_specialize=["num_tokens"])
def _encode(
    states,  # [B, H, T, D]
    centroids,  # [M, R, K, S]
    biases,  # float32 [M, R, K]: -|c|^2 / 2
    cos,  # float32 [B, T, PAIRS]
    sin,
    codes,  # uint8 [B, M, R, T]
    num_tokens,
    stages,
    stride_batch,
    stride_head,
    stride_token,
    rotary_batch,
    rotary_token,
    codes_batch,
    codes_subspace,
    codes_stage,
    D: tl.constexpr,
    S: tl.constexpr,
    K: tl.constexpr,
    PAIRS: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
    BT: tl.constexpr,
):
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    subspace = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    base = states + row * stride_batch + t[:, None].to(tl.int64) * stride_token
    angle = row * rotary_batch + t[:, None].to(tl.int64) * rotary_token
    s = tl.arange(0, BS // 2)
    cos += angle
    sin += angle
    if S == D and 2 * PAIRS == D and BS == D:
        first_half, other_half = _load_head(base, cos, sin, t, num_tokens, subspace, s, stride_head, PAIRS)
    else:
        first_half = _load_plain(base, cos, sin, t, num_tokens, subspace, s, stride_head, D, S, PAIRS)
        other_half = _load_plain(base, cos, sin, t, num_tokens, subspace, s + BS // 2, stride_head, D, S, PAIRS)
    # The residual is kept as the products take it. Rounding it costs no more than rounding the centroids did, and half
    # the registers let two programs share an SM, one multiplying while the other compares.
    first_half = first_half.to(centroids.dtype.element_ty)
    other_half = other_half.to(centroids.dtype.element_ty)
    k = tl.arange(0, BK)
    # Codes of many million tokens lie further apart than 32 bits count; centroids never do.
    codes += row * codes_batch + subspace.to(tl.int64) * codes_subspace
    # Column 8i + 2j + e of a tile of scores lies in register (i, e) of thread j of four.
    i = tl.arange(0, BK // 8)[None, :, None, None]
    e = tl.arange(0, 2)[None, None, None, :]
    # Beyond the last token codes are not stored, so any mask will do there. One that is no constant keeps the compiler
    # from making one instruction of the mask and the code, which would all wait for one pipe: 5 % of the time.
    upper = tl.where(t < num_tokens, -256, -1)[:, None, None, None]
    for stage in range(stages):
        place = subspace * stages + stage
        table = centroids + place.to(tl.int64) * (K * S)
        best = tl.full([BT, 4], float("-inf"), tl.float32)
        # Tiles in flight (num_stages=2 or 3) were no faster: two programs share an SM and hide each other's loads.
        for start in tl.range(0, K, BK, num_stages=1):
            tile = table + (start + k)[:, None] * S + s[None, :]
            first_part = tl.load(tile, mask=s[None, :] < S, other=0.0)
            other_part = tl.load(tile + BS // 2, mask=s[None, :] + BS // 2 < S, other=0.0)
            bias = tl.load(biases + place * K + start + k)
            # argmin |x - c|^2 = argmax x.c - |c|^2 / 2 (paper, Alg. 1, step 2)
            scores = tl.dot(first_half, tl.trans(first_part), tl.broadcast_to(bias[None, :], [BT, BK]))
            scores = tl.dot(other_half, tl.trans(other_part), scores)
            # The code takes the place of the last 8 of 23 mantissa bits, so that one maximum finds both; the operands
            # of the products have 10 at most. Bits are inverted: of equal positive scores the lowest code wins.
            bits = scores.to(tl.int32, bitcast=True).reshape([BT, BK // 8, 4, 2])
            packed = ((bits & upper) + (255 - start - 8 * i - e)).to(tl.float32, bitcast=True)
            best = tl.maximum(best, tl.max(tl.max(packed, 3), 1))
        bits = best.to(tl.int32, bitcast=True) - 2 * tl.arange(0, 4)[None, :]
        bits = tl.max(bits.to(tl.float32, bitcast=True), 1).to(tl.int32, bitcast=True)
        code = 255 - (bits & 255)
        tl.store(codes + t, code.to(tl.uint8), mask=t < num_tokens)
        codes += codes_stage
        chosen = table + code[:, None] * S + s[None, :]
        first_half -= tl.load(chosen, mask=s[None, :] < S, other=0.0)
        other_half -= tl.load(chosen + BS // 2, mask=s[None, :] + BS // 2 < S, other=0.0)


@torch.library.custom_op("transformers_gsrq::encode", mutates_args={"codes"})
def _encode_op(
    states: torch.Tensor,
    centroids: torch.Tensor,
    biases: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    codes: torch.Tensor,
) -> None:
    batch, _, num_tokens, head_dim = states.shape
    num_subspaces, num_stages, num_centroids, subspace_dim = centroids.shape
    if not num_tokens or not batch:
        return
    if states.stride(-1) != 1:
        states = states.contiguous()
    centroids = centroids.contiguous()
    pairs = 0
    if cos is not None:
        pairs = cos.shape[-1]
        # One row of angles may serve all rows of the batch.
        cos = cos.to(torch.float32).expand(batch, -1, -1)
        sin = sin.to(torch.float32).expand(batch, -1, -1)
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
    grid = (-(-num_tokens // BLOCK_TOKENS), num_subspaces, batch)
    with torch.cuda.device_of(states):
        _encode[grid](
            states,
            centroids,
            biases,
            biases if cos is None else cos,
            biases if sin is None else sin,
            codes,
            num_tokens,
            num_stages,
            *states.stride()[:3],
            *((0, 0) if cos is None else cos.stride()[:2]),
            *codes.stride()[:3],
            D=head_dim,
            S=subspace_dim,
            K=num_centroids,
            PAIRS=pairs,
            BS=max(32, 1 << (subspace_dim - 1).bit_length()),
            BK=BLOCK_CENTROIDS,
            BT=BLOCK_TOKENS,
            num_warps=NUM_WARPS,
            maxnreg=MAX_REGISTERS,
        )


@_encode_op.register_fake
def _(states, centroids, biases, cos, sin, codes):
    return None


def encode(
    states: torch.Tensor,
    centroids: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    biases: torch.Tensor | None = None,
) -> None:
    """Greedy residual codes of key or value states; the same as `reference.encode` but for products in half precision.

    Residuals are kept in the dtype of `centroids`: of two centroids almost equally near the farther may be chosen.

    Args:
        states: `[B, H, T, D]`, float16 or bfloat16, any strides.
        centroids: `[M, R, K, S]` of the same dtype.
        cos_sin: Rotation to undo first: cosine and sine, each `[B or 1, T, P]` for P half-split channel pairs; None
            for states to be taken as they are.
        out: uint8 `[B, M, R, T]`, tokens contiguous, other strides arbitrary; written.
        biases: -|c|^2 / 2, float32 `[M, R, K]`, if they are known.
    """
    if biases is None:
        biases = torch.linalg.vector_norm(centroids, dim=-1, dtype=torch.float32).square() * -0.5
    cos, sin = (None, None) if cos_sin is None else cos_sin
    _encode_op(states, centroids, biases, cos, sin, out)
