"""The codec in plain torch: works on every device and dtype, and is what kernels are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Scores of one block of tokens against all centroids stay below this many float32 numbers (64 MiB).
MAX_SCORES = 1 << 24
# States of one block of tokens stay below this many numbers while they are decoded (8 MiB in float32).
MAX_DECODED = 1 << 21


def encode_vectors(vectors: torch.Tensor, centroids: torch.Tensor, beam_width: int = 1) -> torch.Tensor:
    """Residual codes of vectors: stage r codes what stages before it left over (paper, section 3; greedy, Eq. 3).

    With `beam_width` > 1 the best partial sums are kept at every stage, which finds nearer codes for the same decoder.

    Args:
        vectors: `[M, N, S]`, any float dtype; computed in float32.
        centroids: `[M, R, K, S]`.
        beam_width: Partial sums kept for each vector; 1 is greedy, ties going to the lowest code.

    Returns:
        Codes uint8 `[M, R, N]`.
    """
    num_subspaces, num_vectors, _ = vectors.shape
    centroids = centroids.float()
    half_norms = centroids.square().sum(-1) / 2
    codes = torch.empty(num_subspaces, centroids.shape[1], num_vectors, dtype=torch.uint8, device=vectors.device)
    block = max(1, MAX_SCORES // (num_subspaces * centroids.shape[2] * beam_width))
    for start in range(0, num_vectors, block):
        part = vectors[:, start : start + block].float()
        if beam_width == 1:
            codes[:, :, start : start + block] = _encode_greedy(part, centroids, half_norms)
        else:
            codes[:, :, start : start + block] = _encode_beam(part, centroids, half_norms, beam_width)
    return codes


def _encode_greedy(vectors: torch.Tensor, centroids: torch.Tensor, half_norms: torch.Tensor) -> torch.Tensor:
    residual = vectors.clone()
    codes = []
    for stage in range(centroids.shape[1]):
        table = centroids[:, stage]
        # argmin |x - c|^2 = argmax x.c - |c|^2/2
        scores = torch.baddbmm(half_norms[:, stage, None], residual, table.mT, beta=-1)
        best = scores.argmax(-1)
        residual -= torch.gather(table, 1, best[..., None].expand_as(residual))
        codes.append(best.to(torch.uint8))
    return torch.stack(codes, 1)


def _encode_beam(
    vectors: torch.Tensor, centroids: torch.Tensor, half_norms: torch.Tensor, beam_width: int
) -> torch.Tensor:
    num_subspaces, num_vectors, width = vectors.shape
    num_centroids = centroids.shape[2]
    residual = vectors[:, :, None]
    codes = torch.empty(num_subspaces, num_vectors, 1, 0, dtype=torch.uint8, device=vectors.device)
    for stage in range(centroids.shape[1]):
        table = centroids[:, stage]
        beams = residual.shape[2]
        scores = torch.baddbmm(half_norms[:, stage, None], residual.flatten(1, 2), table.mT, beta=-1)
        # Sums compete across beams, so what each beam still misses counts as well.
        scores = scores.view(num_subspaces, num_vectors, beams, num_centroids)
        scores = scores - residual.square().sum(-1, keepdim=True) / 2
        keep = min(beam_width, beams * num_centroids)
        best = _largest(scores.flatten(2), keep)
        parent, code = best // num_centroids, best % num_centroids
        chosen = torch.gather(table, 1, code.flatten(1)[..., None].expand(-1, -1, width)).view(
            num_subspaces, num_vectors, keep, width
        )
        residual = torch.gather(residual, 2, parent[..., None].expand(-1, -1, -1, width)) - chosen
        history = torch.gather(codes, 2, parent[..., None].expand(-1, -1, -1, stage))
        codes = torch.cat([history, code[..., None].to(torch.uint8)], -1)
    # Sorted, so the first beam is the nearest sum.
    return codes[:, :, 0].transpose(1, 2)


def _largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Indices of the `count` largest of `[..., X]`, largest first; overwrites `scores`.

    A few passes of max are several times faster than topk for millions of short rows.
    """
    found = []
    for _ in range(count):
        found.append(scores.argmax(-1, keepdim=True))
        scores.scatter_(-1, found[-1], -torch.inf)
    return torch.cat(found, -1)


def decode_vectors(codes: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Sums of the coded centroids. A prefix of the stages is a valid code of a lower rate.

    Args:
        codes: uint8 `[B, M, R', T]` with R' up to R.
        centroids: `[M, R, K, S]`, float16, bfloat16 or float32.

    Returns:
        `[B, T, M*S]` in the dtype of `centroids`, summed in float32 where the device's kernel does so.
    """
    batch, num_subspaces, num_stages, num_tokens = codes.shape
    table = centroids.flatten(0, 2)
    first_row = torch.arange(num_subspaces * centroids.shape[1], device=codes.device) * centroids.shape[2]
    first_row = first_row.view(num_subspaces, -1)[:, :num_stages]
    rows = codes.permute(0, 3, 1, 2) + first_row
    summed = F.embedding_bag(rows.reshape(-1, num_stages), table, mode="sum")
    return summed.view(batch, num_tokens, -1)


def look_up(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Rows of a stage's centroids `[M, K, S]` by codes `[M, N]`, as `[M, N, S]`."""
    return torch.gather(table, 1, codes.long()[..., None].expand(-1, -1, table.shape[-1]))


def split_subspaces(states: torch.Tensor, width: int) -> torch.Tensor:
    """`[B, H, T, D]` to `[M, B*T, S]`: concatenate the heads, then cut into subspaces of `width` channels."""
    batch, num_heads, num_tokens, head_dim = states.shape
    flat = states.transpose(1, 2).reshape(batch * num_tokens, num_heads * head_dim // width, width)
    return flat.transpose(0, 1)


def rotate(states: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Apply rotary embedding to the first channels of every head, in float32.

    Args:
        states: `[B, H, T, D]`.
        cos_sin: Cosine and sine, each `[B or 1, T, P]` for P half-split channel pairs, 2P <= D.

    Returns:
        float32 `[B, H, T, D]`.
    """
    cos, sin = (table[:, None].float() for table in cos_sin)
    pairs = cos.shape[-1]
    first, second, rest = states.float().split([pairs, pairs, states.shape[-1] - 2 * pairs], -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def unrotate(states: torch.Tensor, cos_sin: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Undo `rotate`, also where a scaled variant folded a factor into cosine and sine; float32."""
    cos, sin = (table[:, None].float() for table in cos_sin)
    # yarn and longrope scale cos and sin, so the inverse is the transpose over cos^2 + sin^2, not the transpose.
    norm = cos.square() + sin.square()
    return rotate(states, (cos_sin[0] / norm[:, 0], -cos_sin[1] / norm[:, 0]))


def encode(
    states: torch.Tensor,
    centroids: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    beam_width: int = 1,
) -> None:
    """Encode key or value states into their place in the cache.

    Args:
        states: `[B, H, T, D]`.
        centroids: `[M, R, K, S]`.
        cos_sin: Rotation to undo first, as in `unrotate`; None for states to be taken as they are.
        out: uint8 `[B, M, R, T]`, written; any strides.
        beam_width: As in `encode_vectors`.
    """
    batch, _, num_tokens, _ = states.shape
    plain = states if cos_sin is None else unrotate(states, cos_sin)
    codes = encode_vectors(split_subspaces(plain, centroids.shape[-1]), centroids, beam_width)
    out.copy_(codes.unflatten(-1, (batch, num_tokens)).permute(2, 0, 1, 3))


def decode(
    codes: torch.Tensor,
    centroids: torch.Tensor,
    num_heads: int,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """States `[B, H, T, D]` that codes `[B, M, R', T]` stand for, rotated if `cos_sin` is given.

    Tokens are decoded in blocks, so that little but the result is held. It is written to `out` if given.
    """
    batch, num_tokens = codes.shape[0], codes.shape[-1]
    width = centroids.shape[0] * centroids.shape[-1]
    if out is None:
        out = centroids.new_empty(batch, num_heads, num_tokens, width // num_heads)
    block = max(1, MAX_DECODED // max(1, batch * width))
    for start in range(0, num_tokens, block):
        tokens = slice(start, start + block)
        flat = decode_vectors(codes[..., tokens], centroids)
        states = flat.unflatten(-1, (num_heads, -1)).transpose(1, 2)
        if cos_sin is not None:
            states = rotate(states, (cos_sin[0][:, tokens], cos_sin[1][:, tokens]))
        out[:, :, tokens] = states
    return out
