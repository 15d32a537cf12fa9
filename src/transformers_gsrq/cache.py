"""`GSRQCache`: a transformers cache whose full-attention layers store codes."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from . import fused, persistence
from .attention import Step, SteppedCache, attach
from .codebooks import GSRQCodebooks
from .compat import attributes, holds_states, native_layers, restart_length
from .layer import GSRQLayer
from .memory import MemoryReport, measure
from .models import attention_modules, fingerprint
from .options import CacheOptions
from .rope import read_rotary
from .support import check_attention
from .tokens import TokenTable


class GSRQCache(SteppedCache):
    """KV cache for `model.generate` and forward calls that stores tokens as gain-shape residual codes.

    Full-attention layers keep the first `sink_length` and the latest `residual_length` tokens exactly and code the
    rest once, when it leaves the window; layers of other kinds keep transformers' own caches.

    Args:
        codebooks: The codebooks, or where they are: a local folder or a Hub id, as `from_pretrained` takes it.
        model: The model that will use the cache; it is `attach`ed.
        residual_length: Latest tokens kept exact. While decoding up to `chunk_length` - 1 more are exact.
        sink_length: First real tokens of each row kept exact.
        chunk_length: Tokens that leave the window together while decoding.
        beam_width: Partial sums kept when encoding; wider is slower and nearer, decoding does not change.
        quantize_prefill: Let prompt tokens attend to what the cache stores instead of exact states. For honest
            perplexities, usually with `residual_length=0, sink_length=0`. Every call with several tokens is a prompt.
        backend: "auto" encodes and decodes by kernels where they can run and in torch where not; "triton" raises where
            they cannot run, when the first tokens are to be compressed or read from codes; "torch" never uses them.
        max_length: Tokens that will be cached at most, if known: room for codes is then allocated once.

    Raises:
        TypeError: if `codebooks` is none of these.
        ValueError: if the codebooks do not fit the model, the model is not supported, or an option is out of range.
    """

    def __init__(
        self,
        codebooks: GSRQCodebooks | str | Path,
        model: PreTrainedModel,
        *,
        residual_length: int = 128,
        sink_length: int = 4,
        chunk_length: int = 64,
        beam_width: int = 1,
        quantize_prefill: bool = False,
        backend: str = "auto",
        max_length: int | None = None,
    ) -> None:
        self.options = CacheOptions(
            residual_length, sink_length, chunk_length, beam_width, quantize_prefill, backend, max_length
        )
        if isinstance(codebooks, str | Path):
            codebooks = GSRQCodebooks.from_pretrained(codebooks)
        if not isinstance(codebooks, GSRQCodebooks):
            raise TypeError(
                f"codebooks must be GSRQCodebooks, a folder or a Hub id, got {type(codebooks).__name__}. "
                "The order is GSRQCache(codebooks, model)."
            )
        self.codebooks = codebooks
        config = codebooks.config
        config.check_model(model.config)
        modules = attention_modules(model)
        for index in config.layers:
            check_attention(modules[index])
        rotaries = dict.fromkeys(config.layers)
        if config.key_space == "before_rope":
            rotaries = read_rotary(model, config.layers)
        self.table = TokenTable()
        layers = native_layers(model.config)
        for index in config.layers:
            layers[index] = GSRQLayer(codebooks, index, rotaries[index], self.table, self.options)
        super().__init__(layers=layers)
        attach(model)
        if backend != "torch":
            fused.route(model)
        self._restart_length = restart_length(model.config)
        # What the cache was before the forward pass that is running; None between passes.
        self._undo: list[dict[str, Any]] | None = None
        self._broken = ""
        self._model = weakref.ref(model)
        self._modules = {index: weakref.ref(module) for index, module in modules.items()}
        self._empty = self._snapshot()

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> GSRQCache:
        # Outside of inference mode, so that a copy made inside can be written to outside, like its original.
        other = memo[id(self)] = type(self).__new__(type(self))
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "A GSRQCache belongs to its model and cannot be pickled. Write it to a file with cache.save(path) and "
            "read it with GSRQCache.load(path, codebooks, model); or copy it with copy.deepcopy(cache)."
        )

    @property
    def compressed_layers(self) -> list[GSRQLayer]:
        """The layers that store codes."""
        return [layer for layer in self.layers if isinstance(layer, GSRQLayer)]

    def receive(self, module: nn.Module, step: Step) -> None:
        """Hand a step to its layer (called by the hooks of `attach`).

        Raises:
            ValueError: if another model than the cache's uses it.
            RuntimeError: if no forward pass was begun.
        """
        self._check_begun()
        index: Any = module.layer_idx
        if self._modules[index]() is not module:
            raise ValueError(
                "This cache was made for another model. Make one for each model: GSRQCache(codebooks, model=model)."
            )
        # Some versions of transformers keep no layer for a module that reads the states of an earlier one.
        layer = self.layers[index] if index < len(self.layers) else None
        if isinstance(layer, GSRQLayer):
            layer.receive(step)

    # Lengths kept in Python change with every token: traced, they would be compiled anew each time.
    @torch.compiler.disable
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's new states and return all it holds; see `GSRQLayer.update`.

        If it fails, or anything later in the forward pass does, the whole cache is as it was before that pass.

        Raises:
            RuntimeError: if no forward pass was begun.
            ValueError: if the context would reach a length at which the model starts over without this cache.
        """
        self._check_begun()
        self._check_restart(layer_idx, key_states.shape[-2])
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def _check_begun(self) -> None:
        if self._undo is None:
            self._break_if_changed()
            raise RuntimeError(
                "This cache was not told that a forward pass begins: its model was detached, or never attached, or "
                "its layers are run one by one. Call transformers_gsrq.attach(model), or make a new GSRQCache with "
                "model=model; and call the model, or model.get_decoder(), not its layers."
            )

    def _check_restart(self, layer_idx: int, new: int) -> None:
        before, limit = self.layers[layer_idx].get_seq_length(), self._restart_length
        if limit is not None and 0 < before <= limit <= before + new:
            raise ValueError(
                f"The context reaches {before + new} tokens. At {limit} this model's generate drops every cache, "
                "compressed or not, and reads the whole text again (original_max_position_embeddings). Stop before "
                f"that, or start with a prompt of more than {limit} tokens."
            )

    @torch.compiler.disable
    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached by complete forward passes, padding included; a later layer's own count if it is asked for."""
        if self._undo is not None and layer_idx == 0:
            return self._undo[-1]["length"]
        return super().get_seq_length(layer_idx)

    # Masks are asked for before a pass changes anything; a vision-language model even asks before its decoder, whose
    # hook undoes an interrupted pass, is called.

    @torch.compiler.disable
    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the next token among the cached ones, as it was before the forward pass that is running."""
        return super().get_query_offset(layer_idx if self._undo is None else 0)

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a layer's `update` returns, as it was before the pass that is running."""
        if self._undo is None:
            return super().get_mask_sizes(query_length, layer_idx)
        layers = list(self.layers)
        # Linear attention counts no tokens; the first layer that does answers for it.
        for index in range(layer_idx, len(layers)):
            if isinstance(layers[index], CacheLayerMixin):
                layers[index] = object.__new__(type(layers[index]))
                vars(layers[index]).update(self._undo[index])
                break
        return Cache(layers=layers).get_mask_sizes(query_length, layer_idx)

    def begin(self) -> None:
        """Take note that a forward pass begins (called by the hooks of `attach`).

        Raises:
            RuntimeError: if an operation failed half-way that could not be undone.
        """
        self.roll_back()
        if self._broken:
            raise RuntimeError(f"{self._broken} Call cache.reset() and start again with the whole text.")
        self._undo = self._snapshot()

    def commit(self) -> None:
        """Forget how to undo the last forward pass; it is complete (called by the hooks of `attach`)."""
        self._undo = None
        self.table.forget_tables()

    def roll_back(self) -> None:
        """Make the cache what it was before the forward pass that is running, if one is (called when it fails).

        Hooks are told of errors, but not of Ctrl-C; then the next use of the cache does it.
        """
        if self._undo is not None:
            self._restore(self._undo)
            self.commit()
            self._break_if_changed()

    def _break_if_changed(self) -> None:
        if any(map(holds_states, self.layers)):
            self._broken = "A forward pass failed, and the linear-attention states of this cache change in place."

    def _snapshot(self) -> list[dict[str, Any]]:
        """References to what each layer and then the table hold: enough for `_restore`, and nothing is copied."""
        layers = (layer.snapshot() if isinstance(layer, GSRQLayer) else attributes(layer) for layer in self.layers)
        return [*layers, self.table.snapshot()]

    def _restore(self, snapshot: list[dict[str, Any]]) -> None:
        for layer, held in zip(self.layers, snapshot[:-1], strict=True):
            if isinstance(layer, GSRQLayer):
                layer.restore(held)
            else:
                vars(layer).clear()
                vars(layer).update(held)
        self.table.restore(snapshot[-1])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every layer, or of none if that fails.

        Args:
            tokens_to_remove: Zero or negative, as transformers passes it; -n removes n tokens.

        Raises:
            ValueError: if positive, or more tokens than there are.
            RuntimeError: if a layer with a sliding window dropped the tokens that would be its latest again; call
                `activate_past_recording` before the tokens come that may be removed.
        """
        self.roll_back()
        length = self.get_seq_length()
        if not -length <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop(-n) removes the last n tokens, n from 0 to the {length} cached ones; got {tokens_to_remove}."
            )
        before = self._snapshot()
        try:
            super().crop(tokens_to_remove)
        except BaseException:
            self._restore(before)
            raise
        self.table.truncate(length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, `activate_past_recording` too; the cache can be used for another text."""
        self._restore(self._empty)
        # The layers change what they were just given.
        self._empty = self._snapshot()
        self.commit()
        self._broken = ""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the past of row `beam_idx[row]` (beam search).

        Raises:
            ValueError: if `beam_idx` does not name one cached row for each row.
        """
        rows = self._num_rows()
        if rows is not None:
            if beam_idx.shape != (rows,):
                raise ValueError(f"reorder_cache needs {rows} rows, got a tensor of shape {tuple(beam_idx.shape)}.")
            self._select(self._row_indices(beam_idx, rows))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies next to each other.

        Raises:
            ValueError: if `repeats` is not positive.
        """
        if repeats < 1:
            raise ValueError(f"batch_repeat_interleave needs a positive number of repeats, got {repeats}.")
        rows = self._num_rows()
        if rows is not None:
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep these rows of the batch, in this order; indices or a boolean mask.

        Raises:
            ValueError: if there are none, or one is not a cached row.
        """
        rows = self._num_rows()
        if rows is not None:
            self._select(self._row_indices(torch.as_tensor(indices), rows))

    def _num_rows(self) -> int | None:
        """Rows B of the cached batch, None while nothing is cached."""
        self.roll_back()
        return next((layer.keys.shape[0] for layer in self.compressed_layers if layer.is_initialized), None)

    @staticmethod
    def _row_indices(indices: torch.Tensor, rows: int) -> torch.Tensor:
        if indices.dtype == torch.bool:
            if indices.shape != (rows,):
                raise ValueError(f"A mask of rows must have shape ({rows},), got {tuple(indices.shape)}.")
            indices = indices.nonzero()[:, 0]
        # On a GPU an index out of range would end the process, so the check is worth a synchronization.
        if indices.dim() != 1 or indices.numel() == 0 or not (0 <= int(indices.min()) <= int(indices.max()) < rows):
            raise ValueError(f"Rows must be one or more indices from 0 to {rows - 1}, got {indices.tolist()}.")
        return indices

    def _select(self, rows: torch.Tensor) -> None:
        try:
            # The one such operation that transformers' layers of every kind have; it takes any number of rows.
            for layer in self.layers:
                layer.reorder_cache(rows)
            self.table.select(rows)
        except BaseException:
            # Undoing would mean to hold the whole cache twice.
            self._broken = "Selecting rows of this cache failed half-way."
            raise

    def __bool__(self) -> bool:
        # An empty cache is false, like any empty container. Models that drop "a cache" when the prompt exceeds their
        # original context (Phi-3) ask this way, and would drop the new one that the prompt is meant for.
        return self.get_seq_length() > 0

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, to go on from it later or elsewhere.

        It holds codes, sinks and window, not the codebooks, and names the codebooks and the model by digests.

        Args:
            path: The file, written whole or not at all; its folder is created.

        Raises:
            ValueError: if the cache is empty, or has layers of a kind that cannot be saved (linear attention).
            RuntimeError: if its model is gone.
        """
        self.roll_back()
        if self._model() is None:
            raise RuntimeError("The model of this cache was deleted, so the file could not say which one it was.")
        mark = fingerprint(self._model())
        persistence.write_cache(path, self.layers, self.table, self.codebooks, self.options, mark)

    @classmethod
    def load(
        cls, path: str | Path, codebooks: GSRQCodebooks | str | Path, model: PreTrainedModel, **options: Any
    ) -> GSRQCache:
        """Read a cache that `save` wrote; each layer goes to the device where the model computes it.

        Args:
            path: The file.
            codebooks: The codebooks it was made with, or where to load them from.
            model: The model it was made with.
            **options: Keywords of `GSRQCache` that shall differ from those it was saved with; not `sink_length`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is damaged or of another version, or belongs to other codebooks or another model.
        """
        file = persistence.read_header(path)
        if options.get("sink_length", file.options.sink_length) != file.options.sink_length:
            raise ValueError(f"This cache was made with sink_length={file.options.sink_length}, which cannot change.")
        cache = cls(codebooks, model, **{**dataclasses.asdict(file.options), **options})
        persistence.check_origin(file, cache.codebooks, model)
        persistence.fill_cache(file, cache.layers, cache.table, model)
        return cache

    @property
    def backend(self) -> str:
        """What attended to the codes in the latest call of every layer: "triton" or "torch"."""
        return "triton" if {layer.ran for layer in self.compressed_layers} == {"triton"} else "torch"

    def memory(self) -> MemoryReport:
        """Bytes held now; everything is counted, codebooks too."""
        self.roll_back()
        return measure(self.layers, self.table, self.codebooks.config)
