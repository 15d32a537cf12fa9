"""Calibration on a real model: what is captured, how it is fitted, how it goes on after an interruption."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_models import SUPPORTED
from transformers_gsrq import GSRQConfig, attach, calibrate
from transformers_gsrq.calibration import Samples, capture, fit
from transformers_gsrq.calibration.fit import gradient_weights
from transformers_gsrq.ops import encode_vectors
from transformers_gsrq.ops.reference import split_subspaces

# The package exports the function of the same name.
fit_module = importlib.import_module("transformers_gsrq.calibration.fit")
_fit_one = fit_module._fit_one

SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Texts = tuple[list[str], list[str]]


def two_layers(samples: Samples, config: GSRQConfig) -> tuple[Samples, GSRQConfig]:
    """The first two layers only: enough to test, and quick."""
    fields = {**config.to_dict(), "layers": (0, 1)}
    for kind in ("key", "value"):
        fields[f"{kind}_stages"] = fields[f"{kind}_stages"][:2]
    return samples, GSRQConfig.from_dict(fields)


@pytest.fixture(scope="module")
def small(smollm2: SmolLM2, smollm2_samples: Samples) -> tuple[Samples, GSRQConfig]:
    return two_layers(smollm2_samples, GSRQConfig.for_model(smollm2[0].config, bits=0.5, num_centroids=32))


def test_capture_takes_values_and_gradients_of_the_loss(smollm2: SmolLM2) -> None:
    model, _ = smollm2
    config = GSRQConfig.for_model(model.config, bits=1.0)
    window = torch.randint(0, 40000, (1, 40))
    samples = capture(model, window, config, max_vectors=40, progress=False)
    # The same by hand: values of layer 5 from the projection, their gradient by autograd.
    taken = []

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        taken.append(output.detach().requires_grad_())
        return taken[0]

    handle = model.model.layers[5].self_attn.v_proj.register_forward_hook(keep)
    loss = model(window, labels=window).loss
    handle.remove()
    gradient = torch.autograd.grad(loss, taken)[0]
    torch.testing.assert_close(samples.states[5, "value"].flatten(1), taken[0][0].detach())
    seen = samples.gradients[5, "value"].flatten(1)
    # Gradients are kept up to one common factor.
    factor = (seen.norm() / gradient.norm()).item()
    torch.testing.assert_close(seen, gradient[0] * factor, rtol=1e-3, atol=1e-5 * factor)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_capture_samples_the_same_tokens_everywhere_within_the_bound(smollm2: SmolLM2) -> None:
    model, _ = smollm2
    config = GSRQConfig.for_model(model.config, bits=1.0)
    windows = torch.randint(0, 40000, (3, 32))
    few, whole = (
        capture(model, windows, config, gradients=False, max_vectors=count, progress=False) for count in (10, 96)
    )
    assert few.num_vectors == 10 and whole.num_vectors == 96 and few.num_tokens == 96
    places = []
    for key in [(0, "key"), (29, "value")]:
        distance = torch.cdist(few.states[key].flatten(1), whole.states[key].flatten(1))
        assert distance.amin(-1).max() < 0.02
        places.append(distance.argmin(-1).tolist())
    assert places[0] == places[1] == sorted(set(places[0]))


@pytest.mark.parametrize("before", [False, True])
def test_capture_leaves_the_model_as_it_was(before: bool) -> None:
    model = SUPPORTED["llama"].build().train()
    model.model.layers[0].eval()
    if before:
        attach(model)
    modes = [module.training for module in model.modules()]
    hooks = [[*module._forward_pre_hooks.values(), *module._forward_hooks.values()] for module in model.modules()]
    capture(
        model, torch.arange(40)[None], GSRQConfig.for_model(model.config, bits=1.0, subspace_dim=8), progress=False
    )
    assert [module.training for module in model.modules()] == modes
    assert [[*m._forward_pre_hooks.values(), *m._forward_hooks.values()] for m in model.modules()] == hooks


def test_stages_fit_what_the_stages_before_leave(small: tuple[Samples, GSRQConfig]) -> None:
    samples, config = small
    codebooks = fit(samples, config, weighting="none", iterations=4, progress=False)
    vectors = split_subspaces(samples.states[1, "key"].transpose(0, 1)[None], config.key_subspace_dim).float()
    centroids = codebooks.centroids(1, "key", torch.device("cpu"), torch.float32)
    left = []
    for stages in range(1, centroids.shape[1] + 1):
        codes = encode_vectors(vectors, centroids[:, :stages]).long()
        made = sum(torch.gather(centroids[:, r], 1, codes[:, r, :, None].expand_as(vectors)) for r in range(stages))
        left.append((vectors - made).square().sum().item())
    assert left == sorted(left, reverse=True) and left[-1] < 0.5 * vectors.square().sum().item()
    # The report is on held-out vectors: of the same order, and falling.
    report = [r for r in codebooks.provenance["report"] if (r["layer"], r["kind"]) == (1, "key")][0]
    distortions = [stage["distortion"] for stage in report["stages"]]
    assert distortions == sorted(distortions, reverse=True)
    assert distortions[-1] == pytest.approx(left[-1] / vectors.square().sum().item(), rel=0.5)


def test_lower_rates_are_what_fitting_them_gives(small: tuple[Samples, GSRQConfig]) -> None:
    samples, config = small
    both = fit(samples, config, iterations=3, progress=False)
    fields = {**config.to_dict(), "key_stages": (2, 2), "value_stages": (1, 1)}
    alone = fit(samples, GSRQConfig.from_dict(fields), iterations=3, progress=False)
    assert both.with_stages(2, 1).digest == alone.digest


@pytest.mark.parametrize("method", ["gskm", "kmeans"])
def test_every_method_and_weighting_gives_its_own_codebooks(method: str, small: tuple[Samples, GSRQConfig]) -> None:
    made = [
        fit(*small, weighting=weighting, method=method, iterations=3, progress=False)
        for weighting in ("none", "log", "raw")
    ]
    assert len({codebooks.digest for codebooks in made}) == 3
    assert [codebooks.provenance["calibration"]["weighting"] for codebooks in made] == ["none", "log", "raw"]


def test_log_weights_are_equation_ten() -> None:
    norms = torch.tensor([[1.0, 2.0, 5.0]])
    torch.testing.assert_close(gradient_weights(norms, "log"), torch.log(1 + norms / 2.0))
    torch.testing.assert_close(gradient_weights(norms, "log", temperature=3.0), torch.log(1 + 3 * norms / 2.0))
    assert gradient_weights(norms, "none") is None
    # Vectors without a gradient count for nothing, and do not decide what the median is.
    behind_a_mask = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 5.0]])
    torch.testing.assert_close(gradient_weights(behind_a_mask, "log")[:, 4:], gradient_weights(norms, "log"))
    assert torch.equal(gradient_weights(torch.zeros(1, 3), "log"), torch.ones(1, 3))
    with pytest.raises(ValueError, match="one of log, raw, none, got 'sqrt'"):
        gradient_weights(norms, "sqrt")


def test_an_interrupted_fit_goes_on(
    small: tuple[Samples, GSRQConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(*small, iterations=3, progress=False)
    fitted = []

    def fit_three(*args: object) -> object:
        if len(fitted) == 3:
            raise KeyboardInterrupt
        fitted.append(args[2:4])
        return _fit_one(*args)

    monkeypatch.setattr(fit_module, "_fit_one", fit_three)
    with pytest.raises(KeyboardInterrupt):
        fit(*small, iterations=3, progress=False, checkpoint=tmp_path)
    fitted.clear()
    resumed = fit(*small, iterations=3, progress=False, checkpoint=tmp_path)
    assert fitted == [(1, "value")]
    assert resumed.digest == whole.digest
    # Other arguments must not take over what was fitted with these.
    monkeypatch.setattr(fit_module, "_fit_one", _fit_one)
    other = fit(*small, iterations=2, progress=False, checkpoint=tmp_path)
    assert other.digest == fit(*small, iterations=2, progress=False).digest != whole.digest
    # Nor must another model that read the same text.
    assert small[0].origin
    sibling = dataclasses.replace(small[0], origin="another")
    monkeypatch.setattr(fit_module, "_fit_one", fit_three)
    fitted.clear()
    with pytest.raises(KeyboardInterrupt):
        fit(sibling, small[1], iterations=2, progress=False, checkpoint=tmp_path)
    assert len(fitted) == 3


def test_calibrate_records_where_the_codebooks_come_from(smollm2: SmolLM2, texts: Texts) -> None:
    model, tokenizer = smollm2
    config = GSRQConfig.for_model(model.config, bits=0.25, num_centroids=4)
    options = {"num_samples": 2, "window_length": 32, "max_vectors": 64, "iterations": 1, "progress": False}
    codebooks = calibrate(model, tokenizer, texts[0], config, data_name="sotu", seed=3, **options)
    again = calibrate(model, tokenizer, texts[0], config, data_name="sotu", seed=3, **options)
    assert codebooks.digest == again.digest
    made = codebooks.provenance
    assert made["data"] == {"name": "sotu", "windows": 2, "window_length": 32}
    assert made["calibration"]["seed"] == 3 and len(made["calibration"]["data_digest"]) == 64
    assert made["versions"]["torch"] == torch.__version__.split("+")[0] or made["versions"]["torch"]
    assert len(made["report"]) == 60


def test_few_vectors_warn_or_stop(small: tuple[Samples, GSRQConfig], caplog: pytest.LogCaptureFixture) -> None:
    samples, config = small
    some = Samples({k: v[:200] for k, v in samples.states.items()}, {}, samples.data_digest, 200)
    with caplog.at_level(logging.WARNING):
        fit(some, config, weighting="none", iterations=1, progress=False)
    assert "Only 5.6 vectors for each of the 32 centroids" in caplog.text
    few = Samples({k: v[:30] for k, v in samples.states.items()}, {}, samples.data_digest, 30)
    with pytest.raises(ValueError, match="30 sampled tokens leave 27 to fit 32 centroids"):
        fit(few, config, weighting="none", progress=False)
    with pytest.raises(ValueError, match="needs gradients"):
        fit(some, config, weighting="log", progress=False)


def test_a_model_that_overflows_is_noticed(small: tuple[Samples, GSRQConfig]) -> None:
    samples, config = small
    states = {key: value.clone() for key, value in samples.states.items()}
    states[0, "key"][5, 0, 0] = float("inf")
    bad = Samples(states, {}, samples.data_digest, samples.num_tokens)
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit(bad, config, weighting="none", iterations=1, progress=False)


def test_text_that_is_too_short_is_named(smollm2: SmolLM2) -> None:
    model, tokenizer = smollm2
    config = GSRQConfig.for_model(model.config, bits=1.0)
    with pytest.raises(ValueError, match="less than one window of 2048"):
        calibrate(model, tokenizer, ["Only this."], config, progress=False)
