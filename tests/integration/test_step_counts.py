"""What a step costs the host: Python calls into the package and synchronizations, counted on a CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

from transformers_gsrq import config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# At most, of two layers: calls in each layer, calls around the layers, synchronizations beyond the plain cache's.
BOUNDS = {"token": (44, 34, 0), "draft step": (46, 53, 8), "prompt": (77, 37, 14)}


@pytest.fixture(scope="module")
def modules() -> tuple[ModuleType, ModuleType, ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return tuple(importlib.import_module(name) for name in ("profile_step", "steps", "models"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on a CPU")
def test_a_step_costs_no_more_than_it_did(modules: tuple[ModuleType, ModuleType, ModuleType]) -> None:
    profile_step, steps, models = modules
    model = steps.random_model("tiny")
    codebooks = models.make_codebooks(model, key_bits=0.25, value_bits=0.25)
    found = profile_step.profile_all(model, codebooks, steps.random_tokens(model, 1, 300))
    layers = model.config.num_hidden_layers
    for phase, bounds in BOUNDS.items():
        plain, ours = found["plain"][phase], found["gsrq eager"][phase]
        around = ours["calls"] - layers * ours["layer_calls"]
        counts = ours["layer_calls"], around, ours["syncs"] - plain["syncs"]
        assert all(count <= bound for count, bound in zip(counts, bounds, strict=True)), (phase, counts)
        assert plain["layer_calls"] == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the driver tells of synchronizations")
def test_what_counts(modules: tuple[ModuleType, ModuleType, ModuleType]) -> None:
    profile_step, steps, _ = modules
    model = steps.random_model("tiny")
    numbers = torch.arange(4)
    reads = (
        lambda: bool(numbers.sum()), lambda: int(numbers[0]), lambda: numbers[0].item(), lambda: numbers[numbers > 1],
        lambda: numbers.nonzero(), lambda: torch.equal(numbers, numbers), lambda: numbers.cpu(),
        lambda: numbers.tolist(), lambda: numbers.numpy(), lambda: numbers.unique(),
    )  # fmt: skip
    for read in reads:
        with profile_step.count(model) as counts:
            read()
        assert counts.syncs >= 1
    with profile_step.count(model) as counts:
        (numbers + 1).cumsum(0)[numbers]
        model(torch.ones(1, 3, dtype=torch.long))
    assert (counts.syncs, counts.calls) == (0, 0)
    with profile_step.count(model) as counts:
        config.head_geometry(model.config)
    assert counts.calls >= 1
    assert counts.layer_calls == 0
