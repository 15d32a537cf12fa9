"""The bit budget is exact, and a split that loses needles is not chosen for its perplexity."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from transformers_gsrq import GSRQConfig
from transformers_gsrq.evaluation.split import Split, _choose, candidate_splits

MODEL = LlamaConfig(hidden_size=4096, num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=2, head_dim=128)


@pytest.mark.parametrize("bits", [0.25, 0.375, 0.5, 0.75, 1.0, 2.0])
def test_measured_split_costs_the_same(bits: float) -> None:
    even = GSRQConfig.for_model(MODEL, bits=bits)
    measured = GSRQConfig.for_model(MODEL, bits=bits, split="measured")
    assert measured.bits() == even.bits() == bits
    assert measured.code_bytes_per_token == even.code_bytes_per_token
    keys, values = measured.key_stages[0], measured.value_stages[0]
    assert (keys * 5 == values * 3) if bits >= 1 else (keys == values)
    assert GSRQConfig.for_model(MODEL, split=(bits, bits)) == even


def test_a_split_that_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        GSRQConfig.for_model(MODEL, bits=1.0, split="best")
    with pytest.raises(ValueError, match="one subspace_dim"):
        GSRQConfig.for_model(MODEL, bits=1.0, split="measured", subspace_dim=(64, 128))


def test_candidates_cost_exactly_the_bits() -> None:
    config = GSRQConfig.for_model(MODEL, key_bits=1.0, value_bits=2.0)
    pairs = candidate_splits(config, 1.0)
    assert pairs[0] == (16, 16)
    assert pairs == sorted(pairs, reverse=True)
    assert len(pairs) > 2
    assert {sum(pair) for pair in pairs} == {32}
    with pytest.raises(ValueError, match="Calibrate with more bits"):
        candidate_splits(config, 2.0)
    with pytest.raises(ValueError, match="not whole"):
        candidate_splits(config, 0.7)


def test_needles_come_before_perplexity() -> None:
    even, better = Split(8, 8, 0.9, 0.1, 0.5), Split(7, 9, 0.8, 0.1, 0.5)
    greedy = Split(5, 11, 0.7, 0.1, 0.1, lost=14, gained=1)
    choice = _choose((even, better, greedy))
    assert choice.chosen == better
    assert "5/11" in choice.reason
    assert _choose((even, greedy)).chosen == even


@pytest.mark.parametrize(
    ("lost", "gained", "recalls"),
    [(0, 0, True), (1, 0, True), (2, 0, False), (2, 1, True), (6, 3, True), (7, 3, False)],
)
def test_a_prompt_more_or_less_is_chance(lost: int, gained: int, recalls: bool) -> None:
    assert Split(7, 9, 0.8, 0.1, 0.5, lost, gained).recalls is recalls
