"""Joint refinement: least squares for each stage, so the error of the given codes cannot rise."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from transformers_gsrq import GSRQCodebooks, GSRQConfig, calibrate
from transformers_gsrq.calibration import Samples, fit
from transformers_gsrq.calibration.refine import refine, refit_stages
from transformers_gsrq.ops.reference import encode_vectors


def _error(vectors: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    made = torch.zeros_like(vectors)
    for stage in range(centroids.shape[1]):
        index = codes[:, stage].long()[..., None].expand_as(vectors)
        made += torch.gather(centroids[:, stage], 1, index)
    return ((vectors - made).square().sum(-1) * weights).sum()


def test_a_round_lowers_the_weighted_error_of_its_codes() -> None:
    vectors = torch.randn(2, 300, 8, dtype=torch.float32)
    weights = torch.rand(2, 300)
    centroids = torch.randn(2, 3, 16, 8) * torch.tensor([1.0, 0.7, 0.5])[None, :, None, None]
    codes = encode_vectors(vectors, centroids)
    made = refit_stages(vectors, weights, centroids)
    assert _error(vectors, weights, made, codes) < 0.95 * _error(vectors, weights, centroids, codes)
    # The last stage is at its optimum: any other centroid for the same members is worse.
    moved = made.clone()
    moved[:, -1] += 0.01 * torch.randn_like(moved[:, -1])
    assert _error(vectors, weights, moved, codes) > _error(vectors, weights, made, codes)


def test_refined_codebooks_fit_better_and_say_so(smollm2_samples: Samples, tiny_codebooks: GSRQCodebooks) -> None:
    made = refine(smollm2_samples, tiny_codebooks.with_stages(2, 2), rounds=1, beam_width=1, progress=False)
    report = made.provenance["training"][-1]["measured"]["report"]
    assert sum(entry["after"] < entry["before"] for entry in report) > len(report) / 2
    assert all(entry["after"] <= entry["before"] for entry in report)
    # The calibration's figures are those of other centroids.
    assert "report" in tiny_codebooks.provenance and "report" not in made.provenance


def test_calibration_can_refine_what_it_fitted(
    first_layers: tuple[PreTrainedModel, PreTrainedTokenizerBase], texts: tuple[list[str], list[str]]
) -> None:
    model, tokenizer = first_layers
    config = GSRQConfig.for_model(model.config, bits=0.25, num_centroids=16)
    options = {"num_samples": 1, "window_length": 512, "iterations": 2, "progress": False}
    fitted = calibrate(model, tokenizer, texts[0][:1], config, **options)
    refined = calibrate(model, tokenizer, texts[0][:1], config, **options, refine_rounds=2)
    (step,) = refined.provenance["training"]
    assert (step["rounds"], step["from_digest"]) == (2, fitted.digest)
    assert sum(entry["after"] < entry["before"] for entry in step["measured"]["report"]) > len(config.layers)
    with pytest.raises(ValueError, match="refine_rounds must be 0 or more, got -1"):
        calibrate(model, tokenizer, texts[0][:1], config, **options, refine_rounds=-1)


def test_states_that_are_all_zero_can_be_refined_and_saved(tmp_path: Path) -> None:
    model = LlamaConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    config = GSRQConfig.for_model(model, bits=0.5, num_centroids=16)
    samples = Samples({(0, "key"): torch.randn(300, 2, 16), (0, "value"): torch.zeros(300, 2, 16)}, {}, "", 300)
    fitted = fit(samples, config, weighting="none", iterations=2, progress=False)
    made = refine(samples, fitted, rounds=1, weighting="none", progress=False)
    assert made.provenance["training"][-1]["measured"]["report"][1]["after"] == 0
    made.save_pretrained(tmp_path / "refined")
    assert GSRQCodebooks.from_pretrained(tmp_path / "refined").digest == made.digest
