"""How far a model with a compressed cache departs from the same model without: token by token, and in greedy text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..cache import GSRQCache
from ..codebooks import GSRQCodebooks
from ..compat import CACHE_ARGUMENT
from ..config import KINDS
from ..models import check_length, input_device
from ..simulation import CodebookMethod, Method, SimulatedCache, codings
from .perplexity import PLAIN, SHORTER_WINDOWS, Perplexity, mean_error, summarize

# Predictions compared at once, so that float32 logits of a large vocabulary stay small.
BLOCK_TOKENS = 512
# Parts of the layers whose cost is measured one at a time.
LAYER_GROUPS = 4


@dataclass(frozen=True)
class Agreement:
    """Agreement of a method with the plain cache over token windows.

    Attributes:
        perplexity: Perplexity, with its increase over the plain cache's.
        divergence: Mean KL divergence (nats) of the next-token predictions from the plain cache's.
        divergence_error: Its standard error, from the spread between windows.
        top1: Share of positions where both have the same likeliest token.
        divergences: `divergence` of each window.
    """

    perplexity: Perplexity
    divergence: float
    divergence_error: float
    top1: float
    divergences: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)


@torch.no_grad()
def measure_agreement(
    model: PreTrainedModel,
    windows: torch.Tensor,
    methods: Mapping[str, Method],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, Agreement]:
    """Compare methods with the plain cache; every token attends to what a method stores, nothing is kept exact.

    Args:
        model: The model.
        windows: int64 `[windows, T]`, text that calibration did not see.
        methods: Methods by name.
        batch_size: Windows read at once.
        progress: Show a progress bar.

    Returns:
        Results by name; the plain cache's is named "plain".

    Raises:
        ValueError: for a window of fewer than two tokens, or of more than the model can read, or a method named
            "plain".
    """
    if windows.shape[1] < 2:
        raise ValueError(f"A window must have at least 2 tokens to predict one, got {windows.shape[1]}.")
    if PLAIN in methods:
        raise ValueError(f"{PLAIN!r} is the name of the model's own cache; give the method another name.")
    check_length(model, windows.shape[1], SHORTER_WINDOWS)
    coding = {name: codings(model, method) for name, method in methods.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (PLAIN, *methods)}
    for part in tqdm(windows.split(batch_size), desc="Agreement", unit="batch", disable=not progress):
        ids = part.to(input_device(model))
        plain = model(input_ids=ids, use_cache=False).logits
        found[PLAIN].append(_compare(plain, plain, ids))
        for name in methods:
            cache = SimulatedCache(model, coding[name])
            coded = model(input_ids=ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
            found[name].append(_compare(coded, plain, ids))
            del cache, coded
    tables = {name: torch.cat(parts).double() for name, parts in found.items()}
    reference = tables[PLAIN][:, 0]
    return {
        name: Agreement(
            summarize(table[:, 0], reference), table[:, 1].mean().item(), mean_error(table[:, 1]),
            table[:, 2].mean().item(), tuple(table[:, 1].tolist()),
        )
        for name, table in tables.items()
    }  # fmt: skip


def _compare(coded: torch.Tensor, plain: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """For each row of logits `[B, T, V]`: loss, divergence and share of equal guesses, `[B, 3]` on the CPU."""
    ids = ids.to(coded.device)
    rows = []
    for row in range(ids.shape[0]):
        sums = torch.zeros(3, dtype=torch.float64)
        last = ids.shape[1] - 1
        for at in range(0, last, BLOCK_TOKENS):
            part = slice(at, min(at + BLOCK_TOKENS, last))
            mine, theirs = (logits[row, part].float().log_softmax(-1) for logits in (coded, plain))
            loss = F.nll_loss(mine, ids[row, part.start + 1 : part.stop + 1], reduction="sum")
            divergence = F.kl_div(mine, theirs, reduction="sum", log_target=True)
            same = (mine.argmax(-1) == theirs.argmax(-1)).sum()
            sums += torch.stack([loss, divergence, same.float()]).double().cpu()
        rows.append(sums / last)
    return torch.stack(rows)


def measure_attribution(
    model: PreTrainedModel,
    windows: torch.Tensor,
    methods: Mapping[str, CodebookMethod],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> dict[str, dict[str, Agreement]]:
    """What each part of a compressed cache costs by itself, everything else kept exact.

    Args:
        model: The model.
        windows: int64 `[windows, T]`, text that calibration did not see.
        methods: Codebooks by name.
        batch_size: Windows read at once.
        progress: Show a progress bar for each method.

    Returns:
        For each method the agreement of its parts: "all", "keys only", "values only", each quarter of the layers
        ("layers 0-7"), and "plain".

    Raises:
        ValueError: for a window of fewer than two tokens, or of more than the model can read.
    """
    found = {}
    for name, method in methods.items():
        size = -(-len(method.layers) // LAYER_GROUPS)
        groups = [method.layers[start : start + size] for start in range(0, len(method.layers), size)]
        parts = {
            "all": method,
            **{f"{kind}s only": replace(method, kinds=(kind,)) for kind in KINDS},
            **{f"layers {group[0]}-{group[-1]}": replace(method, only_layers=group) for group in groups},
        }
        found[name] = measure_agreement(model, windows, parts, batch_size=batch_size, progress=progress)
    return found


@torch.no_grad()
def measure_divergence_lengths(
    model: PreTrainedModel,
    prompts: Sequence[torch.Tensor],
    codebooks: Mapping[str, GSRQCodebooks],
    *,
    max_new_tokens: int = 128,
    progress: bool = True,
    **cache_options: Any,
) -> dict[str, list[int]]:
    """Tokens for which the greedy texts with and without compression are the same.

    Args:
        model: The model.
        prompts: int64 `[T]` each.
        codebooks: Codebooks by name.
        max_new_tokens: Where to stop; texts that never part count as this.
        progress: Show a progress bar.
        **cache_options: Keywords of `GSRQCache`.

    Returns:
        For each name a number for each prompt.

    Raises:
        ValueError: if a prompt and its text are longer than the model can read.
    """
    longest = max((prompt.numel() for prompt in prompts), default=0)
    # Nobody reads the last token.
    check_length(model, longest + max_new_tokens - 1, "Pass shorter prompts, or a smaller max_new_tokens.")
    lengths: dict[str, list[int]] = {name: [] for name in codebooks}
    for prompt in tqdm(prompts, desc="Greedy texts", unit="prompt", disable=not progress):
        ids = prompt[None].to(input_device(model))
        settings = {
            "attention_mask": torch.ones_like(ids), "max_new_tokens": max_new_tokens, "do_sample": False,
            "min_new_tokens": max_new_tokens,
        }  # fmt: skip
        plain = model.generate(ids, **settings)[0, ids.shape[1] :]
        for name, made in codebooks.items():
            cache = GSRQCache(made, model, **cache_options)
            coded = model.generate(ids, **{CACHE_ARGUMENT: cache}, **settings)
            lengths[name].append(equal_tokens(coded[0, ids.shape[1] :], plain))
    return lengths


def equal_tokens(text: torch.Tensor, other: torch.Tensor) -> int:
    """Tokens `[T]` of two texts before they part; T if they never do."""
    parted = (text != other).nonzero()
    return int(parted[0]) if len(parted) else len(text)
