"""Self-distillation on a real model: it must come nearer to the plain model, and lose nothing when interrupted."""

from __future__ import annotations

import copy
import logging
import random
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate import PartialState
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_gsrq import GSRQCodebooks, GSRQConfig, calibrate, detach
from transformers_gsrq.calibration import finetune as module
from transformers_gsrq.calibration.finetune import finetune
from transformers_gsrq.calibration.recall import recall_window
from transformers_gsrq.card import Rate, model_card
from transformers_gsrq.cli.inspect import describe
from transformers_gsrq.hooks import is_attached
from transformers_gsrq.text import token_windows

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
# So high a rate that a few steps are seen on held-out text.
QUICK = {"window_length": 48, "steps": 6, "evaluate_every": 3, "learning_rate": 1e-2, "progress": False}


@pytest.fixture(scope="module")
def small(first_layers: Loaded, texts: tuple[list[str], list[str]]) -> GSRQCodebooks:
    """Two stages: little to search, much to gain."""
    model, tokenizer = first_layers
    config = GSRQConfig.for_model(model.config, bits=0.25, num_centroids=64)
    options = {"num_samples": 2, "window_length": 512, "max_vectors": 1024, "iterations": 3, "progress": False}
    return calibrate(model, tokenizer, texts[0], config, **options)


@pytest.fixture(scope="module")
def made(first_layers: Loaded, texts: tuple[list[str], list[str]], small: GSRQCodebooks) -> GSRQCodebooks:
    return finetune(*first_layers, texts[0][:2], small, guard_texts=texts[1][:1], data_name="two messages", **QUICK)


def course_of(codebooks: GSRQCodebooks) -> list[dict[str, float | None]]:
    return codebooks.provenance["training"][-1]["measured"]["course"]


def card(codebooks: GSRQCodebooks) -> str:
    return model_card("someone/codebooks", {"": Rate(codebooks.config, codebooks.provenance, codebooks.digest)})


def test_divergence_falls_on_held_out_and_unseen_text(made: GSRQCodebooks, small: GSRQCodebooks) -> None:
    course = course_of(made)
    assert course[-1]["kl"] < 0.95 * course[0]["kl"]
    assert course[-1]["guard_kl"] < 0.95 * course[0]["guard_kl"]
    assert made.config == small.config
    assert made.digest != small.digest
    for layer in made.config.layers:
        norms = made.shapes(layer, "value").float().norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms), atol=1e-3, rtol=0)


def test_what_was_measured_before_is_not_said_of_the_result(small: GSRQCodebooks, made: GSRQCodebooks) -> None:
    assert "report" in small.provenance
    assert set(made.provenance) == set(small.provenance) - {"report"} | {"training"}
    record = made.provenance["training"][-1]
    said = f"| step 2, distillation | {record['best_step']} steps of 1 windows of 48 tokens of two messages (SHA-256 "
    course = f"{course_of(made)[0]['kl']:.4f} nats before"
    assert said in card(made) and course in card(made)
    # A lower rate was not measured, however it came about.
    assert said in card(made.with_stages(1, 1)) and course not in card(made.with_stages(1, 1))
    assert "distillation" in describe(made)[1] and "distillation" not in describe(small)[1]


def test_the_codebooks_belong_to_the_model_that_was_distilled(
    first_layers: Loaded, texts: tuple[list[str], list[str]], made: GSRQCodebooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_layers[0].config, "_name_or_path", "someone/sibling")
    again = finetune(*first_layers, texts[0][:2], made, **{**QUICK, "steps": 1})
    first, second = again.provenance["training"]
    assert first == {**made.provenance["training"][0], "measured": None}
    assert (second["from_digest"], second["from_model"]) == (made.digest, made.provenance["base_model"])
    assert again.provenance["base_model"] == second["base_model"] == "someone/sibling"
    assert "| base model | someone/sibling |" in card(again)


def test_fewer_stages_of_what_was_trained_together_are_warned_of(
    made: GSRQCodebooks, small: GSRQCodebooks, caplog: pytest.LogCaptureFixture
) -> None:
    small.with_stages(1, 1)
    made.with_stages(2, 2)
    assert not caplog.records
    made.with_stages(1, 1)
    assert "trained together (distillation)" in caplog.text and "with_stages(1, 1), and train then" in caplog.text


def test_a_checkpoint_belongs_to_its_model(
    first_layers: Loaded, texts: tuple[list[str], list[str]], small: GSRQCodebooks, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    options = {**QUICK, "steps": 1, "recall_share": 0.0, "checkpoint": tmp_path}
    finetune(*first_layers, texts[0][:2], small, **options)
    weight = first_layers[0].model.layers[0].self_attn.k_proj.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight.mul_(1.01)
    try:
        other = finetune(*first_layers, texts[0][:2], small, **options)
    finally:
        with torch.no_grad():
            weight.copy_(before)
    assert "belongs to a distillation with other arguments" in caplog.text
    assert other.provenance["training"][-1]["steps_run"] == 1


def test_the_model_is_as_before(first_layers: Loaded, made: GSRQCodebooks) -> None:
    model = first_layers[0]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_offloaded_weights_are_distilled_like_others(
    gradient_checkpointing: bool,
    first_layers: Loaded,
    texts: tuple[list[str], list[str]],
    small: GSRQCodebooks,
) -> None:
    options = {**QUICK, "steps": 1, "recall_share": 0.0, "gradient_checkpointing": gradient_checkpointing}
    offloaded = copy.deepcopy(first_layers[0])
    detach(offloaded)
    offloaded = accelerate.cpu_offload(offloaded, execution_device=torch.device("cpu")).train()
    layers = offloaded.model.layers
    layers[0].eval()
    for layer in layers:
        # As on several devices: its forward becomes one of its own.
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    forwards = [layer.forward for layer in layers]
    found, expected = (
        finetune(model, first_layers[1], texts[0][:2], small, **options) for model in (offloaded, first_layers[0])
    )
    assert found.digest == expected.digest
    # The model is as before.
    assert not is_attached(offloaded)
    assert offloaded.training and not layers[0].training
    assert [layer.forward for layer in layers] == forwards
    assert all(parameter.requires_grad for parameter in offloaded.parameters())
    ids = torch.arange(8)[None]
    assert torch.equal(offloaded.eval()(ids).logits, first_layers[0](ids).logits)


def test_an_interrupted_run_goes_on_where_it_was(
    first_layers: Loaded,
    texts: tuple[list[str], list[str]],
    small: GSRQCodebooks,
    made: GSRQCodebooks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = module._Trainer._train_step

    def interrupted(trainer: module._Trainer) -> float:
        if trainer.step == 4:
            raise KeyboardInterrupt
        return real(trainer)

    options = {**QUICK, "checkpoint": tmp_path}
    with monkeypatch.context() as patch:
        patch.setattr(module._Trainer, "_train_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(*first_layers, texts[0][:2], small, **options)
    state = tmp_path / "state.safetensors"
    kept = state.read_bytes()
    with monkeypatch.context() as patch:
        patch.setitem(PartialState._shared_state, "num_processes", 2)
        with pytest.raises(ValueError, match="was begun with 1 process.* cannot go on with 2"):
            finetune(*first_layers, texts[0][:2], small, **options)
    assert state.read_bytes() == kept
    steps = []

    def counted(trainer: module._Trainer) -> float:
        steps.append(trainer.step)
        return real(trainer)

    monkeypatch.setattr(module._Trainer, "_train_step", counted)
    resumed = finetune(*first_layers, texts[0][:2], small, **options)
    assert steps == [3, 4, 5]
    found, expected = map(course_of, (resumed, made))
    assert [point["kl"] for point in found] == pytest.approx([point["kl"] for point in expected], rel=1e-3)


def test_nan_keeps_the_last_good_codebooks(
    first_layers: Loaded,
    texts: tuple[list[str], list[str]],
    small: GSRQCodebooks,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = module._Trainer._divergence

    def broken(trainer: module._Trainer, window: module.WeightedWindow) -> torch.Tensor:
        loss = real(trainer, window)
        return loss * torch.nan if trainer.step == 2 and torch.is_grad_enabled() else loss

    monkeypatch.setattr(module._Trainer, "_divergence", broken)
    with caplog.at_level(logging.WARNING):
        made = finetune(*first_layers, texts[0][:2], small, **{**QUICK, "evaluate_every": 1, "recall_share": 0.0})
    record = made.provenance["training"][-1]
    assert record["steps_run"] == 2
    assert "step 2" in record["stopped"]
    assert "step 2" in caplog.text
    assert record["best_step"] in (1, 2)


def test_a_divergence_that_is_not_a_number_is_kept_as_none(
    first_layers: Loaded,
    texts: tuple[list[str], list[str]],
    small: GSRQCodebooks,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = module._Trainer._divergence

    def overflowing(trainer: module._Trainer, window: module.WeightedWindow) -> torch.Tensor:
        """On the text of another kind always, on held-out text before the first step."""
        guard = any(window is other for other in trainer.data.guard)
        broken = not torch.is_grad_enabled() and (guard or trainer.step == 0)
        return real(trainer, window) * (torch.nan if broken else 1)

    monkeypatch.setattr(module._Trainer, "_divergence", overflowing)
    options = {**QUICK, "steps": 2, "evaluate_every": 1, "recall_share": 0.0, "guard_texts": texts[1][:1]}
    made = finetune(*first_layers, texts[0][:2], small, **options)
    made.save_pretrained(tmp_path)
    saved = GSRQCodebooks.from_pretrained(tmp_path)
    course = course_of(saved)
    assert course[0]["kl"] is None and all(point["kl"] > 0 for point in course[1:])
    assert [point["guard_kl"] for point in course] == [None] * 3
    # What is a number is better than what is not.
    assert saved.provenance["training"][-1]["best_step"] > 0
    assert "divergence on held-out text not finite before, " in card(saved)


def test_too_little_text_and_bad_options_are_named(
    first_layers: Loaded, texts: tuple[list[str], list[str]], small: GSRQCodebooks
) -> None:
    with pytest.raises(ValueError, match="held out"):
        finetune(*first_layers, [texts[0][0][:1000]], small, window_length=64)
    with pytest.raises(ValueError, match="Windows of 20 tokens are too short .* at least 28, or recall_share 0"):
        finetune(*first_layers, texts[0][:1], small, window_length=20)
    with pytest.raises(ValueError, match="recall_share"):
        finetune(*first_layers, texts[0][:1], small, recall_share=2.0)


@pytest.mark.parametrize("length", [28, 48, 64, 96, 512])
def test_recall_windows_ask_for_what_they_told(
    smollm2: Loaded, texts: tuple[list[str], list[str]], length: int
) -> None:
    tokenizer = smollm2[1]
    text = token_windows(tokenizer, texts[0][:1], 512, 1)[0]
    asked = 0
    for form in range(24):
        window = recall_window(tokenizer, text, length, random.Random(form))
        assert window.input_ids.shape == window.weights.shape == (length,)
        assert window.weights.sum().item() == pytest.approx(1, rel=1e-5)
        least = window.weights.min()
        stressed = (window.weights > least).nonzero()[:, 0] + 1
        # Too short for a fact and its question, all tokens count alike.
        if len(stressed):
            asked += 1
            told = window.input_ids[: stressed[0]].tolist()
            # Every stressed token has been there before: recall, not prediction, is what is asked.
            answers = window.input_ids[stressed].tolist()
            assert sum(token in told for token in answers) >= 0.95 * len(answers)
    assert asked > 6
