"""Learn codebooks for a model: capture its states on text, then fit them stage by stage."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..codebooks import GSRQCodebooks
from ..config import GSRQConfig
from ..files import check_folder
from ..models import capped_length
from ..text import token_windows
from .capture import Samples, capture
from .fit import check_amount, check_options, fit
from .gskm import Clustering, cluster
from .refine import refine
from .report import model_record

__all__ = ["Clustering", "Samples", "calibrate", "capture", "cluster", "fit", "refine"]


@torch.inference_mode(False)
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    config: GSRQConfig,
    *,
    num_samples: int = 128,
    window_length: int = 2048,
    max_vectors: int = 65536,
    weighting: str = "log",
    method: str = "gskm",
    iterations: int = 20,
    refine_rounds: int = 0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    data_name: str | None = None,
) -> GSRQCodebooks:
    """Learn codebooks for a model from text (paper, section 3: 128 windows of 2,048 tokens).

    Args:
        model: The model, on any device; it is read, not changed.
        tokenizer: Its tokenizer.
        texts: Calibration texts; shuffled by `seed`.
        config: What to learn, from `GSRQConfig.for_model(model.config, bits=...)`.
        num_samples: Windows to read at most.
        window_length: Tokens of a window; fewer, with a warning, where the model's positions end before.
        max_vectors: Tokens, sampled from all windows, that the clustering sees.
        weighting: "log" weights vectors by the loss gradient (the paper's), "raw", or "none" (no backward pass).
        method: "gskm", or "kmeans" as a baseline.
        iterations: Updates of each clustering at most.
        refine_rounds: Rounds of `refine` afterwards: less error at the same bits, but the first stages alone are no
            longer a good code of a lower rate.
        seed: Of the shuffle, the sample and the clusterings.
        checkpoint: Folder that keeps finished layers, so that an interrupted calibration with the same arguments
            goes on where it stopped.
        progress: Show progress bars.
        data_name: What to call the texts in the provenance.

    Returns:
        The codebooks; `provenance` says what they were made from and how well they fit held-out states.

    Raises:
        ValueError: if the model is not supported, does not match the config, or the text is too short.
        RuntimeError: if the model's layers have no backward pass, which `weighting="none"` does without.
    """
    config.check_model(model.config)
    if checkpoint is not None:
        check_folder("checkpoint", Path(checkpoint))
    check_options(weighting, method, iterations)
    if refine_rounds < 0:
        raise ValueError(f"refine_rounds must be 0 or more, got {refine_rounds}.")
    if max_vectors < config.num_centroids:
        raise ValueError(f"max_vectors must be at least the {config.num_centroids} centroids, got {max_vectors}.")
    window_length = capped_length(model, window_length)
    windows = token_windows(tokenizer, texts, window_length, num_samples, seed)
    check_amount(min(max_vectors, windows.numel()), config)
    began = time.perf_counter()
    samples = capture(
        model,
        windows,
        config,
        max_vectors=max_vectors,
        gradients=weighting != "none",
        seed=seed,
        progress=progress,
    )
    provenance: dict[str, Any] = {
        **model_record(model),
        "data": {"name": data_name, "windows": len(windows), "window_length": window_length},
        "capture_seconds": round(time.perf_counter() - began, 1),
    }
    codebooks = fit(
        samples,
        config,
        weighting=weighting,
        method=method,
        iterations=iterations,
        seed=seed,
        checkpoint=checkpoint,
        progress=progress,
        provenance=provenance,
    )
    if not refine_rounds:
        return codebooks
    return refine(samples, codebooks, rounds=refine_rounds, weighting=weighting, seed=seed, progress=progress)
