"""Joint refinement: after the greedy fit, fit every stage again to what all the *others* leave over."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm

from ..codebooks import GSRQCodebooks
from ..config import KINDS, Kind
from ..ops import encode_vectors
from ..ops.reference import look_up
from .capture import Samples
from .fit import _subspaces, check_options, check_samples, exact_centroids, gradient_weights, split_rows


def refine(
    samples: Samples,
    codebooks: GSRQCodebooks,
    *,
    rounds: int = 3,
    beam_width: int = 4,
    weighting: str = "log",
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> GSRQCodebooks:
    """Lower the error of fitted codebooks at the same bits.

    The greedy fit lets stage r see only the stages before it. A round encodes all vectors with all stages, then moves
    each stage's centroids, one stage after another, to the weighted mean of what the other stages leave over: the
    least-squares solution for that stage given the codes. Rounds that do not help on held-out vectors are dropped.
    Afterwards a prefix of the stages is no longer what fitting at the lower rate would give.

    Args:
        samples: From `capture`, with gradients unless `weighting` is "none".
        codebooks: From `fit` on these samples.
        rounds: Rounds of encoding and fitting.
        beam_width: Partial sums kept when encoding; codes of a wider search leave the stages more to agree on.
        weighting: As in `fit`.
        temperature: As in `fit`.
        seed: As in `fit`, so that the same vectors are held out.
        progress: Show a progress bar.

    Returns:
        New codebooks; the held-out error before and after is in their provenance.

    Raises:
        ValueError: for an unknown weighting, or layers or gradients that were not captured.
    """
    check_options(weighting)
    check_samples(samples, codebooks.config, weighting)
    gains, shapes, reports = {}, {}, []
    jobs: list[tuple[int, Kind]] = [(layer, kind) for layer in codebooks.config.layers for kind in KINDS]
    for layer, kind in tqdm(jobs, desc="Refining codebooks", unit="codebook", disable=not progress):
        width = codebooks.config.subspace_dim(kind)
        vectors = _subspaces(samples.states[layer, kind], width)
        weights = torch.ones_like(vectors[..., 0])
        if weighting != "none":
            norms = _subspaces(samples.gradients[layer, kind], width).norm(dim=-1)
            found = gradient_weights(norms, weighting, temperature)
            weights = weights if found is None else found
        kept, held = split_rows(vectors.shape[1], seed)
        held = held if len(held) else kept[:1]
        best = exact_centroids(codebooks, layer, kind, vectors.device)
        before = least = _error(vectors[:, held], weights[:, held], best, beam_width)
        current = best
        for _ in range(rounds):
            current = refit_stages(vectors[:, kept], weights[:, kept], current, beam_width)
            error = _error(vectors[:, held], weights[:, held], current, beam_width)
            if error >= least:
                break
            best, least = current, error
        gain = best.norm(dim=-1)
        gains[layer, kind] = gain
        shapes[layer, kind] = best / gain.clamp(min=1e-12)[..., None]
        reports.append({"layer": layer, "kind": kind, "before": before, "after": least})
    made = {
        "rounds": rounds,
        "beam_width": beam_width,
        "weighting": weighting,
        "temperature": temperature,
        "seed": seed,
        "data_digest": samples.data_digest,
        "from_digest": codebooks.digest,
    }
    return codebooks.trained("refinement", gains, shapes, made, {"report": reports})


def refit_stages(
    vectors: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, beam_width: int = 1
) -> torch.Tensor:
    """One round: encode, then move each stage's centroids to the mean of what the other stages leave over.

    For the codes of this round the weighted squared error cannot rise.

    Args:
        vectors: float32 `[M, N, S]`.
        weights: `[M, N]`, non-negative.
        centroids: float32 `[M, R, K, S]`.
        beam_width: As in `encode_vectors`.

    Returns:
        New centroids; those that no vector chose stay.
    """
    num_subspaces, _, width = vectors.shape
    num_centroids = centroids.shape[2]
    codes = encode_vectors(vectors, centroids, beam_width).long()
    centroids = centroids.clone()
    left = vectors.clone()
    for stage in range(centroids.shape[1]):
        left -= look_up(centroids[:, stage], codes[:, stage])
    first = torch.arange(num_subspaces, device=vectors.device)[:, None] * num_centroids
    for stage in range(centroids.shape[1]):
        rows = (codes[:, stage] + first).flatten()
        mass = weights.new_zeros(num_subspaces * num_centroids).index_add_(0, rows, weights.flatten())
        # Moving by the mean of what all stages leave over lands on the mean of what the others leave over.
        pull = vectors.new_zeros(num_subspaces * num_centroids, width)
        pull.index_add_(0, rows, (left * weights[..., None]).flatten(0, 1))
        tiny = torch.finfo(mass.dtype).tiny
        move = torch.where(mass[:, None] > 0, pull / mass.clamp(min=tiny)[:, None], 0).view_as(centroids[:, stage])
        centroids[:, stage] += move
        left -= look_up(move, codes[:, stage])
    return centroids


def _error(vectors: torch.Tensor, weights: torch.Tensor, centroids: torch.Tensor, beam_width: int) -> float:
    codes = encode_vectors(vectors, centroids, beam_width).long()
    left = vectors.clone()
    for stage in range(centroids.shape[1]):
        left -= look_up(centroids[:, stage], codes[:, stage])
    # States may be all zero, as StageQuality allows for too: an error that is no number could not be saved.
    energy = (vectors.square().sum(-1) * weights).sum().clamp(min=1e-30)
    return ((left.square().sum(-1) * weights).sum() / energy).item()
