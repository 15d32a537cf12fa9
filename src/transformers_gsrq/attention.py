"""Attention that reads codes: which modules can call it, and what it does when they do.

Each attention module that can be given another attention function gets a view of its config that names ours; the
model's own config stays as it is. Our function calls the original unless the hook of the module (`hooks`) passed it a
cache layer: then it attends to codes, sinks and window by kernels, and adds the new states to the window.
"""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .ops import triton as kernels

if TYPE_CHECKING:
    from .layer import GSRQLayer
    from .steps import Step

logger = logging.getLogger(__name__)

MAX_QUERIES = kernels.MAX_QUERIES
PREFIX = "gsrq_"
# Implementations whose decoding we can replace; their masks are None or boolean.
ROUTED = ("sdpa",)
# How the hook of an attention module names the cache layer that its attention function is to read.
LAYER_ARGUMENT = "gsrq_layer"


class _RoutedConfig:
    """A view of a config, for one attention module: the same values, but for the name of our attention function.

    It shares the attributes of the original, so that what a user changes there holds here too. A copy of it, or of the
    module, has the original: routing belongs to the module that was attached.
    """

    __slots__ = ("gsrq_original",)
    if TYPE_CHECKING:
        gsrq_original: Any

    def __init_subclass__(cls) -> None:
        """Nothing: transformers would make it a kind of config of its own."""

    @property
    def _attn_implementation(self) -> str | None:
        name = self.gsrq_original._attn_implementation
        return PREFIX + name if name in ROUTED else name

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self.gsrq_original._attn_implementation = value

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _itself, (self.gsrq_original,)

    def __copy__(self) -> Any:
        return copy.copy(self.gsrq_original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.gsrq_original, memo)


def _itself(config: Any) -> Any:
    return config


_routed_classes: dict[type, Any] = {}


def _routed(config: Any) -> Any:
    kind: Any = type(config)
    if kind not in _routed_classes:
        _routed_classes[kind] = type(kind)(kind.__name__, (_RoutedConfig, kind), {"__slots__": ()})
    view: Any = object.__new__(_routed_classes[kind])
    object.__setattr__(view, "__dict__", config.__dict__)
    view.gsrq_original = config
    return view


def route(model: PreTrainedModel, modules: Mapping[int, nn.Module]) -> None:
    """Let attention modules call our attention function, where transformers says that they can be given another."""
    if not model._can_set_attn_implementation():
        return
    for module in modules.values():
        if not is_routed(module) and why_not_routed(module) is None:
            module.config = _routed(module.config)


def unroute(modules: Mapping[int, nn.Module]) -> None:
    """Give attention modules their own configs back."""
    for module in modules.values():
        if isinstance(module.config, _RoutedConfig):
            module.config = module.config.gsrq_original


def is_routed(module: nn.Module) -> bool:
    """Whether an attention module has a config of ours."""
    return isinstance(getattr(module, "config", None), _RoutedConfig)


def why_not_routed(module: nn.Module) -> str | None:
    """Why an attention module cannot be given our attention function, whatever the model; None if it can."""
    if any(getattr(module, name, False) for name in ("store_full_length_kv", "is_kv_shared_layer")):
        return "later layers attend to the states of this one, and need all of them"
    if getattr(module, "sinks", None) is not None:
        return "the model adds learned sinks to its attention weights"
    parameters = inspect.signature(module.forward).parameters.values()
    if not hasattr(module, "config") or not any(p.kind is p.VAR_KEYWORD for p in parameters):
        return f"{type(module).__name__} does not pass further arguments on to its attention function"
    return None


def why_not_kernels(layer: GSRQLayer, module: nn.Module, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention of a layer cannot read codes by kernels, whatever the forward pass; None if it can.

    Args:
        layer: The cache layer.
        module: Its attention module.
        device: Where the layer computes.
        dtype: Dtype of its states.
    """
    if layer.options.backend == "torch":
        return "backend='torch' was asked for"
    config, rotary = layer.codebooks.config, layer.rotary
    reason = kernels.unsupported_decode_reason(
        device,
        dtype,
        num_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        key_subspace_dim=config.subspace_dim("key"),
        value_subspace_dim=config.subspace_dim("value"),
        rotary_dim=0 if rotary is None else 2 * rotary.inv_freq.numel(),
        num_centroids=config.num_centroids,
    )
    if reason or (reason := why_not_routed(module)):
        return reason
    held = {part.dtype for part in layer.state.exact.values()} if layer.is_initialized else {dtype}
    if held != {dtype}:
        return f"the cache holds states of {', '.join(map(str, held))}, and the model computes in {dtype}"
    implementation = getattr(module.config, "_attn_implementation", None)
    if implementation in ROUTED:
        return "transformers does not let this model's attention implementation be replaced"
    if not str(implementation).startswith(PREFIX):
        return f"the model's attention implementation is {implementation!r}, and only {ROUTED} can be replaced"
    return None


def why_not_this_pass(decoder: nn.Module, module: nn.Module, step: Step) -> str | None:
    """Why a forward pass cannot read codes by kernels though its layers could; None if it can.

    Args:
        decoder: The decoder.
        module: An attention module of it.
        step: What the model tells that module.
    """
    mask = step.attention_mask
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() == 4):
        return "the attention mask is not a boolean [B, heads, Q, T] tensor"
    if module.training and getattr(module, "attention_dropout", None):
        return "the model drops attention weights in training mode"
    if torch.is_autocast_enabled(step.device.type):
        return "autocast is on"
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in decoder.parameters())
    return "gradients are needed" if trained or step.differentiable else None


@cache
def log_path(reason: str | None) -> None:
    """Say once which way decoding goes."""
    if reason is not None:
        logger.info(f"Decoding in torch: {reason}.")
    elif (slower := kernels.gluon_reason(1)) is not None:
        logger.info(f"Decoding attends to the codes by portable kernels, slower on long contexts: {slower}.")
    else:
        logger.info("Decoding attends to the codes by Triton kernels.")


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    gsrq_layer: GSRQLayer | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a routed module calls instead of its original attention; arguments and results are transformers'.

    With `gsrq_layer` keys and values are the new states alone, `[B, H, Q, D]`.
    """
    if gsrq_layer is None:
        if softcap is not None:
            kwargs["softcap"] = softcap
        if attention_mask is not None and attention_mask.shape[-1] > key.shape[2]:
            # Made for all the room of a cache whose codes cannot be read in this pass after all.
            attention_mask = attention_mask[..., : key.shape[2]]
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return gsrq_layer.attend(query, key, value, attention_mask, scaling, softcap), None


for _name in ROUTED:
    AttentionInterface.register(PREFIX + _name, _attend)
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
