"""What codebooks were made with, and how well they reproduce held-out states, stage by stage."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from ..compat import computed_with


def model_record(model: PreTrainedModel) -> dict[str, Any]:
    """The model that codebooks are made for and what it ran on, as JSON types."""
    return {
        "base_model": model.config.name_or_path,
        "base_model_revision": getattr(model.config, "_commit_hash", None),
        **computed_with(model),
    }


@dataclass(frozen=True)
class StageQuality:
    """Reproduction of held-out vectors by the first stages of a residual quantizer.

    Attributes:
        distortion: Squared error over squared norm, summed over all vectors; 0 is exact, 1 is no better than zeros.
        cosine: Mean cosine between a vector and its reproduction.
        gain_error: Mean relative error of the norm.
    """

    distortion: float
    cosine: float
    gain_error: float

    @classmethod
    def measure(cls, vectors: torch.Tensor, residual: torch.Tensor) -> StageQuality:
        """Compare vectors with what is left of them.

        Args:
            vectors: `[M, N, S]`.
            residual: Vectors minus their reproduction, same shape.
        """
        made = vectors - residual
        norms, made_norms = vectors.norm(dim=-1), made.norm(dim=-1)
        real = norms > 0
        cosine = (vectors * made).sum(-1)[real] / (norms * made_norms).clamp(min=1e-30)[real]
        gain_error = ((made_norms - norms).abs() / norms.clamp(min=1e-30))[real]
        energy = vectors.square().sum().clamp(min=1e-30)
        return cls(
            (residual.square().sum() / energy).item(),
            cosine.mean().item() if real.any() else 1.0,
            gain_error.mean().item() if real.any() else 0.0,
        )


@dataclass(frozen=True)
class LayerReport:
    """Fit of one kind of one layer.

    Attributes:
        layer: Layer index.
        kind: "key" or "value".
        stages: Quality after 1, 2, ... stages, on vectors the fit did not see.
        seconds: Time that the fit took.
    """

    layer: int
    kind: str
    stages: tuple[StageQuality, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)
