"""Perplexity with a compressed cache, beside the plain one of the same run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..cache import GSRQCache
from ..codebooks import GSRQCodebooks
from ..compat import CACHE_ARGUMENT
from ..models import check_length, input_device

PLAIN = "plain"
# What to do where the positions of a model end before its text.
SHORTER_WINDOWS = "Pass a smaller window_length."


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over token windows.

    Attributes:
        value: exp of the mean negative log-likelihood of a token.
        standard_error: Of `value`, from the spread between windows.
        increase: `value` over the plain cache's, minus 1; 0 for the plain cache itself.
        increase_error: Standard error of `increase`, from the paired windows.
        losses: Mean negative log-likelihood (nats) of each window, to compare runs on the same windows pairwise.
    """

    value: float
    standard_error: float
    increase: float
    increase_error: float
    losses: tuple[float, ...] = ()


def measure_perplexity(
    model: PreTrainedModel,
    windows: torch.Tensor,
    codebooks: Mapping[str, GSRQCodebooks],
    *,
    progress: bool = True,
    **cache_options: Any,
) -> dict[str, Perplexity]:
    """Perplexity of a model with each of several codebooks and with its plain cache.

    Every token attends to what the cache stores (`quantize_prefill`); by default nothing is kept exact, neither sinks
    nor window, which is the paper's setting and the hardest one.

    Args:
        model: The model.
        windows: int64 `[windows, T]`, text that calibration did not see. Each is read by itself, and standard
            errors take them for independent: best from as many texts (`token_windows`).
        codebooks: Codebooks by name.
        progress: Show a progress bar.
        **cache_options: Keywords of `GSRQCache`; `residual_length=0, sink_length=0` unless given.

    Returns:
        Results by name; the plain cache's, in the dtype of the model, is named "plain".

    Raises:
        ValueError: for a window of fewer than two tokens, or of more than the model can read, or codebooks of another
            model or named "plain".
    """
    if windows.shape[1] < 2:
        raise ValueError(f"A window must have at least 2 tokens to predict one, got {windows.shape[1]}.")
    if PLAIN in codebooks:
        raise ValueError(f"{PLAIN!r} is the name of the model's own cache; give the codebooks another name.")
    check_length(model, windows.shape[1], SHORTER_WINDOWS)
    for made in codebooks.values():
        made.config.check_model(model.config)
    options = {"residual_length": 0, "sink_length": 0, **cache_options, "quantize_prefill": True}
    losses: dict[str, list[float]] = {name: [] for name in (PLAIN, *codebooks)}
    for window in tqdm(windows, desc="Perplexity", unit="window", disable=not progress):
        for name in losses:
            cache = None if name == PLAIN else GSRQCache(codebooks[name], model, **options)
            losses[name].append(window_loss(model, window, cache))
    plain = torch.tensor(losses[PLAIN], dtype=torch.float64)
    return {name: summarize(torch.tensor(values, dtype=torch.float64), plain) for name, values in losses.items()}


@torch.no_grad()
def window_loss(model: PreTrainedModel, window: torch.Tensor, cache: GSRQCache | None) -> float:
    """Mean negative log-likelihood (nats) of the tokens `[T]` after the first, read in one forward pass."""
    input_ids = window[None].to(input_device(model))
    logits = model(input_ids=input_ids, **{CACHE_ARGUMENT: cache}, use_cache=cache is not None).logits
    return nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:].to(logits.device)).item()


def summarize(losses: torch.Tensor, plain: torch.Tensor) -> Perplexity:
    """Perplexity of windows with losses `[N]` (nats), beside those of the plain cache."""
    value = math.exp(losses.mean())
    difference = losses - plain
    ratio = math.exp(difference.mean())
    # Delta method: the standard error of exp(mean) is exp(mean) times that of the mean.
    errors = value * mean_error(losses), ratio * mean_error(difference)
    return Perplexity(value, errors[0], ratio - 1, errors[1], tuple(losses.tolist()))


def mean_error(values: torch.Tensor) -> float:
    """Standard error of the mean of values `[N]`, from their spread; NaN for a single one."""
    return (values.std() / math.sqrt(len(values))).item() if len(values) > 1 else math.nan
