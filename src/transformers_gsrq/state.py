"""What a compressed cache holds on its devices, and how much of it is in use. Knows nothing of transformers.

Tensors are only written where nothing is in use: codes and positions behind their end, exact tokens in free slots of a
ring. What is in use is a matter of a few integers, which change when a forward pass is complete. So a failed pass
needs no undoing, and reading never disturbs a pass that is running.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .graphs import StepInputs
from .ops.triton import PAGE_TOKENS, Count
from .rope import Rotary

# Slots of a ring are a multiple of this.
RING_UNIT = 16
# Slots of a ring at first, if the window is longer.
FIRST_RING = 256


def round_up(number: int, unit: int) -> int:
    """The next multiple of `unit`."""
    return -(-number // unit) * unit


def look(*numbers: torch.Tensor | None) -> list[float | None]:
    """What numbers on devices are, in one synchronization for each device; None for None."""
    there = [number for number in numbers if number is not None]
    if len({number.device for number in there}) > 1:
        there = [number.cpu() for number in there]
    seen = iter(torch.stack(there).tolist() if there else [])
    return [None if number is None else next(seen) for number in numbers]


_FINITE = (
    "NaN or infinity in {}: such a state has no nearest centroid. The model overflowed: check its inputs, or load it "
    "in bfloat16 or float32 instead of float16."
)


@dataclass
class ForwardPass:
    """What one forward pass does to the tokens; worked out before its first layer runs, and the same for all layers.

    Attributes:
        num_new: Tokens that it adds.
        stored: Tokens that have left the window when the layers run.
        exact: Exact tokens before the new ones.
        leaving: Tokens that leave the window once a layer has attended to them: a prompt's.
        settled: Whether every row has begun, its own tokens included.
        reads_codes: Whether layers that can attend to the codes by kernels do.
        room: Codes that a layer needs room for.
        finite: For each compressed kind and layer, whether its states are finite, on their devices.
        new_window: For each layer and kind, what is written to its ring when the pass is complete.
        updated: Layers that have taken their states.
        complete: Whether the model is through, so that only our own bookkeeping is left.
    """

    num_new: int
    stored: int
    exact: int
    leaving: int
    settled: bool
    reads_codes: bool
    room: int
    finite: dict[str, torch.Tensor] = field(default_factory=dict)
    new_window: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    updated: set[int] = field(default_factory=set)
    complete: bool = False

    @property
    def before(self) -> int:
        """Tokens before it."""
        return self.stored + self.exact

    @property
    def after(self) -> int:
        """Tokens once it is complete."""
        return self.before + self.num_new

    @property
    def stored_after(self) -> int:
        """Tokens that have left the window once it is complete."""
        return self.stored + self.leaving


class TokenState:
    """How many tokens there are, where they stand and where each row begins; the same for all layers of a cache.

    Tokens 0 to `num_stored` are sinks, codes or padding, those up to `length` are exact.

    Args:
        sink_length: First real tokens of each row kept exact.
        residual_length: Latest tokens kept exact.
        chunk_length: Tokens that leave the window together while decoding.
        max_length: Tokens that will be cached at most, None if unknown.

    Attributes:
        length: Tokens T, padding included.
        num_stored: Tokens that have left the window.
        capacity: Codes that every layer has room for.
        ring: Slots that every layer has for exact tokens.
        starts: int64 `[B]`, index of each row's first real token; None before the first token.
        padded: Whether any row starts later than 0.
        settled: Whether every row has begun.
        begun_by: Tokens among which every row is known to begin, while `settled`.
        straight: Whether the positions of every row's coded tokens follow one another.
        long_text: Whether the prompt was so long that the model rotates by its other frequencies (longrope).
        epoch: Grows whenever a tensor that kernels read moves in memory.
        dtypes: Grows whenever a layer begins to hold states, or holds them in another dtype.
        running: The forward pass that is running, once it is known what it does; None between passes.
        reads_codes: `running.reads_codes`, False between passes: the one thing that traced code looks at.
        offloaded: Whether a layer's states were moved to the CPU.
        rotary_error: Differences found by `Rotary.error` and not looked at yet.
    """

    def __init__(self, sink_length: int, residual_length: int, chunk_length: int, max_length: int | None) -> None:
        self.sink_length = sink_length
        self.residual_length = residual_length
        self.chunk_length = chunk_length
        self.max_length = max_length
        self.epoch = self.dtypes = 0
        self.running: ForwardPass | None = None
        self.reads_codes = False
        self.offloaded = False
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.length = self.num_stored = 0
        self.capacity = 0
        self.ring = min(self.least_ring, FIRST_RING)
        self._positions: torch.Tensor | None = None
        self.starts: torch.Tensor | None = None
        self.padded = False
        self.settled = False
        self.begun_by = 0
        self.straight = True
        self.long_text = False
        self.epoch += 1
        # By device: the counts, and what they were written from.
        self._counts: dict[torch.device, tuple[torch.Tensor, list[int]]] = {}
        # What recorded attention is given, by device and shapes, and the epoch that it was recorded in.
        self._step_inputs: dict[Any, StepInputs] = {}
        self._recorded = -1
        # Grows whenever a row begins elsewhere or stands elsewhere.
        self._version = 0
        self.rotary_error: torch.Tensor | None = None
        self._tables: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: the tokens of complete passes, and nothing that is only at hand for kernels."""
        dropped: dict[str, Any] = {
            "running": None,
            "reads_codes": False,
            "_counts": {},
            "_step_inputs": {},
            "_tables": {},
        }
        return {**self.__dict__, **dropped}

    @property
    def full_window(self) -> int:
        """Exact tokens at which a chunk is due."""
        return self.residual_length + self.chunk_length

    @property
    def least_ring(self) -> int:
        """Slots that decoding token by token needs at most: a full window and one new token."""
        return round_up(self.full_window + 1, RING_UNIT)

    @property
    def num_exact(self) -> int:
        """Exact tokens in the ring."""
        return self.length - self.num_stored

    @property
    def room(self) -> int:
        """Tokens that there is room for."""
        return self.sink_length + self.capacity + self.ring

    def codes_of(self, num_stored: int) -> int:
        """Codes that there are when so many tokens have left the window."""
        return max(0, num_stored - self.sink_length)

    def capacity_for(self, num_codes: int) -> int:
        """Room for codes once `num_codes` must fit: what is known to be needed, else twice what there was."""
        if num_codes <= self.capacity:
            return self.capacity
        expected = (self.max_length or 0) - self.sink_length - self.residual_length
        return round_up(expected if expected >= num_codes else max(num_codes, 2 * self.capacity), PAGE_TOKENS)

    def ring_for(self, num_exact: int) -> int:
        """Slots of the ring once `num_exact` tokens must fit.

        A window that is longer than most texts is not allocated before it is needed; a ring that held a long prompt
        shrinks again.
        """
        needed = round_up(num_exact, RING_UNIT)
        usual = max(needed, min(self.least_ring, max(FIRST_RING, 2 * needed)))
        return usual if needed > self.ring or self.ring > 2 * usual else self.ring

    # Positions and padding

    @property
    def positions(self) -> torch.Tensor | None:
        """Positions of the tokens, int32 `[B, T]`; None if the model passes none."""
        return None if self._positions is None else self._positions[:, : self.length]

    @torch.inference_mode(False)
    def write_positions(self, position_ids: torch.Tensor, batch: int, room: int, device: torch.device) -> torch.Tensor:
        """Write down the positions of new tokens, which count once `length` says so.

        Args:
            position_ids: Integers `[B or 1, new]`.
            batch: Rows B.
            room: Tokens to make room for.
            device: Where positions are kept.

        Returns:
            int32 `[B, T + new]`: positions of all tokens, the new ones included.
        """
        last = self.length + position_ids.shape[-1]
        held = self._positions
        if held is None or held.shape[1] < last:
            grown = torch.zeros(batch, max(room, last), dtype=torch.int32, device=device)
            if held is not None:
                grown[:, : self.length] = held[:, : self.length]
            self._positions = held = grown
        held[:, self.length : last] = position_ids
        return held[:, :last]

    def begin_rows(self, starts: torch.Tensor) -> None:
        """Note where rows begin; a row that had begun among the cached tokens keeps its start."""
        if self.starts is not None:
            old = self.starts.to(starts.device)
            starts = torch.where(old < self.length, old, starts)
        self.starts = starts
        self._version += 1

    def look(self, *numbers: torch.Tensor | None) -> list[float | None]:
        """Look at these numbers and at `rotary_error`, all in one synchronization.

        Raises:
            ValueError: if the model turns keys otherwise.
        """
        error, *seen = look(self.rotary_error, *numbers)
        self.rotary_error = None
        if error is not None:
            Rotary.check(error)
        return seen

    def look_at_rows(self, length: int) -> tuple[bool, bool]:
        """Whether any row begins later than token 0, and whether all begin among `length` tokens."""
        starts: Any = self.starts
        late, begun = self.look((starts > 0).any(), (starts < length).all())
        return bool(late), bool(begun)

    def check_compressed(self, running: ForwardPass, num_stored: int, positions: torch.Tensor | None) -> None:
        """Look at what is known of tokens that leave the window, in one synchronization.

        Args:
            running: The pass that compressed them.
            num_stored: Tokens that have left the window now.
            positions: Of all tokens, `[B, T]`; None if the model passes none.

        Raises:
            ValueError: if a state is NaN or infinite, or the model turns keys otherwise.
        """
        names, flags = list(running.finite), list(running.finite.values())
        running.finite.clear()
        straight, *finite = self.look(None if positions is None else self.are_straight(positions, num_stored), *flags)
        for name, fine in zip(names, finite, strict=True):
            if not fine:
                raise ValueError(_FINITE.format(name))
        self.straight = straight is None or bool(straight)
        self.forget_tables()

    def sink_tokens(self, device: torch.device) -> torch.Tensor:
        """Token of each sink, int64 `[B, sink_length]`."""
        starts = torch.as_tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(self.sink_length, device=device)

    def are_straight(self, positions: torch.Tensor, num_stored: int) -> torch.Tensor:
        """Whether positions follow one another among the first `num_stored` tokens, a boolean on the device."""
        starts = torch.as_tensor(self.starts, device=positions.device)
        positions = positions[:, : max(1, num_stored)]
        later = torch.arange(1, positions.shape[1], device=positions.device) > starts[:, None]
        return ((positions.diff() == 1) | ~later).all()

    def cos_sin(
        self, rotary: Rotary, first: int, last: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation of tokens `first` to `last`, computed once for all layers; kept until `forget_tables`.

        Args:
            rotary: The layer's embedding.
            first: First token.
            last: One past the last token.
            dtype: What to round to, as in `Rotary.cos_sin`.
            device: Where the tables are needed.

        Returns:
            Two float32 tensors `[B, last - first, P]`.

        Raises:
            ValueError: if the model never passed its positions.
        """
        if self._positions is None:
            raise ValueError(
                "The model did not pass position_ids to its attention layers, so its keys cannot be un-rotated. "
                "This architecture is not supported."
            )
        key = (rotary, first, last, dtype, device)
        if key not in self._tables:
            self._tables[key] = rotary.cos_sin(self._positions[:, first:last].to(device), dtype)
        return self._tables[key]

    def forget_tables(self) -> None:
        """Drop rotations that `cos_sin` kept: they take more memory than codes do."""
        self._tables.clear()

    # What recorded attention needs

    def step_inputs(self, device: torch.device, name: Any, *given: Any) -> StepInputs:
        """Tensors that recorded attention reads what it is given from; one set for the layers of a device.

        They and the memory that goes with them are made anew where `epoch` changed: what was recorded before is gone.
        """
        if self._recorded != self.epoch:
            self._recorded, self._step_inputs = self.epoch, {}
        if (device, name) not in self._step_inputs:
            self._step_inputs[device, name] = StepInputs(*given)
        return self._step_inputs[device, name]

    # Counts on the device

    @torch.inference_mode(False)
    def counts(self, device: torch.device, num_stored: int, num_exact: int) -> torch.Tensor:
        """What kernels read, see `Count`; written where it is not what it was, without a synchronization.

        Args:
            device: Where they are read.
            num_stored: Tokens that have left the window when the layers run.
            num_exact: Exact tokens before the new ones.

        Returns:
            int32 `[len(Count), B]`; always the same tensor until `epoch` changes.
        """
        starts = torch.as_tensor(self.starts, device=device)
        found = self._counts.get(device)
        if found is None or found[0].shape[1] != starts.numel():
            counts = torch.zeros(len(Count), starts.numel(), dtype=torch.int32, device=device)
            found = self._counts[device] = counts, []
            self.epoch += 1
        counts, written = found
        wanted = [self._version, num_stored, self.ring, num_exact]
        if written[:3] != wanted[:3]:
            first = starts * 0
            if self._positions is not None and num_stored:
                begin = starts.clamp(max=num_stored - 1)
                first = self._positions.to(device).gather(1, begin[:, None])[:, 0] - begin
            counts[Count.NUM_CODES] = self.codes_of(num_stored)
            counts[Count.FIRST_CODE] = starts
            counts[Count.FIRST_POSITION] = first + self.sink_length
            counts[Count.NUM_SINKS] = (num_stored - starts).clamp(0, self.sink_length)
            counts[Count.FIRST_TOKEN] = starts
            counts[Count.NUM_STORED] = num_stored
            counts[Count.RING_HEAD] = num_stored % self.ring
        if written != wanted:
            counts[Count.NUM_EXACT] = num_exact
            written[:] = wanted
        return counts

    # Operations

    def count(self, running: ForwardPass) -> None:
        """Count the tokens of a pass that is complete."""
        if running.settled and not self.settled:
            self.begun_by = running.after
        self.length, self.num_stored, self.settled = running.after, running.stored_after, running.settled

    def close(self) -> None:
        """End the running pass."""
        self.running, self.reads_codes = None, False
        self.forget_tables()
        for inputs in self._step_inputs.values():
            inputs.given = None

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on, more than none being left."""
        if length < self.length:
            self.length = length
            self.num_stored = min(self.num_stored, length)
            # A row cut back into its padding may begin elsewhere next time.
            if self.starts is not None and self.padded and length < self.begun_by:
                self.settled, self.begun_by = bool((self.starts < length).all()), length
            self._look_whether_straight()
            self._version += 1

    @torch.inference_mode(False)
    def select(self, rows: torch.Tensor) -> None:
        """Keep rows `rows` of the batch, in that order; int64, repetition allowed."""
        if self.starts is not None:
            self.starts = self.starts[rows.to(self.starts.device)]
        if self._positions is not None:
            self._positions = self._positions[rows.to(self._positions.device)]
        self._look_whether_straight()
        self.moved()

    def _look_whether_straight(self) -> None:
        """Look again at positions that did not follow one another: those that did not may be gone."""
        if not self.straight and self._positions is not None:
            self.straight = bool(self.are_straight(self._positions, self.num_stored))

    def moved(self) -> None:
        """Take note that tensors of the cache lie elsewhere now, or hold other rows."""
        self.epoch += 1
        self._version += 1

    @torch.inference_mode(False)
    def fill(self, length: int, num_stored: int, positions: torch.Tensor | None, starts: torch.Tensor | None) -> None:
        """Hold these tokens, as saved before."""
        long_text, capacity, ring = self.long_text, self.capacity, self.ring
        self.reset()
        self.long_text, self.capacity, self.ring = long_text, capacity, ring
        self.length, self.num_stored, self.starts = length, num_stored, starts
        self._positions = None if positions is None else positions.clone()
        if starts is not None:
            self.padded = bool((starts > 0).any())
            self.settled, self.begun_by = bool((starts < length).all()), length
            self.straight = positions is None or bool(self.are_straight(positions, num_stored))

    def tensors(self) -> list[torch.Tensor]:
        """Everything held here."""
        inputs = [part for each in self._step_inputs.values() for part in each.tensors()]
        held = [self._positions, self.starts, *(counts for counts, _ in self._counts.values()), *inputs]
        return [tensor for tensor in held if tensor is not None]


class LayerState:
    """The tensors of one layer: codes, sinks, and a ring of exact tokens. Token t lies in slot t modulo the ring.

    They are made outside of inference mode, whatever mode a call is in: what is made inside cannot be written to
    outside.

    Args:
        code_shapes: For each kind `(M, R)`, the codes of a token.
        dtypes: For each kind the dtype of exact states.
        batch: Rows B.
        num_heads: Heads H.
        head_dim: Channels D.
        sink_length: Slots for sinks.
        device: Where the layer computes.

    Attributes:
        codes: For each kind uint8 `[B, M, R, capacity]`, stage-major with tokens contiguous: a kernel reads one stage
            of consecutive tokens in one go.
        exact: For each kind `[B, H, sink_length + ring, D]`: sinks, then the ring.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        code_shapes: Mapping[str, tuple[int, int]],
        dtypes: Mapping[str, torch.dtype],
        batch: int,
        num_heads: int,
        head_dim: int,
        sink_length: int,
        device: torch.device,
    ) -> None:
        self.sink_length = sink_length
        self.codes = {
            kind: torch.empty(batch, *shape, 0, dtype=torch.uint8, device=device)
            for kind, shape in code_shapes.items()
        }
        self.exact = {
            kind: torch.zeros(batch, num_heads, sink_length, head_dim, dtype=dtype, device=device)
            for kind, dtype in dtypes.items()
        }

    @property
    def batch(self) -> int:
        """Rows B."""
        return next(iter(self.exact.values())).shape[0]

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return next(iter(self.exact.values())).device

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return next(iter(self.exact.values())).shape[2] - self.sink_length

    @property
    def capacity(self) -> int:
        """Codes that there is room for."""
        return next(iter(self.codes.values())).shape[-1]

    @torch.inference_mode(False)
    def reserve(self, capacity: int, used: int) -> None:
        """Make room for `capacity` codes, keeping the first `used`."""
        for kind, held in self.codes.items():
            if held.shape[-1] < capacity:
                grown = held.new_empty(*held.shape[:-1], capacity)
                grown[..., :used] = held[..., :used]
                self.codes[kind] = grown

    @torch.inference_mode(False)
    def resize_ring(self, ring: int, first: int, last: int) -> None:
        """Give the ring another number of slots, keeping tokens `first` to `last`."""
        if ring == self.ring:
            return
        resized = {}
        for kind, held in self.exact.items():
            # Zeros, since a product with what memory happens to hold may be NaN.
            new = held.new_zeros(*held.shape[:2], self.sink_length + ring, held.shape[3])
            new[:, :, : self.sink_length] = held[:, :, : self.sink_length]
            for slots, tokens in _runs(first, last, ring, self.sink_length):
                new[:, :, slots] = self.read(kind, *tokens)
            resized[kind] = new
        self.exact = resized

    @torch.inference_mode(False)
    def promote(self, kind: str, dtype: torch.dtype) -> bool:
        """Hold exact states of a wider dtype if these are; whether that changed anything (autocast that ended)."""
        held = self.exact[kind]
        wide = torch.promote_types(held.dtype, dtype)
        self.exact[kind] = held.to(wide)
        return wide != held.dtype

    @torch.no_grad()
    def write(self, kind: str, states: torch.Tensor, first: int) -> None:
        """Put exact states `[B, H, T, D]` of tokens from `first` on into their slots."""
        for slots, (start, stop) in _runs(first, first + states.shape[2], self.ring, self.sink_length):
            self.exact[kind][:, :, slots] = states[:, :, start - first : stop - first]

    def read(self, kind: str, first: int, last: int) -> torch.Tensor:
        """Exact states of tokens `first` to `last`, `[B, H, T, D]`; not to be written to."""
        parts = [self.exact[kind][:, :, slots] for slots, _ in _runs(first, last, self.ring, self.sink_length)]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts, 2) if parts else self.exact[kind][:, :, :0]

    def sinks(self, kind: str) -> torch.Tensor:
        """The slots of the sinks, `[B, H, sink_length, D]`."""
        return self.exact[kind][:, :, : self.sink_length]

    @torch.no_grad()
    def write_sinks(self, kind: str, states: torch.Tensor, first: int, sink_tokens: torch.Tensor) -> None:
        """Keep those of these exact states that are sinks, now that they leave the window.

        Args:
            kind: Kind of state.
            states: `[B, H, T, D]`, tokens from `first` on.
            first: Their first token.
            sink_tokens: int64 `[B, sink_length]`, token of each sink.
        """
        count = states.shape[2]
        if self.sink_length == 0 or count == 0:
            return
        sinks = self.sinks(kind)
        source = (sink_tokens - first).clamp(0, count - 1)[:, None, :, None].expand_as(sinks)
        leaving = ((sink_tokens >= first) & (sink_tokens < first + count))[:, None, :, None]
        sinks.copy_(torch.where(leaving, states.gather(2, source).to(sinks.dtype), sinks))

    @torch.inference_mode(False)
    def select(self, rows: torch.Tensor, used: int) -> None:
        """Keep rows `rows` of the batch; codes beyond the first `used` are only room."""
        rows = rows.to(self.device)
        self.exact = {kind: held.index_select(0, rows) for kind, held in self.exact.items()}
        for kind, held in self.codes.items():
            kept = held.new_empty(rows.numel(), *held.shape[1:])
            torch.index_select(held[..., :used], 0, rows, out=kept[..., :used])
            self.codes[kind] = kept

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> None:
        """Move everything. Blocking copies: whoever reads next, perhaps on the CPU, need not know of a stream."""
        self.codes = {kind: held.to(device) for kind, held in self.codes.items()}
        self.exact = {kind: held.to(device) for kind, held in self.exact.items()}

    def tensors(self) -> list[torch.Tensor]:
        """Everything held here."""
        return [*self.codes.values(), *self.exact.values()]


def _runs(first: int, last: int, ring: int, offset: int) -> list[tuple[slice, tuple[int, int]]]:
    """Slices of a ring that begins at `offset`, and the tokens in them, for tokens `first` to `last`."""
    runs = []
    while first < last:
        slot = first % ring
        count = min(last - first, ring - slot)
        runs.append((slice(offset + slot, offset + slot + count), (first, first + count)))
        first += count
    return runs
