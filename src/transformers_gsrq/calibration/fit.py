"""Fit residual codebooks stage by stage on captured states."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from ..codebooks import STORED_DTYPE, GSRQCodebooks
from ..config import KINDS, GSRQConfig, Kind
from ..files import write_tensors
from ..ops import encode_vectors
from ..ops.reference import look_up, split_subspaces
from .capture import Samples
from .gskm import METHODS, cluster
from .report import LayerReport, StageQuality

logger = logging.getLogger(__name__)

WEIGHTINGS = ("log", "raw", "none")
HELD_OUT_SHARE = 0.1
# Below this many vectors a centroid is mostly the few it was made of (the paper uses about 1,000).
FEW_VECTORS_PER_CENTROID = 16


def check_options(weighting: str, method: str = METHODS[0], iterations: int = 1) -> None:
    """Check what `fit` is told, before the long work.

    Raises:
        ValueError: naming what was given and what is legal.
    """
    for name, given, legal in (("weighting", weighting, WEIGHTINGS), ("method", method, METHODS)):
        if given not in legal:
            raise ValueError(f"{name} must be one of {', '.join(legal)}, got {given!r}.")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}.")


def gradient_weights(norms: torch.Tensor, weighting: str, temperature: float = 1.0) -> torch.Tensor | None:
    """Weights of vectors from the norms of their loss gradients (Eq. 9-10).

    Args:
        norms: `[M, N]`, Euclidean norms of the gradients in each subspace.
        weighting: "log" for log(1 + norm * temperature / median), "raw" for the norm itself, "none".
        temperature: The paper's tau.

    Returns:
        `[M, N]`, or None for "none".

    Raises:
        ValueError: for another weighting.
    """
    check_options(weighting)
    if weighting == "none":
        return None
    if weighting == "raw":
        return norms
    # Of those that are not zero: with most of them zero, as behind a mask, the other weights would be infinite.
    median = norms.where(norms > 0, torch.nan).nanmedian(dim=-1, keepdim=True).values.nan_to_num(1.0)
    weights = torch.log1p(norms * temperature / median)
    return torch.where((norms > 0).any(-1, keepdim=True), weights, 1.0)


def fit(
    samples: Samples,
    config: GSRQConfig,
    *,
    weighting: str = "log",
    method: str = "gskm",
    iterations: int = 20,
    temperature: float = 1.0,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    provenance: dict[str, Any] | None = None,
) -> GSRQCodebooks:
    """Learn the codebooks of a config from captured states.

    Each stage clusters what the stages before it leave over, after their centroids were rounded to what is stored.
    A tenth of the vectors is held out for the report, which goes into the provenance of the result.

    Args:
        samples: From `capture`, with gradients unless `weighting` is "none".
        config: The geometry to learn.
        weighting: "log" (the paper's), "raw" or "none"; the same weights serve every stage.
        method: "gskm", or "kmeans" as a baseline.
        iterations: Updates of each clustering at most.
        temperature: Tau of the log weights.
        seed: Start of the clusterings.
        checkpoint: Folder that keeps finished layers; an interrupted fit with the same arguments goes on from there.
        progress: Show a progress bar.
        provenance: Added to that of the codebooks.

    Returns:
        The codebooks.

    Raises:
        ValueError: for an unknown weighting or method, too few vectors, or layers or gradients that were not captured.
    """
    check_options(weighting, method, iterations)
    check_samples(samples, config, weighting)
    fitted = check_amount(samples.num_vectors, config)
    if fitted < FEW_VECTORS_PER_CENTROID * config.num_centroids:
        logger.warning(
            "Only %.1f vectors for each of the %d centroids: quality will suffer. Calibrate on more text.",
            fitted / config.num_centroids,
            config.num_centroids,
        )
    options = {
        "weighting": weighting,
        "method": method,
        "iterations": iterations,
        "temperature": temperature,
        "seed": seed,
    }
    store = None if checkpoint is None else _Checkpoint(Path(checkpoint), samples, config, options)
    gains, shapes, reports = {}, {}, []
    jobs = [(layer, kind) for layer in config.layers for kind in KINDS]
    bar = tqdm(jobs, desc="Fitting codebooks", unit="codebook", disable=not progress)
    for layer, kind in bar:
        saved = store.load(layer, kind) if store is not None else None
        if saved is None:
            saved = _fit_one(samples, config, layer, kind, options)
            if store is not None:
                store.save(layer, kind, saved)
        gains[layer, kind], shapes[layer, kind], report = saved
        reports.append(report)
        bar.set_postfix(layer=layer, kind=kind, distortion=f"{report['stages'][-1]['distortion']:.3f}")
    made = {
        "calibration": {
            **options,
            "vectors": samples.num_vectors,
            "tokens_read": samples.num_tokens,
            "data_digest": samples.data_digest,
        },
        "report": reports,
    }
    return GSRQCodebooks(config, gains, shapes, {**(provenance or {}), **made})


def check_samples(samples: Samples, config: GSRQConfig, weighting: str) -> None:
    """Check that samples hold what fitting a config takes.

    Raises:
        ValueError: if states of a layer are missing, or gradients.
    """
    missing = [layer for layer in config.layers if (layer, KINDS[0]) not in samples.states]
    if missing:
        raise ValueError(f"The samples hold no states of layer {missing[0]}. Capture them with the same config.")
    if weighting != "none" and not samples.gradients:
        raise ValueError(
            f"weighting={weighting!r} needs gradients: capture(..., gradients=True), or weighting='none'."
        )


def check_amount(num_vectors: int, config: GSRQConfig) -> int:
    """Vectors that are left to fit of those that are sampled.

    Raises:
        ValueError: if they are fewer than the centroids.
    """
    fitted = num_vectors - int(num_vectors * HELD_OUT_SHARE)
    if fitted < config.num_centroids:
        raise ValueError(
            f"{num_vectors} sampled tokens leave {fitted} to fit {config.num_centroids} centroids. Calibrate "
            "on more text (num_samples, window_length) or raise max_vectors."
        )
    return fitted


def _fit_one(
    samples: Samples, config: GSRQConfig, layer: int, kind: Kind, options: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    began = time.perf_counter()
    width = config.subspace_dim(kind)
    vectors = _subspaces(samples.states[layer, kind], width)
    weights = None
    if options["weighting"] != "none":
        norms = _subspaces(samples.gradients[layer, kind], width).norm(dim=-1)
        weights = gradient_weights(norms, options["weighting"], options["temperature"])
    fitted, held = split_rows(vectors.shape[1], options["seed"])
    weights = None if weights is None else weights[:, fitted]

    def learn(residual: torch.Tensor, stage: int) -> tuple[torch.Tensor, torch.Tensor]:
        result = cluster(
            residual,
            config.num_centroids,
            weights=weights,
            iterations=options["iterations"],
            method=options["method"],
            # Another start for each stage, the same for every method.
            seed=options["seed"] + stage,
        )
        return result.gains, result.shapes

    gains, shapes, quality = fit_stages(vectors[:, fitted], vectors[:, held], config.code_shape(layer, kind)[1], learn)
    report = LayerReport(layer, kind, quality, round(time.perf_counter() - began, 3))
    return gains.cpu(), shapes.cpu(), report.to_dict()


def split_rows(num_vectors: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of the vectors to fit, and of the tenth that is held out."""
    held = int(num_vectors * HELD_OUT_SHARE)
    order = torch.randperm(num_vectors, generator=torch.Generator().manual_seed(seed))
    return order[held:], order[:held]


def fit_stages(
    vectors: torch.Tensor,
    held_out: torch.Tensor,
    num_stages: int,
    learn: Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, tuple[StageQuality, ...]]:
    """Learn stage after stage on what the stages before it leave over.

    Args:
        vectors: float32 `[M, N, S]`.
        held_out: `[M, N', S]`, for the report; if there are none, it is on the fitted vectors.
        num_stages: R.
        learn: Takes what is left, `[M, N, S]`, and the index of the stage; returns gains `[M, K]` and unit shapes
            `[M, K, S]`.

    Returns:
        Gains `[M, R, K]` and shapes `[M, R, K, S]` as they are stored, and the quality after each stage.
    """
    gains, shapes, quality = [], [], []
    residual, left = vectors, held_out
    for stage in range(num_stages):
        gain, shape = (learned.to(STORED_DTYPE) for learned in learn(residual, stage))
        gains.append(gain)
        shapes.append(shape)
        centroids = (gain.float()[..., None] * shape.float())[:, None]
        residual = _subtract(residual, centroids)
        left = _subtract(left, centroids)
        measured = (held_out, left) if held_out.shape[1] else (vectors, residual)
        quality.append(StageQuality.measure(*measured))
    return torch.stack(gains, 1), torch.stack(shapes, 1), tuple(quality)


def _subspaces(states: torch.Tensor, width: int) -> torch.Tensor:
    """`[N, H, D]` to float32 `[M, N, S]`."""
    return split_subspaces(states.transpose(0, 1)[None], width).float()


def exact_centroids(codebooks: GSRQCodebooks, layer: int, kind: Kind, device: torch.device) -> torch.Tensor:
    """Centroids gain * shape, float32 `[M, R, K, S]`, as they are trained; the codebooks keep no copy."""
    gains, shapes = (part(layer, kind).to(device).float() for part in (codebooks.gains, codebooks.shapes))
    return gains[..., None] * shapes


def _subtract(vectors: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Vectors `[M, N, S]` minus their nearest of `[M, 1, K, S]`."""
    return vectors - look_up(centroids[:, 0], encode_vectors(vectors, centroids)[:, 0])


class _Checkpoint:
    """Finished codebooks in a folder, tied to what they were fitted on."""

    def __init__(self, folder: Path, samples: Samples, config: GSRQConfig, options: dict[str, Any]) -> None:
        self.folder = folder
        identity = [config.to_dict(), options, samples.num_vectors, samples.data_digest, samples.origin]
        self.identity = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder.mkdir(parents=True, exist_ok=True)

    def load(self, layer: int, kind: Kind) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]] | None:
        """What `save` kept, unless it belongs to another fit."""
        path = self._path(layer, kind)
        if not path.is_file():
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("identity") != self.identity:
                return None
            return file.get_tensor("gains"), file.get_tensor("shapes"), json.loads(metadata["report"])

    def save(self, layer: int, kind: Kind, fitted: tuple[torch.Tensor, torch.Tensor, dict[str, Any]]) -> None:
        """Keep a finished codebook."""
        path = self._path(layer, kind)
        metadata = {"identity": self.identity, "report": json.dumps(fitted[2])}
        write_tensors(path, {"gains": fitted[0], "shapes": fitted[1]}, metadata)

    def _path(self, layer: int, kind: Kind) -> Path:
        return self.folder / f"layer-{layer:03d}-{kind}.safetensors"
