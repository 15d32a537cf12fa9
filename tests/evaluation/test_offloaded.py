"""Weights that accelerate keeps elsewhere: fetched for each call, on the meta device between calls."""

from __future__ import annotations

import accelerate
import pytest
import torch
from transformers import PreTrainedModel

from tiny_models import SUPPORTED, VOCABULARY, random_codebooks
from transformers_gsrq.calibration import capture
from transformers_gsrq.evaluation import measure_perplexity
from transformers_gsrq.evaluation.agreement import measure_agreement, measure_divergence_lengths
from transformers_gsrq.evaluation.retrieval import Prompt, measure_retrieval, read_prompts
from transformers_gsrq.evaluation.speed import measure_speed
from transformers_gsrq.simulation import CodebookMethod


def build(parts: str) -> PreTrainedModel:
    model = SUPPORTED["llama"].build()
    for module in {"nothing": [], "layers": model.model.layers, "everything": [model]}[parts]:
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"))
    return model


def measure_all(model: PreTrainedModel) -> list[object]:
    codebooks = random_codebooks(SUPPORTED["llama"].build())
    windows = torch.randint(3, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    methods = {"coded": CodebookMethod(codebooks)}
    plain = model.generate(windows, max_new_tokens=2, do_sample=False, eos_token_id=None)[:, 40:]
    prompts = [Prompt("needle", 0.5, ids, answer) for ids, answer in zip(windows, plain, strict=True)]
    scores = measure_retrieval(
        model, read_prompts(model, prompts, progress=False), methods, residual_length=8, sink_length=2
    )
    samples = capture(model, windows, codebooks.config, max_vectors=20, progress=False)
    speeds = measure_speed(model, codebooks, windows[0], [20], new_tokens=3)
    return [
        measure_perplexity(model, windows, {"coded": codebooks}, progress=False)["coded"].losses,
        measure_agreement(model, windows, methods, progress=False)["coded"].divergences,
        measure_divergence_lengths(
            model, list(windows), {"coded": codebooks}, max_new_tokens=4, residual_length=8, progress=False
        ),
        [(name, found[0].hits) for name, found in scores.items()],
        [samples.states[0, "key"].tolist(), samples.gradients[0, "key"].tolist()],
        [(speed.cache, speed.cache_bytes) for speed in speeds],
    ]


@pytest.mark.parametrize("parts", ["layers", "everything"])
def test_offloaded_weights_are_measured_like_others(parts: str) -> None:
    assert measure_all(build(parts)) == measure_all(build("nothing"))
