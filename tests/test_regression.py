"""Files that earlier releases wrote load, and stand for the same numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from regression import format_1
from transformers_gsrq import GSRQCache, GSRQCodebooks

pytestmark = pytest.mark.host


@pytest.mark.parametrize("name", format_1.MODELS)
def test_files_of_format_1(name: str) -> None:
    folder: Path = format_1.FOLDER / name
    model = format_1.build(name)
    # The digests of codebooks and model are checked here too.
    codebooks = GSRQCodebooks.from_pretrained(folder / format_1.CODEBOOKS)
    cache = GSRQCache.load(folder / format_1.CACHE, codebooks, model, backend="torch")
    length = format_1.PROMPT.shape[1] + sum(tokens.shape[1] for tokens in format_1.BEFORE)
    assert cache.get_seq_length() == length
    for option, value in format_1.OPTIONS.items():
        assert getattr(cache.options, option) == value
    # Some of the text is codes, and some is not.
    assert all(0 < layer.num_stored < length for layer in cache.compressed_layers)
    expected = load_file(folder / format_1.EXPECTED)
    logits = expected.pop("logits")
    held = format_1.states(cache)
    assert held.keys() == expected.keys()
    for part, tensor in held.items():
        # A cosine of another library differs in its last bit.
        assert torch.allclose(tensor, expected[part], rtol=1e-5, atol=1e-6), part
    found = format_1.run(model, cache, format_1.AFTER, length)
    assert torch.allclose(found, logits, rtol=1e-4, atol=1e-4 * logits.abs().max().item())


def test_the_files_hold_what_a_cache_can_hold() -> None:
    """Padding, sliding layers and the long rotary embedding, each in one of them."""
    for name, needed in (
        ("llama", '"num_stored"'),
        ("gemma3", '"cumulative_length"'),
        ("phi3-longrope", '"long_rotary": true'),
    ):
        text = (format_1.FOLDER / name / format_1.CACHE).read_bytes().decode("latin1").replace('\\"', '"')
        assert needed in text
    starts = load_file(format_1.FOLDER / "llama" / format_1.CACHE)["table.starts"]
    assert starts.tolist() == [format_1.PADDING, 0]
