"""What the encode kernel reads beside the centroids."""

from __future__ import annotations

import torch
from torch.utils.weak import WeakIdKeyDictionary

_biases: WeakIdKeyDictionary = WeakIdKeyDictionary()


def find_biases(centroids: torch.Tensor) -> torch.Tensor:
    """-|c|^2 / 2, float32 `[M, R, K]`; worked out once for a codebook, however many caches use it.

    Args:
        centroids: `[M, R, K, S]`, never changed in place.
    """
    found = _biases.get(centroids)
    if found is None:
        found = _biases[centroids] = torch.linalg.vector_norm(centroids, dim=-1, dtype=torch.float32).square() * -0.5
    return found


def bias_bytes(centroids: torch.Tensor) -> int:
    """Bytes that `find_biases` holds for these centroids."""
    found = _biases.get(centroids)
    return 0 if found is None else found.nbytes
