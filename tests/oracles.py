"""Slow float64 versions of the equations, to compare every implementation with. Never imported by the package."""

from __future__ import annotations

import math

import torch


def rotate_oracle(
    states: torch.Tensor, positions: torch.Tensor, inv_freq: torch.Tensor, factor: float
) -> torch.Tensor:
    """RoPE on the first 2P channels of `[B, H, T, D]` at positions `[B, T]`; the others stay."""
    pairs = inv_freq.numel()
    angles = positions.double()[:, None, :, None] * inv_freq.double()
    cos, sin = angles.cos() * factor, angles.sin() * factor
    out = states.double().clone()
    first, second = out[..., :pairs].clone(), out[..., pairs : 2 * pairs].clone()
    out[..., :pairs] = first * cos - second * sin
    out[..., pairs : 2 * pairs] = second * cos + first * sin
    return out


def encode_oracle(states: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Greedy residual codes of plain states `[B, H, T, D]`: int64 `[B, M, R, T]`."""
    batch, heads, tokens, head_dim = states.shape
    num_subspaces, num_stages, _, width = centroids.shape
    flat = states.double().permute(0, 2, 1, 3).reshape(batch, tokens, num_subspaces, width)
    codes = torch.empty(batch, num_subspaces, num_stages, tokens, dtype=torch.long)
    for subspace in range(num_subspaces):
        residual = flat[:, :, subspace]
        for stage in range(num_stages):
            table = centroids[subspace, stage].double()
            distances = (residual[:, :, None] - table).square().sum(-1)
            codes[:, subspace, stage] = distances.argmin(-1)
            residual = residual - table[codes[:, subspace, stage]]
    return codes


def decode_oracle(codes: torch.Tensor, centroids: torch.Tensor, num_heads: int) -> torch.Tensor:
    """States `[B, H, T, D]` in float64 that codes `[B, M, R, T]` stand for."""
    batch, num_subspaces, num_stages, tokens = codes.shape
    parts = []
    for subspace in range(num_subspaces):
        tables = centroids[subspace].double()
        parts.append(sum(tables[stage][codes[:, subspace, stage].long()] for stage in range(num_stages)))
    flat = torch.cat(parts, -1)
    return flat.view(batch, tokens, num_heads, num_subspaces * centroids.shape[-1] // num_heads).transpose(1, 2)


def attention_oracle(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Grouped-query attention in float64; zeros for a query that sees nothing.

    `query` is `[B, Hq, Q, D]`, `keys` and `values` are `[B, H, T, D]`, `visible` broadcasts to `[B, Hq, Q, T]`.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(groups, 1) for part in (keys, values))
    scores = query.double() @ keys.mT * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, -math.inf)
    # A query that is NaN must stay so.
    weights = torch.where(visible.any(-1, keepdim=True), torch.softmax(scores, -1), 0.0)
    return weights @ values


def visible_oracle(
    num_codes: int,
    num_exact: int,
    num_queries: int,
    starts: torch.Tensor,
    sink_counts: torch.Tensor,
    sink_length: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each query of a decode step sees, `[B, 1 or Hq, Q, C + E]`: codes, then sinks, then the window."""
    batch = starts.numel()
    visible = torch.ones(batch, 1, num_queries, num_codes + num_exact, dtype=torch.bool)
    if mask is None:
        for i in range(num_queries):
            visible[:, :, i, num_codes + num_exact - num_queries + 1 + i :] = False
    else:
        visible = mask.cpu().clone()
    for row in range(batch):
        visible[row, ..., : int(starts[row])] = False
        visible[row, ..., num_codes + int(sink_counts[row]) : num_codes + sink_length] = False
    return visible
