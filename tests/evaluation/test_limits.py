"""Texts longer than a model with a table of positions can read: told in one line before anything is measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from cli_runner import assert_one_line, run, run_json
from tiny_models import random_codebooks
from transformers_gsrq import GSRQCodebooks
from transformers_gsrq.evaluation.agreement import measure_agreement, measure_divergence_lengths
from transformers_gsrq.evaluation.measures import GREEDY_TOKENS, Settings, evaluate
from transformers_gsrq.evaluation.perplexity import measure_perplexity
from transformers_gsrq.evaluation.reconstruction import measure_reconstruction
from transformers_gsrq.evaluation.retrieval import Prompt, measure_retrieval, read_prompts
from transformers_gsrq.evaluation.speed import measure_speed
from transformers_gsrq.simulation import CodebookMethod

LIMIT = 96
TEXT = " ".join(f"w{(i * i + 7 * i // 3) % 90}" for i in range(1500))

Measure = Callable[[PreTrainedModel, GSRQCodebooks, torch.Tensor], Any]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    settings = {"vocab_size": 97, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": LIMIT}
    return GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=1, eos_token_id=1)).eval()


@pytest.fixture(scope="module")
def codebooks(model: PreTrainedModel) -> GSRQCodebooks:
    return random_codebooks(model)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "[EOS]": 1, **{f"w{i}": i + 2 for i in range(90)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", eos_token="[EOS]")


def retrieval(model: PreTrainedModel, codebooks: GSRQCodebooks, windows: torch.Tensor) -> Any:
    # The answer counts too.
    prompts = [Prompt("needle", 0.5, window[:-3], window[-3:]) for window in windows]
    return measure_retrieval(model, read_prompts(model, prompts, progress=False), {"b": CodebookMethod(codebooks)})


MEASURES: dict[str, Measure] = {
    "perplexity": lambda model, books, windows: measure_perplexity(model, windows, {"b": books}, progress=False),
    "agreement": lambda model, books, windows: measure_agreement(
        model, windows, {"b": CodebookMethod(books)}, progress=False
    ),
    "greedy": lambda model, books, windows: measure_divergence_lengths(
        model, list(windows[:, :-3]), {"b": books}, max_new_tokens=4, progress=False
    ),
    "reconstruction": lambda model, books, windows: measure_reconstruction(
        model, windows, {"b": books}, progress=False
    ),
    "retrieval": retrieval,
    "speed": lambda model, books, windows: list(
        measure_speed(model, books, windows[0], [windows.shape[1] - 4], new_tokens=3)
    ),
}


@pytest.mark.parametrize("name", MEASURES)
def test_texts_as_long_as_the_positions_are_measured_and_longer_ones_named(
    name: str, model: PreTrainedModel, codebooks: GSRQCodebooks
) -> None:
    windows = torch.randint(2, 97, (2, LIMIT + 1))
    assert MEASURES[name](model, codebooks, windows[:, :LIMIT])
    with pytest.raises(ValueError, match=f"positions for {LIMIT} tokens and cannot read {LIMIT + 1}"):
        MEASURES[name](model, codebooks, windows)


def test_greedy_texts_leave_room_for_themselves(
    model: PreTrainedModel, codebooks: GSRQCodebooks, tokenizer: PreTrainedTokenizerFast
) -> None:
    windows = torch.randint(2, 97, (1, LIMIT))
    found = evaluate(
        model, tokenizer, [TEXT], windows, {"b": codebooks}, Settings(measures=("agreement",)), progress=False
    )
    assert 0 <= found["same_tokens"]["b"][0] <= GREEDY_TOKENS


def test_codebooks_of_another_model_are_named_before_a_text_is_read(
    model: PreTrainedModel, codebooks: GSRQCodebooks
) -> None:
    other = random_codebooks(GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)))

    def fail(*_: Any) -> None:
        raise AssertionError("the long work has begun")

    handle = model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(ValueError, match="codebooks"):
            measure_perplexity(model, torch.zeros(1, 8, dtype=torch.long), {"a": codebooks, "b": other})
        with pytest.raises(ValueError, match="codebooks"):
            list(measure_speed(model, other, torch.zeros(40, dtype=torch.long), [8]))
    finally:
        handle.remove()


def test_commands_say_it_in_one_line(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    folder, made, text = tmp_path / "gpt2", tmp_path / "codebooks", tmp_path / "text.txt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text.write_text(TEXT, encoding="utf-8")
    # Its windows are 2,048 tokens by default.
    said = run_json("calibrate", folder, "-o", made, "--text", text, "--iterations", 1, "--num-samples", 8)
    assert said["output"] == str(made)
    limit = f"GPT2LMHeadModel has positions for {LIMIT} tokens and cannot read "
    evaluation = run("eval", folder, made, "--text", text, "--window-length", 200, "--windows", 1)
    assert_one_line(evaluation, f"{limit}200. Pass a smaller window_length.")
    prompt = " ".join(["w1"] * 90)
    generation = run("generate", folder, made, "--prompt", prompt, "--max-new-tokens", 20)
    assert_one_line(generation, f"{limit}109. The prompt has 90 and --max-new-tokens is 20")
    assert_one_line(run("bench", folder, made, "--contexts", "16,128"), f"{limit}145. Pass shorter contexts.")
    assert run_json("generate", folder, made, "--prompt", prompt, "--max-new-tokens", 7)["prompt_tokens"] == 90
