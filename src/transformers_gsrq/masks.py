"""What a mask says of the tokens."""

from __future__ import annotations

from typing import Any

import torch


def first_real_tokens(mask: Any, batch: int, before: int, num_tokens: int, device: torch.device) -> torch.Tensor:
    """Index of each row's first real token among the new ones: the first whose own query sees it.

    The last query will not do: under a mask of one's own it may see little of what came before.

    Args:
        mask: None, `[B, T]` (1 = real), `[B, 1, Q, T]` boolean (True = visible) or additive, or a
            flex-attention block mask.
        batch: Rows B.
        before: Tokens before the new ones.
        num_tokens: New tokens Q.
        device: Where the result lives.

    Returns:
        int64 `[B]`; before + Q for a row whose new tokens are all padding.

    Raises:
        TypeError: for a mask of another type.
    """
    if mask is None:
        return torch.full((batch,), before, dtype=torch.long, device=device)
    new = torch.arange(num_tokens, device=device)
    if hasattr(mask, "mask_mod"):
        rows = torch.arange(batch, device=device)[:, None]
        real = mask.mask_mod(rows, torch.zeros_like(rows), new[None], before + new[None])
    elif isinstance(mask, torch.Tensor):
        own = mask[..., before : before + num_tokens]
        if mask.dim() == 4:
            own = own[:, 0].expand(-1, num_tokens, -1).diagonal(dim1=-2, dim2=-1)
        additive = mask.dim() == 4 and mask.is_floating_point()
        real = (own > torch.finfo(own.dtype).min / 2 if additive else own != 0).to(device)
    else:
        raise TypeError(
            f"The attention mask is a {type(mask).__name__}; expected None, a tensor or a flex-attention block mask."
        )
    real = real.expand(batch, num_tokens)
    return torch.where(real.any(-1), before + real.int().argmax(-1), before + num_tokens)
