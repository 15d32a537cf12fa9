"""The codec's operations, as the rest of the package calls them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from . import reference, triton
from .dispatch import BACKENDS, choose_backend
from .reference import decode, encode_vectors

__all__ = ["BACKENDS", "choose_backend", "decode", "encode", "encode_vectors"]


def encode(
    states: torch.Tensor,
    centroids: torch.Tensor,
    cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
    out: torch.Tensor,
    beam_width: int = 1,
    backend: str = "auto",
    find_biases: Callable[[], torch.Tensor] | None = None,
) -> None:
    """Encode states `[B, H, T, D]` into codes `[B, M, R, T]`; see `reference.encode`.

    `find_biases` gives what the kernel reads beside the centroids (`triton.encode.encode`), where it is kept.
    Beams wider than 1 always take the reference, which runs on every device.

    Raises:
        ValueError: if `backend` is "triton" and the kernel cannot run.
    """
    reason = triton.unsupported_encode_reason(states.device, states.dtype, centroids.shape[-1], centroids.shape[-2])
    if reason is None and states.dtype != centroids.dtype:
        reason = f"states are {states.dtype} and centroids {centroids.dtype}"
    if choose_backend(backend, reason) == "triton" and beam_width == 1:
        from .triton.encode import encode as encode_by_kernel

        encode_by_kernel(states, centroids, cos_sin, out, None if find_biases is None else find_biases())
    else:
        reference.encode(states, centroids, cos_sin, out, beam_width)
