"""`GSRQLayer`: one decoder layer's part of the cache. Sinks and window exact, everything between as codes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from . import fused
from .attention import Step
from .buffers import CodeBuffer, own
from .codebooks import GSRQCodebooks
from .config import KINDS, Kind
from .options import CacheOptions
from .quantizer import ResidualQuantizer
from .rope import Rotary
from .tokens import TokenTable


class GSRQLayer(CacheLayerMixin):
    """Cache layer that stores tokens between the sinks and the window as residual codes.

    Token t of row b is a sink if it is among the first `sink_length` real tokens of that row, else it is exact while
    it is in the window, else a code. Codes exist for tokens `sink_length` to `num_stored`: earlier tokens are sinks or
    padding in every row.

    Args:
        codebooks: The codebooks.
        index: Index of the decoder layer.
        rotary: Rotary embedding to take off keys; None to store keys as they come.
        table: Positions and padding, shared by all layers of the cache.
        options: Run-time choices.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self, codebooks: GSRQCodebooks, index: int, rotary: Rotary | None, table: TokenTable, options: CacheOptions
    ) -> None:
        super().__init__()
        self.codebooks = codebooks
        self.index = index
        self.rotary = rotary
        self.table = table
        self.options = options
        self.record_past = False
        self.num_stored = 0
        self.ran = "torch"
        self._step: Step | None = None
        self._active_rotary = rotary

    # What transformers asks about lengths

    def get_seq_length(self) -> int:
        """Tokens cached, padding included."""
        return self.num_stored + self.keys.shape[-2] if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    # The name that transformers before 5.18 uses for it.
    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """Expect `crop` after each forward: compress only what was there before the call (see `update`)."""
        self.record_past = True

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: not the step that an interrupted forward pass left, which holds the attention module."""
        return {**self.__dict__, "_step": None}

    # Writing

    def receive(self, step: Step) -> None:
        """Take what the model says about the forward pass that calls `update` next."""
        self._step = step

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for states like these, `[B, H, T, D]`.

        Raises:
            ValueError: if heads or channels differ from the codebooks'.
        """
        config = self.codebooks.config
        given: dict[Kind, torch.Tensor] = {"key": key_states, "value": value_states}
        for kind, states in given.items():
            if (states.shape[1], states.shape[3]) != (config.num_kv_heads, config.head_dim):
                raise ValueError(
                    f"Layer {self.index} has {states.shape[1]} {kind} heads of {states.shape[3]} channels, the "
                    f"codebooks {config.num_kv_heads} of {config.head_dim}. Tensor-parallel shards and layers of "
                    "different sizes are not supported."
                )
        self.dtype, self.device = key_states.dtype, key_states.device
        # Under autocast keys, which were rotated in float32, and values differ in dtype.
        self.quantizers = {
            kind: ResidualQuantizer(
                self.codebooks.centroids(self.index, kind, self.device, given[kind].dtype),
                config.num_kv_heads,
                self.options.backend,
                f"layer {self.index} {kind}",
            )
            for kind in KINDS
        }
        shape = key_states.shape[0], config.num_kv_heads, self.options.sink_length, config.head_dim
        self.buffers = {kind: CodeBuffer(shape[0], q.code_shape, self.device) for kind, q in self.quantizers.items()}
        self.keys = key_states[:, :, :0].clone()
        self.values = value_states[:, :, :0].clone()
        self.sinks = {kind: states.new_zeros(shape) for kind, states in given.items()}
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new states and return all of them, the compressed ones decoded.

        What is due is compressed before the new states are appended, so that a draft that is rejected later never
        causes a compression. Only a prefill is compressed at once, unless the caller announced that it will crop. A
        prefill is a call with several tokens: the first, a long one, and with `quantize_prefill` any.

        Args:
            key_states: `[B, H, T, D]`, after rotary embedding.
            value_states: `[B, H, T, D]`.

        Returns:
            Keys and values of all cached tokens, `[B, H, total, D]`; only the new states where the attention that
            follows reads the rest from the codes (`fused`).

        Raises:
            RuntimeError: if the model handed over no step: it is not attached, or was detached.
            ValueError: if the batch is not the cached one, or a state that leaves the window is NaN or infinite.
        """
        step, self._step, self.ran = self._step, None, "torch"
        if step is None:
            raise RuntimeError(
                f"Layer {self.index} of this cache was updated without being told the positions: the model was "
                "detached, or never attached. Call transformers_gsrq.attach(model), or make a new GSRQCache with "
                "model=model."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_batch(key_states.shape[0])
        self.prefetch()
        before, new = self.get_seq_length(), key_states.shape[-2]
        self.table.extend(before, key_states.shape[0], new, step, self.device)
        self._check_rotary(before, new, step)
        keep, full = self.options.residual_length, self.options.residual_length + self.options.chunk_length
        if self.keys.shape[-2] >= full:
            self._compress(self.keys, self.values, self.keys.shape[-2] - keep)
        window = self.keys.shape[-2]
        keys = torch.cat([self.keys, key_states], -2) if window else key_states
        values = torch.cat([self.values, value_states], -2) if window else value_states
        prefill = new > 1 and (before == 0 or new >= full or self.options.quantize_prefill)
        due = window + new - keep if prefill and not self.record_past else 0
        if due <= 0 and self._reads_codes(step, key_states):
            self.keys, self.values = own(keys), own(values)
            return key_states, value_states
        if due > 0 and self.options.quantize_prefill:
            self._compress(keys, values, due)
            return self._all_states(self.keys, self.values)
        states = self._all_states(keys, values)
        if due > 0:
            self._compress(keys, values, due)
        else:
            self.keys, self.values = own(keys), own(values)
        return states

    def _reads_codes(self, step: Step, key_states: torch.Tensor) -> bool:
        """Whether the attention that follows reads the codes by kernels, so that nothing need be decoded."""
        if self.buffers["key"].length == 0 or key_states.shape[-2] > fused.MAX_QUERIES:
            return False
        kernels = fused.choose(self, step, key_states)
        if kernels:
            self.ran = "triton"
            if step.module is not None:
                fused.expect(step.module, self)
        return kernels

    def _check_batch(self, rows: int) -> None:
        if rows != self.keys.shape[0]:
            raise ValueError(
                f"This cache holds {self.keys.shape[0]} rows, but the model was given {rows}. Change the cache first: "
                "batch_repeat_interleave(n) for n continuations of each row, batch_select_indices(rows) to keep some."
            )

    def _check_rotary(self, before: int, new: int, step: Step) -> None:
        if self.rotary is None:
            return
        if before == 0:
            self._active_rotary = self.rotary.for_length(new)
        rotary = self._active_rotary or self.rotary
        if rotary.max_tokens is not None and before + new > rotary.max_tokens:
            raise ValueError(
                f"The context reaches {before + new} tokens, but this model rotates keys by other frequencies beyond "
                f"{rotary.max_tokens} (longrope), so {before} cached keys no longer fit. Start again with the whole "
                "text as one prompt."
            )
        # Comparing costs a synchronization, so it is done where a prompt comes in, not at every token.
        if new > 1 and step.position_embeddings is not None and self.table.positions is not None:
            rotary.check(self.table.positions[:, before : before + new].to(self.device), step.position_embeddings)

    def _compress(self, keys: torch.Tensor, values: torch.Tensor, count: int) -> None:
        """Store the first `count` of these exact states and keep the rest as the window."""
        first, last = self.num_stored, self.num_stored + count
        coded = max(first, self.options.sink_length)
        states = {"key": keys[:, :, :count], "value": values[:, :, :count]}
        if coded < last:
            for kind, buffer in self.buffers.items():
                room = buffer.reserve(last - coded, self._expected_codes())
                cos_sin = self._rotation(coded, last, self.dtype) if kind == "key" else None
                self.quantizers[kind].encode(
                    states[kind][:, :, coded - first :], cos_sin, self.options.beam_width, out=room
                )
        sinks = {kind: self._with_sinks(kind, states[kind], first, last) for kind in KINDS}
        # Nothing above changed what is cached; from here on nothing can fail.
        window = {"key": keys[:, :, count:].clone(), "value": values[:, :, count:].clone()}
        self.keys, self.values, self.sinks = window["key"], window["value"], sinks
        self._set_stored(last)

    def _set_stored(self, num_stored: int) -> None:
        self.num_stored = num_stored
        for buffer in self.buffers.values():
            buffer.length = max(0, num_stored - self.options.sink_length)

    def _expected_codes(self) -> int:
        return (self.options.max_length or 0) - self.options.sink_length - self.options.residual_length

    @property
    def active_rotary(self) -> Rotary | None:
        """The rotary embedding that the cached keys were given."""
        return self._active_rotary or self.rotary

    def _rotation(self, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        if self.rotary is None:
            return None
        return self.table.cos_sin(self._active_rotary or self.rotary, first, last, dtype, self.device)

    def _with_sinks(self, kind: Kind, states: torch.Tensor, first: int, last: int) -> torch.Tensor:
        """The sinks once tokens `first` to `last`, whose exact `states` these are, have left the window."""
        sinks = self.sinks[kind]
        if sinks.shape[2] == 0:
            return sinks
        token = self._sink_tokens()
        source = (token - first).clamp(0, last - first - 1)[:, None, :, None].expand_as(sinks)
        leaving = ((token >= first) & (token < last))[:, None, :, None]
        return torch.where(leaving, states.gather(2, source), sinks)

    def _sink_tokens(self) -> torch.Tensor:
        """Token index of each sink, int64 `[B, sink_length]`."""
        starts = torch.as_tensor(self.table.starts, device=self.device)
        return starts[:, None] + torch.arange(self.options.sink_length, device=self.device)

    # Reading

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all cached tokens as the next query will see them, `[B, H, T, D]`.

        Left padding holds anything.

        Raises:
            RuntimeError: if nothing is cached yet.
        """
        if not self.is_initialized:
            raise RuntimeError(f"Layer {self.index} of this cache is empty: it has no states yet.")
        self.prefetch()
        states = self._all_states(self.keys, self.values)
        self.table.forget_tables()
        return states

    def _all_states(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States of all tokens: the stored ones, then these exact ones."""
        if self.num_stored == 0:
            return keys, values
        return self._join("key", keys), self._join("value", values)

    def _join(self, kind: Kind, window: torch.Tensor) -> torch.Tensor:
        batch, num_heads, length, head_dim = window.shape
        out = window.new_empty(batch, num_heads, self.num_stored + length, head_dim)
        out[:, :, self.num_stored :] = window
        skip = min(self.options.sink_length, self.num_stored)
        if self.num_stored > skip:
            # Unrounded tables: the decoded key is an approximation that owes nothing to the model's rounding.
            cos_sin = self._rotation(skip, self.num_stored, torch.float32) if kind == "key" else None
            self.quantizers[kind].decode(self.buffers[kind].codes, cos_sin, out=out[:, :, skip : self.num_stored])
        if skip:
            out[:, :, :skip] = 0
            sinks = self.sinks[kind][:, :, :skip].to(out.dtype)
            if self.table.padded:
                token = self._sink_tokens()[:, :skip]
                # A sink still in the window goes to token 0, which is padding wherever that happens.
                token = torch.where(token < self.num_stored, token, 0)
                out.scatter_(2, token[:, None, :, None].expand_as(sinks), sinks)
            else:
                out[:, :, :skip] = sinks
        return out

    # Operations on the batch and on the length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens; those already compressed stay compressed.

        Args:
            tokens_to_remove: Zero or negative, as transformers passes it; -n removes n tokens.

        Raises:
            ValueError: if positive, or more tokens than there are.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes zero or a negative number of tokens to remove, got {tokens_to_remove}.")
        length = self.get_seq_length() + tokens_to_remove
        if length < 0:
            raise ValueError(f"Cannot remove {-tokens_to_remove} of {self.get_seq_length()} cached tokens.")
        if tokens_to_remove == 0 or not self.is_initialized:
            return
        if length == 0:
            self.reset()
            return
        self._set_stored(min(self.num_stored, length))
        self.keys = self.keys[:, :, : length - self.num_stored]
        self.values = self.values[:, :, : length - self.num_stored]

    # Saving

    @property
    def uses_long_rotary(self) -> bool:
        """Whether the prompt was so long that the model rotates by its other frequencies (longrope)."""
        return self._active_rotary is not self.rotary

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything held, by name: what `fill` takes."""
        out = {"keys": self.keys, "values": self.values}
        for kind in KINDS:
            out[f"{kind}_sinks"], out[f"{kind}_codes"] = self.sinks[kind], self.buffers[kind].codes
        return out

    def fill(self, tensors: dict[str, torch.Tensor], num_stored: int, *, long_rotary: bool) -> None:
        """Hold these tensors: codes from anywhere, the others on the device where the layer computes.

        Raises:
            ValueError: if their shapes do not fit the codebooks or one another.
        """
        self.lazy_initialization(tensors["keys"], tensors["values"])
        self.keys, self.values = tensors["keys"], tensors["values"]
        self.sinks = {kind: tensors[f"{kind}_sinks"] for kind in KINDS}
        for kind, buffer in self.buffers.items():
            buffer.fill(tensors[f"{kind}_codes"])
        self.num_stored = num_stored
        if long_rotary and self.rotary is not None:
            self._active_rotary = self.rotary.longer

    def snapshot(self) -> dict[str, Any]:
        """What `restore` needs to undo an update: references, since an update changes nothing in place."""
        return dict(self.__dict__)

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Be as at the time of `snapshot`; only for undoing what came since."""
        self.__dict__.clear()
        self.__dict__.update(snapshot, _step=None)
        if self.is_initialized:
            self._set_stored(self.num_stored)

    def reset(self) -> None:
        """Forget every token."""
        self.keys = self.values = None  # type: ignore[assignment]
        self.is_initialized = False
        self.num_stored = 0
        self._step = None
        for name in ("quantizers", "buffers", "sinks"):
            self.__dict__.pop(name, None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows of the batch, in this order, as many as there are; the cache has checked them."""
        if self.is_initialized:
            rows = beam_idx.to(self.keys.device)
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)
            self.sinks = {kind: sinks.index_select(0, rows) for kind, sinks in self.sinks.items()}
            for buffer in self.buffers.values():
                buffer.select(rows)

    def offload(self) -> None:
        """Move the states to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move offloaded states back."""
        if self.is_initialized and self.keys.device != self.device:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        # Blocking copies: whoever reads them next, perhaps on the CPU, need not know of a stream.
        if self.is_initialized:
            self.keys, self.values = self.keys.to(device), self.values.to(device)
            self.sinks = {kind: sinks.to(device) for kind, sinks in self.sinks.items()}
            for buffer in self.buffers.values():
                buffer.to(device)
