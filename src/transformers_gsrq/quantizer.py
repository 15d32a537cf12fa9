"""`ResidualQuantizer`: encode and decode one kind of state of one layer. Owns no kernel; ops does the work."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from . import ops
from .rope import Rotary

if TYPE_CHECKING:
    # Importing it would import Triton.
    from .ops.triton.key_tables import KeyTables


class ResidualQuantizer:
    """Residual vector quantizer of a layer's keys or values: the codebook as a device computes with it.

    Beside the centroids it holds what kernels read and what follows from them; never changed, so every cache of a
    model shares one (`GSRQCodebooks.quantizer`).

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
        # By frequencies and scaling: caches read the model's rotary embedding each for itself.
        self._key_tables: dict[tuple[bytes, float], KeyTables] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ResidualQuantizer:
        # Never changed, and its centroids are large: copies of a cache share it.
        return self

    @cached_property
    def biases(self) -> torch.Tensor:
        """-|c|^2 / 2, float32 `[M, R, K]`: what the encode kernel reads beside the centroids."""
        with torch.inference_mode(False), torch.no_grad():
            return torch.linalg.vector_norm(self.centroids, dim=-1, dtype=torch.float32).square() * -0.5

    def key_tables(self, rotary: Rotary | None) -> KeyTables:
        """The codebook as decode attention reads keys; the tables are made once and serve every rotary embedding."""
        from .ops.triton.key_tables import prepare_keys

        inv_freq, scaling = (None, 1.0) if rotary is None else (rotary.inv_freq, rotary.scaling)
        name = b"" if inv_freq is None else inv_freq.numpy().tobytes(), scaling
        if name not in self._key_tables:
            width = 0 if inv_freq is None else 2 * inv_freq.numel()
            made = next((tables for tables in self._key_tables.values() if tables.rotary_dim == width), None)
            with torch.inference_mode(False), torch.no_grad():
                if made is None:
                    made = prepare_keys(self.centroids, self.num_heads, self.head_dim, inv_freq, scaling)
                self._key_tables[name] = made.turning(inv_freq, scaling)
        return self._key_tables[name]

    def tensors(self) -> list[torch.Tensor]:
        """Everything held on the device."""
        tables = self._key_tables.values()
        parts = [part for t in tables for part in (t.tables, t.subspaces, t.frequencies, t.amplitudes)]
        return [self.centroids, *parts, *([self.biases] if "biases" in self.__dict__ else [])]

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
        self.encode_into(out, states, cos_sin, beam_width, self.backend)
        return out

    @torch.no_grad()
    def encode_into(
        self,
        out: torch.Tensor,
        states: torch.Tensor,
        cos_sin: tuple[torch.Tensor, torch.Tensor] | None,
        beam_width: int,
        backend: str,
    ) -> None:
        """`encode` without its checks, which wait for the device: NaN gets any codes.

        Args:
            out: uint8 `[B, M, R, T]`, written; any strides.
            states: `[B, H, T, D]`.
            cos_sin: As in `encode`.
            beam_width: As in `encode`.
            backend: As in the constructor.
        """
        ops.encode(states, self.centroids, cos_sin, out, beam_width, backend, lambda: self.biases)

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
