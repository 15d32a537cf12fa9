"""What rotary embedding a model uses, read from the model and checked against the cos/sin it really computed."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .models import CACHE_ARGUMENTS, attention_modules
from .ops.reference import rotate

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
# Cosines are compared after the model rounded them; two roundings of one number differ by at most this many ulps.
MAX_ULPS = 2
# What the code of a model raises where it meets arguments that it was not written for.
_MISFITS = (AttributeError, LookupError, RuntimeError, TypeError, ValueError)

_probed: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary embedding of one layer, half-split layout: channel i turns with channel i + P.

    Immutable and compared by identity: layers that turn alike share one.

    Attributes:
        inv_freq: float32 `[P]`, radians per position of each channel pair.
        scaling: Factor that the model folds into cos and sin (1 but for yarn and longrope).
        max_tokens: Longest context, in tokens, for which `inv_freq` holds; None if it always does.
        longer: What replaces this embedding in longer contexts (longrope).
    """

    inv_freq: torch.Tensor
    scaling: float
    max_tokens: int | None = None
    longer: Rotary | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> Rotary:
        return self

    def for_length(self, num_tokens: int) -> Rotary:
        """The embedding that the model uses when its first forward pass sees `num_tokens` tokens."""
        if self.longer is None or self.max_tokens is None or num_tokens <= self.max_tokens:
            return self
        return self.longer

    def cos_sin(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine as the model computes them.

        Args:
            positions: `[B, T]` integers.
            dtype: What the model rounds its tables to; float32 for unrounded ones.

        Returns:
            Two float32 tensors `[B, T, P]` on the device of `positions`, holding values rounded to `dtype`.
        """
        angles = positions[..., None].float() * self.inv_freq.to(positions.device)
        cos, sin = angles.cos() * self.scaling, angles.sin() * self.scaling
        return cos.to(dtype).float(), sin.to(dtype).float()

    def error(self, positions: torch.Tensor, seen: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """How far our tables are from the `position_embeddings` that the model gave its attention layers.

        Args:
            positions: `[B, T]`.
            seen: cos and sin `[B or 1, T, 2P]` in the model's dtype.

        Returns:
            The largest difference over the tolerance, a float32 number on the device; for `check`.

        Raises:
            ValueError: if they differ in layout.
        """
        pairs, errors = self.inv_freq.numel(), [torch.zeros((), device=positions.device)]
        for ours, theirs in zip(self.cos_sin(positions, seen[0].dtype), seen, strict=True):
            if theirs.shape[-1] != 2 * pairs:
                raise ValueError(
                    f"The model rotates {theirs.shape[-1]} channels of each head, but its rotary module has "
                    f"{pairs} frequencies for {2 * pairs}. This rotary layout is not supported."
                )
            tolerance = MAX_ULPS * torch.finfo(theirs.dtype).eps * max(1.0, self.scaling)
            if theirs.numel():
                # A model spread over devices computes its tables on one of them.
                halves = theirs.to(ours.device).float().unflatten(-1, (2, pairs))
                errors.append((halves - ours[..., None, :]).abs().max() / tolerance)
        return torch.stack(errors).max()

    @staticmethod
    def check(error: float) -> None:
        """Refuse an embedding that `error` found to differ from the model's.

        Raises:
            ValueError: if it is above 1 or NaN: keys would be un-rotated wrongly.
        """
        if not error <= 1:
            raise ValueError(
                f"The model's rotary embedding differs from the one read from it by {error:.3g} times the tolerance "
                f"({MAX_ULPS} roundings), so keys cannot be un-rotated exactly. If the model was given another dtype "
                "since the cache was made, make a new cache; else its layout (interleaved pairs, several axes) or its "
                "length-dependent frequencies are not supported."
            )


def read_rotary(model: PreTrainedModel, layers: Iterable[int]) -> dict[int, Rotary | None]:
    """Read the rotary embedding of decoder layers.

    Args:
        model: A transformers decoder model.
        layers: Indices of full-attention layers.

    Returns:
        For each layer its embedding (one object for all that share it), or None where keys are not rotated.

    Raises:
        ValueError: by name, for a type, layout or module that is not supported.
    """
    attention = attention_modules(model)
    rotated = {layer: rotates_keys(model, attention[layer]) for layer in layers}
    first = next((layer for layer, does in rotated.items() if does), None)
    rotary = None if first is None else _read_module(model, attention[first])
    return {layer: rotary if does else None for layer, does in rotated.items()}


def _read_module(model: PreTrainedModel, attention: nn.Module) -> Rotary:
    name = model.config.model_type
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    prefix = ""
    if isinstance(parameters.get("full_attention"), dict):
        parameters, prefix = parameters["full_attention"], "full_attention_"
    rope_type = parameters.get("rope_type", "default")
    if "mrope_section" in parameters:
        raise ValueError(f"{name!r} uses multi-axis rotary embedding (mrope), which is not supported.")
    if rope_type not in SUPPORTED_ROPE_TYPES:
        reason = " (its frequencies change with the context length)" if rope_type == "dynamic" else ""
        raise ValueError(
            f"Rotary type {rope_type!r} of {name!r} is not supported{reason}. Supported: {SUPPORTED_ROPE_TYPES}."
        )
    module = _rotary_module(model, attention)
    if not isinstance(module, nn.Module) or not hasattr(module, f"{prefix}inv_freq"):
        raise ValueError(
            f"{name!r} has a rotary embedding, but not as a module named rotary_emb with inv_freq; it is not "
            'supported. GSRQConfig.for_model(..., key_space="after_rope") quantizes keys as they are, at some loss.'
        )
    scaling = float(getattr(module, f"{prefix}attention_scaling", 1.0))
    # The current buffer of a longrope model depends on the last prompt; the original one does not.
    inv_freq = getattr(module, f"{prefix}original_inv_freq").detach()
    if inv_freq.is_meta:
        raise ValueError(f"The rotary frequencies of this {name!r} are on the meta device; load the model's weights.")
    inv_freq = inv_freq.float().cpu()
    check_layout(attention, inv_freq.numel(), name)
    if rope_type != "longrope":
        return Rotary(inv_freq, scaling)
    max_tokens = parameters["original_max_position_embeddings"]
    long_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](config, device="cpu", seq_len=max_tokens + 1)
    return Rotary(inv_freq, scaling, max_tokens, longer=Rotary(long_freq.float(), scaling))


def _rotary_module(model: PreTrainedModel, attention: nn.Module) -> Any:
    return getattr(model.get_decoder(), "rotary_emb", None) or getattr(attention, "rotary_emb", None)


def rotates_keys(model: PreTrainedModel, attention: nn.Module) -> bool:
    """Whether an attention layer rotates its keys: what it is given, and what it does with it.

    Raises:
        ValueError: if that cannot be found out, or if the layer turns by frequencies of its own.
    """
    config = model.config.get_text_config(decoder=True)
    signs = ("rope_parameters", "rotary_dim", "rotary_pct", "rope_theta")
    # RoFormer's has no other sign, and ALiBi takes the place of a rotary embedding.
    declared = any(getattr(config, sign, None) for sign in signs) or hasattr(config, "rotary_value")
    if not declared or getattr(config, "alibi", False):
        return False
    layer: Any = attention.layer_idx
    # Models with this list give each layer a rotary embedding of its own, or none.
    thetas = getattr(config, "layer_rope_theta", None)
    if (thetas and not thetas[layer]) or getattr(model.get_decoder(), "rotary_emb", attention) is None:
        return False
    if thetas and thetas[layer] != config.rope_parameters["rope_theta"]:
        raise ValueError(
            f"Layer {layer} of {config.model_type!r} has a rotary embedding of its own (rope_theta {thetas[layer]}, "
            f"the model {config.rope_parameters['rope_theta']}); only one for all layers is supported."
        )
    if "position_embeddings" not in inspect.signature(type(attention).forward).parameters:
        return True
    if attention not in _probed:
        module = _rotary_module(model, attention)
        frequencies = getattr(module, "inv_freq", getattr(module, "full_attention_inv_freq", None))
        width = getattr(attention, "head_dim", 0) if frequencies is None else 2 * frequencies.numel()
        try:
            _probed[attention] = _keys_follow_positions(attention, getattr(attention, "config", config), width)
        except _MISFITS as error:
            raise ValueError(
                f"Whether layer {layer} of {config.model_type!r} rotates its keys cannot be found out, because "
                f"{type(attention).__name__} does not run by itself ({type(error).__name__}); a rotary embedding "
                "that is not known is not supported. "
                'GSRQConfig.for_model(..., key_space="after_rope") quantizes keys as they are, at some loss.'
            ) from error
    return _probed[attention]


class _Update(Exception):
    """Carries what an attention module that is being probed hands to its cache: keys and layer."""


class _ProbeCache(Cache):
    """Ends a forward pass where an attention module hands over its keys."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        """Raise the keys and the layer."""
        raise _Update(key_states, layer_idx)


def _keys_follow_positions(attention: nn.Module, config: Any, width: int) -> bool:
    """Whether keys depend on cos and sin; see `_probe`."""
    return _probe(attention, config, width)[0].requires_grad


def check_cache_layer(attention: nn.Module) -> None:
    """Check that an attention module writes to the cache layer of its own index, in every call.

    Models that run some layers several times keep states for each time: they tell the module by how many cache layers
    to go further, in an integer that is zero if they say nothing.

    Raises:
        ValueError: if it may write to another layer, or if that cannot be found out.
    """
    parameters = inspect.signature(type(attention).forward).parameters
    offsets = [name for name, parameter in parameters.items() if type(parameter.default) is int]
    for name in offsets:
        config: Any = getattr(attention, "config", None)
        width: Any = getattr(attention, "head_dim", 0)
        try:
            layers = {_probe(attention, config, width, **{name: value})[1] for value in (0, 1)}
        except _MISFITS as error:
            raise ValueError(
                f"{type(attention).__name__} takes a number {name}, and whether it is that of a cache layer cannot be "
                f"found out, because it does not run by itself ({type(error).__name__}); this architecture is not "
                "supported."
            ) from error
        if layers != {attention.layer_idx}:
            raise ValueError(
                f"{type(attention).__name__} writes to other cache layers than its own (its {name} says to which): "
                "the model runs some of its layers several times. This architecture is not supported."
            )


def _probe(attention: nn.Module, config: Any, width: int, **more: Any) -> tuple[torch.Tensor, Any]:
    """What a module like this one, that has shapes and no numbers, hands to its cache: keys, and the layer.

    So it costs nothing and asks nothing of the weights, which may be quantized or on any device. Keys that depend on
    cos and sin ask for their gradients.

    Args:
        attention: The module.
        config: What it is built from.
        width: Channels 2P of cos and sin.
        **more: Other arguments of its forward.

    Raises:
        TypeError: if the module hands no keys to a cache; and whatever its code raises that cannot be run so.
    """
    with torch.inference_mode(False), torch.enable_grad(), torch.device("meta"):
        wanted = inspect.signature(type(attention)).parameters
        own = {"config": config, **{name: getattr(attention, name) for name in wanted if hasattr(attention, name)}}
        like = type(attention)(**{name: own[name] for name in wanted if name in own}).requires_grad_(False)
        dtype = next(like.parameters()).dtype
        given = {
            "hidden_states": torch.empty(1, 2, config.hidden_size, dtype=dtype),
            "position_ids": torch.zeros(1, 2, dtype=torch.long),
            "position_embeddings": tuple(torch.empty(1, 2, width, dtype=dtype, requires_grad=True) for _ in range(2)),
            **dict.fromkeys(CACHE_ARGUMENTS, _ProbeCache()),
            **more,
        }
        parameters = inspect.signature(like.forward).parameters
        required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
        arguments = {**dict.fromkeys(required), **{name: given[name] for name in given if name in parameters}}
        try:
            like(**arguments)
        except _Update as update:
            return update.args[0], update.args[1]
    raise TypeError("it hands no keys to its cache")


def check_layout(attention: nn.Module, pairs: int, name: str) -> None:
    """Run the model's own rotation on random channels and compare it with ours.

    Raises:
        ValueError: if the model has no such function, or pairs channels in another way.
    """
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise ValueError(
            f"{name!r} rotates keys by a function we do not know ({type(attention).__module__} has no "
            "apply_rotary_pos_emb); it is not supported."
        )
    # Said of each, since torch has defaults that a user may have changed.
    plain: Any = {"dtype": torch.float32, "device": "cpu"}
    generator = torch.Generator("cpu").manual_seed(0)
    states = torch.randn(1, 1, 3, 2 * pairs, generator=generator, **plain)
    angles = torch.randn(1, 3, pairs, generator=generator, **plain)
    cos, sin = angles.cos(), angles.sin()
    try:
        theirs = apply(states, states, torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))[1]
    except _MISFITS as error:
        raise ValueError(
            f"{name!r} rotates keys by a function that takes other arguments than (query, key, cos, sin) of one width "
            f"({type(error).__name__}); it is not supported."
        ) from error
    if not torch.allclose(theirs, rotate(states, (cos, sin)), atol=1e-5):
        raise ValueError(f"{name!r} rotates interleaved channel pairs; only the half-split layout is supported.")
