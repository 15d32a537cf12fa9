"""What calibration and distillation find out before the long work, and under which gradient modes they run."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCodebooks, GSRQConfig, calibrate, finetune
from transformers_gsrq.calibration import capture, fit, refine
from transformers_gsrq.memory import held_bytes

TEXT = " ".join(f"w{(i * i + 7 * i // 3) % 90}" for i in range(4000))
LEARN = {"num_samples": 2, "window_length": 64, "iterations": 1, "progress": False}
TUNE = {
    "steps": 1, "window_length": 64, "evaluate_every": 1, "recall_share": 0.0, "learning_rate": 0.1, "progress": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, **{f"w{i}": i + 2 for i in range(90)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]")


def config_of(model: PreTrainedModel) -> GSRQConfig:
    return GSRQConfig.for_model(model.config, bits=1.0, subspace_dim=8, num_centroids=16)


def learned(model: PreTrainedModel, tokenizer: Any, **options: Any) -> GSRQCodebooks:
    return calibrate(model, tokenizer, [TEXT], config_of(model), **{**LEARN, **options})


def tuned(model: PreTrainedModel, tokenizer: Any, codebooks: GSRQCodebooks, **options: Any) -> GSRQCodebooks:
    return finetune(model, tokenizer, [TEXT], codebooks, **{**TUNE, **options})


def unread(model: PreTrainedModel) -> PreTrainedModel:
    """A model that fails when it is run."""

    def fail(*_: Any) -> None:
        raise AssertionError("the long work has begun")

    model.register_forward_pre_hook(fail)
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_computed_under_every_mode(
    mode: Callable[[], AbstractContextManager[Any]], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = SUPPORTED["llama"].build()
    plain = learned(model, tokenizer)
    better = tuned(model, tokenizer, plain)
    with mode():
        same = learned(model, tokenizer)
        assert same.digest == plain.digest
        assert tuned(model, tokenizer, same).digest == better.digest
        assert learned(model, tokenizer, weighting="none").digest != plain.digest
        windows = torch.arange(64)[None]
        samples = capture(model, windows, config_of(model), progress=False)
    assert samples.gradients[0, "key"].abs().sum() > 0 and not same.gains(0, "key").is_inference()
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_weights_made_under_inference_mode_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.inference_mode():
        model = unread(SUPPORTED["llama"].build())
    with pytest.raises(ValueError, match=r'inference_mode, or calibrate with weighting="none"\.'):
        learned(model, tokenizer)
    with pytest.raises(ValueError, match=r"outside of inference_mode\."):
        tuned(model, tokenizer, random_codebooks(model))


def test_layers_without_a_backward_pass(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(
            SUPPORTED["llama"].build(), {torch.nn.Linear}, dtype=torch.qint8
        )
    with pytest.raises(RuntimeError, match='No gradients come through .* Calibrate with weighting="none"'):
        learned(model, tokenizer)
    codebooks = learned(model, tokenizer, weighting="none")
    # Found out before the first evaluation.
    monkeypatch.setattr("transformers_gsrq.calibration.finetune._Trainer._evaluate", None)
    with pytest.raises(RuntimeError, match="No gradients come through .* Distill from the model with plain weights"):
        tuned(model, tokenizer, codebooks)


def test_the_want_of_memory_is_told_as_it_is(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("torch.autograd.grad", fail)
    with pytest.raises(torch.OutOfMemoryError):
        learned(SUPPORTED["llama"].build(), tokenizer)


@pytest.mark.parametrize("scheme", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_torchao_weights_are_calibrated_and_distilled(scheme: str, tokenizer: PreTrainedTokenizerFast) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = SUPPORTED["llama"].build(torch.bfloat16)
    quantization.quantize_(model.model, getattr(quantization, scheme)())
    codebooks = learned(model, tokenizer)
    assert codebooks.digest != learned(model, tokenizer, weighting="none").digest
    assert tuned(model, tokenizer, codebooks).provenance["training"][-1]["steps_run"] == 1


@pytest.mark.parametrize("what", ["folder", "amount", "fingerprint"])
def test_what_can_be_known_is_told_before_the_text_is_read(
    what: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = unread(SUPPORTED["llama"].build())
    codebooks = random_codebooks(model)
    options: dict[str, Any] = {}
    message = r"16 sampled tokens leave 15 to fit 16 centroids"
    if what == "folder":
        (tmp_path / "file").touch()
        options, message = {"checkpoint": tmp_path / "file" / "kept"}, "checkpoint .* is a file. Name a folder"
    elif what == "amount":
        options = {"max_vectors": 16}
    else:

        def fail(_: Any) -> None:
            raise NotImplementedError("no name")

        message = "no name"
        for module in ("capture", "finetune"):
            # The package exports functions of the same names.
            monkeypatch.setattr(
                importlib.import_module(f"transformers_gsrq.calibration.{module}"), "fingerprint", fail
            )
    expected = (ValueError, OSError, NotImplementedError)
    with pytest.raises(expected, match=message):
        learned(model, tokenizer, **options)
    if what != "amount":
        with pytest.raises(expected, match=message):
            tuned(model, tokenizer, codebooks, **options)


def test_samples_of_other_layers_or_without_gradients_are_named() -> None:
    model = SUPPORTED["llama"].build()
    config = config_of(model)
    samples = capture(model, torch.arange(64)[None], config, gradients=False, progress=False)
    codebooks = fit(samples, config, weighting="none", iterations=1, progress=False)
    with pytest.raises(ValueError, match="needs gradients"):
        refine(samples, codebooks, progress=False)
    with pytest.raises(ValueError, match="weighting must be one of"):
        refine(samples, codebooks, weighting="logarithm", progress=False)
    del samples.states[2, "key"]
    for use in (lambda: fit(samples, config, weighting="none"), lambda: refine(samples, codebooks, weighting="none")):
        with pytest.raises(ValueError, match="no states of layer 2"):
            use()


def test_training_leaves_no_copy_in_the_codebooks(tokenizer: PreTrainedTokenizerFast) -> None:
    model = SUPPORTED["llama"].build()
    codebooks = learned(model, tokenizer)
    before = held_bytes([vars(codebooks)])
    samples = capture(model, torch.arange(64)[None], codebooks.config, progress=False)
    refined = refine(samples, codebooks, rounds=1, progress=False)
    tuned(model, tokenizer, codebooks)
    assert held_bytes([vars(codebooks)]) == before == held_bytes([vars(refined)])


@pytest.mark.parametrize("max_vectors", [3, 11, 20, 79, 100])
def test_every_window_is_sampled_alike(max_vectors: int) -> None:
    """Of ten windows: fewer tokens than windows, not divisible, divisible, nearly all, more than there are."""
    model = SUPPORTED["llama"].build()
    config = config_of(model)
    windows = torch.arange(80).view(10, 8)
    every = capture(model, windows, config, gradients=False, progress=False).states[0, "value"].flatten(1)
    samples = capture(model, windows, config, max_vectors=max_vectors, progress=False)
    exact = "donot_use_mm_for_euclid_dist"
    distance, places = torch.cdist(samples.states[0, "value"].flatten(1), every, compute_mode=exact).min(-1)
    assert distance.max() < 1e-4 and len(set(places.tolist())) == min(max_vectors, 80)
    counts = (places // 8).bincount(minlength=10)
    assert counts.sum() == samples.num_vectors == min(max_vectors, 80) and counts.max() - counts.min() <= 1
    assert samples.num_tokens == 8 * int((counts > 0).sum())
    if max_vectors % 10 == 0:
        generator = torch.Generator().manual_seed(0)
        share = min(max_vectors // 10, 8)
        drawn = [8 * i + torch.randperm(8, generator=generator)[:share].sort().values for i in range(10)]
        assert places.tolist() == torch.cat(drawn).tolist()


def test_windows_end_where_the_positions_of_the_model_do(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 48}
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=1)).eval()
    codebooks = calibrate(model, tokenizer, [TEXT], config_of(model), num_samples=2, iterations=1, progress=False)
    assert codebooks.provenance["data"]["window_length"] == 48
    assert caplog.text.count("positions for 48 tokens: windows are that long, not 2048") == 1
    options = {name: value for name, value in TUNE.items() if name != "window_length"}
    made = finetune(model, tokenizer, [TEXT], codebooks, **options)
    assert made.provenance["training"][-1]["window_length"] == 48
    with pytest.raises(ValueError, match="positions for 48 tokens and cannot read 49. Pass shorter windows"):
        capture(model, torch.zeros(1, 49, dtype=torch.long), codebooks.config, progress=False)
