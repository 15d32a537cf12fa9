"""Prompts hold what they ask for."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_gsrq.evaluation.retrieval import TASKS, make_prompts

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
