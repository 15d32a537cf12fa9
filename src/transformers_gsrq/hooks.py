"""The link between a model and a cache: what `Cache.update` is not told, handed over by hooks.

A pre-hook on each attention module tells the cache positions, cos/sin and mask of the running forward pass;
hooks on the decoder say when a pass begins and when it is complete.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from . import attention, decoding
from .models import CACHE_ARGUMENTS, attention_modules
from .steps import Step, SteppedCache, find_cache

logger = logging.getLogger(__name__)


def attach(model: PreTrainedModel) -> None:
    """Install hooks that tell a `GSRQCache` the positions, the rotation and the mask of each forward pass.

    `GSRQCache(codebooks, model)` attaches its model itself. Call this after `detach`, to go on with a cache that was
    made before. A copy of the model needs a cache of its own, which attaches it. Attaching again changes nothing, and
    caches of other kinds pass through untouched, so an attached model behaves as before with them.

    Args:
        model: The model of the cache; changed in place.

    Raises:
        ValueError: if no attention modules are recognised.
    """
    modules = attention_modules(model)
    for module in modules.values():
        if _before_attention not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_before_attention, with_kwargs=True)
    decoder = model.get_decoder()
    if _before_decoder not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_before_decoder, with_kwargs=True)
    if _after_decoder not in decoder._forward_hooks.values():
        decoder.register_forward_hook(_after_decoder, with_kwargs=True, always_call=True)
    attention.route(model, modules)
    decoding.install(model)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether a model has the hooks that `attach` installs."""
    return _before_decoder in model.get_decoder()._forward_pre_hooks.values()


def detach(model: PreTrainedModel) -> None:
    """Remove every hook that `attach` installed, and give the model its own attention back.

    A `GSRQCache` of the model then takes no tokens: `attach` it again, or make a new cache.

    Args:
        model: The model; changed in place.

    Raises:
        ValueError: if no attention modules are recognised.
    """
    modules = attention_modules(model)
    decoding.uninstall(model)
    attention.unroute(modules)
    ours = (_before_decoder, _before_attention, _after_decoder)
    for module in (*modules.values(), model.get_decoder()):
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in ours]:
                del hooks[key]
                with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _before_decoder(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = find_cache(args, kwargs)
    if cache is not None and not cache.driven:
        if torch.compiler.is_compiling():
            _advise()
        _begin(cache, decoder)


@torch.compiler.disable
def _advise() -> None:
    _log_once(
        "This model was compiled as a whole, and most of it runs as if it was not: what a cache keeps in Python "
        "changes with every token. Use generate, or decode with model.get_compiled_call(None)(input_ids=..., "
        "position_ids=..., cache=...), which replays a CUDA graph, or with a CompileConfig instead of None."
    )


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


# Lengths kept in Python change with every token: traced, they would be compiled anew each time.
@torch.compiler.disable
def _begin(cache: SteppedCache, decoder: nn.Module) -> None:
    cache.begin_pass(decoder)


def _before_attention(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    cache = None
    for name in CACHE_ARGUMENTS:
        if name in kwargs:
            cache = kwargs[name]
    if not isinstance(cache, SteppedCache):
        return None
    if cache.wants_steps:
        _stage(cache, module, args, kwargs)
    # Some versions of transformers keep no layer for a module that reads the states of an earlier one.
    index: Any = module.layer_idx
    if cache.reads_codes and index < len(cache.layers):
        layer = cache.layers[index]
        if getattr(layer, "can_read_codes", False):
            return args, {**kwargs, attention.LAYER_ARGUMENT: layer}
    return None


@torch.compiler.disable
def _stage(cache: SteppedCache, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    step = Step(
        kwargs.get("position_ids"),
        kwargs.get("position_embeddings"),
        kwargs.get("attention_mask"),
        hidden.shape[0],
        hidden.shape[1],
        hidden.device,
        torch.is_grad_enabled() and hidden.requires_grad,
    )
    cache.stage_step(module, step)


def _after_decoder(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = find_cache(args, kwargs)
    if cache is not None and not cache.driven:
        # An always-called hook sees no output exactly when the forward raised.
        _end(cache, output is not None)


@torch.compiler.disable
def _end(cache: SteppedCache, succeeded: bool) -> None:
    if succeeded:
        cache.commit_pass()
    else:
        cache.roll_back()
