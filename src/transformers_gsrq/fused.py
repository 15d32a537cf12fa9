"""Fused decoding: attention of a few new tokens that reads the codes instead of decoding the whole cache.

`route` makes a model call `gsrq_sdpa` instead of `sdpa`. A cache layer that can be read by the kernels returns only
the new states from `update` and leaves a note with `expect`; our function finds the note and runs the kernels. Without
one, so in every prefill and for every other cache, it calls the original.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import compiled
from .config import KINDS
from .ops import triton as kernels
from .ops.triton.encode_biases import bias_bytes
from .rope import Rotary

if TYPE_CHECKING:
    from .attention import Step, SteppedCache
    from .layer import GSRQLayer
    from .ops.triton.key_tables import KeyTables
    from .tokens import TokenTable

logger = logging.getLogger(__name__)

MAX_QUERIES = kernels.MAX_QUERIES
PREFIX = "gsrq_"
# Implementations whose decoding we can replace; their masks are None or boolean.
ROUTED = ("sdpa",)

_places: WeakKeyDictionary[TokenTable, dict[torch.device, Places]] = WeakKeyDictionary()
_key_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()
_turned: WeakKeyDictionary[Rotary, WeakIdKeyDictionary] = WeakKeyDictionary()


class _Notes(threading.local):
    """What `expect` left for the forward pass of this thread; another thread may run the same modules."""

    def __init__(self) -> None:
        self.layers: WeakKeyDictionary[nn.Module, GSRQLayer] = WeakKeyDictionary()


_expected = _Notes()


@dataclass
class Places:
    """Where the coded tokens and the sinks of a cache stand; the same for all its layers on a device.

    Attributes:
        num_stored: Tokens that are sinks, codes or padding.
        source: The starts that this was made from.
        starts: int32 `[B]`: first code of each row that is neither padding nor a sink.
        sink_counts: int32 `[B]`: sinks that each row fills.
        first_position: int32 `[B]`: position of code 0.
        contiguous: Whether the positions of every row's tokens follow one another.
        mask: The last mask seen, and what `arrange_mask` made of it.
    """

    num_stored: int
    source: torch.Tensor
    starts: torch.Tensor
    sink_counts: torch.Tensor
    first_position: torch.Tensor
    contiguous: bool
    mask: tuple[torch.Tensor, torch.Tensor] | None = None


def find_places(table: TokenTable, num_stored: int, sink_length: int, device: torch.device) -> Places:
    """Look up or work out `Places`; one synchronization for each chunk of tokens that is compressed.

    What is looked up still holds, since `begin` drops it when a crop has gone below it.
    """
    found = _places.setdefault(table, {}).get(device)
    if found is not None and found.num_stored == num_stored and found.source is table.starts:
        return found
    if table.starts is None:
        raise RuntimeError("This cache holds codes but does not know where its rows begin; call cache.reset().")
    starts = table.starts.to(device)
    positions = torch.zeros(starts.numel(), 1, dtype=torch.int32, device=device)
    first_position, contiguous = starts * 0, True
    if table.positions is not None:
        positions = table.positions[:, :num_stored].to(device)
        begin = starts.clamp(max=num_stored - 1)
        first_position = positions.gather(1, begin[:, None])[:, 0] - begin + sink_length
        token = torch.arange(num_stored, device=device)
        straight = positions - token == (first_position - sink_length)[:, None]
        contiguous = bool((straight | (token < starts[:, None])).all())
    found = Places(
        num_stored=num_stored,
        source=table.starts,
        starts=starts.int(),
        sink_counts=(num_stored - starts).clamp(0, sink_length).int(),
        first_position=first_position.int(),
        contiguous=contiguous,
    )
    _places[table][device] = found
    return found


def arrange_mask(mask: torch.Tensor, places: Places, sink_length: int) -> torch.Tensor:
    """A mask over tokens in the order of the kernels: codes, sinks, window; made once for all layers.

    Args:
        mask: Boolean `[B or 1, 1 or Hq, Q, T]`.
        places: Where the tokens stand.
        sink_length: Slots for sinks.
    """
    if places.mask is not None and places.mask[0] is mask:
        return places.mask[1]
    rows = mask.expand(places.starts.numel(), -1, -1, -1)
    token = places.starts.long()[:, None] + torch.arange(sink_length, device=mask.device)
    token = token.clamp(max=mask.shape[-1] - 1)[:, None, None].expand(*rows.shape[:3], -1)
    parts = [rows[..., sink_length : places.num_stored], rows.gather(-1, token), rows[..., places.num_stored :]]
    arranged = torch.cat(parts, -1)
    places.mask = mask, arranged
    return arranged


def reason_against(layer: GSRQLayer, step: Step, states: torch.Tensor) -> str | None:
    """Why this step of a layer cannot be fused; None if it can.

    Args:
        layer: A layer that holds codes.
        step: What the model said about the step.
        states: The new keys `[B, H, Q, D]`.
    """
    module, mask = step.module, step.attention_mask
    if layer.options.backend == "torch":
        return "backend='torch' was asked for"
    reason = _kernel_reason(layer, states.shape[-2])
    if reason:
        return reason
    if module is not None and shares_states(module):
        return "later layers attend to the states of this one, and need all of them"
    if module is None or not is_routed(module):
        implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if implementation in ROUTED:
            return "the model's first parameter has a device or dtype that the kernels do not take"
        return f"the model's attention implementation is {implementation!r}, and only {ROUTED} can be replaced"
    if mask is not None and not (isinstance(mask, torch.Tensor) and mask.dtype == torch.bool and mask.dim() == 4):
        return "the attention mask is not a boolean [B, heads, Q, T] tensor"
    if getattr(module, "sinks", None) is not None:
        return "the model adds learned sinks to its attention weights"
    if torch.is_grad_enabled() and states.requires_grad:
        return "gradients are needed"
    if module.training and getattr(module, "attention_dropout", None):
        return "the model drops attention weights in training mode"
    places = find_places(layer.table, layer.num_stored, layer.options.sink_length, states.device)
    if layer.rotary is not None and not places.contiguous:
        return "the positions of the cached tokens do not follow one another"
    return None


def _kernel_reason(layer: GSRQLayer, num_queries: int) -> str | None:
    key, value = layer.quantizers["key"], layer.quantizers["value"]
    return kernels.unsupported_decode_reason(
        layer.device,
        layer.dtype,
        num_heads=key.num_heads,
        head_dim=key.head_dim,
        key_subspace_dim=key.centroids.shape[-1],
        value_subspace_dim=value.centroids.shape[-1],
        rotary_dim=0 if layer.rotary is None else 2 * layer.rotary.inv_freq.numel(),
        num_centroids=key.centroids.shape[-2],
        num_queries=num_queries,
    )


def choose(layer: GSRQLayer, step: Step, states: torch.Tensor) -> bool:
    """Whether to fuse this step; says once which path runs.

    Raises:
        ValueError: if backend="triton" was asked for and the kernels cannot run, with the reason.
    """
    reason = reason_against(layer, step, states)
    if reason and layer.options.backend == "triton":
        raise ValueError(f"backend='triton' cannot decode layer {layer.index}: {reason}.")
    _log_once(reason)
    return reason is None


@cache
def _log_once(reason: str | None) -> None:
    if reason is not None:
        logger.info(f"Decoding in torch: {reason}.")
    elif (slower := kernels.gluon_reason(1)) is not None:
        logger.info(f"Decoding attends to the codes by portable kernels, slower on long contexts: {slower}.")
    else:
        logger.info("Decoding attends to the codes by Triton kernels.")


def key_tables(centroids: torch.Tensor, num_heads: int, head_dim: int, rotary: Rotary | None) -> KeyTables:
    """The key codebook as the kernels take it; made once and shared by every cache that uses these centroids."""
    from .ops.triton.key_tables import prepare_keys

    turned = None if rotary is None else _turned.setdefault(rotary, WeakIdKeyDictionary())
    found = None if turned is None else turned.get(centroids)
    if found is None:
        # Caches read the model's rotary embedding each for itself, so the same frequencies come again and again.
        inv_freq, scaling = (None, 1.0) if rotary is None else (rotary.inv_freq, rotary.scaling)
        found = _key_tables.get(centroids)
        if found is None or found.rotary_dim != (0 if inv_freq is None else 2 * inv_freq.numel()):
            found = _key_tables[centroids] = prepare_keys(centroids, num_heads, head_dim, inv_freq, scaling)
        else:
            found = found.turning(inv_freq, scaling)
        if turned is not None:
            turned[centroids] = found
    return found


def table_bytes(layer: GSRQLayer) -> int:
    """Bytes that kernels hold beside the centroids of a layer."""
    key, value = (layer.quantizers[kind].centroids for kind in KINDS)
    tables = _key_tables.get(key)
    return bias_bytes(key) + bias_bytes(value) + (0 if tables is None else tables.nbytes)


def expect(module: nn.Module, layer: GSRQLayer) -> None:
    """Let the next attention of `module` read `layer`, which has taken the new states already."""
    _expected.layers[module] = layer


def forget(module: nn.Module) -> None:
    """Drop a note that an interrupted forward pass left."""
    _expected.layers.pop(module, None)


def check_read(decoder: nn.Module) -> None:
    """Check that every note was read once a forward pass is through.

    Raises:
        RuntimeError: if an attention module took only the new states for all there are.
    """
    if _expected.layers and any(module in _expected.layers for module in decoder.modules()):
        raise RuntimeError(
            "An attention module of this model does not call the attention function of its config, so it attended to "
            "the newest tokens only. Use GSRQCache(..., backend='torch') with this model."
        )


@torch.compiler.disable
def attend(
    layer: GSRQLayer, query: torch.Tensor, mask: torch.Tensor | None, scaling: float | None, softcap: float | None
) -> torch.Tensor:
    """Attention of the latest tokens to everything a layer holds.

    Args:
        layer: The layer.
        query: `[B, Hq, Q, D]`, rotated.
        mask: Boolean `[B or 1, 1 or Hq, Q, T]`, or None.
        scaling: Factor of the scores; 1/sqrt(D) by default.
        softcap: Soft cap of the scores.

    Returns:
        `[B, Hq, Q, D]`.
    """
    from .ops.triton.decode_attention import decode_attention

    key, value = layer.quantizers["key"], layer.quantizers["value"]
    sink_length = layer.options.sink_length
    places = find_places(layer.table, layer.num_stored, sink_length, query.device)
    return decode_attention(
        query,
        layer.buffers["key"].codes,
        layer.buffers["value"].codes,
        key_tables(key.centroids, key.num_heads, key.head_dim, layer.active_rotary),
        value.centroids,
        torch.cat([layer.sinks["key"], layer.keys], 2),
        torch.cat([layer.sinks["value"], layer.values], 2),
        starts=places.starts,
        sink_counts=places.sink_counts,
        sink_length=sink_length,
        first_position=places.first_position,
        mask=None if mask is None else arrange_mask(mask, places, sink_length),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
    )


@torch.compiler.disable
def _find_expected(module: nn.Module) -> GSRQLayer | None:
    return _expected.layers.pop(module, None)


def _sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a routed model calls instead of its original attention."""
    traced = torch.compiler.is_compiling() and not torch.is_grad_enabled()
    if traced and compiled.is_told(module):
        options = kwargs.get("dropout", 0.0), kwargs.get("is_causal")
        return compiled.attend(module, query, key, value, attention_mask, scaling, softcap, *options), None
    layer = None if traced else _find_expected(module)
    if layer is None:
        if softcap is not None:
            kwargs["softcap"] = softcap
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return attend(layer, query, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None


def begin(decoder: PreTrainedModel, cache: SteppedCache) -> None:
    """Make ready for a forward pass: what was done for the last one may no longer hold.

    A model loses our attention function when it is detached or given another, and can first take it when it is moved
    to another device or dtype. Tokens that were cropped may be replaced by others, at other positions.
    """
    options = getattr(cache, "options", None)
    if options is not None and options.backend != "torch" and decoder.config._attn_implementation in ROUTED:
        route(decoder)
    table: Any = getattr(cache, "table", None)
    if table in _places:
        kept = {device: found for device, found in _places[table].items() if found.num_stored <= table.length}
        _places[table] = kept
    forget_masks(cache)


def forget_masks(cache: SteppedCache) -> None:
    """Drop masks at the end of a forward pass: the next may bring the same tensor with other numbers in it."""
    table: Any = getattr(cache, "table", None)
    for found in (_places[table] if table in _places else {}).values():
        found.mask = None


# At import: a routed model that was pickled brings our name into a process that routes nothing.
for _name in ROUTED:
    AttentionInterface.register(PREFIX + _name, _sdpa)
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])


def route(model: PreTrainedModel) -> None:
    """Make a model call our attention function where kernels can run on its device; else change nothing."""
    parameter = next(model.parameters(), None)
    if parameter is None or kernels.unsupported_reason(parameter.device, parameter.dtype) is not None:
        return
    for config in _configs(model):
        if config._attn_implementation in ROUTED:
            config._attn_implementation_internal = PREFIX + config._attn_implementation


def shares_states(module: nn.Module) -> bool:
    """Whether a module hands what its cache returns to later layers, or is one of those (Gemma 3n, Gemma 4)."""
    return any(getattr(module, name, False) for name in ("store_full_length_kv", "is_kv_shared_layer"))


def is_routed(module: nn.Module) -> bool:
    """Whether an attention module calls our attention function, and may be given the new states only."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    return str(implementation).startswith(PREFIX) and not shares_states(module)


def unroute(model: PreTrainedModel) -> None:
    """Give a model its original attention back."""
    for config in _configs(model):
        implementation = config._attn_implementation
        if str(implementation).startswith(PREFIX):
            config._attn_implementation_internal = implementation.removeprefix(PREFIX)


def _configs(model: PreTrainedModel) -> list[Any]:
    modules = [model.get_decoder(), *model.get_decoder().modules()]
    configs = {id(module.config): module.config for module in modules if hasattr(module, "config")}
    return list(configs.values())
