"""What a cache holds in memory, counted from its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .config import GSRQConfig
from .layer import GSRQLayer
from .state import TokenState


@dataclass(frozen=True)
class MemoryReport:
    """Bytes that a cache holds on its devices, and what a plain cache would hold for the same tokens.

    Attributes:
        tokens: Cached tokens of one row, padding included.
        codes: Codes in use: R*M bytes per stored token, layer and kind.
        reserved: Room for codes that later tokens will fill.
        sinks: Exact first tokens.
        window: Exact latest tokens and the slots for those to come.
        positions: Token positions, row starts and the counts that kernels read.
        workspace: Memory that the kernels of a decoding step work in.
        native: Layers that are not compressed (sliding window, linear attention and others).
        codebooks: Run-time centroids, and the key tables of the kernels; one set serves all caches of a model.
        plain: What transformers' own cache would hold: every token in the model's dtype.
    """

    tokens: int
    codes: int
    reserved: int
    sinks: int
    window: int
    positions: int
    workspace: int
    native: int
    codebooks: int
    plain: int

    @property
    def cache(self) -> int:
        """Everything but the codebooks."""
        held = self.codes + self.reserved + self.sinks + self.window + self.positions
        return held + self.workspace + self.native

    @property
    def total(self) -> int:
        """The cache and the codebooks."""
        return self.cache + self.codebooks

    def __str__(self) -> str:
        names = (
            "codes",
            "reserved",
            "sinks",
            "window",
            "positions",
            "workspace",
            "native",
            "codebooks",
            "total",
            "plain",
        )
        rows = [f"{name:<10}{getattr(self, name) / 2**20:>12,.3f} MiB" for name in names]
        share = f"{self.cache / self.plain:.1%}" if self.plain else "-"
        rows.append(f"{self.tokens} tokens; the cache without codebooks is {share} of a plain one.")
        return "\n".join(rows)


def measure(
    layers: Sequence[Any], tokens: TokenState, workspaces: Iterable[torch.Tensor], config: GSRQConfig
) -> MemoryReport:
    """Count the layers of a cache and what they share; see `GSRQCache.memory`."""
    compressed = [layer for layer in layers if isinstance(layer, GSRQLayer) and layer.is_initialized]
    native = held_bytes([vars(layer) for layer in layers if not isinstance(layer, GSRQLayer)])
    plain, codebooks, codes, room, sinks, exact = native, config.codebook_bytes, 0, 0, 0, 0
    used = tokens.codes_of(tokens.num_stored)
    for layer in compressed:
        for held in layer.state.codes.values():
            codes += held[..., :used].nbytes
            room += held.nbytes
        for kind, held in layer.state.exact.items():
            sinks += layer.state.sinks(kind).nbytes
            exact += held.nbytes
    if compressed:
        state = compressed[0].state
        element = sum(held.element_size() for held in state.exact.values())
        plain += state.batch * tokens.length * config.dense_bytes_per_token(element) // 2
        codebooks = held_bytes([q.tensors() for layer in compressed for q in layer.quantizers.values()])
    return MemoryReport(
        tokens=tokens.length,
        codes=codes,
        reserved=room - codes,
        sinks=sinks,
        window=exact - sinks,
        positions=held_bytes(tokens.tensors()),
        workspace=held_bytes(list(workspaces)),
        native=native,
        codebooks=codebooks,
        plain=plain,
    )


def held_bytes(holder: Any) -> int:
    """Bytes that tensors keep alive: the whole storage where one is a part of it, and a shared storage once.

    Args:
        holder: A tensor, or a list or mapping of anything, in which tensors are looked for.
    """
    storages = (tensor.untyped_storage() for tensor in _tensors(holder))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(holder: Any) -> Iterator[torch.Tensor]:
    if isinstance(holder, torch.Tensor):
        yield holder
    elif isinstance(holder, Mapping):
        yield from _tensors(list(holder.values()))
    elif isinstance(holder, (list, tuple)):
        for part in holder:
            yield from _tensors(part)
