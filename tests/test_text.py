"""Token windows."""

from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_gsrq.text import token_windows, windows_digest

SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def test_texts_take_turns_and_nothing_is_lost(smollm2: SmolLM2) -> None:
    tokenizer = smollm2[1]
    texts = ["The first text is short.", "The second one is a little longer than the first."]
    first, second = (tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts)
    assert (len(first), len(second)) == (7, 12)
    # A rest of three tokens fills no window; with four more it does.
    windows = token_windows(tokenizer, texts, 4).tolist()
    assert windows == [first[:4], second[:4], second[4:8], second[8:]]
    windows = token_windows(tokenizer, [*texts, texts[0]], 4).tolist()
    rests = first[4:] + first[4:]
    assert windows == [first[:4], second[:4], rests[:4], first[:4], second[4:8], second[8:]]
    assert token_windows(tokenizer, texts, 4, num_windows=2).tolist() == windows[:2]
    # Texts shorter than a window are joined.
    assert token_windows(tokenizer, texts, 16).tolist() == [(first + second)[:16]]


def test_windows_come_from_many_texts(smollm2: SmolLM2, texts: tuple[list[str], list[str]]) -> None:
    windows = token_windows(smollm2[1], texts[0], 512, 12, seed=0)
    found = [smollm2[1].decode(window[5:60]) for window in windows]
    origins = [{index for index, text in enumerate(texts[0]) if part in text} for part in found]
    # Some are joined from what is left of several.
    assert len(set.union(*origins)) >= 8


def test_windows_begin_as_the_tokenizer_begins_texts(smollm2: SmolLM2) -> None:
    tokenizer = copy.deepcopy(smollm2[1])
    plain = token_windows(tokenizer, ["One two three four five six seven."], 4).tolist()
    begin = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, begin)]
    )
    windows = token_windows(tokenizer, ["One two three four five six seven."], 5).tolist()
    assert windows == [[begin, *window] for window in plain]


def test_the_seed_decides_the_order(smollm2: SmolLM2, texts: tuple[list[str], list[str]]) -> None:
    first, again, other = (token_windows(smollm2[1], texts[0], 64, 8, seed=seed) for seed in (1, 1, 2))
    assert windows_digest(first) == windows_digest(again) != windows_digest(other)


def test_bad_texts_are_named(smollm2: SmolLM2) -> None:
    with pytest.raises(ValueError, match=r"The texts hold \d+ tokens in all, less than one window of 2048"):
        token_windows(smollm2[1], ["Too short."], 2048)
    for length, count in ((1, None), (16, 0)):
        with pytest.raises(ValueError, match=f"got {count} windows of {length} tokens"):
            token_windows(smollm2[1], ["Some text."], length, count)
    with pytest.raises(ValueError, match="hold 0 tokens"):
        token_windows(smollm2[1], [], 16)
    with pytest.raises(TypeError, match="got one string"):
        token_windows(smollm2[1], "Too short.", 4)
