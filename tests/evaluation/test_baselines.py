"""Scalar quantization: levels, groups and their price. Strided groups and moving averages, step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from transformers_gsrq import GSRQConfig
from transformers_gsrq.calibration import cluster
from transformers_gsrq.calibration.capture import Samples
from transformers_gsrq.compat import CACHE_ARGUMENT, quantized_backends, quantized_cache
from transformers_gsrq.evaluation.baselines import (
    QuantizedCacheMethod,
    ScalarMethod,
    StridedMethod,
    ema_kmeans,
    fit_strided,
)
from transformers_gsrq.simulation import CodebookMethod, stage_prefix


@pytest.mark.parametrize("kind", ["key", "value"])
def test_scalar_levels(kind: str) -> None:
    method = ScalarMethod((0,), element_bits=2, group_size=8)
    states = torch.randn(1, 2, 20, 16)
    made = method.codec(0, kind, torch.device("cpu"), torch.float32)(states)
    # One group: 8 tokens of a channel for keys, 8 channels of a token for values.
    group = (made[0, 1, 8:16, 3] if kind == "key" else made[0, 1, 5, 8:16]).unique()
    assert 2 <= len(group) <= 4
    given = states[0, 1, 8:16, 3] if kind == "key" else states[0, 1, 5, 8:16]
    ends = torch.stack([given.min(), given.max()])
    torch.testing.assert_close(torch.stack([group.min(), group.max()]), ends, atol=5e-3, rtol=0)
    assert method.bits == 6
    finer = ScalarMethod((0,), element_bits=4, group_size=8).codec(0, kind, torch.device("cpu"), torch.float32)(states)
    assert (finer - states).square().mean() < (made - states).square().mean() / 8


def config_of(samples: Samples, **changes: object) -> GSRQConfig:
    """One layer of two heads of 64 channels."""
    geometry = {
        "model_type": "llama", "num_hidden_layers": 1, "layers": (0,), "num_kv_heads": 2, "head_dim": 64,
        "key_subspace_dim": 64, "value_subspace_dim": 64, "key_stages": (1,), "value_stages": (1,),
        "num_centroids": 16,
    }  # fmt: skip
    return GSRQConfig(**{**geometry, **changes})


@pytest.fixture
def layer_samples(smollm2_samples: Samples) -> Samples:
    """Two heads of a middle layer of SmolLM2."""
    states = {(0, kind): smollm2_samples.states[15, kind][:, :2] for kind in ("key", "value")}
    return Samples(states, {}, smollm2_samples.data_digest, smollm2_samples.num_tokens)


def test_strided_groups_hold_every_second_key_channel(layer_samples: Samples) -> None:
    config = config_of(layer_samples)
    method = fit_strided(layer_samples, config, bits=0.5, iterations=2, batch_size=256)
    assert method.bits == 0.5
    states = layer_samples.states[0, "key"].transpose(0, 1)[None]
    made = method.codec(0, "key", states.device, torch.float32)(states)
    assert made.shape == states.shape
    # One channel of another group changes nothing of this group, one of the same group does.
    for channel, (same, other) in {6: (40, 41), 7: (41, 40)}.items():
        changed = states.clone()
        changed[..., 1, :, channel] += 30
        again = method.codec(0, "key", states.device, torch.float32)(changed)
        assert torch.equal(again[:, 1, :, other], made[:, 1, :, other])
        assert torch.equal(again[:, 0], made[:, 0])
        assert not torch.equal(again[:, 1, :, same], made[:, 1, :, same])


def test_strided_codebooks_were_learned_in_the_order_they_code(layer_samples: Samples) -> None:
    method = fit_strided(layer_samples, config_of(layer_samples), bits=1.0, iterations=3, batch_size=256)

    def error(coder: CodebookMethod, kind: str) -> float:
        states = layer_samples.states[0, kind].transpose(0, 1)[None].float()
        made = coder.codec(0, kind, states.device, torch.float32)(states)
        return float((made - states).square().sum() / states.square().sum())

    neighbours = CodebookMethod(method.codebooks)
    assert error(method, "key") < 0.8 * error(neighbours, "key")
    assert error(method, "value") == error(neighbours, "value")
    assert error(stage_prefix(method, 2, 2), "key") > error(method, "key")
    assert isinstance(stage_prefix(method, 2, 2), StridedMethod)


def test_moving_averages_are_the_equations() -> None:
    vectors = torch.randn(2, 96, 4, dtype=torch.float64)
    decay, width, count = 0.9, 32, 5
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(96, generator=generator)
    batches = [rows for _ in range(2) for rows in torch.randperm(96, generator=generator).split(width)]
    start = cluster(vectors[:, order], count, iterations=10, method="kmeans", seed=3).centroids
    expected = []
    for m in range(2):
        centroids, sums, counts = start[m].clone(), start[m].clone(), torch.ones(count, dtype=torch.float64)
        for rows in batches:
            batch = vectors[m, rows]
            codes = torch.cdist(batch, centroids).argmin(-1)
            for k in range(count):
                mine = batch[codes == k]
                counts[k] = decay * counts[k] + (1 - decay) * len(mine)
                sums[k] = decay * sums[k] + (1 - decay) * mine.sum(0)
            # Laplace smoothing keeps an unused centroid from being divided by zero.
            smoothed = (counts + 1e-5) / (counts.sum() + count * 1e-5) * counts.sum()
            centroids = sums / smoothed[:, None]
        expected.append(centroids)
    found = ema_kmeans(vectors, count, iterations=2, decay=decay, batch_size=width, seed=3)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert (found - start).abs().max() > 0.05


def test_heads_without_groups_are_named(layer_samples: Samples) -> None:
    config = config_of(layer_samples, head_dim=48, key_subspace_dim=48, value_subspace_dim=48)
    with pytest.raises(ValueError, match="48 channels cannot be cut into groups of 32"):
        fit_strided(layer_samples, config)


@pytest.mark.parametrize("backend", ["quanto", "hqq"])
def test_transformers_own_quantized_cache(
    smollm2: tuple[Any, Any], texts: tuple[list[str], list[str]], backend: str
) -> None:
    """The codec gives what the cache gives: its second update returns what the first one stored."""
    if backend not in quantized_backends():
        pytest.skip(f"the package of {backend} is not installed")
    model, tokenizer = smollm2
    ids = tokenizer(texts[1][0], return_tensors="pt")["input_ids"][:, :256]
    with torch.no_grad():
        plain = model(ids, **{CACHE_ARGUMENT: DynamicCache()})[CACHE_ARGUMENT].layers[5]
    errors = {}
    for bits in (2, 4):
        method = QuantizedCacheMethod(model.config, backend, bits)
        cache = quantized_cache(model.config, backend, bits)
        cache.update(plain.keys, plain.values, 0)
        held = cache.update(plain.keys[:, :, :1], plain.values[:, :, :1], 0)
        for kind, states, stored in zip(("key", "value"), (plain.keys, plain.values), held, strict=True):
            made = method.codec(5, kind, states.device, states.dtype)(states)
            torch.testing.assert_close(made, stored[:, :, :256])
            errors[bits, kind] = (made - states).norm() / states.norm()
        assert method.bits == bits + 0.5
    assert errors[4, "value"] < errors[2, "value"] / 3
