"""The oracle of the cache: a plain growing cache whose tokens are replaced by their decoded values when they leave.

It keeps every state in a dense tensor, turns keys with the model's own rotary function and the cos/sin that the model
really used, and codes with the float64 loops of `oracles.py`. It shares no code with the package but the hooks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from oracles import decode_oracle, encode_oracle
from transformers_gsrq import GSRQCodebooks, attach
from transformers_gsrq.steps import Step, SteppedCache


class OracleLayer(DynamicLayer):
    """Dense keys and values; `left` of the tokens have left the window."""

    def __init__(
        self, codebooks: GSRQCodebooks, index: int, attention: nn.Module, starts: torch.Tensor, **options: Any
    ) -> None:
        super().__init__()
        self.codebooks, self.index = codebooks, index
        # EXAONE 4 says it by no attribute: its layers of full attention have no rotary embedding.
        self.rotates = getattr(attention, "use_rope", attention.config.model_type != "exaone4")
        self.turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        self.starts = starts
        self.keep = options.get("residual_length", 128)
        self.chunk = options.get("chunk_length", 64)
        self.sink = options.get("sink_length", 4)
        self.record_past = False
        self.left = 0
        self.step: Step | None = None
        self.cos = self.sin = None

    def activate_past_recording(self) -> None:
        self.record_past = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        before, new = self.get_seq_length(), key_states.shape[-2]
        if before == 0:
            self.starts = self.starts.repeat_interleave(key_states.shape[0] // self.starts.numel())
        if before - self.left >= self.keep + self.chunk:
            self.leave(before - self.keep)
        super().update(key_states, value_states)
        if self.step.position_embeddings is not None and self.rotates:
            cos, sin = (table.expand(key_states.shape[0], -1, -1) for table in self.step.position_embeddings)
            self.cos = cos if self.cos is None else torch.cat([self.cos, cos], 1)
            self.sin = sin if self.sin is None else torch.cat([self.sin, sin], 1)
        seen = self.keys.clone(), self.values.clone()
        prefill = new > 1 and (before == 0 or new >= self.keep + self.chunk)
        if prefill and not self.record_past and before + new - self.left > self.keep:
            self.leave(before + new - self.keep)
        return seen

    def leave(self, last: int) -> None:
        """Replace tokens up to `last`, sinks excepted, by what their codes stand for."""
        token = torch.arange(self.left, last)
        sink = (token >= self.starts[:, None]) & (token < self.starts[:, None] + self.sink)
        for kind, states in (("key", self.keys), ("value", self.values)):
            leaving = states[:, :, self.left : last]
            decoded = self.round_trip(kind, leaving, last)
            states = states.clone()
            states[:, :, self.left : last] = torch.where(sink[:, None, :, None], leaving, decoded.to(states.dtype))
            setattr(self, f"{kind}s", states)
        self.left = last

    def round_trip(self, kind: str, states: torch.Tensor, last: int) -> torch.Tensor:
        table = self.codebooks.centroids(self.index, kind, torch.device("cpu"), torch.float32).double()
        turned = kind == "key" and self.cos is not None
        if turned:
            cos, sin = self.cos[:, self.left : last].double(), self.sin[:, self.left : last].double()
            states = self.turned(states.double(), cos, -sin)
            scale = (cos.square() + sin.square())[:, None]
            states[..., : cos.shape[-1]] /= scale
        decoded = decode_oracle(encode_oracle(states, table), table, states.shape[1])
        return self.turned(decoded, cos, sin) if turned else decoded

    def turned(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """The model's own rotation, of the channels that it turns."""
        width = cos.shape[-1]
        first = states[..., :width]
        return torch.cat([self.turn(first, first, cos, sin)[1], states[..., width:]], -1)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self.left = min(self.left, length)
        if self.cos is not None:
            self.cos, self.sin = self.cos[:, :length], self.sin[:, :length]

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.left, self.cos, self.sin = 0, None, None

    def select(self, rows: torch.Tensor) -> None:
        self.starts = self.starts[rows]
        if self.cos is not None:
            self.cos, self.sin = self.cos[rows], self.sin[rows]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self.select(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.keys.shape[0]).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self.select(rows)


class OracleCache(SteppedCache):
    """Oracle of `GSRQCache(codebooks, model, **options)`, told by `mask` where each row begins."""

    def __init__(
        self, codebooks: GSRQCodebooks, model: PreTrainedModel, mask: torch.Tensor | None = None, **options: Any
    ) -> None:
        layers = DynamicCache(config=model.config).layers
        starts = torch.zeros(1, dtype=torch.long) if mask is None else mask.int().argmax(-1)
        modules = {
            module.layer_idx: module
            for module in model.modules()
            if "Attention" in type(module).__name__ and hasattr(module, "layer_idx")
        }
        for index in codebooks.config.layers:
            layers[index] = OracleLayer(codebooks, index, modules[index], starts, **options)
        super().__init__(layers=layers)
        attach(model)

    def stage_step(self, module: nn.Module, step: Step) -> None:
        layer = self.layers[module.layer_idx]
        if isinstance(layer, OracleLayer):
            layer.step = step

    def reset(self) -> None:
        # Transformers 5.17 leaves zeros in its own layers.
        for layer in self.layers:
            layer.reset()
            layer.keys = layer.values = None
            layer.is_initialized = False
            layer.record_past = False

    def roll_back(self) -> None:
        raise AssertionError("the oracle never fails in the middle of a forward pass")
