"""Key codebooks as the score kernel reads them: channel pairs that rotate together lie together, in float16."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import torch

# Channel pairs of one table row, the best first. A row of 32 pairs is one 128-byte cache line.
ROW_PAIRS = (32, 16, 8)
# A row of 64 pairs is two lines, one for each half; needed where the halves of a pair come from different subspaces.
ROW_PAIRS_UNPAIRED = (64, 32, 16, 8)
# Sums over all stages stay below this power of two, far from float16's 65,504 also after a rotation.
MAX_EXPONENT = 14


@dataclass(frozen=True)
class KeyLayout:
    """Where the channel pairs of a head lie.

    Attributes:
        pairs: Channel pairs P of one table row; a head has D / 2P rows, its slices.
        paired: Whether both halves of every slice come from one subspace, hence from one code.
        first: Channels of the pairs' first halves, D/2 integers.
        second: Channels of their second halves.
        subspaces: Subspace of the first and of the second half, for each of the H * D / 2P slices.
    """

    pairs: int
    paired: bool
    first: list[int]
    second: list[int]
    subspaces: list[tuple[int, int]]


@dataclass(frozen=True)
class KeyTables:
    """A key codebook prepared for the score kernel.

    Attributes:
        tables: float16 `[H * slices, R, K, 2P]`: centroids times 2^-exponent. Paired rows hold
            (a0 a1 b0 b1 a2 a3 b2 b3 ...) for first halves a and second halves b, others (a0 a1 ... b0 b1 ...).
        subspaces: int32 `[H * slices, 2]`, as in `KeyLayout`.
        frequencies: float32 `[D/2]`, radians a position; 0 for pairs that do not rotate.
        amplitudes: float32 `[D/2]`: the factor folded into cosine and sine, 1 for pairs that do not rotate.
        exponent: The power of two taken out of the centroids.
        rotary_dim: Channels of a head that rotate.
        paired: As in `KeyLayout`.
    """

    tables: torch.Tensor
    subspaces: torch.Tensor
    frequencies: torch.Tensor
    amplitudes: torch.Tensor
    exponent: int
    rotary_dim: int
    paired: bool

    def turning(self, inv_freq: torch.Tensor | None, rope_scaling: float) -> KeyTables:
        """The same codebook, shared, for another rotary embedding of as many channels.

        Args:
            inv_freq: float32 `[rotary_dim / 2]`; None if keys do not rotate.
            rope_scaling: Factor of cosine and sine.
        """
        if inv_freq is None:
            return self
        frequencies, amplitudes = torch.zeros_like(self.frequencies), torch.ones_like(self.amplitudes)
        frequencies[: inv_freq.numel()] = inv_freq
        amplitudes[: inv_freq.numel()] = rope_scaling
        return replace(self, frequencies=frequencies, amplitudes=amplitudes)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        return sum(part.nbytes for part in (self.tables, self.subspaces, self.frequencies, self.amplitudes))


@cache
def key_layout(num_heads: int, head_dim: int, subspace_dim: int, rotary_dim: int) -> KeyLayout | None:
    """Slices of channel pairs such that each half of a slice lies in one subspace; None where there are none.

    Args:
        num_heads: H.
        head_dim: D, even.
        subspace_dim: S.
        rotary_dim: Rotating channels, even, up to D. The others are paired as well, with angle zero.
    """
    half, rest = rotary_dim // 2, (head_dim - rotary_dim) // 2
    first = [pair if pair < half else pair + half for pair in range(head_dim // 2)]
    second = [channel + (half if pair < half else rest) for pair, channel in enumerate(first)]
    for paired, sizes in ((True, ROW_PAIRS), (False, ROW_PAIRS_UNPAIRED)):
        for pairs in sizes:
            if head_dim // 2 % pairs:
                continue
            subspaces = []
            for slot in range(0, num_heads * head_dim // 2, pairs):
                head, pair = divmod(slot, head_dim // 2)
                halves = [
                    {(head * head_dim + channel) // subspace_dim for channel in channels[pair : pair + pairs]}
                    for channels in (first, second)
                ]
                if len(halves[0]) > 1 or len(halves[1]) > 1 or (paired and halves[0] != halves[1]):
                    break
                subspaces.append((halves[0].pop(), halves[1].pop()))
            else:
                return KeyLayout(pairs, paired, first, second, subspaces)
    return None


def prepare_keys(
    centroids: torch.Tensor,
    num_heads: int,
    head_dim: int,
    inv_freq: torch.Tensor | None,
    rope_scaling: float = 1.0,
) -> KeyTables:
    """Rearrange a key codebook for `decode_attention`; once for each codebook, since it reads the largest centroid.

    The rearrangement is exact for float16 centroids and, but for numbers 2^-28 times the largest, for bfloat16 ones.

    Args:
        centroids: `[M, R, K, S]` in the model's dtype.
        num_heads: H.
        head_dim: D.
        inv_freq: float32 `[rotary_dim / 2]`; None if keys do not rotate.
        rope_scaling: Factor of cosine and sine.

    Returns:
        The tables, on the device of `centroids`.

    Raises:
        ValueError: if no layout fits, or a centroid is not finite.
    """
    num_stages, num_centroids, subspace_dim = centroids.shape[1:]
    rotary_dim = 0 if inv_freq is None else 2 * inv_freq.numel()
    layout = key_layout(num_heads, head_dim, subspace_dim, rotary_dim)
    if layout is None:
        raise ValueError(
            f"Key subspaces of {subspace_dim} channels do not divide the channel pairs of heads of {head_dim} "
            f"({rotary_dim} rotating) into rows of at least {ROW_PAIRS[-1]} pairs; use backend='torch'."
        )
    device = centroids.device
    bound = centroids.abs().amax((0, 2, 3)).float().sum().item()
    if not math.isfinite(bound):
        raise ValueError("A key centroid is not finite.")
    exponent = math.ceil(math.log2(bound)) - MAX_EXPONENT if bound else 0
    halves = []
    for side, channels in enumerate((layout.first, layout.second)):
        # [H * slices, P]: channels of each slice inside its subspace.
        inside = torch.tensor(channels, device=device).view(-1, layout.pairs).repeat(num_heads, 1)
        head = torch.arange(num_heads, device=device).repeat_interleave(head_dim // 2 // layout.pairs)
        inside = (inside + head[:, None] * head_dim) % subspace_dim
        source = torch.tensor([subspaces[side] for subspaces in layout.subspaces], device=device)
        rows = centroids[source].float() * 2.0**-exponent
        halves.append(rows.gather(-1, inside[:, None, None].expand(-1, num_stages, num_centroids, -1)).half())
    if layout.paired:
        halves = [half.unflatten(-1, (-1, 2)) for half in halves]
        tables = torch.stack(halves, -2).flatten(-3)
    else:
        tables = torch.cat(halves, -1)
    no_turn = torch.zeros(head_dim // 2, device=device)
    return KeyTables(
        tables=tables.contiguous(),
        subspaces=torch.tensor(layout.subspaces, dtype=torch.int32, device=device),
        frequencies=no_turn,
        amplitudes=no_turn + 1,
        exponent=exponent,
        rotary_dim=rotary_dim,
        paired=layout.paired,
    ).turning(inv_freq, rope_scaling)
