"""`ResidualQuantizer`: encode and decode one kind of state of one layer. Owns no kernel; ops does the work."""

from __future__ import annotations

from typing import Any

import torch

from . import ops


class ResidualQuantizer:
    """Residual vector quantizer of a layer's keys or values.

    Args:
        centroids: `[M, R, K, S]` on the layer's device, in the dtype to decode to.
        num_heads: Key/value heads H with H*D = M*S.
        backend: "auto", "torch" or "triton" (see `transformers_gsrq.ops`).
        label: What is quantized, for error messages.
    """

    def __init__(
        self, centroids: torch.Tensor, num_heads: int, backend: str = "auto", label: str = "the states"
    ) -> None:
        self.centroids = centroids
        self.num_heads = num_heads
        self.backend = backend
        self.label = label

    def __deepcopy__(self, memo: dict[int, Any]) -> ResidualQuantizer:
        # Stateless, and its centroids are large: copies of a cache share it.
        return self

    @property
    def code_shape(self) -> tuple[int, int]:
        """`(M, R)`: codes of a token."""
        return self.centroids.shape[0], self.centroids.shape[1]

    @property
    def head_dim(self) -> int:
        """Channels D of a head."""
        return self.centroids.shape[0] * self.centroids.shape[3] // self.num_heads

    @torch.no_grad()
    def encode(
        self,
        states: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
        beam_width: int = 1,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Codes of states, stage by stage on the residual (paper, section 3).

        Args:
            states: `[B, H, T, D]`, any float dtype.
            cos_sin: Rotation to undo first, each `[B or 1, T, P]`; None to take the states as they are.
            beam_width: Partial sums kept at each stage; 1 is greedy.
            out: uint8 `[B, M, R, T]` to write to; a new tensor by default.

        Returns:
            uint8 `[B, M, R, T]`.

        Raises:
            ValueError: if the shape does not match the codebook, `beam_width` < 1, or a state is NaN or infinite.
        """
        batch, num_heads, num_tokens, head_dim = states.shape
        if (num_heads, head_dim) != (self.num_heads, self.head_dim):
            raise ValueError(
                f"These codebooks hold {self.num_heads} heads of {self.head_dim} channels, got states of "
                f"{num_heads} heads of {head_dim}."
            )
        if beam_width < 1:
            raise ValueError(f"beam_width must be at least 1, got {beam_width}.")
        if not torch.isfinite(states).all():
            raise ValueError(
                f"NaN or infinity in {self.label}: such a state has no nearest centroid. The model overflowed: check "
                "its inputs, or load it in bfloat16 or float32 instead of float16."
            )
        if out is None:
            out = torch.empty(batch, *self.code_shape, num_tokens, dtype=torch.uint8, device=states.device)
        ops.encode(states, self.centroids, cos_sin, out, beam_width, self.backend)
        return out

    def decode(
        self,
        codes: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """States that codes stand for.

        Args:
            codes: uint8 `[B, M, R', T]`; fewer stages than R decode to the coarser approximation they are.
            cos_sin: Rotation to apply, each `[B or 1, T, P]`.
            out: `[B, H, T, D]` to write to; a new tensor by default.

        Returns:
            `[B, H, T, D]` in the dtype of the centroids.
        """
        return ops.decode(codes, self.centroids, self.num_heads, cos_sin, out)
