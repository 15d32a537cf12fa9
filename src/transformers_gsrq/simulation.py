"""Dense stand-ins for a compressed cache: states replaced by what a method makes of them, in the model's own dtype.

They save no memory. They exist to compare methods in one pipeline, to switch keys or values off, and to let gradients
through; that they give what `GSRQCache` gives is tested.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from .codebooks import GSRQCodebooks
from .compat import holds_states, native_layers
from .config import KINDS, Kind
from .hooks import attach
from .models import attention_modules, execution_device
from .ops import encode_vectors
from .ops.reference import decode_vectors, rotate, split_subspaces, unrotate
from .rope import Rotary, read_rotary
from .steps import Step, SteppedCache

# Takes states [B, H, T, D] and returns what a cache would give back for them, same shape and dtype.
Codec = Callable[[torch.Tensor], torch.Tensor]


class Method(Protocol):
    """A way to store keys and values."""

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers it compresses."""

    @property
    def key_space(self) -> str:
        """Whether its key codec takes keys "before_rope" or "after_rope"."""

    @property
    def bits(self) -> float:
        """Stored bits per key/value element, scales counted."""

    def codec(self, layer: int, kind: Kind, device: torch.device, dtype: torch.dtype) -> Codec | None:
        """What to do with the states of one layer and kind; None leaves them exact."""


@dataclass(frozen=True)
class CodebookMethod:
    """Codebooks as a method, whole or in part.

    Attributes:
        codebooks: The codebooks.
        beam_width: Partial sums kept when encoding.
        kinds: Kinds to compress; the others stay exact.
        only_layers: Layers to compress; None for all that the codebooks have.
    """

    codebooks: GSRQCodebooks
    beam_width: int = 1
    kinds: tuple[Kind, ...] = ("key", "value")
    only_layers: tuple[int, ...] | None = None

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the layers it compresses."""
        return self.codebooks.config.layers

    @property
    def key_space(self) -> str:
        """As the codebooks' config says."""
        return self.codebooks.config.key_space

    @property
    def bits(self) -> float:
        """Bits per element of both kinds together."""
        return self.codebooks.config.bits()

    def codec(self, layer: int, kind: Kind, device: torch.device, dtype: torch.dtype) -> Codec | None:
        """Encode and decode with the codebooks."""
        if kind not in self.kinds or (self.only_layers is not None and layer not in self.only_layers):
            return None
        centroids = self.codebooks.centroids(layer, kind, device, dtype)

        def code(states: torch.Tensor) -> torch.Tensor:
            batch, num_heads, num_tokens, _ = states.shape
            codes = encode_vectors(split_subspaces(states, centroids.shape[-1]), centroids, self.beam_width)
            flat = decode_vectors(codes.unflatten(-1, (batch, num_tokens)).permute(2, 0, 1, 3), centroids)
            return flat.unflatten(-1, (num_heads, -1)).transpose(1, 2)

        return code


@dataclass(frozen=True)
class Coding:
    """Codecs of one layer, ready to apply to what the layer's cache is given.

    Attributes:
        codecs: Codec by kind; a kind that is missing stays exact.
        rotary: Rotary embedding to undo before the key codec and to apply after it; None for keys as they come.
    """

    codecs: Mapping[Kind, Codec]
    rotary: Rotary | None

    def apply(
        self, states: Mapping[Kind, torch.Tensor], positions: torch.Tensor | None, length: int
    ) -> dict[Kind, torch.Tensor]:
        """Replace states `[B, H, T, D]` (keys after rotary embedding) at `positions` `[B or 1, T]`.

        `length` counts all tokens up to the end of their forward pass: by it a longrope model chose its frequencies.
        """
        out = dict(states)
        for kind, codec in self.codecs.items():
            given = states[kind]
            if kind == "key" and self.rotary is not None:
                if positions is None:
                    raise ValueError(
                        "The model did not pass position_ids to its attention layers, so its keys cannot be "
                        "un-rotated."
                    )
                rotary, positions = self.rotary.for_length(length), positions.to(given.device)
                plain = unrotate(given, rotary.cos_sin(positions, given.dtype))
                made = rotate(codec(plain), rotary.cos_sin(positions, torch.float32))
            else:
                made = codec(given)
            out[kind] = made.to(given.dtype)
        return out


def codings(model: PreTrainedModel, method: Method) -> dict[int, Coding]:
    """The codecs of a method for each layer of a model, on the device that the layer's states are on."""
    rotaries: dict[int, Rotary | None] = dict.fromkeys(method.layers)
    if method.key_space == "before_rope":
        rotaries = read_rotary(model, method.layers)
    out = {}
    for layer in method.layers:
        device = layer_device(model, layer)
        made = {kind: method.codec(layer, kind, device, model.dtype) for kind in KINDS}
        out[layer] = Coding({kind: codec for kind, codec in made.items() if codec is not None}, rotaries[layer])
    return out


def layer_device(model: PreTrainedModel, layer: int) -> torch.device:
    """Device that a decoder layer's attention computes on."""
    return execution_device(attention_modules(model)[layer])


class SimulatedLayer(DynamicLayer):
    """Plain cache layer that replaces every state it is given."""

    def __init__(self, coding: Coding) -> None:
        super().__init__()
        self.coding = coding
        self.step: Step | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace the new states `[B, H, T, D]`, keep them and return all."""
        positions = None if self.step is None else self.step.position_ids
        length = self.get_seq_length() + key_states.shape[-2]
        states = self.coding.apply({"key": key_states, "value": value_states}, positions, length)
        return super().update(states["key"], states["value"])


class StatelessLayer(SimulatedLayer):
    """Layer of one forward pass: keeps nothing, so that the pass can be recomputed for its gradients."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace states `[B, H, T, D]` and return them."""
        positions = None if self.step is None else self.step.position_ids
        states = self.coding.apply({"key": key_states, "value": value_states}, positions, key_states.shape[-2])
        return states["key"], states["value"]


class SimulatedCache(SteppedCache):
    """Cache in which every token attends to what a method stores, as with `GSRQCache(quantize_prefill=True)`.

    Args:
        model: The model; it is attached.
        coding: From `codings`; layers that are missing keep transformers' own cache layers.
        layer_class: What to put in their place.
    """

    def __init__(
        self, model: PreTrainedModel, coding: Mapping[int, Coding], layer_class: type[SimulatedLayer] | None = None
    ) -> None:
        layers = native_layers(model.config)
        for index, layer_coding in coding.items():
            layers[index] = (layer_class or SimulatedLayer)(layer_coding)
        super().__init__(layers=layers)
        attach(model)

    def stage_step(self, module: nn.Module, step: Step) -> None:
        """Keep the step with its layer."""
        layer = self.layers[module.layer_idx]
        if isinstance(layer, SimulatedLayer):
            layer.step = step

    def roll_back(self) -> None:
        """Nothing to undo: the cache is dropped with its forward pass."""


def coded_copy(
    cache: DynamicCache, coding: Mapping[int, Coding], *, residual_length: int = 128, sink_length: int = 4
) -> DynamicCache:
    """A plain cache that holds what `GSRQCache` would give back after the same prefill.

    Args:
        cache: Plain cache of a prompt without padding, from position 0 on.
        coding: From `codings`.
        residual_length: Latest tokens kept exact.
        sink_length: First tokens kept exact.

    Returns:
        A new cache; the old one stays as it is.
    """
    made = branch(cache)
    for index in coding:
        layer = cache.layers[index]
        length = layer.keys.shape[-2]
        last = length - residual_length
        if last > sink_length:
            states: dict[Kind, torch.Tensor] = {"key": layer.keys, "value": layer.values}
            positions = torch.arange(sink_length, last, device=layer.keys.device)[None]
            middle = coding[index].apply(
                {kind: part[:, :, sink_length:last] for kind, part in states.items()}, positions, length
            )
            made.layers[index].keys, made.layers[index].values = (
                torch.cat([part[:, :, :sink_length], middle[kind], part[:, :, last:]], -2)
                for kind, part in states.items()
            )
    return made


def branch(cache: DynamicCache) -> DynamicCache:
    """A cache that goes on from another and leaves it as it was; they share states that new tokens do not change."""
    made = copy.copy(cache)
    made.layers = [copy.deepcopy(layer) if holds_states(layer) else copy.copy(layer) for layer in cache.layers]
    return made


def stage_prefix(method: CodebookMethod, key_stages: int, value_stages: int) -> CodebookMethod:
    """The same method with only the first stages of its codebooks."""
    return replace(method, codebooks=method.codebooks.with_stages(key_stages, value_stages))
