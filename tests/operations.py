"""Everything that can be done with a cache, once: run with our cache and with the oracle, and compared token by token.

`docs/supported-models.md` is made from this table and that of `tiny_models.py`.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Cache, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT

# Small, so that short texts leave the window; the prompt is longer than a sliding window of the tiny models.
OPTIONS = {"residual_length": 5, "sink_length": 2, "chunk_length": 3}


@dataclass
class Bench:
    """What an operation may use.

    Attributes:
        model: The model.
        codebooks: Codebooks that fit it.
        prompt: Token ids `[2, 30]`; the first row is left-padded.
        mask: Attention mask of the prompt.
        make_cache: Makes the cache to be tried; takes the attention mask of what it will see first.
        draft: Another model of the same vocabulary.
        new_tokens: Tokens that `generate` adds.
    """

    model: PreTrainedModel
    codebooks: GSRQCodebooks
    prompt: torch.Tensor
    mask: torch.Tensor
    make_cache: Callable[..., Cache]
    draft: PreTrainedModel
    new_tokens: int = 12

    def generate(self, rows: slice = slice(None), **settings: Any) -> list[torch.Tensor]:
        """Tokens and the scores that they were chosen by."""
        settings = {"max_new_tokens": self.new_tokens, "do_sample": False, "eos_token_id": None, **settings}
        mask = settings.pop("attention_mask", self.mask[rows])
        prompt = settings.pop("prompt", self.prompt[rows])
        settings.setdefault(CACHE_ARGUMENT, self.make_cache(mask))
        torch.manual_seed(7)
        prompt, mask = prompt.to(self.model.device), mask.to(self.model.device)
        out = self.model.generate(
            prompt, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **settings
        )
        return [out.sequences, *out.logits]

    @torch.no_grad()
    def forward(self, cache: Cache, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Logits of new tokens; `mask` covers all tokens, cached and new."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        tokens, mask, positions = (tensor.to(self.model.device) for tensor in (tokens, mask, positions))
        return self.model(tokens, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits

    def filled(self) -> tuple[Cache, torch.Tensor]:
        """A cache that holds the prompt, and the mask of its tokens."""
        cache = self.make_cache(self.mask)
        self.forward(cache, self.prompt, self.mask)
        return cache, self.mask

    def go_on(self, cache: Cache, mask: torch.Tensor, count: int = 1, first: int = 11) -> list[torch.Tensor]:
        """Logits of `count` more tokens in one pass, then of four more one by one."""
        out = []
        for size in (count, 1, 1, 1, 1):
            mask = torch.cat([mask, mask.new_ones(mask.shape[0], size)], -1)
            tokens = (torch.arange(size) + first + mask.shape[1])[None] % 80 + 3
            out.append(self.forward(cache, tokens.expand(mask.shape[0], -1), mask))
        return out


@dataclass(frozen=True)
class Operation:
    """A thing to do with a cache.

    Attributes:
        title: What the documentation calls it.
        run: Does it and returns what must not depend on how the cache is made.
        sliding: Why it cannot be done where layers have a sliding window; empty if it can.
        host_sliding: Why an old transformers cannot do it there with any cache, its own included.
    """

    title: str
    run: Callable[[Bench], list[torch.Tensor]]
    sliding: str = ""
    host_sliding: str = ""


class EndsWith(StoppingCriteria):
    """Stops once any row has `count` tokens whose number is even."""

    def __init__(self, count: int, prompt_length: int) -> None:
        self.count, self.prompt_length = count, prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        enough = (input_ids[:, self.prompt_length :] % 2 == 0).sum(-1) >= self.count
        return enough.any().expand(input_ids.shape[0])


class Collector(BaseStreamer):
    """Keeps the tokens it is given."""

    def __init__(self) -> None:
        self.tokens: list[torch.Tensor] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens.append(value.flatten())

    def end(self) -> None:
        self.ended = True


def stream(bench: Bench) -> list[torch.Tensor]:
    collector = Collector()
    sequences, *scores = bench.generate(slice(1, 2), streamer=collector)
    if not collector.ended or torch.cat(collector.tokens).tolist() != sequences[0].tolist():
        raise AssertionError("the stream differs from what generate returned")
    return [sequences, *scores]


def stop(bench: Bench) -> list[torch.Tensor]:
    criteria = StoppingCriteriaList([EndsWith(3, bench.prompt.shape[1])])
    return bench.generate(stopping_criteria=criteria)


def prompt_lookup(bench: Bench) -> list[torch.Tensor]:
    prompt = bench.prompt[1:, :10].repeat(1, 3)
    return bench.generate(
        prompt=prompt, attention_mask=torch.ones_like(prompt), prompt_lookup_num_tokens=4, max_matching_ngram_size=2
    )


def assisted(bench: Bench) -> list[torch.Tensor]:
    return bench.generate(slice(1, 2), assistant_model=bench.draft)


def turns(bench: Bench) -> list[torch.Tensor]:
    mask, prompt, out = bench.mask, bench.prompt, []
    cache = bench.make_cache(mask)
    for turn in range(3):
        part = [
            tensor.cpu() for tensor in bench.generate(prompt=prompt, attention_mask=mask, **{CACHE_ARGUMENT: cache})
        ]
        out += part
        said = (torch.arange(7) * (turn + 2) % 60 + 5).expand(2, -1)
        prompt = torch.cat([part[0], said], -1)
        mask = torch.cat([mask, mask.new_ones(2, prompt.shape[1] - mask.shape[1])], -1)
    return out


def branches(bench: Bench) -> list[torch.Tensor]:
    cache, mask = bench.filled()
    out = []
    for first in (11, 47, 11):
        out += bench.go_on(copy.deepcopy(cache), mask, count=4, first=first)
    for early, late in zip(out[:5], out[10:], strict=True):
        if not torch.equal(early, late):
            raise AssertionError("a branch changed the cache it was copied from")
    return out


def crop_drafts(bench: Bench) -> list[torch.Tensor]:
    cache = bench.make_cache(bench.mask)
    cache.activate_past_recording()
    bench.forward(cache, bench.prompt, bench.mask)
    cache.crop(-11)
    mask = bench.mask[:, :-11]
    out = []
    for removed in (0, 2, 6, 5, 4):
        mask = torch.cat([mask, mask.new_ones(2, 6)], -1)
        tokens = (torch.arange(6) * 5 + removed).expand(2, -1) + 3
        out.append(bench.forward(cache, tokens, mask))
        cache.crop(-removed)
        mask = mask[:, : mask.shape[1] - removed]
    return out


def crop_codes(bench: Bench) -> list[torch.Tensor]:
    cache, mask = bench.filled()
    out = []
    for removed in (0, 3, 15, 12):
        cache.crop(-removed)
        mask = mask[:, : mask.shape[1] - removed]
        out += bench.go_on(cache, mask, count=2)
        mask = torch.cat([mask, mask.new_ones(2, 6)], -1)
    cache.crop(-cache.get_seq_length())
    return [*out, bench.forward(cache, bench.prompt, bench.mask), *bench.go_on(cache, bench.mask)]


def rows(bench: Bench) -> list[torch.Tensor]:
    cache, mask = bench.filled()
    cache.batch_repeat_interleave(2)
    mask = mask.repeat_interleave(2, 0)
    out = bench.go_on(cache, mask)
    mask = torch.cat([mask, mask.new_ones(4, 5)], -1)
    order = torch.tensor([3, 0, 0, 2])
    cache.reorder_cache(order)
    out += bench.go_on(cache, mask[order])
    mask = torch.cat([mask[order], mask.new_ones(4, 5)], -1)
    kept = torch.tensor([2, 0])
    cache.batch_select_indices(kept)
    return out + bench.go_on(cache, mask[kept])


def start_again(bench: Bench) -> list[torch.Tensor]:
    cache, _ = bench.filled()
    cache.reset()
    if cache.get_seq_length() != 0:
        raise AssertionError("tokens are left after reset")
    prompt = bench.prompt[1:, 4:]
    mask = torch.ones_like(prompt)
    for layer in cache.layers:
        # The oracle is told where rows begin; ours finds out.
        if hasattr(layer, "starts"):
            layer.starts = torch.zeros(1, dtype=torch.long)
    return [bench.forward(cache, prompt, mask), *bench.go_on(cache, mask)]


def move(bench: Bench) -> list[torch.Tensor]:
    cache, mask = bench.filled()
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    return bench.go_on(cache, mask)


def save_and_load(bench: Bench) -> list[torch.Tensor]:
    cache, mask = bench.filled()
    if isinstance(cache, GSRQCache):
        with tempfile.TemporaryDirectory() as folder:
            cache.save(Path(folder) / "cache.safetensors")
            cache = GSRQCache.load(Path(folder) / "cache.safetensors", bench.codebooks, bench.model)
    return bench.go_on(cache, mask, count=3)


def several_tokens(bench: Bench) -> list[torch.Tensor]:
    cache, mask = bench.filled()
    return [*bench.go_on(cache, mask, count=5), *bench.go_on(cache, torch.cat([mask, mask.new_ones(2, 9)], -1), 20)]


def beyond_capacity(bench: Bench) -> list[torch.Tensor]:
    cache = bench.make_cache(bench.mask, max_length=bench.prompt.shape[1] + 2)
    return bench.generate(**{CACHE_ARGUMENT: cache}, max_new_tokens=2 * bench.new_tokens)


NEEDS_RECORDING = "sliding-window layers cannot go back unless `activate_past_recording` was called first"
DRAFT_WINDOW = "transformers 5.17 fails there with any cache, its own included, when the draft's window slides"

OPERATIONS = {
    "greedy": Operation("Greedy, left padding", lambda bench: bench.generate()),
    "sampling": Operation("Sampling", lambda bench: bench.generate(do_sample=True, top_k=20)),
    "beams": Operation("Beam search", lambda bench: bench.generate(num_beams=3)),
    "beam-sampling": Operation("Beam sampling", lambda bench: bench.generate(num_beams=3, do_sample=True)),
    "several-sequences": Operation(
        "`num_return_sequences`", lambda bench: bench.generate(num_return_sequences=3, do_sample=True)
    ),
    "assisted": Operation("Assisted decoding", assisted, host_sliding=DRAFT_WINDOW),
    "prompt-lookup": Operation("Prompt lookup", prompt_lookup),
    "streaming": Operation("Streaming", stream),
    "stopping": Operation("Stopping criteria", stop),
    "beyond-capacity": Operation("More tokens than reserved", beyond_capacity),
    "chunked-prefill": Operation("`prefill_chunk_size`", lambda bench: bench.generate(prefill_chunk_size=7)),
    "turns": Operation("Several turns on one cache", turns),
    "branches": Operation("Prefill once, copy, branch", branches),
    "several-tokens": Operation("Several new tokens at once", several_tokens),
    "crop-drafts": Operation("`crop` of recorded drafts", crop_drafts),
    "crop-codes": Operation("`crop` into codes and sinks", crop_codes, sliding=NEEDS_RECORDING),
    "rows": Operation("Repeat, reorder, select rows", rows),
    "reset": Operation("`reset` and reuse", start_again),
    "offload": Operation("`offload`, `prefetch`", move),
    "save": Operation("`save`, `load`", save_and_load),
}
