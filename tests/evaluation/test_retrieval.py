"""Prompts hold what they ask for."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from test_cache_hybrid import build as build_hybrid
from tiny_models import SUPPORTED, VOCABULARY, random_codebooks
from transformers_gsrq import GSRQCache
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.evaluation.retrieval import TASKS, Prompt, make_prompts, measure_retrieval, read_prompts
from transformers_gsrq.simulation import CodebookMethod

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Texts = tuple[list[str], list[str]]


@pytest.mark.parametrize("task", TASKS)
def test_prompts_hold_the_answer_at_their_depth(smollm2: Loaded, texts: Texts, task: str) -> None:
    tokenizer = smollm2[1]
    prompts = make_prompts(tokenizer, texts[1][:3], task, 600, 4, seed=3)
    assert [round(prompt.depth, 3) for prompt in prompts] == [0.125, 0.375, 0.625, 0.875]
    for prompt in prompts:
        assert prompt.input_ids.shape == (600,)
        text, answer = tokenizer.decode(prompt.input_ids), tokenizer.decode(prompt.answer_ids)
        if task == "variable_tracking":
            names = answer.strip().split(", ")
            value = re.search(r"assigned the value (\d{5}) ", text).group(1)
            for name, source in zip(names, [value, *(f"VAR {n}" for n in names)], strict=False):
                assert f"VAR {name} = {source}." in text
            continue
        assert text.count("special magic numbers for") == (4 if task == "needle_of_four" else 1)
        key = re.search(r"What is the special magic number for ([a-z ]+) mentioned", text).group(1)
        needle = f"One of the special magic numbers for {key} is:{answer}."
        assert abs(text.index(needle) / len(text) - prompt.depth) < 0.2
    again = make_prompts(tokenizer, texts[1][:3], task, 600, 4, seed=3)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in zip(prompts, again, strict=True))


def test_a_chain_is_told_from_its_beginning(smollm2: Loaded, texts: Texts) -> None:
    tokenizer = smollm2[1]
    for prompt in make_prompts(tokenizer, texts[1][:3], "variable_tracking", 400, 50):
        text, names = tokenizer.decode(prompt.input_ids), tokenizer.decode(prompt.answer_ids).strip().split(", ")
        places = [text.index(f"VAR {name} = ") for name in names]
        assert places == sorted(places)


@pytest.mark.parametrize("build", [SUPPORTED["llama"].build, SUPPORTED["gemma2"].build, build_hybrid])
def test_what_generate_says_is_a_hit(build: Callable[[], PreTrainedModel]) -> None:
    """With layers of every kind, and with any number of methods after one another."""
    model = build()
    codebooks = random_codebooks(model)
    prompts = []
    for ids in torch.randint(3, VOCABULARY, (4, 60)):
        cache = GSRQCache(codebooks, model, residual_length=8, sink_length=2)
        made = model.generate(
            ids[None], **{CACHE_ARGUMENT: cache}, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        prompts.append(Prompt("needle", 0.5, ids, made[0, 60:]))
    methods = dict.fromkeys(("first", "second"), CodebookMethod(codebooks))
    scores = measure_retrieval(
        model, read_prompts(model, prompts, progress=False), methods, residual_length=8, sink_length=2
    )
    plain, first, second = (found[0].accuracy for found in scores.values())
    assert plain < first == second == 1
