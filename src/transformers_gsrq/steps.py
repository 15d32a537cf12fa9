"""What a model tells a cache of a forward pass, and the cache that is told.

`Cache.update` receives keys after rotation and nothing else; so that nothing about them is ever guessed, `hooks` hand
over what the model itself computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Cache


@dataclass(frozen=True)
class Step:
    """What the model tells an attention layer in one forward pass.

    Attributes:
        position_ids: `[B or 1, T]`, None if the model passes none.
        position_embeddings: cos and sin `[B or 1, T, 2P]`, None without rotary embedding.
        attention_mask: Whatever the attention implementation takes: None, a tensor, or a flex-attention block mask.
        batch: Rows B.
        num_tokens: New tokens T.
        device: Where the layer computes.
        differentiable: Whether gradients are wanted of what the layer is given.
    """

    position_ids: torch.Tensor | None
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    attention_mask: Any
    batch: int
    num_tokens: int
    device: torch.device
    differentiable: bool = False


class SteppedCache(Cache):
    """A cache that `attach`ed models tell about their forward passes.

    Attributes:
        driven: Whether somebody else begins and completes the running pass and has staged it (`decoding`).
        wants_steps: Whether `stage_step` is to be called for the next attention module.
        reads_codes: Whether the layers of the running pass that can attend to their codes do.
    """

    driven = False
    wants_steps = True

    @property
    def reads_codes(self) -> bool:
        """False: nothing is coded."""
        return False

    def begin_pass(self, decoder: nn.Module) -> None:
        """Take note that a forward pass begins; the one before may have ended without a word, as it does on Ctrl-C."""

    def stage_step(self, module: nn.Module, step: Step) -> None:
        """Take what the model says to one attention module, just before its forward runs."""
        raise NotImplementedError

    def commit_pass(self) -> None:
        """Take note that the forward pass is complete."""

    def roll_back(self) -> None:
        """Forget a forward pass that failed."""
        raise NotImplementedError


def find_cache(args: tuple[Any, ...], kwargs: dict[str, Any]) -> SteppedCache | None:
    """The cache among the arguments of a decoder, whatever its name or place."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, SteppedCache):
            return value
    return None
