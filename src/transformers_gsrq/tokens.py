"""What is known of the tokens themselves, once for all layers: positions, and where each row's text begins."""

from __future__ import annotations

import torch

from .attention import Step, first_real_tokens
from .rope import Rotary


class TokenTable:
    """Positions and padding of the cached tokens, shared by the layers of a cache.

    Attributes:
        length: Tokens T known so far, padding included.
        positions: int32 `[B, T]`, or None as long as the model passes none.
        starts: int64 `[B]`, index of each row's first real token; None before the first token.
        padded: Whether any row starts later than 0.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every token."""
        self.length = 0
        self.positions: torch.Tensor | None = None
        self.starts: torch.Tensor | None = None
        self.padded = False
        self._settled = False
        self._tables: dict[tuple[object, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def extend(self, before: int, batch: int, num_tokens: int, step: Step, device: torch.device) -> None:
        """Add the tokens of a forward pass; the layers after the first find them there already.

        Args:
            before: Tokens that the calling layer holds.
            batch: Rows B.
            num_tokens: New tokens.
            step: The layer's step.
            device: Device of the calling layer.

        Raises:
            RuntimeError: if the layers do not hold the same tokens.
        """
        if self.length == before + num_tokens:
            return
        if self.length != before:
            raise RuntimeError(
                f"This layer holds {before} tokens, but the cache {self.length}: a forward pass was interrupted. "
                "Call cache.reset() and start the prompt again."
            )
        if step.position_ids is not None:
            # A copy: a caller may count on in the tensor that it passed.
            new = step.position_ids.to(device, torch.int32, copy=True).expand(batch, -1)
            if self.positions is not None:
                new = torch.cat([self.positions, new.to(self.positions.device)], -1)
            self.positions = new
        if not self._settled:
            self._find_starts(before, batch, num_tokens, step, device)
        self.length += num_tokens
        self.forget_tables()

    def _find_starts(self, before: int, batch: int, num_tokens: int, step: Step, device: torch.device) -> None:
        starts = first_real_tokens(step.attention_mask, batch, before, num_tokens, device)
        if self.starts is not None:
            # A row that had begun keeps its start; one that was all padding so far may begin now.
            old = self.starts.to(device)
            starts = torch.where(old < before, old, starts)
        self.starts = starts
        first, last = starts.min().item(), starts.max().item()
        self.padded = last > 0
        self._settled = max(first, last) < before + num_tokens

    def cos_sin(
        self, rotary: Rotary, first: int, last: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotation of tokens `first` to `last`, computed once for all layers; kept until `forget_tables`.

        Args:
            rotary: The layer's embedding.
            first: First token.
            last: One past the last token.
            dtype: What to round to, as in `Rotary.cos_sin`.
            device: Where the tables are needed.

        Returns:
            Two float32 tensors `[B, last - first, P]`.

        Raises:
            ValueError: if the model never passed its positions.
        """
        if self.positions is None:
            raise ValueError(
                "The model did not pass position_ids to its attention layers, so its keys cannot be un-rotated. "
                "This architecture is not supported."
            )
        key = (rotary, first, last, dtype, device)
        if key not in self._tables:
            self._tables[key] = rotary.cos_sin(self.positions[:, first:last].to(device), dtype)
        return self._tables[key]

    def forget_tables(self) -> None:
        """Drop rotations that `cos_sin` kept: they take more memory than codes do."""
        self._tables.clear()

    def truncate(self, length: int) -> None:
        """Forget all tokens from index `length` on."""
        if length == 0:
            self.reset()
        elif length < self.length:
            self.length = length
            # A row cut back into its padding may begin elsewhere next time.
            if self.starts is not None and self.padded:
                self._settled = bool((self.starts < length).all())
            if self.positions is not None:
                self.positions = self.positions[:, :length]
            self.forget_tables()

    def fill(self, length: int, positions: torch.Tensor | None, starts: torch.Tensor | None) -> None:
        """Hold these tokens, as saved before."""
        self.reset()
        self.length, self.positions, self.starts = length, positions, starts
        if starts is not None:
            self.padded = bool((starts > 0).any())
            self._settled = bool((starts < length).all())

    def snapshot(self) -> dict[str, object]:
        """What `restore` needs to undo a forward pass."""
        return dict(self.__dict__)

    def restore(self, snapshot: dict[str, object]) -> None:
        """Be as at the time of `snapshot`."""
        self.__dict__.update(snapshot)
        self.forget_tables()

    def select(self, rows: torch.Tensor) -> None:
        """Keep rows `rows` of the batch, in that order; int64, repetition allowed."""
        if self.starts is not None:
            self.starts = self.starts[rows.to(self.starts.device)]
        if self.positions is not None:
            self.positions = self.positions[rows.to(self.positions.device)]
        self.forget_tables()
