"""What codebooks keep of a text's states, and one clustering of its vectors (the paper's figures 2, 4 and 5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..calibration.capture import Samples, capture
from ..calibration.gskm import METHODS, cluster
from ..calibration.report import StageQuality
from ..codebooks import GSRQCodebooks
from ..config import KINDS, GSRQConfig, Kind, legal_subspace_dims
from ..ops import encode_vectors
from ..ops.reference import look_up, split_subspaces


@dataclass(frozen=True)
class LayerReconstruction:
    """How well codebooks reproduce held-out states of one kind of one layer.

    Attributes:
        layer: Layer index.
        kind: "key" or "value".
        stages: Quality after 1, 2, ... stages.
    """

    layer: int
    kind: Kind
    stages: tuple[StageQuality, ...]


def measure_reconstruction(
    model: PreTrainedModel,
    windows: torch.Tensor,
    codebooks: Mapping[str, GSRQCodebooks],
    *,
    beam_width: int = 1,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, list[LayerReconstruction]]:
    """Encode the states of a text with given codebooks and compare them with what is decoded.

    Args:
        model: The model.
        windows: int64 `[windows, T]`, text that calibration did not see. Of very long texts 65,536 tokens are sampled.
        codebooks: Codebooks of this model by name.
        beam_width: Partial sums kept when encoding.
        seed: Of the sample.
        progress: Show progress bars.

    Returns:
        For each name one entry for every compressed layer and kind.
    """
    samples: dict[str, Samples] = {}
    for made in codebooks.values():
        if made.config.key_space not in samples:
            samples[made.config.key_space] = capture(
                model, windows, made.config, gradients=False, seed=seed, progress=progress
            )
    found: dict[str, list[LayerReconstruction]] = {name: [] for name in codebooks}
    jobs = [(name, layer, kind) for name, made in codebooks.items() for layer in made.config.layers for kind in KINDS]
    for name, layer, kind in tqdm(jobs, desc="Reconstruction", unit="codebook", disable=not progress):
        made = codebooks[name]
        states = samples[made.config.key_space].states[layer, kind]
        vectors = split_subspaces(states.transpose(0, 1)[None], made.config.subspace_dim(kind)).float()
        # Rounded to the model's dtype, as a cache holds them.
        centroids = made.centroids(layer, kind, vectors.device, model.dtype).float()
        codes = encode_vectors(vectors, centroids, beam_width)
        left, stages = vectors, []
        for stage in range(centroids.shape[1]):
            left = left - look_up(centroids[:, stage], codes[:, stage])
            stages.append(StageQuality.measure(vectors, left))
        found[name].append(LayerReconstruction(layer, kind, tuple(stages)))
    return found


@dataclass(frozen=True)
class Reconstruction:
    """How well the centroids of one clustering stand for the vectors it was made of.

    In-sample, as in the paper's figures: the vectors that were clustered are the ones that are scored.

    Attributes:
        data: What was clustered: "gaussian", "key", "value", "key residual" or "value residual".
        method: "kmeans" or "gskm".
        subspace_dim: Channels S of a vector.
        num_centroids: K.
        mse: Mean squared error of an element over the mean square of an element.
        gain_error: Mean error of the norm over the mean norm.
        cosine: Mean cosine between a vector and its centroid.
        shrinkage: Mean squared norm of the centroids in use over that of the vectors; k-means pulls it below 1.
    """

    data: str
    method: str
    subspace_dim: int
    num_centroids: int
    mse: float
    gain_error: float
    cosine: float
    shrinkage: float


def compare_clusterings(
    vectors: torch.Tensor, data: str, num_centroids: int, *, iterations: int = 20, seed: int = 0
) -> list[Reconstruction]:
    """Cluster the same vectors with k-means and with GSKM: same start, iterations and precision.

    Args:
        vectors: `[M, N, S]`; the figures are means over the M subspaces.
        data: Name for the result.
        num_centroids: K, at most N.
        iterations: Updates at most.
        seed: Of the start.
    """
    rows = []
    for method in METHODS:
        result = cluster(vectors, num_centroids, iterations=iterations, method=method, seed=seed)
        made = look_up(result.centroids, result.codes)
        quality = StageQuality.measure(vectors, vectors - made)
        norms, made_norms = vectors.norm(dim=-1), made.norm(dim=-1)
        # Not relative to each norm: what a stage leaves of a vector can be next to nothing.
        gain_error = (made_norms - norms).abs().mean() / norms.mean()
        shrinkage = made_norms.square().sum() / norms.square().sum()
        rows.append(
            Reconstruction(
                data,
                method,
                vectors.shape[-1],
                num_centroids,
                quality.distortion,
                gain_error.item(),
                quality.cosine,
                shrinkage.item(),
            )
        )
    return rows


def sweep_gaussians(
    subspace_dims: Sequence[int] = (4, 16, 64, 256, 1024),
    num_centroids: Sequence[int] = (16, 64, 256, 1024),
    *,
    num_vectors: int = 10_000,
    at_subspace_dim: int = 256,
    at_num_centroids: int = 256,
    iterations: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Reconstruction]:
    """Standard normal vectors: over S at one K, then over K at one S (the paper's figure 4, at smaller K).

    Args:
        subspace_dims: S to try, at K = `at_num_centroids`.
        num_centroids: K to try, at S = `at_subspace_dim`.
        num_vectors: Vectors of a clustering.
        at_subspace_dim: S of the second sweep.
        at_num_centroids: K of the first sweep.
        iterations: Updates at most.
        seed: Of the vectors and the start.
        progress: Show a progress bar.
    """
    jobs = [(s, at_num_centroids) for s in subspace_dims] + [(at_subspace_dim, k) for k in num_centroids]
    rows = []
    for width, count in tqdm(list(dict.fromkeys(jobs)), desc="Gaussians", disable=not progress):
        vectors = torch.randn(1, num_vectors, width, generator=torch.Generator().manual_seed(seed))
        rows += compare_clusterings(vectors, "gaussian", count, iterations=iterations, seed=seed)
    return rows


def sweep_states(
    samples: Samples,
    config: GSRQConfig,
    layer: int,
    *,
    num_centroids: int = 256,
    iterations: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> list[Reconstruction]:
    """Real keys and values of one layer, and what a first stage of k-means leaves of them, over S (figures 2 and 5).

    Args:
        samples: From `capture`.
        config: Geometry of the model.
        layer: A compressed layer.
        num_centroids: K.
        iterations: Updates at most.
        seed: Of the start.
        progress: Show a progress bar.

    Returns:
        Rows for every legal S from 4 up.
    """
    widths = [width for width in legal_subspace_dims(config.num_kv_heads, config.head_dim) if width >= 4]
    rows = []
    for kind, width in tqdm([(k, w) for k in KINDS for w in widths], desc="Keys and values", disable=not progress):
        vectors = split_subspaces(samples.states[layer, kind].transpose(0, 1)[None], width).float()
        rows += compare_clusterings(vectors, kind, num_centroids, iterations=iterations, seed=seed)
        first = cluster(vectors, num_centroids, method="kmeans", iterations=iterations, seed=seed)
        residual = vectors - look_up(first.centroids, first.codes)
        rows += compare_clusterings(residual, f"{kind} residual", num_centroids, iterations=iterations, seed=seed)
    return rows
