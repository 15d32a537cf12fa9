"""The link between a model and a cache: what `Cache.update` is not told, handed over by hooks.

`update` receives keys after rotation and nothing else. A pre-hook on each attention module hands the cache layer the
positions, the cos/sin and the mask of the running forward pass, so nothing about them is ever guessed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from . import compiled, fused
from .models import attention_modules

# What attention modules call their cache argument.
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")

# The attention modules of a decoder by layer.
_attached: WeakKeyDictionary[nn.Module, dict[int, nn.Module]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Step:
    """What the model tells one attention layer in one forward pass.

    Attributes:
        position_ids: `[B or 1, T]`, None if the model passes none.
        position_embeddings: cos and sin `[B or 1, T, 2P]`, None without rotary embedding.
        attention_mask: Whatever the attention implementation takes: None, a tensor, or a flex-attention block mask.
        module: The attention module.
    """

    position_ids: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    attention_mask: Any
    module: nn.Module | None = None


class SteppedCache(Cache):
    """A cache whose layers are told about the running forward pass by `attach`ed models."""

    def receive(self, module: nn.Module, step: Step) -> None:
        """Take the step of one attention module, just before its forward runs."""
        raise NotImplementedError

    def begin(self) -> None:
        """Take note that a forward pass begins; the one before may have ended without a word, as it does on Ctrl-C."""

    def commit(self) -> None:
        """Take note that the forward pass is complete."""

    def roll_back(self) -> None:
        """Forget what an interrupted forward pass left behind."""
        raise NotImplementedError


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
        if _hand_over not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_hand_over, with_kwargs=True)
    decoder = model.get_decoder()
    _attached[decoder] = modules
    if _begin not in decoder._forward_pre_hooks.values():
        decoder.register_forward_pre_hook(_begin, with_kwargs=True)
    if _clean_up not in decoder._forward_hooks.values():
        decoder.register_forward_hook(_clean_up, with_kwargs=True, always_call=True)


def is_attached(model: PreTrainedModel) -> bool:
    """Whether a model has the hooks that `attach` installs."""
    return _begin in model.get_decoder()._forward_pre_hooks.values()


def detach(model: PreTrainedModel) -> None:
    """Remove every hook that `attach` installed, and give the model its own attention back.

    A `GSRQCache` of the model then takes no tokens: `attach` it again, or make a new cache.

    Args:
        model: The model; changed in place.

    Raises:
        ValueError: if no attention modules are recognised.
    """
    fused.unroute(model)
    modules = [*attention_modules(model).values(), model.get_decoder()]
    for module in modules:
        for hooks, with_kwargs in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for key in [key for key, hook in hooks.items() if hook in (_begin, _hand_over, _clean_up)]:
                del hooks[key]
                with_kwargs.pop(key, None)
                module._forward_hooks_always_called.pop(key, None)


def _begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = _find_cache(args, kwargs)
    if cache is not None:
        _prepare(module, cache)


def _find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SteppedCache | None:
    """The cache among the arguments of a decoder, whatever its name or place."""
    return next((value for value in (*args, *kwargs.values()) if isinstance(value, SteppedCache)), None)


@torch.compiler.disable
def _prepare(decoder: nn.Module, cache: SteppedCache) -> None:
    cache.begin()
    if decoder not in _attached:
        # A copy of an attached model has its hooks.
        hooked = (part for part in decoder.modules() if _hand_over in part._forward_pre_hooks.values())
        _attached[decoder] = {int(part.layer_idx): part for part in hooked}  # type: ignore[arg-type]
    compiled.begin(cache, _attached[decoder])
    fused.begin(decoder, cache)


def _hand_over(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    name = next((name for name in CACHE_ARGUMENTS if isinstance(kwargs.get(name), SteppedCache)), "")
    cache = kwargs.get(name)
    position_ids, embeddings = kwargs.get("position_ids"), kwargs.get("position_embeddings")
    if torch.compiler.is_compiling() and not torch.is_grad_enabled():
        if not isinstance(cache, SteppedCache):
            return None
        if fused.is_routed(module):
            compiled.leave(module, position_ids, embeddings)
            return args, {**kwargs, name: compiled.PassThrough(cache)}
    tell(module, cache, Step(position_ids, embeddings, kwargs.get("attention_mask"), module))
    return None


@torch.compiler.disable
def tell(module: nn.Module, cache: Any, step: Step) -> None:
    """Tell the cache of one attention module, if it is one of ours, about its step."""
    # A forward pass that was interrupted may have left a note for this module, which may now run with another cache.
    fused.forget(module)
    if isinstance(cache, SteppedCache):
        cache.receive(module, step)


def _clean_up(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    cache = _find_cache(args, kwargs)
    if cache is not None:
        # An always-called hook sees no output exactly when the forward raised.
        _finish(module, cache, output is not None)


@torch.compiler.disable
def _finish(decoder: nn.Module, cache: SteppedCache, succeeded: bool) -> None:
    fused.forget_masks(cache)
    if succeeded:
        fused.check_read(decoder)
        compiled.check_taken(_attached[decoder])
        cache.commit()
    else:
        cache.roll_back()


def first_real_tokens(mask: Any, batch: int, before: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Index of each row's first real token among the new ones: the first whose own query sees it.

    The last query will not do: under a mask of one's own it may see little of what came before.

    Args:
        mask: As in `Step`: None, `[B, T]` (1 = real), `[B, 1, Q, T]` boolean (True = visible) or additive, or a
            flex-attention block mask.
        batch: Rows B.
        before: Tokens before the new ones.
        num_tokens: New tokens Q.
        device: Where the result lives.

    Returns:
        int64 `[B]`; before + Q for a row whose new tokens are all padding.

    Raises:
        TypeError: for a mask of another type.
    """
    if mask is None:
        return torch.full((batch,), before, dtype=torch.long, device=device)
    new = torch.arange(num_tokens, device=device)
    if hasattr(mask, "mask_mod"):
        rows = torch.arange(batch, device=device)[:, None]
        real = mask.mask_mod(rows, torch.zeros_like(rows), new[None], before + new[None])
    elif isinstance(mask, torch.Tensor):
        own = mask[..., before : before + num_tokens]
        if mask.dim() == 4:
            own = own[:, 0].expand(-1, num_tokens, -1).diagonal(dim1=-2, dim2=-1)
        additive = mask.dim() == 4 and mask.is_floating_point()
        real = (own > torch.finfo(own.dtype).min / 2 if additive else own != 0).to(device)
    else:
        raise TypeError(
            f"The attention mask is a {type(mask).__name__}; expected None, a tensor or a flex-attention block mask."
        )
    real = real.expand(batch, num_tokens)
    return torch.where(real.any(-1), before + real.int().argmax(-1), before + num_tokens)
