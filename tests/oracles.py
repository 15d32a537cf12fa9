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
    counts: dict[str, list[int]],
    capacity: int,
    sink_length: int,
    ring_length: int,
    num_queries: int,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """What each query of a decode step sees, `[B, 1 or Hq, Q, C + sink_length + W + Q]`.

    The last axis holds codes, slots of sinks, slots of the ring, and new tokens; `counts` has a number for each row of
    the batch under each name of `Count`.
    """
    batch = len(counts["NUM_CODES"])
    num_heads = 1 if mask is None else mask.shape[1]
    visible = torch.zeros(batch, num_heads, num_queries, capacity + sink_length + ring_length + num_queries).bool()
    for row in range(batch):
        here = {name: numbers[row] for name, numbers in counts.items()}
        # The token in each place; -1 where there is none.
        codes = torch.full((capacity,), -1)
        seen = range(here["FIRST_CODE"], here["NUM_CODES"])
        codes[seen.start : seen.stop] = sink_length + torch.arange(seen.start, max(seen.start, seen.stop))
        sinks = torch.full((sink_length,), -1)
        sinks[: here["NUM_SINKS"]] = here["FIRST_TOKEN"] + torch.arange(here["NUM_SINKS"])
        ring = torch.full((ring_length,), -1)
        for i in range(here["NUM_EXACT"]):
            ring[(here["RING_HEAD"] + i) % ring_length] = here["NUM_STORED"] + i
        new = here["NUM_STORED"] + here["NUM_EXACT"] + torch.arange(num_queries)
        tokens = torch.cat([codes, sinks, ring, new])
        for query in range(num_queries):
            if mask is None:
                visible[row, :, query] = (tokens >= 0) & ~torch.isin(tokens, new[query + 1 :])
            else:
                allowed = mask.cpu()[row % mask.shape[0], :, query]
                visible[row, :, query] = (tokens >= 0) & allowed[:, tokens.clamp(min=0)]
    return visible
