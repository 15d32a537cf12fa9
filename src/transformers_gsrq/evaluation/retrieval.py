"""Retrieval: does the model still find what it read? Tasks in the form of RULER (arXiv 2404.06654), made locally."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ..compat import CACHE_ARGUMENT
from ..models import check_length, input_device
from ..simulation import Method, branch, coded_copy, codings
from ..text import windows_digest
from .perplexity import PLAIN

TASKS = ("needle", "needle_of_four", "variable_tracking")
# Those whose answer stands at one place.
NEEDLE_TASKS = TASKS[:2]
NEEDLE = "One of the special magic numbers for {key} is: {value}."
NEEDLE_HEAD = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize them. I will quiz you "
    "about the numbers afterwards.\n"
)
NEEDLE_QUESTION = (
    "\nWhat is the special magic number for {key} mentioned in the provided text? The special magic number for {key} "
    "mentioned in the provided text is"
)
CHAIN_HEAD = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n"
CHAIN_QUESTION = (
    "\nQuestion: Find all variables that are assigned the value {value} in the text above. Answer: According to the "
    "chain(s) of variable assignment in the text above, {hops} variables are assigned the value {value}, they are:"
)
ADJECTIVES = (
    "amber brisk calm dusty eager faint gentle hollow ivory jolly keen lucid mellow noble opaque plain".split()
)
NOUNS = "anchor basket candle domino engine falcon garden hammer island jacket kettle lantern magnet needle".split()


@dataclass(frozen=True)
class Prompt:
    """A prompt with the answer that a model should continue it with.

    Attributes:
        task: One of `TASKS`.
        depth: Where the (asked) needle is, 0 for the beginning of the text and 1 for its end.
        input_ids: int64 `[T]`.
        answer_ids: int64 `[A]`, tokens of the answer.
    """

    task: str
    depth: float
    input_ids: torch.Tensor
    answer_ids: torch.Tensor


@dataclass(frozen=True)
class Retrieval:
    """Score of one method on one task at one length.

    Attributes:
        task: The task.
        length: Tokens T of a prompt.
        accuracy: Share of prompts whose greedy continuation begins with the answer.
        standard_error: Of `accuracy`, binomial.
        relative: `accuracy` over the plain cache's on the same prompts; NaN if that is 0.
        hits: For each prompt its depth and whether it was answered, for heat maps.
        data_digest: SHA-256 of the prompts' tokens.
    """

    task: str
    length: int
    accuracy: float
    standard_error: float
    relative: float
    hits: tuple[tuple[float, bool], ...]
    data_digest: str


def make_prompts(
    tokenizer: PreTrainedTokenizerBase,
    haystack: Sequence[str],
    task: str,
    length: int,
    num_prompts: int,
    seed: int = 0,
) -> list[Prompt]:
    """Prompts of exactly `length` tokens: needles hidden in text at evenly spread depths.

    Args:
        tokenizer: The model's tokenizer.
        haystack: Texts to hide needles in.
        task: "needle" (one number), "needle_of_four" (four, one is asked for) or "variable_tracking" (a chain of
            assignments over five variables).
        length: Tokens of a prompt.
        num_prompts: Prompts; the asked needle's depth runs evenly from the beginning to the end.
        seed: Of everything random.

    Raises:
        ValueError: for an unknown task, a length that leaves no room for text, or too little text.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {TASKS}, got {task!r}.")
    generator = random.Random(f"{seed} {task}")
    words = _words(tokenizer, haystack, length, generator)
    prompts = []
    for index in range(num_prompts):
        depth = (index + 0.5) / num_prompts
        make = _chain if task == "variable_tracking" else _needles
        head, lines, question, answer = make(generator, depth, 4 if task == "needle_of_four" else 1)
        ids = _assemble(tokenizer, words, head, lines, question, length, generator, in_order=make is _chain)
        answer_ids = torch.tensor(tokenizer(answer, add_special_tokens=False)["input_ids"])
        prompts.append(Prompt(task, depth, ids, answer_ids))
    return prompts


def _needles(generator: random.Random, depth: float, count: int) -> tuple[str, list[tuple[float, str]], str, str]:
    keys = generator.sample([f"{adjective} {noun}" for adjective in ADJECTIVES for noun in NOUNS], count)
    values = [str(generator.randrange(10**6, 10**7)) for _ in keys]
    depths = [depth, *(generator.random() for _ in keys[1:])]
    lines = [(d, NEEDLE.format(key=k, value=v)) for d, k, v in zip(depths, keys, values, strict=True)]
    return NEEDLE_HEAD, lines, NEEDLE_QUESTION.format(key=keys[0]), f" {values[0]}"


def _chain(generator: random.Random, depth: float, count: int) -> tuple[str, list[tuple[float, str]], str, str]:
    names = ["".join(generator.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = str(generator.randrange(10**4, 10**5))
    depths = sorted([depth, *(generator.random() for _ in names[1:])])
    sources = [value, *(f"VAR {name}" for name in names)]
    lines = [(d, f"VAR {name} = {source}.") for d, name, source in zip(depths, names, sources, strict=False)]
    return CHAIN_HEAD, lines, CHAIN_QUESTION.format(value=value, hops=len(names)), " " + ", ".join(names)


def _words(
    tokenizer: PreTrainedTokenizerBase, haystack: Sequence[str], length: int, generator: random.Random
) -> list[list[int]]:
    """Sentences of the haystack as token lists, enough for any prompt of `length`."""
    sentences: list[list[int]] = []
    order = list(haystack)
    generator.shuffle(order)
    total = 0
    for text in order:
        pieces = [piece.strip() for piece in text.replace("\n", " ").split(". ") if piece.strip()]
        if pieces:
            batch = tokenizer([f" {piece}." for piece in pieces], add_special_tokens=False, verbose=False)["input_ids"]
            sentences += [ids for ids in batch if len(ids) <= length // 8]
            total = sum(map(len, sentences))
        if total >= 4 * length:
            break
    if total < length:
        raise ValueError(
            f"The texts hold {total} tokens in sentences of at most {length // 8}, less than the {length} of a prompt "
            "itself. Pass more text, or make the prompts shorter; longer, if it is the sentences that are too long."
        )
    return sentences


def _assemble(
    tokenizer: PreTrainedTokenizerBase,
    sentences: list[list[int]],
    head: str,
    lines: list[tuple[float, str]],
    question: str,
    length: int,
    generator: random.Random,
    *,
    in_order: bool,
) -> torch.Tensor:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    first, last = start + encode(head), encode(question)
    hidden = [(depth, encode(f" {line}")) for depth, line in lines]
    room = length - len(first) - len(last) - sum(len(ids) for _, ids in hidden)
    if room < 0:
        raise ValueError(f"length={length} leaves no room for text around the task; it takes {length - room} tokens.")
    filler: list[list[int]] = []
    at = generator.randrange(len(sentences))
    used = 0
    while used < room:
        filler.append(sentences[at % len(sentences)][: room - used])
        used += len(filler[-1])
        at += 1
    place = len(filler)
    for depth, ids in sorted(hidden, key=lambda pair: pair[0], reverse=True):
        # The text grows with every line, so that a line may come to stand behind one that is deeper.
        place = min(round(depth * len(filler)), place if in_order else len(filler))
        filler.insert(place, ids)
    return torch.tensor([*first, *(token for ids in filler for token in ids), *last])


def check_prompts(model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
    """Check that a model can read prompts, and their answers behind them.

    Raises:
        ValueError: if its positions end before.
    """
    longest = max((prompt.input_ids.numel() + prompt.answer_ids.numel() for prompt in prompts), default=0)
    check_length(model, longest, "Make the prompts shorter (prompt_length), so that their answers fit too.")


@dataclass(frozen=True)
class ReadPrompts:
    """Prompts that the model has read, exactly; any number of methods can be scored on them.

    Attributes:
        prompts: B prompts.
        cache: Plain cache that holds them.
        logits: `[B, V]` after the last token of each.
    """

    prompts: tuple[Prompt, ...]
    cache: DynamicCache
    logits: torch.Tensor


@torch.no_grad()
def read_prompts(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, batch_size: int = 4, progress: bool = True
) -> Iterator[ReadPrompts]:
    """Let the model read prompts of one length, a batch at a time.

    Args:
        model: The model.
        prompts: From `make_prompts`.
        batch_size: Prompts read at once.
        progress: Show a progress bar.

    Raises:
        ValueError: if prompts differ in length, or are longer than the model can read.
    """
    check_prompts(model, prompts)
    lengths = {prompt.input_ids.numel() for prompt in prompts}
    if len(lengths) != 1:
        raise ValueError(f"Prompts must have one length, got {sorted(lengths)}; measure each length on its own.")
    for start in tqdm(range(0, len(prompts), batch_size), desc="Retrieval", unit="batch", disable=not progress):
        part = tuple(prompts[start : start + batch_size])
        ids = torch.stack([prompt.input_ids for prompt in part]).to(input_device(model))
        cache = DynamicCache(config=model.config)
        out = model(input_ids=ids, use_cache=True, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
        yield ReadPrompts(part, cache, out.logits[:, -1])


@torch.no_grad()
def measure_retrieval(
    model: PreTrainedModel,
    batches: Iterable[ReadPrompts],
    methods: Mapping[str, Method],
    *,
    residual_length: int = 128,
    sink_length: int = 4,
) -> dict[str, list[Retrieval]]:
    """Score methods on prompts as `generate` with a `GSRQCache` would.

    The prompt is read exactly once for all methods; then all but its sinks and latest tokens is replaced by what each
    method stores, and the answer is read against that. A hit is a prompt whose greedy continuation begins with the
    answer, which one forward pass over the answer decides: every answer token must be the likeliest one.

    Args:
        model: The model.
        batches: From `read_prompts`; a list of them can be used again.
        methods: Methods by name.
        residual_length: Latest prompt tokens kept exact.
        sink_length: First tokens kept exact.

    Returns:
        For each method, and for the plain cache as "plain", one result for each task.

    Raises:
        ValueError: if a method is named "plain".
    """
    if PLAIN in methods:
        raise ValueError(f"{PLAIN!r} is the name of the model's own cache; give the method another name.")
    coding = {name: codings(model, method) for name, method in methods.items()}
    window = {"residual_length": residual_length, "sink_length": sink_length}
    hits: dict[str, list[bool]] = {name: [] for name in (PLAIN, *methods)}
    prompts: list[Prompt] = []
    for batch in batches:
        prompts += batch.prompts
        hits[PLAIN] += answered(model, batch.prompts, batch.cache, batch.logits)
        for name in methods:
            copy = coded_copy(batch.cache, coding[name], **window)
            hits[name] += answered(model, batch.prompts, copy, batch.logits)
            del copy
    return {name: _score(prompts, found, hits[PLAIN]) for name, found in hits.items()}


def answered(
    model: PreTrainedModel, prompts: Sequence[Prompt], cache: DynamicCache, logits: torch.Tensor
) -> list[bool]:
    """Whether each prompt's answer is the greedy continuation; the cache is as before afterwards.

    Args:
        model: The model.
        prompts: B prompts of one length T.
        cache: Plain cache that holds them.
        logits: `[B, V]` after the last prompt token.
    """
    longest = max(prompt.answer_ids.numel() for prompt in prompts)
    answers = torch.zeros(len(prompts), longest, dtype=torch.long)
    asked = torch.zeros(len(prompts), longest, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        answers[row, : prompt.answer_ids.numel()] = prompt.answer_ids
        asked[row, : prompt.answer_ids.numel()] = True
    answers, asked = answers.to(logits.device), asked.to(logits.device)
    out = model(input_ids=answers, **{CACHE_ARGUMENT: branch(cache)}, use_cache=True).logits
    guesses = torch.cat([logits.argmax(-1)[:, None].to(out.device), out[:, :-1].argmax(-1)], -1)
    return ((guesses == answers) | ~asked).all(-1).tolist()


def _score(prompts: Sequence[Prompt], found: list[bool], plain: list[bool]) -> list[Retrieval]:
    results = []
    for task, length in dict.fromkeys((prompt.task, prompt.input_ids.numel()) for prompt in prompts):
        rows = [i for i, prompt in enumerate(prompts) if (prompt.task, prompt.input_ids.numel()) == (task, length)]
        accuracy = sum(found[i] for i in rows) / len(rows)
        reference = sum(plain[i] for i in rows) / len(rows)
        results.append(
            Retrieval(
                task,
                length,
                accuracy,
                math.sqrt(accuracy * (1 - accuracy) / len(rows)),
                accuracy / reference if reference else math.nan,
                tuple((prompts[i].depth, found[i]) for i in rows),
                windows_digest(torch.stack([prompts[i].input_ids for i in rows])),
            )
        )
    return results
