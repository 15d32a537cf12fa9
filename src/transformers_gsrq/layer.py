"""`GSRQLayer`: one decoder layer's part of the cache. Sinks and window exact, everything between as codes."""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from .codebooks import GSRQCodebooks
from .config import KINDS, Kind
from .graphs import record
from .options import CacheOptions
from .quantizer import ResidualQuantizer
from .rope import Rotary
from .state import ForwardPass, LayerState, TokenState


class GSRQLayer(CacheLayerMixin):
    """Cache layer that stores tokens between the sinks and the window as residual codes.

    Token t of row b is a sink if it is among the first `sink_length` real tokens of that row, else it is exact while
    it is in the window, else a code. Codes exist for tokens `sink_length` to `num_stored`: earlier tokens are sinks or
    padding in every row. Lengths, crops and rows are the cache's, which all its layers share.

    Args:
        codebooks: The codebooks.
        index: Index of the decoder layer.
        rotary: Rotary embedding to take off keys; None to store keys as they come.
        tokens: What is known of the tokens, shared by all layers of the cache.
        options: Run-time choices.

    Attributes:
        can_read_codes: Whether attention of this layer can be computed by kernels; see `attention.route`.
        attended: Whether our attention function came by in the running pass.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(
        self, codebooks: GSRQCodebooks, index: int, rotary: Rotary | None, tokens: TokenState, options: CacheOptions
    ) -> None:
        self.codebooks = codebooks
        self.index = index
        self.rotary = rotary
        self.tokens = tokens
        self.options = options
        self.record_past = False
        self.can_read_codes = False
        self.attended = False
        # Recorded attention, by what it was given: empty where it only ran once.
        self.captured: dict[Any, Any] = {}
        self.kernel_inputs: tuple[Any, ...] = ()
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: nothing that is only at hand for kernels."""
        return {**self.__dict__, "kernel_inputs": (), "captured": {}}

    # What transformers asks

    @property
    def keys(self) -> torch.Tensor | None:
        """Exact keys of the window, `[B, H, T, D]`; None before the first token."""
        return self._window("key")

    @property
    def values(self) -> torch.Tensor | None:
        """Exact values of the window, `[B, H, T, D]`; None before the first token."""
        return self._window("value")

    def _window(self, kind: Kind) -> torch.Tensor | None:
        tokens = self.tokens
        return self.state.read(kind, tokens.num_stored, tokens.length) if self.is_initialized else None

    @property
    def num_stored(self) -> int:
        """Tokens that have left the window, padding included."""
        return self.tokens.num_stored if self.is_initialized else 0

    def get_seq_length(self) -> int:
        """Tokens cached by complete forward passes, padding included."""
        return self.tokens.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys that `update` will return."""
        return self.tokens.length + query_length, 0

    def get_max_length(self) -> int:
        """-1, by which transformers means that the layer holds any number of tokens."""
        return -1

    # The name that transformers before 5.18 uses for it.
    get_max_cache_shape = get_max_length

    def activate_past_recording(self) -> None:
        """Expect `crop` after each forward: compress only what was there before the call."""
        self.record_past = True

    # Writing

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
        self.quantizers: dict[Kind, ResidualQuantizer] = {
            kind: self.codebooks.quantizer(self.index, kind, self.device, given[kind].dtype) for kind in KINDS
        }
        self.state = LayerState(
            {kind: quantizer.code_shape for kind, quantizer in self.quantizers.items()},
            {kind: states.dtype for kind, states in given.items()},
            key_states.shape[0],
            config.num_kv_heads,
            config.head_dim,
            self.options.sink_length,
            self.device,
        )
        self.state.resize_ring(self.tokens.ring, 0, 0)
        self.state.reserve(self.tokens.capacity, 0)
        self.tokens.dtypes += 1
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new states; the lengths count them when the forward pass is complete.

        Args:
            key_states: `[B, H, T, D]`, after rotary embedding.
            value_states: `[B, H, T, D]`.

        Returns:
            Keys and values of all tokens, the compressed ones decoded, `[B, H, total, D]`. Only the new states, and
            nothing is added yet, where our attention function does both: it reads the codes.
        """
        if self.tokens.reads_codes and self.can_read_codes:
            return key_states, value_states
        return self._add(key_states, value_states)

    # Lengths kept in Python change with every token: traced, they would be compiled anew each time.
    @torch.compiler.disable
    def _add(self, key_states: torch.Tensor, value_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        running = self.tokens.running
        if running is None or self.index in running.updated:
            raise RuntimeError(
                f"Layer {self.index} of this cache was given states outside of a forward pass, or twice in one: call "
                "the model, or model.get_decoder(), not its layers."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        running.updated.add(self.index)
        new: dict[Kind, torch.Tensor] = {"key": key_states, "value": value_states}
        state, leaving = self.state, running.leaving
        for kind, states in new.items():
            if states.dtype != state.exact[kind].dtype and state.promote(kind, states.dtype):
                self.tokens.dtypes += 1
                self.tokens.moved()
        if leaving == 0:
            for kind, states in new.items():
                state.write(kind, states.detach(), running.before)
            return self._decode("key", running, new["key"]), self._decode("value", running, new["value"])
        if not self.options.quantize_prefill:
            out = self._decode("key", running, new["key"]), self._decode("value", running, new["value"])
        leave = {
            kind: self._joined(kind, running.stored, running.before, states)[:, :, :leaving]
            for kind, states in new.items()
        }
        self.compress(leave, running.stored, running)
        count = min(running.num_new, running.after - running.stored_after)
        for kind, states in new.items():
            running.new_window[self.index, kind] = states[:, :, states.shape[2] - count :].detach().clone()
        if self.options.quantize_prefill:
            out = self._reread("key", running, new["key"]), self._reread("value", running, new["value"])
        return out

    def workspace_bytes(self, num_query_heads: int, num_queries: int, device: torch.device) -> int:
        """Memory that the kernels of a step work in.

        Args:
            num_query_heads: Hq.
            num_queries: Tokens Q that a step brings at most.
            device: Where it runs.
        """
        from .ops.triton.decode_attention import decode_workspace_bytes

        value = self.quantizers["value"]
        return decode_workspace_bytes(
            batch=self.state.batch,
            num_heads=value.num_heads,
            num_query_heads=num_query_heads,
            num_queries=num_queries,
            head_dim=value.head_dim,
            value_stages=value.centroids.shape[1],
            value_subspace_dim=value.centroids.shape[-1],
            capacity=self.state.capacity,
            device=device,
        )

    def prepare_kernels(self, counts: torch.Tensor, workspace: torch.Tensor) -> None:
        """Have at hand what `attend` reads; what is written in place stays right until a tensor moves."""
        from .ops.triton.decode_attention import decode_attention

        self.kernel = decode_attention
        codes, exact = self.state.codes, self.state.exact
        tables = self.quantizers["key"].key_tables(self.active_rotary)
        self.kernel_inputs = (
            codes["key"], codes["value"], tables, self.quantizers["value"].centroids,
            exact["key"], exact["value"], counts, workspace,
        )  # fmt: skip
        self.captured.clear()

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Attention of a few new tokens to everything the layer holds; their states go to the window.

        Args:
            query: `[B, Hq, Q, D]`, rotated.
            key: New keys `[B, H, Q, D]`, rotated.
            value: New values `[B, H, Q, D]`.
            mask: Boolean `[B or 1, 1 or Hq, Q, total or more]` in the order of tokens, or None.
            scaling: Factor of the scores.
            softcap: Soft cap of the scores.

        Returns:
            `[B, Q, Hq, D]`.
        """
        self.attended = True
        if torch.compiler.is_compiling() or not query.is_cuda or torch.cuda.is_current_stream_capturing():
            return self._launch(query, key, value, mask, scaling, softcap)
        if mask is not None and mask.shape[-1] < self.tokens.room:
            # As long as the text: it comes in another shape each time.
            return self._launch(query, key, value, mask, scaling, softcap)
        # Python takes longer to launch five kernels than the GPU to run them on a short text.
        name = query.shape, query.dtype, None if mask is None else mask.shape, scaling, softcap
        found = self.captured.get(name)
        if found is None:
            # Launched as they are the first time: kernels are compiled before they are recorded.
            self.captured[name] = ()
            return self._launch(query, key, value, mask, scaling, softcap)
        if not found:
            inputs = self.tokens.step_inputs(self.device, name, query, key, value, mask)
            graph, out = record(
                lambda: self._launch(inputs.query, inputs.key, inputs.value, inputs.mask, scaling, softcap),
                self.device,
                inputs.pool,
            )
            found = self.captured[name] = graph, out, inputs
        graph, out, inputs = found
        inputs.take(query, key, value, mask)
        graph.replay()
        return out.clone()

    def _launch(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        return self.kernel(
            query, key, value, *self.kernel_inputs,
            sink_length=self.options.sink_length, mask=mask, scaling=scaling, softcap=softcap,
        )  # fmt: skip

    def compress(self, states: dict[Kind, torch.Tensor], first: int, running: ForwardPass) -> None:
        """Code the exact states of tokens that leave the window; the lengths are the cache's business.

        Args:
            states: For each kind `[B, H, T, D]`, tokens from `first` on.
            first: Their first token.
            running: Told whether they are finite.
        """
        tokens, last = self.tokens, first + states["key"].shape[2]
        coded = max(first, tokens.sink_length)
        if coded < last:
            for kind in KINDS:
                part = states[kind].detach()[:, :, coded - first :]
                running.finite[f"layer {self.index} {kind}"] = part.isfinite().all()
                self.quantizers[kind].encode_into(
                    self.state.codes[kind][..., tokens.codes_of(coded) : tokens.codes_of(last)],
                    part,
                    self._rotation(coded, last, self.dtype) if kind == "key" else None,
                    self.options.beam_width,
                    self.options.backend,
                )
        for kind in KINDS:
            self.state.write_sinks(kind, states[kind].detach(), first, tokens.sink_tokens(self.device))

    def finish(self, running: ForwardPass) -> None:
        """Write what a complete pass leaves in the window."""
        for kind in KINDS:
            window = running.new_window.get((self.index, kind))
            if window is not None:
                self.state.write(kind, window, running.after - window.shape[2])

    @property
    def active_rotary(self) -> Rotary | None:
        """The rotary embedding that the cached keys were given."""
        return self.rotary.longer if self.rotary is not None and self.tokens.long_text else self.rotary

    def _rotation(self, first: int, last: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor] | None:
        rotary = self.active_rotary
        return None if rotary is None else self.tokens.cos_sin(rotary, first, last, dtype, self.device)

    # Reading

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of all cached tokens as the next query will see them, `[B, H, T, D]`.

        Left padding holds anything.

        Raises:
            RuntimeError: if nothing is cached yet.
        """
        if not self.is_initialized or self.tokens.length == 0:
            raise RuntimeError(f"Layer {self.index} of this cache is empty: it has no states yet.")
        self.prefetch()
        tokens = self.tokens
        window: dict[Kind, torch.Tensor] = {
            kind: self.state.read(kind, tokens.num_stored, tokens.length) for kind in KINDS
        }
        states = tuple(self._all(kind, tokens.num_stored, window[kind]) for kind in KINDS)
        tokens.forget_tables()
        return states[0], states[1]

    def _joined(self, kind: Kind, first: int, last: int, new: torch.Tensor) -> torch.Tensor:
        """Exact states of tokens `first` to `last` from the ring, then these new ones."""
        if first == last:
            return new
        return torch.cat([self.state.read(kind, first, last).to(new.dtype), new], 2)

    def _decode(self, kind: Kind, running: ForwardPass, new: torch.Tensor) -> torch.Tensor:
        """States of all tokens of a running pass, those that leave it still exact."""
        return self._all(kind, running.stored, self._joined(kind, running.stored, running.before, new))

    def _reread(self, kind: Kind, running: ForwardPass, new: torch.Tensor) -> torch.Tensor:
        """States of all tokens of a running pass as the cache will hold them."""
        window = self._joined(kind, running.stored, running.before, new)[:, :, running.leaving :]
        return self._all(kind, running.stored_after, window)

    def _all(self, kind: Kind, num_stored: int, window: torch.Tensor) -> torch.Tensor:
        """States of `num_stored` stored tokens, decoded, and these exact ones after them."""
        if num_stored == 0:
            return window
        tokens = self.tokens
        batch, num_heads, length, head_dim = window.shape
        out = window.new_empty(batch, num_heads, num_stored + length, head_dim)
        out[:, :, num_stored:] = window
        skip = min(tokens.sink_length, num_stored)
        if num_stored > skip:
            # Unrounded tables: the decoded key is an approximation that owes nothing to the model's rounding.
            cos_sin = self._rotation(skip, num_stored, torch.float32) if kind == "key" else None
            codes = self.state.codes[kind][..., : tokens.codes_of(num_stored)]
            self.quantizers[kind].decode(codes, cos_sin, out=out[:, :, skip:num_stored])
        if skip:
            out[:, :, :skip] = 0
            sinks = self.state.sinks(kind)[:, :, :skip].to(out.dtype)
            if tokens.padded:
                token = tokens.sink_tokens(self.device)[:, :skip]
                # A sink still in the window goes to token 0, which is padding wherever that happens.
                token = torch.where(token < num_stored, token, 0)
                out.scatter_(2, token[:, None, :, None].expand_as(sinks), sinks)
            else:
                out[:, :, :skip] = sinks
        return out

    # Saving and moving

    @property
    def uses_long_rotary(self) -> bool:
        """Whether the prompt was so long that the model rotates by its other frequencies (longrope)."""
        return self.rotary is not None and self.tokens.long_text

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that is in use, by name: what `fill` takes."""
        tokens = self.tokens
        out = {f"{kind}s": self.state.read(kind, tokens.num_stored, tokens.length) for kind in KINDS}
        for kind in KINDS:
            out[f"{kind}_sinks"] = self.state.sinks(kind)
            out[f"{kind}_codes"] = self.state.codes[kind][..., : tokens.codes_of(tokens.num_stored)]
        return out

    def fill(self, tensors: dict[str, torch.Tensor], num_stored: int, *, long_rotary: bool) -> None:
        """Hold these tensors, whose shapes fit: codes from anywhere, the others on the layer's device."""
        self.lazy_initialization(tensors["keys"], tensors["values"])
        tokens, length = self.tokens, num_stored + tensors["keys"].shape[2]
        tokens.long_text |= long_rotary
        tokens.ring = tokens.ring_for(length - num_stored)
        tokens.capacity = tokens.capacity_for(tokens.codes_of(num_stored))
        self.state.resize_ring(tokens.ring, 0, 0)
        self.state.reserve(tokens.capacity, 0)
        for kind in KINDS:
            self.state.write(kind, tensors[f"{kind}s"], num_stored)
            self.state.sinks(kind).copy_(tensors[f"{kind}_sinks"])
            self.state.codes[kind][..., : tokens.codes_of(num_stored)].copy_(tensors[f"{kind}_codes"])

    def reset(self) -> None:
        """Free everything."""
        self.is_initialized = False
        self.forget_kernel_inputs()
        for name in ("quantizers", "state", "kernel"):
            self.__dict__.pop(name, None)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep these rows of the batch, in this order, as many as there are; the cache has checked them."""
        if self.is_initialized:
            self.forget_kernel_inputs()
            self.state.select(beam_idx, self.tokens.codes_of(self.tokens.num_stored))

    def offload(self) -> None:
        """Move the states to the CPU."""
        self._move("cpu")
        self.tokens.offloaded = True

    def prefetch(self) -> None:
        """Move offloaded states back."""
        if self.is_initialized and self.state.device != self.device:
            self._move(self.device)

    def forget_kernel_inputs(self) -> None:
        """Let go of tensors that were replaced; `prepare_kernels` takes the new ones."""
        self.kernel_inputs = ()
        self.captured.clear()

    def _move(self, device: torch.device | str) -> None:
        if self.is_initialized:
            self.forget_kernel_inputs()
            self.state.to(device)
            self.tokens.moved()
