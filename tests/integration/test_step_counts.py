"""What a step costs the host: Python calls into the package and synchronizations, counted on a CPU."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import DynamicCache

from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, config
from transformers_gsrq.compat import CACHE_ARGUMENT

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# At most, of two layers that decode in torch: calls in each layer, calls around them, and synchronizations beyond the
# plain cache's.
BOUNDS = {"token": (67, 38, 0), "draft step": (69, 40, 0), "prompt": (103, 88, 2)}


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


@pytest.mark.skipif(torch.cuda.is_available(), reason="counted on a CPU")
@pytest.mark.parametrize("padding", [0, 5])
@torch.no_grad()
def test_when_the_host_waits_for_the_device(modules: tuple[ModuleType, ModuleType, ModuleType], padding: int) -> None:
    """For a prompt twice, whatever the number of layers, and once for tokens that leave the window; else never."""
    profile_step, model = modules[0], SUPPORTED["llama"].build()
    options = {"residual_length": 8, "chunk_length": 4, "sink_length": 2}
    tokens = (torch.arange(80) * 7 % 50 + 3).view(2, 40)
    mask = torch.ones_like(tokens)
    mask[0, :padding] = 0
    caches = GSRQCache(random_codebooks(model), model, **options), DynamicCache(config=model.config)
    found: dict[int, list[tuple[int, int]]] = {}
    # A prompt; a token; a draft, some of which is rejected; three tokens, the last of which finds a full window.
    for new, rejected in ((20, 0), (1, 0), (5, 3), (1, 0), (1, 0)):
        waits, num_stored = [], caches[0].layers[0].num_stored
        for cache in caches:
            first = cache.get_seq_length()
            with profile_step.count(model) as counts:
                model(
                    tokens[:, first : first + new],
                    attention_mask=mask[:, : first + new],
                    position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, first : first + new],
                    **{CACHE_ARGUMENT: cache},
                )
                if rejected:
                    cache.crop(-rejected)
            waits.append(counts.syncs)
        left = caches[0].layers[0].num_stored - num_stored
        found.setdefault(new, []).append((waits[0] - waits[1], left))
    assert found == {20: [(2, 12)], 5: [(0, 0)], 1: [(0, 0), (0, 0), (1, 4)]}


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
