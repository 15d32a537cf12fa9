"""Compiled models: what a layer's hook, `Cache.update` and attention do, as one operator that nothing looks into.

What a cache keeps in Python changes with every token, so traced it would be compiled anew each time. Where
`torch.compile` traces a routed model (see `fused`) without gradients, the hook of an attention module gives it a
`PassThrough` for its cache and leaves with the module what the cache is to be told; our attention function takes that
and calls the operator, which does in eager mode what an eager model does.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

if TYPE_CHECKING:
    from .attention import SteppedCache

# Where the hook leaves what the attention function takes.
_NOTE = "_gsrq_note"


class _Running(threading.local):
    """The latest forward pass of a decoder in this thread."""

    cache: Callable[[], SteppedCache | None] = staticmethod(lambda: None)
    modules: Mapping[int, nn.Module]


_running = _Running()


class PassThrough:
    """Stands for a cache whose new states the operator will take; for all but `update` it is that cache."""

    def __init__(self, cache: SteppedCache) -> None:
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the new states `[B, H, T, D]`."""
        return key_states, value_states


def begin(cache: SteppedCache, modules: Mapping[int, nn.Module]) -> None:
    """Take note of the cache and the attention modules, by layer, of the forward pass that begins."""
    # Weakly: the note stays until this thread's next forward pass, and a model may be deleted before that.
    _running.cache, _running.modules = weakref.ref(cache), weakref.WeakValueDictionary(modules)


def check_taken(modules: Mapping[int, nn.Module]) -> None:
    """Check that every attention module took what `leave` left with it, once a forward pass is through.

    Raises:
        RuntimeError: if one did not, and so took only the new states for all there are.
    """
    ignored = [module for module in modules.values() if _NOTE in vars(module)]
    for module in ignored:
        delattr(module, _NOTE)
    if ignored:
        raise RuntimeError(
            "An attention module of this compiled model does not call the attention function of its config, so it "
            "attended to the newest tokens only. Run this model without torch.compile."
        )


def leave(module: nn.Module, position_ids: torch.Tensor | None, position_embeddings: Any) -> None:
    """Leave with an attention module, while it is traced, what the cache is to be told besides the mask."""
    cos, sin = position_embeddings if isinstance(position_embeddings, tuple) else (None, None)
    setattr(module, _NOTE, (position_ids, cos, sin))


def is_told(module: nn.Module) -> bool:
    """Whether `leave` left something with a module."""
    return getattr(module, _NOTE, None) is not None


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
    is_causal: bool | None,
) -> torch.Tensor:
    """Attention of a traced module to all that its cache holds with the new states.

    Args:
        module: The attention module.
        query: `[B, Hq, T, D]`.
        key: New keys `[B, H, T, D]`, after rotary embedding.
        value: New values `[B, H, T, D]`.
        mask: Boolean `[B or 1, 1 or Hq, T, total]`, or None.
        scaling: Factor of the scores.
        softcap: Soft cap of the scores.
        dropout: As `sdpa` takes it.
        is_causal: As `sdpa` takes it.

    Returns:
        `[B, T, Hq, D]`.
    """
    note = getattr(module, _NOTE)
    delattr(module, _NOTE)
    layer: Any = module.layer_idx
    return _cached_attention(query, key, value, mask, *note, layer, scaling, softcap, dropout, is_causal)


# A CUDA graph would replay the kernels and not the cache's bookkeeping.
@torch.library.custom_op("transformers_gsrq::cached_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _cached_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    layer: int,
    scaling: float | None,
    softcap: float | None,
    dropout: float,
    is_causal: bool | None,
) -> torch.Tensor:
    from .attention import Step, tell

    cache = _running.cache()
    if cache is None:
        raise RuntimeError("A compiled attention layer ran outside of its model. Call the model, not its layers.")
    module: Any = _running.modules[layer]
    # The compiler may use the memory of these again; a cache keeps what it is given.
    key, value = key.clone(), value.clone()
    position_ids = None if position_ids is None else position_ids.clone()
    embeddings = None if cos is None or sin is None else (cos, sin)
    tell(module, cache, Step(position_ids, embeddings, mask, module))
    key, value = cache.update(key, value, layer)
    options = {} if softcap is None else {"softcap": softcap}
    implementation = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
    out, _ = implementation(
        module, query, key, value, mask, scaling=scaling, dropout=dropout, is_causal=is_causal, **options
    )
    return out.contiguous()


@_cached_attention.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any) -> torch.Tensor:
    batch, num_heads, num_tokens, _ = query.shape
    return query.new_empty(batch, num_tokens, num_heads, value.shape[-1])
