"""Several measures in one run, over the same codebooks and the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..codebooks import GSRQCodebooks
from ..models import check_length, position_limit
from ..simulation import CodebookMethod
from .agreement import measure_agreement, measure_attribution, measure_divergence_lengths
from .perplexity import SHORTER_WINDOWS, measure_perplexity
from .reconstruction import measure_reconstruction
from .retrieval import TASKS, check_prompts, make_prompts, measure_retrieval, read_prompts

MEASURES = ("perplexity", "agreement", "attribution", "retrieval", "reconstruction")
# Greedy texts cost a forward pass a token and cache: enough to see whether they part soon or late.
GREEDY_PROMPTS, GREEDY_TOKENS = 4, 64


@dataclass(frozen=True)
class Settings:
    """What to measure, and how.

    Attributes:
        measures: Some of `MEASURES`.
        residual_length: Latest tokens kept exact; by default 0 for perplexity, the hardest setting, and 128 for
            retrieval and greedy texts, as in use. Agreement and attribution never keep any.
        sink_length: First tokens kept exact; by default 0 for perplexity and 4 for retrieval and greedy texts.
        beam_width: Partial sums kept when encoding.
        num_prompts: Retrieval prompts of each task and length.
        prompt_lengths: Their tokens.
        seed: Of the retrieval prompts and of a sample of states.

    Raises:
        ValueError: for an unknown measure, or fewer than one prompt.
    """

    measures: tuple[str, ...] = ("perplexity",)
    residual_length: int | None = None
    sink_length: int | None = None
    beam_width: int = 1
    num_prompts: int = 16
    prompt_lengths: tuple[int, ...] = (2048,)
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [measure for measure in self.measures if measure not in MEASURES]
        if unknown:
            raise ValueError(f"There is no measure {unknown[0]!r}. Measures: {', '.join(MEASURES)}.")
        if self.num_prompts < 1:
            raise ValueError(f"Retrieval needs at least 1 prompt of each task, got {self.num_prompts}.")

    @property
    def reading(self) -> dict[str, Any]:
        """Keywords for what is exact while perplexity is measured."""
        return {"residual_length": self.residual_length or 0, "sink_length": self.sink_length or 0}

    @property
    def generating(self) -> dict[str, Any]:
        """Keywords for what is exact in retrieval and greedy texts."""
        return {
            "residual_length": 128 if self.residual_length is None else self.residual_length,
            "sink_length": 4 if self.sink_length is None else self.sink_length,
        }

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON types, defaults worked out."""
        fields = {key: value for key, value in asdict(self).items() if key not in ("residual_length", "sink_length")}
        return {**fields, "reading": self.reading, "generating": self.generating}


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    windows: torch.Tensor,
    codebooks: Mapping[str, GSRQCodebooks],
    settings: Settings,
    *,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Measure codebooks and the plain cache.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        texts: Texts to hide needles in, for retrieval.
        windows: int64 `[windows, T]`, the same texts for everything else; see `token_windows`.
        codebooks: Codebooks by name.
        settings: What to measure, and how.
        progress: Show progress bars.

    Returns:
        For each measure its results by name: `Perplexity`; `Agreement`, and under "same_tokens" for how many tokens
        greedy texts of the first windows agree; for each part its `Agreement` (attribution); a list of `Retrieval`;
        a list of `LayerReconstruction`. The plain cache's are named "plain".

    Raises:
        ValueError: for codebooks of another model, windows of fewer than two tokens, too little text for a prompt, or
            windows or prompts of more tokens than the model can read.
    """
    for made in codebooks.values():
        made.config.check_model(model.config)
    methods = {name: CodebookMethod(made, settings.beam_width) for name, made in codebooks.items()}
    shown: dict[str, Any] = {"progress": progress}
    coded: dict[str, Any] = {"beam_width": settings.beam_width, **shown}
    found: dict[str, dict[str, Any]] = {}
    if set(settings.measures) != {"retrieval"}:
        check_length(model, windows.shape[1], SHORTER_WINDOWS)
    # Made first: too little text is told before the long work.
    prompts = [
        make_prompts(tokenizer, texts, task, length, settings.num_prompts, settings.seed)
        for length in (settings.prompt_lengths if "retrieval" in settings.measures else ())
        for task in TASKS
    ]
    for part in prompts:
        check_prompts(model, part)
    if "perplexity" in settings.measures:
        found["perplexity"] = measure_perplexity(model, windows, codebooks, **settings.reading, **coded)
    if "agreement" in settings.measures:
        found["agreement"] = measure_agreement(model, windows, methods, **shown)
        # So that the text behind a prompt can be read too.
        limit = position_limit(model)
        first = list(windows[:GREEDY_PROMPTS, : None if limit is None else limit - GREEDY_TOKENS])
        generating = {**settings.generating, **coded}
        found["same_tokens"] = measure_divergence_lengths(
            model, first, codebooks, max_new_tokens=GREEDY_TOKENS, **generating
        )
    if "attribution" in settings.measures:
        found["attribution"] = measure_attribution(model, windows, methods, **shown)
    if "retrieval" in settings.measures:
        batches = chain.from_iterable(read_prompts(model, part, **shown) for part in prompts)
        found["retrieval"] = measure_retrieval(model, batches, methods, **settings.generating)
    if "reconstruction" in settings.measures:
        found["reconstruction"] = measure_reconstruction(model, windows, codebooks, seed=settings.seed, **coded)
    return found
