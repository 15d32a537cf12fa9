"""Where a layer keeps its codes, and what it keeps of the states it is given."""

from __future__ import annotations

import torch

# On a GPU rows begin at multiples of this many bytes, so that kernels read several codes at a time without a copy.
ALIGNMENT = 16


class CodeBuffer:
    """Codes of one kind, uint8 `[B, M, R, capacity]`: appended, never rewritten.

    Stage-major with tokens contiguous, so that a kernel reads one stage of consecutive tokens in one go.

    Codes are made outside of inference mode, whatever mode a call is in: what is made inside cannot be written to
    outside.
    """

    @torch.inference_mode(False)
    def __init__(self, batch: int, code_shape: tuple[int, int], device: torch.device) -> None:
        self.length = 0
        self._data = torch.empty(batch, *code_shape, 0, dtype=torch.uint8, device=device)

    @property
    def codes(self) -> torch.Tensor:
        """The codes in use, `[B, M, R, length]`."""
        return self._data[..., : self.length]

    @torch.inference_mode(False)
    def reserve(self, num_tokens: int, expected: int = 0) -> torch.Tensor:
        """Room for `num_tokens` more codes; `length` counts them once the caller has written them and says so."""
        needed = self.length + num_tokens
        if needed > self._data.shape[-1]:
            # Growing by a quarter copies each code four times at most, and wastes a fifth at most.
            capacity = expected if expected >= needed else needed if self.length == 0 else max(needed, needed * 5 // 4)
            if self._data.device.type == "cuda":
                capacity = -(-capacity // ALIGNMENT) * ALIGNMENT
            grown = self._data.new_empty(*self._data.shape[:-1], capacity)
            grown[..., : self.length] = self.codes
            self._data = grown
        return self._data[..., self.length : needed]

    def fill(self, codes: torch.Tensor) -> None:
        """Hold exactly these codes.

        Raises:
            ValueError: if they are not `[B, M, R, length]` for this buffer, or not uint8.
        """
        if codes.shape[:3] != self._data.shape[:3] or codes.dtype != torch.uint8:
            raise ValueError(
                f"Codes must be uint8 [B, M, R, tokens] with [B, M, R] = {list(self._data.shape[:3])}, got "
                f"{codes.dtype} {list(codes.shape)}."
            )
        self._data, self.length = self._data[..., :0], 0
        self.reserve(codes.shape[-1]).copy_(codes)
        self.length = codes.shape[-1]

    @torch.inference_mode(False)
    def select(self, rows: torch.Tensor) -> None:
        """Keep rows `rows` of the batch: one copy of the codes in use, the reserved room is only allocated."""
        kept = self._data.new_empty(rows.numel(), *self._data.shape[1:])
        torch.index_select(self.codes, 0, rows.to(self._data.device), out=kept[..., : self.length])
        self._data = kept

    @torch.inference_mode(False)
    def to(self, device: torch.device | str) -> None:
        """Move the codes."""
        self._data = self._data.to(device)

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes in use and bytes reserved beyond them."""
        used = self.codes.numel()
        return used, self._data.numel() - used


def own(states: torch.Tensor) -> torch.Tensor:
    """These states, copied if they are only a part of what they would keep in memory."""
    return states.clone() if states.untyped_storage().nbytes() > states.nbytes else states
