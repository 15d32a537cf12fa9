"""How to divide an exact bit budget between keys and values: by perplexity and retrieval together.

They disagree. Values drive perplexity, keys drive retrieval; a split chosen by perplexity alone loses needles.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..codebooks import GSRQCodebooks
from ..config import KINDS, GSRQConfig
from ..simulation import CodebookMethod
from .agreement import measure_agreement
from .retrieval import Prompt, measure_retrieval, read_prompts


@dataclass(frozen=True)
class Split:
    """One division of the stages, measured.

    Attributes:
        key_stages: Stages R of every layer's keys.
        value_stages: Stages R of every layer's values.
        increase: Perplexity over the plain cache's, minus 1.
        increase_error: Its standard error.
        hits: Answered share of the retrieval prompts, all tasks together.
        lost: Prompts that the even split answers and this one does not.
        gained: The other way round.
    """

    key_stages: int
    value_stages: int
    increase: float
    increase_error: float
    hits: float
    lost: int = 0
    gained: int = 0

    @property
    def recalls(self) -> bool:
        """Whether it answers no fewer prompts than the even split, but for chance.

        Only prompts that one of the two answers tell them apart; their difference has a standard error of the root of
        their number.
        """
        return self.lost - self.gained <= math.sqrt(self.lost + self.gained)


@dataclass(frozen=True)
class SplitChoice:
    """What `choose_split` chose, and why.

    Attributes:
        chosen: The split to use.
        candidates: All that were measured, the even split first.
        reason: One sentence.
    """

    chosen: Split
    candidates: tuple[Split, ...]
    reason: str


def choose_split(
    model: PreTrainedModel,
    codebooks: GSRQCodebooks,
    bits: float,
    windows: torch.Tensor,
    prompts: Sequence[Prompt],
    *,
    batch_size: int = 1,
    progress: bool = True,
) -> SplitChoice:
    """Measure divisions of `bits` between keys and values and take the best.

    Among the splits that answer no fewer retrieval prompts than the even one (`Split.recalls`), the one with the least
    perplexity.

    Args:
        model: The model.
        codebooks: Codebooks of a higher rate, fitted greedily, with one subspace width for both kinds; candidates
            are prefixes of their stages.
        bits: Bits per element, keys and values together.
        windows: int64 `[windows, T]`, text that neither calibration nor the final evaluation uses.
        prompts: From `make_prompts`, of one length.
        batch_size: Windows or prompts read at once.
        progress: Show progress bars.

    Raises:
        ValueError: if the codebooks have too few stages, unequal widths, or the bits give no whole stages.
    """
    pairs = candidate_splits(codebooks.config, bits)
    methods = {str(pair): CodebookMethod(codebooks.with_stages(*pair)) for pair in pairs}
    agreement = measure_agreement(model, windows, methods, batch_size=batch_size, progress=progress)
    scores = measure_retrieval(model, read_prompts(model, prompts, batch_size=batch_size, progress=progress), methods)
    hits = {name: [hit for score in scores[name] for _, hit in score.hits] for name in methods}
    splits = []
    for name, pair in zip(methods, pairs, strict=True):
        perplexity = agreement[name].perplexity
        share = sum(hits[name]) / max(1, len(hits[name]))
        both = list(zip(hits[str(pairs[0])], hits[name], strict=True))
        splits.append(
            Split(
                *pair,
                perplexity.increase,
                perplexity.increase_error,
                share,
                lost=sum(even and not hit for even, hit in both),
                gained=sum(hit and not even for even, hit in both),
            )
        )
    return _choose(tuple(splits))


def _choose(splits: tuple[Split, ...]) -> SplitChoice:
    even = splits[0]
    safe = [split for split in splits if split.recalls]
    chosen = min(safe, key=lambda split: split.increase)
    dropped = [split for split in splits if split.increase < chosen.increase]
    reason = (
        f"{chosen.key_stages} key and {chosen.value_stages} value stages raise perplexity by {chosen.increase:.1%}, "
        f"the even split by {even.increase:.1%}, and answer {chosen.hits:.0%} of the prompts, the even split "
        f"{even.hits:.0%}"
    )
    if dropped:
        best = min(dropped, key=lambda split: split.increase)
        reason += f"; {best.key_stages}/{best.value_stages} would read better ({best.increase:.1%})"
        reason += f" but answers {best.hits:.0%}"
    return SplitChoice(chosen, splits, reason + ".")


def candidate_splits(config: GSRQConfig, bits: float) -> list[tuple[int, int]]:
    """Divisions `(key_stages, value_stages)` that cost exactly `bits`: even first, then ever fewer keys.

    Raises:
        ValueError: if no whole stages give these bits, or the codebooks have too few.
    """
    width = config.key_subspace_dim
    if config.value_subspace_dim != width:
        raise ValueError(
            f"Splits need one subspace width for both kinds, got {width} for keys and {config.value_subspace_dim} for "
            "values."
        )
    total = bits * 2 * width / 8
    if total != int(total) or total < 2:
        raise ValueError(f"{bits} bits are {total:g} stages of {width} channels for both kinds; that is not whole.")
    most = {kind: min(config.stages(kind)) for kind in KINDS}
    even = (int(total) - int(total) // 2, int(total) // 2)
    # From half the stages for keys down to a quarter, in at most four further steps.
    step = max(1, math.ceil((even[0] - total / 4) / 4))
    keys = range(even[0], max(0, math.ceil(total / 4) - 1), -step)
    pairs = [(k, int(total) - k) for k in keys if k <= most["key"] and int(total) - k <= most["value"]]
    if not pairs or pairs[0] != even:
        raise ValueError(
            f"{bits} bits need {even[0]} stages of each kind at least; these codebooks have {most['key']} for keys "
            f"and {most['value']} for values. Calibrate with more bits."
        )
    return pairs
