"""Texts to token windows, for calibration and evaluation alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase


def token_windows(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    window_length: int,
    num_windows: int | None = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Cut texts into windows of tokens, spread over as many texts as there are.

    The texts take turns, one window each, so that a few windows of a few long texts are not all from the first one.
    What is left of a text that fills no window is joined, with the end-of-text token behind it, to what is left of
    others: nothing is padded and short texts are not lost. Where the tokenizer puts a token before every text, every
    window begins with it.

    Args:
        tokenizer: The model's tokenizer.
        texts: The texts.
        window_length: Tokens of a window.
        num_windows: Windows at most; None takes all.
        seed: Shuffles the texts, and the windows of each, if given.

    Returns:
        int64 `[windows, window_length]`.

    Raises:
        TypeError: if `texts` is a single string.
        ValueError: if all texts together are shorter than one window, or fewer than one window of two tokens is asked
            for.
    """
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of strings, got one string. Pass [text].")
    if window_length < 2 or (num_windows is not None and num_windows < 1):
        raise ValueError(
            f"At least one window of 2 tokens is needed, got {num_windows} windows of {window_length} tokens."
        )
    first = _first_token(tokenizer)
    size = window_length - len(first)
    found: list[list[int]] = []
    scraps: list[int] = []
    total = 0
    for piece, is_rest in _in_turn(tokenizer, texts, size, seed):
        total += len(piece)
        if is_rest:
            scraps += piece
            piece, scraps = (scraps[:size], scraps[size:]) if len(scraps) >= size else ([], scraps)
        if piece:
            found.append(first + piece)
        if num_windows is not None and len(found) == num_windows:
            break
    if not found:
        raise ValueError(
            f"The texts hold {total} tokens in all, less than one window of {window_length}. Pass more text, or "
            "a smaller window_length."
        )
    return torch.tensor(found)


def _first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: one token or none."""
    ids = tokenizer("text", verbose=False)["input_ids"]
    return ids[:1] if tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id else []


def _in_turn(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int, seed: int | None
) -> Iterator[tuple[list[int], bool]]:
    """Pieces of `size` tokens, one of each text in turn; and once for each text what is left, as such."""
    order, generator = list(texts), random.Random(seed)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if seed is not None:
        generator.shuffle(order)
    waiting: list[list[list[int]]] = []
    for text in order:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + separator
        pieces = [ids[at : at + size] for at in range(0, len(ids), size)]
        if pieces and len(pieces[-1]) < size:
            yield pieces.pop(), True
        if seed is not None:
            generator.shuffle(pieces)
        if pieces:
            yield pieces[0], False
            waiting.append(pieces[1:])
    for turn in range(max(map(len, waiting), default=0)):
        yield from ((pieces[turn], False) for pieces in waiting if turn < len(pieces))


def windows_digest(windows: torch.Tensor) -> str:
    """SHA-256 of token windows: names exactly the data that was used, in hexadecimal."""
    return hashlib.sha256(windows.contiguous().numpy().data).hexdigest()
