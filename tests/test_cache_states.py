"""Random sequences of cache operations against an oracle that knows only integers.

Every state of every token spells the token's number; its exact form has a fraction that the codebooks cannot store. So
a state says which token it belongs to and whether it is exact or was compressed, and an off-by-one anywhere is exact.
`GSRQ_CACHE_STEPS` sets how many operations are tried, `GSRQ_CACHE_SEED` which.
"""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from transformers import PreTrainedModel, SmolLM3Config, SmolLM3ForCausalLM

from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig
from transformers_gsrq.config import KINDS
from transformers_gsrq.layer import GSRQLayer
from transformers_gsrq.state import ForwardPass, LayerState, TokenState
from transformers_gsrq.steps import Step

STEPS = int(os.environ.get("GSRQ_CACHE_STEPS", "10000"))
FIRST_SEED = int(os.environ.get("GSRQ_CACHE_SEED", "0"))
STEPS_PER_RUN = 50
MOST_TOKENS = 500
HEADS, HEAD_DIM, LAYERS = 2, 4, 2
# What the exact form of a state has beyond its stored one.
FRACTION = 0.25
# Numbers spelled by a channel: small enough for float32 to tell the nearest centroid without doubt.
RANGE = 6000
# Rotating and un-rotating numbers up to RANGE in float32 moves them by less than this, far below FRACTION.
ROTATION_NOISE = 0.01


def make_model() -> PreTrainedModel:
    """Layer 0 rotates its keys, layer 1 does not; its weights are never used."""
    config = SmolLM3Config(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, head_dim=HEAD_DIM, no_rope_layers=[1, 0], bos_token_id=1, eos_token_id=2,
        pad_token_id=0,
    )  # fmt: skip
    return SmolLM3ForCausalLM(config).eval()


def make_codebooks(model: PreTrainedModel) -> GSRQCodebooks:
    """Two stages of one channel: multiples of 256, then the integers between them."""
    fields = GSRQConfig.for_model(model.config, bits=2.0, subspace_dim=4).to_dict()
    fields |= {"key_subspace_dim": 1, "value_subspace_dim": 1, "key_stages": (2, 2), "value_stages": (2, 2)}
    config = GSRQConfig(**fields)
    digits = torch.arange(-128, 128.0)
    numbers = torch.stack([digits * 256, digits]).expand(HEADS * HEAD_DIM, 2, 256)
    parts = {(layer, kind): numbers for layer in config.layers for kind in KINDS}
    shapes = {key: torch.where(part < 0, -1.0, 1.0)[..., None] for key, part in parts.items()}
    return GSRQCodebooks(config, {key: part.abs() for key, part in parts.items()}, shapes)


MODEL = make_model()
CODEBOOKS = make_codebooks(MODEL)
MODULES = [layer.self_attn for layer in MODEL.model.layers]
# A different sequence of numbers for each layer, kind, head and channel.
FACTORS = torch.tensor([7919 + 2 * 3 * 5 * 7 * 11 * n for n in range(LAYERS * 2 * HEADS * HEAD_DIM)]).view(
    LAYERS, 2, HEADS, 1, HEAD_DIM
)


def spell(token: torch.Tensor, layer: int, kind: int) -> torch.Tensor:
    """Stored form of the states of tokens `[B, T]`, integers `[B, H, T, D]` as float32."""
    return ((token[:, None, :, None] * FACTORS[layer, kind]) % RANGE - RANGE // 2).float()


def turn(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate `[B, H, T, D]` by cos and sin `[B, T, D]`."""
    half = states.shape[-1] // 2
    swapped = torch.cat([-states[..., half:], states[..., :half]], -1)
    return states * cos[:, None] + swapped * sin[:, None]


class CacheMachine(RuleBasedStateMachine):
    steps = 0
    most_tokens = 0

    @initialize(
        pads=st.lists(st.integers(0, 40), min_size=1, max_size=4),
        first=st.integers(1, 90),
        residual=st.integers(0, 20),
        sink=st.integers(0, 6),
        chunk=st.integers(1, 12),
        quantize=st.booleans(),
        room=st.sampled_from([None, 200]),
    )
    def begin(
        self, pads: list[int], first: int, residual: int, sink: int, chunk: int, quantize: bool, room: int | None
    ) -> None:
        self.options = {
            "residual_length": residual, "sink_length": sink, "chunk_length": chunk, "quantize_prefill": quantize,
            "max_length": room,
        }  # fmt: skip
        self.cache = GSRQCache(CODEBOOKS, MODEL, **self.options)
        self.next = 0
        self.recording = False
        self.clear(pads)
        self.append(first)

    def clear(self, pads: list[int]) -> None:
        self.starts = torch.tensor(pads)
        self.tokens = torch.zeros(len(pads), 0, dtype=torch.long)
        self.left = 0

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def positions(self, first: int, last: int) -> torch.Tensor:
        return (torch.arange(first, last) - self.starts[:, None]).clamp(min=0)

    def tables(self, first: int, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = torch.zeros(1, dtype=torch.float32)
        return MODEL.model.rotary_emb(hidden, self.positions(first, last))

    def expected(self, layer: int, kind: int) -> torch.Tensor:
        """States of all tokens, from the numbers alone."""
        index = torch.arange(self.length)
        sink = (index >= self.starts[:, None]) & (index < self.starts[:, None] + self.options["sink_length"])
        exact = sink | (index >= self.left)
        states = spell(self.tokens, layer, kind) + FRACTION * exact[:, None, :, None]
        return turn(states, *self.tables(0, self.length)) if (layer, kind) == (0, 0) else states

    def check(self, layer: int, seen: tuple[torch.Tensor, torch.Tensor]) -> None:
        real = torch.arange(self.length) >= self.starts[:, None]
        for kind, states in enumerate(seen):
            error = (states - self.expected(layer, kind)).abs().amax((1, 3))
            noise = ROTATION_NOISE if (layer, kind) == (0, 0) else 0
            assert states.shape[2] == self.length
            assert (error[real] <= noise).all(), (layer, kind, (error > noise).nonzero().tolist()[:5])

    def check_all(self) -> None:
        type(self).steps += 1
        for index, layer in enumerate(self.cache.layers):
            assert layer.get_seq_length() == self.length
            if self.length:
                assert layer.num_stored == self.left
                self.check(index, layer.states())

    def push(self, cache: GSRQCache, tokens: torch.Tensor, layers: int = LAYERS) -> list:
        """Hand new tokens to a cache as a model would."""
        first, last = self.length, self.length + tokens.shape[1]
        cos, sin = self.tables(first, last)
        mask = (torch.arange(last) >= self.starts[:, None]).long()
        seen = []
        cache.begin_pass(MODEL.model)
        step = Step(self.positions(first, last), (cos, sin), mask, *tokens.shape, tokens.device)
        cache.stage_step(MODULES[0], step)
        for layer in range(layers):
            keys, values = (spell(tokens, layer, kind) + FRACTION for kind in (0, 1))
            keys = turn(keys, cos, sin) if layer == 0 else keys
            seen.append(cache.update(keys, values, layer))
        return seen

    def new_tokens(self, count: int) -> torch.Tensor:
        rows = self.starts.numel()
        tokens = torch.arange(self.next, self.next + rows * count).view(rows, count)
        self.next += rows * count
        return tokens

    @precondition(lambda self: self.length < MOST_TOKENS)
    @rule(count=st.one_of(st.just(1), st.integers(1, 16), st.integers(1, 300)))
    def append(self, count: int) -> None:
        keep, full = self.options["residual_length"], self.options["residual_length"] + self.options["chunk_length"]
        before, tokens = self.length, self.new_tokens(count)
        if before - self.left >= full:
            self.left = before - keep
        seen = self.push(self.cache, tokens)
        self.cache.commit_pass()
        self.tokens = torch.cat([self.tokens, tokens], 1)
        prefill = count > 1 and (before == 0 or count >= full or self.options["quantize_prefill"])
        due = prefill and not self.recording and self.length - self.left > keep
        if due and self.options["quantize_prefill"]:
            self.left = self.length - keep
        for layer, states in enumerate(seen):
            self.check(layer, states)
        if due:
            self.left = self.length - keep
        type(self).steps += 1
        type(self).most_tokens = max(self.most_tokens, self.length)
        assert [layer.num_stored for layer in self.cache.layers] == [self.left] * LAYERS

    @rule(count=st.one_of(st.just(1), st.integers(1, 300)), layers=st.integers(0, LAYERS), asked=st.booleans())
    def fail(self, count: int, layers: int, asked: bool) -> None:
        self.push(self.cache, self.new_tokens(count), layers)
        if asked:
            # What is asked in the middle of a pass is answered from what came before it.
            self.check_all()
        self.cache.roll_back()
        self.check_all()

    @rule(share=st.floats(0, 1), some=st.integers(0, 12))
    def crop(self, share: float, some: int) -> None:
        removed = min(self.length, some if share < 0.8 else int(share * self.length))
        self.cache.crop(-removed)
        self.tokens = self.tokens[:, : self.length - removed]
        self.left = min(self.left, self.length)
        self.check_all()

    def rows(self, rows: list[int]) -> None:
        self.tokens, self.starts = self.tokens[rows], self.starts[rows]
        self.check_all()

    @precondition(lambda self: self.length > 0)
    @rule(numbers=st.lists(st.integers(0, 3), min_size=4, max_size=4))
    def reorder(self, numbers: list[int]) -> None:
        rows = [number % self.starts.numel() for number in numbers[: self.starts.numel()]]
        self.cache.reorder_cache(torch.tensor(rows))
        self.rows(rows)

    @precondition(lambda self: self.length > 0)
    @rule(numbers=st.lists(st.integers(0, 3), min_size=1, max_size=4), by_mask=st.booleans())
    def select(self, numbers: list[int], by_mask: bool) -> None:
        rows = [number % self.starts.numel() for number in numbers]
        if by_mask:
            rows = sorted(set(rows))
            mask = torch.zeros(self.starts.numel(), dtype=torch.bool)
            mask[rows] = True
            self.cache.batch_select_indices(mask)
        else:
            self.cache.batch_select_indices(torch.tensor(rows))
        self.rows(rows)

    @precondition(lambda self: self.length > 0 and self.starts.numel() <= 2)
    @rule()
    def repeat(self) -> None:
        self.cache.batch_repeat_interleave(2)
        self.rows([row for row in range(self.starts.numel()) for _ in range(2)])

    @precondition(lambda self: self.length > 0)
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "cache.safetensors"
            self.cache.save(path)
            self.cache = GSRQCache.load(path, CODEBOOKS, MODEL)
        self.check_all()

    @rule(count=st.integers(1, 40))
    def branch(self, count: int) -> None:
        other = copy.deepcopy(self.cache)
        if self.length:
            self.push(other, self.new_tokens(count))
            other.commit_pass()
        self.check_all()
        self.cache, other = copy.deepcopy(self.cache), None
        self.check_all()

    @rule()
    def move(self) -> None:
        for layer in self.cache.layers:
            layer.offload()
            layer.prefetch()
        self.check_all()

    @rule(on=st.booleans())
    def record(self, on: bool) -> None:
        if on:
            self.cache.activate_past_recording()
        else:
            for layer in self.cache.layers:
                layer.record_past = False
        self.recording = on

    @rule(pads=st.lists(st.integers(0, 40), min_size=1, max_size=4), first=st.integers(1, 90))
    @precondition(lambda self: self.length > MOST_TOKENS // 2)
    def restart(self, pads: list[int], first: int) -> None:
        self.cache.reset()
        self.recording = False
        self.clear(pads)
        self.check_all()
        self.append(first)


def run_machine(number: int, runs: int, shrink: bool = True) -> None:
    phases = (Phase.generate, Phase.shrink) if shrink else (Phase.generate,)
    chosen = settings(
        max_examples=runs, stateful_step_count=STEPS_PER_RUN, deadline=None, database=None, print_blob=True,
        phases=phases, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    run_state_machine_as_test(seed(number)(CacheMachine), settings=chosen)


@pytest.mark.host
def test_random_operations_match_the_oracle() -> None:
    CacheMachine.steps = 0
    number = FIRST_SEED
    while CacheMachine.steps < STEPS:
        run_machine(number, runs=50)
        number += 1
    print(f"{CacheMachine.steps} operations without a mismatch, contexts up to {CacheMachine.most_tokens} tokens")
    assert CacheMachine.most_tokens > MOST_TOKENS


def shifted_sinks(tokens: TokenState, device: torch.device) -> torch.Tensor:
    return tokens.starts[:, None] + torch.arange(tokens.sink_length) + 1


def forgetful_count(tokens: TokenState, running: ForwardPass) -> None:
    tokens.length, tokens.settled = running.after, running.settled
    tokens.num_stored = max(0, running.stored_after - 1)


def unmoved_rows(tokens: TokenState, rows: torch.Tensor) -> None:
    tokens.moved()


def lost_window(state: LayerState, ring: int, first: int, last: int) -> None:
    state.exact = {
        kind: held.new_zeros(*held.shape[:2], state.sink_length + ring, held.shape[3])
        for kind, held in state.exact.items()
    }


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (TokenState, "sink_tokens", shifted_sinks),
        (TokenState, "count", forgetful_count),
        (TokenState, "select", unmoved_rows),
        (LayerState, "resize_ring", lost_window),
        (LayerState, "write", lambda state, kind, states, first: None),
        (GSRQLayer, "finish", lambda layer, running: None),
        (LayerState, "select", lambda state, rows, used: None),
    ],
)
def test_the_oracle_notices(owner: type, name: str, broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        run_machine(0, runs=50, shrink=False)
