"""`GSRQCache`: a transformers cache whose full-attention layers store codes.

A forward pass and the cache:

    idle --begin_pass--> begun --stage_step--> staged --commit_pass--> idle
    begun, staged --roll_back--> idle      an error; after Ctrl-C the next use of the cache does it
    any --select of rows that fails half-way--> broken --reset--> idle

`begin_pass` notes what layers of other kinds hold. `stage_step` works out what the pass does (`ForwardPass`),
compresses the chunk that is due and makes room. Layers then write where nothing is in use, and `commit_pass` counts
what they wrote. Questions (lengths, `memory`, `save`, copies) are answered from what complete passes left; they never
change a pass that is running, perhaps in another thread.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, SupportsIndex

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from . import attention, persistence
from .codebooks import GSRQCodebooks
from .compat import attributes, holds_states, native_layers, restart_length
from .config import KINDS
from .hooks import attach
from .layer import GSRQLayer
from .masks import first_real_tokens
from .memory import MemoryReport, measure
from .models import attention_modules, fingerprint
from .options import CacheOptions
from .rope import Rotary, read_rotary
from .state import ForwardPass, TokenState
from .steps import Step, SteppedCache
from .support import check_attention

_NOT_BEGUN = (
    "This cache was not told that a forward pass begins: its model was detached, or never attached, or its layers are "
    "run one by one. Call transformers_gsrq.attach(model), or make a new GSRQCache with model=model; and call the "
    "model, or model.get_decoder(), not its layers."
)


class GSRQCache(SteppedCache):
    """KV cache for `model.generate` and forward calls that stores tokens as gain-shape residual codes.

    Full-attention layers keep the first `sink_length` and the latest `residual_length` tokens exactly and code the
    rest once, when it leaves the window; layers of other kinds keep transformers' own caches.

    Args:
        codebooks: The codebooks, or where they are: a local folder or a Hub id, as `from_pretrained` takes it.
        model: The model that will use the cache; it is `attach`ed.
        residual_length: Latest tokens kept exact. While decoding up to `chunk_length` more are exact.
        sink_length: First real tokens of each row kept exact.
        chunk_length: Tokens that leave the window together while decoding.
        beam_width: Partial sums kept when encoding; wider is slower and nearer, decoding does not change.
        quantize_prefill: Let prompt tokens attend to what the cache stores instead of exact states. For honest
            perplexities, usually with `residual_length=0, sink_length=0`. Every call with several tokens is a prompt.
        backend: "auto" encodes and decodes by kernels where they can run and in torch where not; "triton" raises where
            they cannot run, when the first tokens are to be compressed or read from codes; "torch" never uses them.
        max_length: Tokens that will be cached at most, if known: room is then allocated once. `generate` says it.

    Raises:
        TypeError: if `codebooks` or `model` is none of these.
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
        order = "The order is GSRQCache(codebooks, model)."
        if not isinstance(codebooks, GSRQCodebooks | str | Path):
            raise TypeError(
                f"codebooks must be GSRQCodebooks, a folder or a Hub id, got {type(codebooks).__name__}. {order}"
            )
        if not isinstance(model, PreTrainedModel):
            raise TypeError(f"model must be a transformers model, got {type(model).__name__}. {order}")
        if not isinstance(codebooks, GSRQCodebooks):
            codebooks = GSRQCodebooks.from_pretrained(codebooks)
        self.codebooks = codebooks
        config = codebooks.config
        config.check_model(model.config)
        modules = attention_modules(model)
        for index in config.layers:
            check_attention(modules[index])
        rotaries: dict[int, Rotary | None] = dict.fromkeys(config.layers)
        if config.key_space == "before_rope":
            rotaries = read_rotary(model, config.layers)
        # Of the layers that turn their keys, which all turn alike; None where none does.
        self._rotary = next((rotary for rotary in rotaries.values() if rotary is not None), None)
        self.tokens = TokenState(sink_length, residual_length, chunk_length, max_length)
        layers = native_layers(model.config)
        for index in config.layers:
            layers[index] = GSRQLayer(codebooks, index, rotaries[index], self.tokens, self.options)
        super().__init__(layers=layers)
        # The layers that store codes.
        self.compressed_layers: list[GSRQLayer] = [layers[index] for index in config.layers]
        attach(model)
        self._restart_length = restart_length(model.config)
        self._model = weakref.ref(model)
        self._decoder = weakref.ref(model.get_decoder())
        # Its first parameter, which moves and changes its dtype with it.
        self._parameter: Any = lambda: None
        self._modules = {index: weakref.ref(modules[index]) for index in config.layers}
        self._broken = ""
        # Of the pass that is running, what layers of other kinds held before it; None between passes.
        self._before: dict[int, dict[str, Any]] | None = None
        self._thread = 0
        self._backend = "torch"
        # What `attention.why_not_kernels` said, and what it was asked about.
        self._kernels: tuple[tuple[Any, ...], str | None] = ((), None)
        # Whether every compressed layer can attend to its codes by kernels.
        self._all_read = False
        self._num_query_heads: int = model.config.get_text_config(decoder=True).num_attention_heads
        # Memory that kernels work in, by device; and the epoch, and the tokens of a step, that layers are ready for.
        self.workspaces: dict[torch.device, torch.Tensor] = {}
        self._prepared = -1, 0
        # Captured decoding steps; they hold tensors of this cache.
        self.graphs: dict[Any, Any] = {}
        self._empty = self._snapshot()

    def __repr__(self) -> str:
        kept = f"{self.options.sink_length} sinks, window {self.options.residual_length}"
        return (
            f"GSRQCache({self.tokens.length} tokens, {len(self.compressed_layers)} of {len(self.layers)} layers at "
            f"{self.codebooks.config.bits():g} bits, {kept}, {self.memory().cache / 2**20:,.1f} MiB, "
            f"backend={self.options.backend!r})"
        )

    @torch.inference_mode(False)
    def __deepcopy__(self, memo: dict[int, Any]) -> GSRQCache:
        # Outside of inference mode, so that a copy made inside can be written to outside, like its original.
        other = memo[id(self)] = type(self).__new__(type(self))
        shared = {"codebooks", "_model", "_decoder", "_modules", "_parameter", "options"}
        # A copy is of what complete passes left.
        state = {
            **self.__dict__,
            "layers": self._committed_layers(),
            "_before": None,
            "driven": False,
            "graphs": {},
            "workspaces": {},
            "_prepared": (-1, 0),
        }
        other.__dict__.update({n: v if n in shared else copy.deepcopy(v, memo) for n, v in state.items()})
        return other

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "A GSRQCache belongs to its model and cannot be pickled. Write it to a file with cache.save(path) and "
            "read it with GSRQCache.load(path, codebooks, model); or copy it with copy.deepcopy(cache)."
        )

    # A forward pass

    @property
    def wants_steps(self) -> bool:  # type: ignore[override]
        """Whether the running pass is not staged yet."""
        return self.tokens.running is None

    @property
    def reads_codes(self) -> bool:
        """Whether the layers of the running pass that can attend to their codes do."""
        return self.tokens.reads_codes

    def begin_pass(self, decoder: nn.Module) -> None:
        """Take note that a forward pass begins (called by the hooks of `attach`).

        Raises:
            ValueError: if another model than the cache's uses it.
            RuntimeError: if a pass of another thread is running, or an operation failed that could not be undone.
        """
        self._settle()
        if self._broken:
            raise RuntimeError(f"{self._broken} Call cache.reset() and start again with the whole text.")
        if self._decoder() is not decoder:
            raise ValueError(
                "This cache was made for another model. Make one for each model: GSRQCache(codebooks, model=model)."
            )
        self._thread = threading.get_ident()
        self._before = self._snapshot()

    def stage_step(self, module: nn.Module, step: Step) -> None:
        """Work out what the running pass does, once for all its layers (called by the hooks of `attach`).

        What is due is compressed before the new states are appended, so that a draft that is rejected later never
        causes a compression. Only a prompt is compressed at once, unless the caller announced that it will crop. A
        prompt is a call with several tokens: the first, a long one, and with `quantize_prefill` any.

        Args:
            module: The attention module that the model runs next.
            step: What the model tells it.

        Raises:
            RuntimeError: if no forward pass was begun.
            ValueError: if the batch is not the cached one, a state that leaves the window is NaN or infinite, the
                context would reach a length at which the model starts over or turns keys by other frequencies, or
                kernels were asked for and cannot run.
        """
        if self._before is None:
            raise RuntimeError(_NOT_BEGUN)
        layer: Any = self.layers[module.layer_idx] if module.layer_idx < len(self.layers) else None  # type: ignore[operator]
        if not isinstance(layer, GSRQLayer):
            return
        tokens, options, new = self.tokens, self.options, step.num_tokens
        self._check_step(step)
        if tokens.offloaded:
            for each in self.compressed_layers:
                each.prefetch()
            tokens.offloaded = False
        for each in self.compressed_layers:
            each.attended = False
        positions, settled = self._note_tokens(step)
        due = tokens.num_exact - tokens.residual_length if tokens.num_exact >= tokens.full_window else 0
        stored, exact = tokens.num_stored + due, tokens.num_exact - due
        prompt = new > 1 and (tokens.length == 0 or new >= tokens.full_window or options.quantize_prefill)
        leaving = max(0, exact + new - tokens.residual_length) if prompt and not layer.record_past else 0
        running = ForwardPass(
            num_new=new,
            stored=stored,
            exact=exact,
            leaving=leaving,
            settled=settled,
            reads_codes=False,
            room=tokens.capacity_for(max(1, tokens.codes_of(stored + leaving))),
        )
        self._make_room(running)
        if due:
            self._compress_due(due, running, positions)
        running.reads_codes = leaving == 0 and self._can_read_codes(layer, module, step, tokens.straight)
        if running.reads_codes:
            self._prepare_kernels(running)
        tokens.running, tokens.reads_codes = running, running.reads_codes

    def stage_first(self, step: Step) -> None:
        """`stage_step` for the first compressed layer, by whoever drives the pass instead of the hooks."""
        module = self._modules[self.codebooks.config.layers[0]]()
        if module is not None:
            self.stage_step(module, step)

    def _check_step(self, step: Step) -> None:
        rows, before, new = self._num_rows(), self.tokens.length, step.num_tokens
        if rows is not None and rows != step.batch:
            raise ValueError(
                f"This cache holds {rows} rows, but the model was given {step.batch}. Change the cache first: "
                "batch_repeat_interleave(n) for n continuations of each row, batch_select_indices(rows) to keep some."
            )
        mask = step.attention_mask
        if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[-1] < before + new:
            raise ValueError(
                f"The attention mask covers {mask.shape[-1]} tokens, but there are {before + new}: {before} cached "
                f"and {new} new ones."
            )
        limit = self._restart_length
        if limit is not None and 0 < before <= limit <= before + new:
            raise ValueError(
                f"The context reaches {before + new} tokens. At {limit} this model's generate drops every cache, "
                "compressed or not, and reads the whole text again (original_max_position_embeddings). Stop before "
                f"that, or start with a prompt of more than {limit} tokens."
            )

    def _note_tokens(self, step: Step) -> tuple[torch.Tensor | None, bool]:
        """Write down where the new tokens stand; positions of all tokens, and whether every row has begun.

        One synchronization for a prompt and while rows have not begun, none for a few more tokens.
        """
        tokens, new, positions = self.tokens, step.num_tokens, None
        if step.position_ids is not None:
            room = tokens.sink_length + tokens.capacity_for(1) + tokens.ring
            positions = tokens.write_positions(step.position_ids, step.batch, room, step.device)
        if self._rotary is not None:
            if tokens.length == 0:
                tokens.long_text = self._rotary.for_length(new) is not self._rotary
            active = self._rotary.longer if tokens.long_text and self._rotary.longer else self._rotary
            if active.max_tokens is not None and tokens.length + new > active.max_tokens:
                raise ValueError(
                    f"The context reaches {tokens.length + new} tokens, but this model rotates keys by other "
                    f"frequencies beyond {active.max_tokens} (longrope), so {tokens.length} cached keys no longer "
                    "fit. Start again with the whole text as one prompt."
                )
            if new > 1 and step.position_embeddings is not None and positions is not None:
                error = active.error(positions[:, tokens.length :], step.position_embeddings)
                held = tokens.rotary_error
                tokens.rotary_error = error if held is None else torch.maximum(held.to(error.device), error)
        if tokens.settled:
            if new > attention.MAX_QUERIES:
                tokens.look()
            return positions, True
        tokens.begin_rows(first_real_tokens(step.attention_mask, step.batch, tokens.length, new, step.device))
        tokens.padded, settled = tokens.look_at_rows(tokens.length + new)
        return positions, settled

    def _compress_due(self, due: int, running: ForwardPass, positions: torch.Tensor | None) -> None:
        tokens = self.tokens
        for layer in self.compressed_layers:
            first = tokens.num_stored
            states = {kind: layer.state.read(kind, first, first + due) for kind in KINDS}
            layer.compress(states, first, running)
        tokens.check_compressed(running, running.stored, positions)

    def _can_read_codes(self, layer: GSRQLayer, module: nn.Module, step: Step, straight: bool) -> bool:
        """Whether layers of this pass attend to their codes by kernels; says once which path runs.

        Raises:
            ValueError: if backend="triton" was asked for and the kernels cannot run, with the reason.
        """
        if not layer.is_initialized or step.num_tokens > attention.MAX_QUERIES:
            return False
        reason = self.kernel_reason() or attention.why_not_this_pass(self._decoder(), module, step)  # type: ignore[arg-type]
        if reason is None and self._rotary is not None and not straight:
            reason = "the positions of the cached tokens do not follow one another"
        if reason and self.options.backend == "triton":
            raise ValueError(f"backend='triton' cannot decode layer {layer.index}: {reason}.")
        attention.log_path(reason)
        return reason is None

    def kernel_reason(self) -> str | None:
        """Why no layer can attend to its codes by kernels, whatever the forward pass; None if some can.

        Asked anew when the model moved or was given another attention.
        """
        decoder, first = self._decoder(), self._parameter()
        if first is None and decoder is not None:
            first = next(decoder.parameters())
            self._parameter = weakref.ref(first)
        if decoder is None or first is None:
            return "the model of this cache was deleted"
        asked = first.device, first.dtype, decoder.config._attn_implementation, self.tokens.dtypes
        if self._kernels[0] != asked:
            reasons = []
            for layer in self.compressed_layers:
                module = self._modules[layer.index]()
                device = layer.device if layer.is_initialized else first.device
                reasons.append(attention.why_not_kernels(layer, module, device, first.dtype))  # type: ignore[arg-type]
                layer.can_read_codes = reasons[-1] is None
            self._kernels = asked, None if None in reasons else reasons[0]
            self._all_read = all(reason is None for reason in reasons)
        return self._kernels[1]

    def _make_room(self, running: ForwardPass) -> None:
        """Make room for codes and exact tokens; addresses change here and nowhere else while decoding."""
        tokens = self.tokens
        ring = tokens.ring_for(running.exact + (0 if running.leaving else running.num_new))
        if running.exact != tokens.num_exact:
            # What was just compressed is in the ring until the pass is complete.
            ring = max(ring, tokens.ring_for(tokens.num_exact + running.num_new), tokens.ring)
        if ring == tokens.ring and running.room == tokens.capacity:
            return
        # Until all layers have their room, rings may differ: if memory runs out, all are looked at again.
        tokens.ring = 0
        for layer in self.compressed_layers:
            if layer.is_initialized:
                layer.forget_kernel_inputs()
                layer.state.resize_ring(ring, tokens.num_stored, tokens.length)
                layer.state.reserve(running.room, tokens.codes_of(tokens.num_stored))
        tokens.ring, tokens.capacity = ring, running.room
        tokens.moved()

    def _prepare_kernels(self, running: ForwardPass) -> None:
        """Bring what kernels read up to date: counts at each step, the rest where something moved."""
        tokens, layers = self.tokens, self.compressed_layers
        queries = next(size for size in (1, 4, attention.MAX_QUERIES) if size >= running.num_new)
        counts = {device: tokens.counts(device, running.stored, running.exact) for device in self._devices()}
        if self._prepared[0] == tokens.epoch and self._prepared[1] >= queries:
            return
        for device in counts:
            held = self.workspaces.get(device)
            needed = max(
                layer.workspace_bytes(self._num_query_heads, queries, device)
                for layer in layers
                if layer.device == device
            )
            if held is None or held.numel() < needed:
                with torch.inference_mode(False):
                    self.workspaces[device] = torch.empty(needed, dtype=torch.uint8, device=device)
                tokens.epoch += 1
        if self._prepared[0] != tokens.epoch:
            for layer in layers:
                layer.prepare_kernels(counts[layer.device], self.workspaces[layer.device])
        self._prepared = tokens.epoch, queries

    def _devices(self) -> list[torch.device]:
        """Where compressed layers compute."""
        return list(dict.fromkeys([layer.device for layer in self.compressed_layers]))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a layer's new states and return all it holds; see `GSRQLayer.update`.

        If it fails, or anything later in the forward pass does, the whole cache is as it was before that pass.

        Raises:
            RuntimeError: if no forward pass was begun, or the model detached in the middle of one.
        """
        if self.wants_steps:
            self._check_begun(layer_idx)
        return self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)

    @torch.compiler.disable
    def _check_begun(self, layer_idx: int) -> None:
        if self._before is None or isinstance(self.layers[layer_idx], GSRQLayer):
            self._break_if_changed()
            raise RuntimeError(_NOT_BEGUN)

    def commit_pass(self) -> None:
        """Count what the running pass wrote; it is complete (called by the hooks of `attach`).

        Raises:
            RuntimeError: if no pass is running, or a layer took no states in it; then the pass is undone.
            ValueError: if a state that left the window is NaN or infinite; then the pass is undone.
        """
        if self._before is None:
            raise RuntimeError("No forward pass of this cache is running, so there is none to complete.")
        running, tokens = self.tokens.running, self.tokens
        if running is not None and not running.complete:
            try:
                self._check_complete(running)
                if running.leaving:
                    whole = None if tokens._positions is None else tokens._positions[:, : running.after]
                    tokens.check_compressed(running, running.stored_after, whole)
            except BaseException:
                self.roll_back()
                raise
            running.complete = True
        self._count(running)

    def _count(self, running: ForwardPass | None) -> None:
        # An interrupt in here is made good by the next use of the cache, which does all of it again.
        if running is not None:
            for layer in self.compressed_layers if running.leaving else ():
                layer.finish(running)
            self.tokens.count(running)
            self._backend = "triton" if running.reads_codes and self._all_read else "torch"
        self.tokens.close()
        self._before = None

    def _check_complete(self, running: ForwardPass) -> None:
        for layer in self.compressed_layers:
            reads = running.reads_codes and layer.can_read_codes
            if reads and not (layer.attended or self.driven):
                raise RuntimeError(
                    f"The attention of layer {layer.index} does not call the attention function of its config, or "
                    "does not pass further arguments on to it, so it attended to the newest tokens only. Use "
                    "GSRQCache(..., backend='torch') with this model."
                )
            if not reads and layer.index not in running.updated:
                raise RuntimeError(f"Layer {layer.index} of this cache was given no states in a forward pass.")

    def roll_back(self) -> None:
        """Make the cache what it was before the forward pass of this thread, if one is running (called when it fails).

        Hooks are told of errors, but not of Ctrl-C; then the next use of the cache does it.
        """
        if self._before is None or self._runs_elsewhere():
            return
        running = self.tokens.running
        if running is not None and running.complete:
            self._count(running)
            return
        self._restore(self._before)
        if self.tokens.length == 0:
            for layer in self.compressed_layers:
                layer.reset()
            self.tokens.reset()
        self.tokens.close()
        self._before = None
        self._break_if_changed()

    def _runs_elsewhere(self) -> bool:
        """Whether another thread, which still lives, is in a forward pass."""
        ident = self._thread
        return ident != threading.get_ident() and any(thread.ident == ident for thread in threading.enumerate())

    def _settle(self) -> None:
        """Undo a pass that was interrupted, before the cache is changed.

        Raises:
            RuntimeError: if a pass of another thread is running.
        """
        if self._before is not None and self._runs_elsewhere():
            raise RuntimeError(
                "Another thread is in a forward pass with this cache. Make a cache for each thread, or wait; if that "
                "pass was interrupted, call cache.reset() and start again with the whole text."
            )
        self.roll_back()

    def _break_if_changed(self) -> None:
        if any(map(holds_states, self.layers)):
            self._broken = "A forward pass failed, and the linear-attention states of this cache change in place."

    def _snapshot(self) -> dict[int, dict[str, Any]]:
        """References to what layers of other kinds hold: enough for `_restore`, and nothing is copied."""
        return {
            index: attributes(layer) for index, layer in enumerate(self.layers) if not isinstance(layer, GSRQLayer)
        }

    def _restore(self, snapshot: dict[int, dict[str, Any]]) -> None:
        for index, held in snapshot.items():
            vars(self.layers[index]).clear()
            vars(self.layers[index]).update(held)

    def _committed_layers(self, only: int | None = None) -> list[Any]:
        """The layers as complete passes left them: those of other kinds are stand-ins while a pass is running.

        Args:
            only: The one layer that is asked for; others may be as they are.
        """
        layers = list(self.layers)
        for index, held in (self._before or {}).items():
            if only is None or index == only:
                layers[index] = object.__new__(type(layers[index]))
                vars(layers[index]).update(held)
        return layers

    # What transformers asks

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens cached by complete forward passes, padding included."""
        return self.tokens.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """Index of the next token among the cached ones, as it was before the forward pass that is running."""
        return self.tokens.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the keys that a mask covers, as it was before the pass that is running.

        Where every layer reads codes and `generate` may compile, masks of a few tokens cover the room of the cache:
        they keep their shape while the text grows.
        """
        layers = self.layers
        # Linear attention counts no tokens; the first layer that does answers for it.
        index = next((i for i in range(layer_idx, len(layers)) if isinstance(layers[i], CacheLayerMixin)), layer_idx)
        if index < len(layers) and isinstance(layers[index], GSRQLayer):
            if query_length <= attention.MAX_QUERIES and self.tokens.length and self.is_compileable:
                return self._room_after(query_length), 0
            return layers[index].get_mask_sizes(query_length)
        if self._before is not None:
            layers = self._committed_layers(index)
        return Cache(layers=layers).get_mask_sizes(query_length, layer_idx)

    def _room_after(self, num_new: int) -> int:
        """Tokens that the cache has room for once `num_new` more are cached."""
        tokens = self.tokens
        due = tokens.num_exact - tokens.residual_length if tokens.num_exact >= tokens.full_window else 0
        codes = tokens.capacity_for(max(1, tokens.codes_of(tokens.num_stored + due)))
        return tokens.sink_length + codes + max(tokens.ring, tokens.ring_for(tokens.num_exact + num_new))

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may compile or capture a decoding step: all layers read codes by kernels."""
        return len(self.compressed_layers) == len(self.layers) and self.kernel_reason() is None and self._all_read

    def __bool__(self) -> bool:
        # An empty cache is false, like any empty container. Models that drop "a cache" when the prompt exceeds their
        # original context (Phi-3) ask this way, and would drop the new one that the prompt is meant for.
        return self.tokens.length > 0

    # Operations

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of every layer, or of none if that fails.

        Args:
            tokens_to_remove: Zero or negative, as transformers passes it; -n removes n tokens.

        Raises:
            ValueError: if positive, or more tokens than there are.
            RuntimeError: if a layer with a sliding window dropped the tokens that would be its latest again; call
                `activate_past_recording` before the tokens come that may be removed.
        """
        self._settle()
        # A number on the device in transformers 5.17.
        length, tokens_to_remove = self.tokens.length, int(tokens_to_remove)
        if not -length <= tokens_to_remove <= 0:
            raise ValueError(
                f"crop(-n) removes the last n tokens, n from 0 to the {length} cached ones; got {tokens_to_remove}."
            )
        before = self._snapshot()
        try:
            for index in before:
                self.layers[index].crop(tokens_to_remove)
        except BaseException:
            self._restore(before)
            raise
        if length + tokens_to_remove == 0:
            for layer in self.compressed_layers:
                layer.reset()
            self.tokens.reset()
        else:
            self.tokens.truncate(length + tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, `activate_past_recording` too; the cache can be used for another text."""
        self.tokens.close()
        self._restore(self._empty)
        # The layers change what they were just given.
        self._empty = self._snapshot()
        for layer in self.compressed_layers:
            layer.reset()
            layer.record_past = False
        self.tokens.reset()
        self.graphs.clear()
        self.workspaces.clear()
        self.tokens.max_length = self.options.max_length
        self._before, self._broken, self._backend, self.driven = None, "", "torch", False

    def expect_length(self, max_length: int) -> None:
        """Make room for a text of this length when room is made next; longer than said before, never shorter."""
        self.tokens.max_length = max(max_length, self.tokens.max_length or 0)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Give each row the past of row `beam_idx[row]` (beam search).

        Raises:
            ValueError: if `beam_idx` does not name one cached row for each row.
        """
        self._settle()
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
        self._settle()
        rows = self._num_rows()
        if rows is not None:
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int] | Sequence[bool]) -> None:
        """Keep these rows of the batch, in this order; indices or a boolean mask.

        Raises:
            ValueError: if there are none, or one is not a cached row.
        """
        self._settle()
        rows = self._num_rows()
        if rows is not None:
            self._select(self._row_indices(torch.as_tensor(indices), rows))

    def _num_rows(self) -> int | None:
        """Rows B of the cached batch, None while nothing is cached."""
        layer = next((layer for layer in self.compressed_layers if layer.is_initialized), None)
        return None if layer is None or self.tokens.length == 0 else layer.state.batch

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
            self.tokens.select(rows)
        except BaseException:
            # Undoing would mean to hold the whole cache twice.
            self._broken = "Selecting rows of this cache failed half-way."
            raise

    def save(self, path: str | Path) -> None:
        """Write the cache to one safetensors file, to go on from it later or elsewhere.

        It holds codes, sinks and window, not the codebooks, and names the codebooks and the model by digests.

        Args:
            path: The file, written whole or not at all; its folder is created.

        Raises:
            ValueError: if the cache is empty, or has layers of a kind that cannot be saved (linear attention).
            RuntimeError: if its model is gone.
        """
        model = self._model()
        if model is None:
            raise RuntimeError("The model of this cache was deleted, so the file could not say which one it was.")
        persistence.write_cache(
            path, self._committed_layers(), self.tokens, self.codebooks, self.options, fingerprint(model)
        )

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
        # How long the text was to become was another call's business.
        cache = cls(codebooks, model, **{**dataclasses.asdict(file.options), "max_length": None, **options})
        persistence.check_origin(file, cache.codebooks, model)
        persistence.fill_cache(file, cache.layers, cache.tokens, model)
        return cache

    @property
    def backend(self) -> str:
        """What attended to the codes in the latest forward pass, in every layer: "triton" or "torch"."""
        return self._backend

    def memory(self) -> MemoryReport:
        """Bytes held now; everything is counted, codebooks too."""
        return measure(self._committed_layers(), self.tokens, self.workspaces.values(), self.codebooks.config)
