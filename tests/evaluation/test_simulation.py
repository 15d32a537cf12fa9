"""The dense stand-ins give what the real cache gives, so that figures made with them are figures of the cache."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from tiny_models import SUPPORTED, VOCABULARY, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.evaluation.agreement import measure_agreement
from transformers_gsrq.simulation import CodebookMethod, SimulatedCache, coded_copy, codings
from transformers_gsrq.text import token_windows

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def ids(smollm2: Loaded, texts: tuple[list[str], list[str]]) -> torch.Tensor:
    return token_windows(smollm2[1], texts[1], 96, 2, seed=1)


@pytest.mark.parametrize("beam_width", [1, 2])
def test_simulated_cache_equals_quantized_prefill(
    smollm2: Loaded, tiny_codebooks: GSRQCodebooks, ids: torch.Tensor, beam_width: int
) -> None:
    model, _ = smollm2
    real = GSRQCache(
        tiny_codebooks, model, residual_length=0, sink_length=0, quantize_prefill=True, beam_width=beam_width
    )
    with torch.no_grad():
        expected = model(ids, **{CACHE_ARGUMENT: real}).logits
        coding = codings(model, CodebookMethod(tiny_codebooks, beam_width=beam_width))
        simulated = model(ids, **{CACHE_ARGUMENT: SimulatedCache(model, coding)}).logits
        plain = model(ids).logits
    torch.testing.assert_close(simulated, expected, atol=1e-3, rtol=1e-3)
    assert (plain - expected).abs().max() > 1


def test_coded_copy_continues_like_the_real_cache(
    smollm2: Loaded, tiny_codebooks: GSRQCodebooks, ids: torch.Tensor
) -> None:
    model, _ = smollm2
    prompt, rest = ids[:, :80], ids[:, 80:]
    with torch.no_grad():
        real = GSRQCache(tiny_codebooks, model, residual_length=24, sink_length=4)
        model(prompt, **{CACHE_ARGUMENT: real})
        expected = model(rest, **{CACHE_ARGUMENT: real}).logits
        plain = DynamicCache()
        model(prompt, **{CACHE_ARGUMENT: plain})
        copy = coded_copy(plain, codings(model, CodebookMethod(tiny_codebooks)), residual_length=24, sink_length=4)
        uncoded = model(rest, **{CACHE_ARGUMENT: plain}).logits
        found = model(rest, **{CACHE_ARGUMENT: copy}).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert (uncoded - expected).abs().max() > 0.5


def test_keys_are_turned_as_their_prompt_was() -> None:
    """Longrope: 300 tokens are beyond the limit of 256, a part of them is not."""
    model = SUPPORTED["phi3-longrope"].build()
    codebooks = random_codebooks(model)
    coding = codings(model, CodebookMethod(codebooks))
    ids = torch.randint(3, VOCABULARY, (1, 300))
    real, plain = GSRQCache(codebooks, model), DynamicCache(config=model.config)
    stored = GSRQCache(codebooks, model, residual_length=0, sink_length=0, quantize_prefill=True)
    simulated = SimulatedCache(model, coding)
    with torch.no_grad():
        for cache in (real, plain):
            model(ids, **{CACHE_ARGUMENT: cache})
        for cache in (stored, simulated):
            model(ids[:, :280], **{CACHE_ARGUMENT: cache})
            model(ids[:, 280:], **{CACHE_ARGUMENT: cache})
    for expected, found in ((real, coded_copy(plain, coding)), (stored, simulated)):
        for layer, made in zip(expected.layers, found.layers, strict=True):
            torch.testing.assert_close((made.keys, made.values), layer.states(), atol=1e-4, rtol=0)


def test_kinds_can_be_switched_off(smollm2: Loaded, tiny_codebooks: GSRQCodebooks, ids: torch.Tensor) -> None:
    model, _ = smollm2
    methods = {
        "none": CodebookMethod(tiny_codebooks, kinds=()),
        "keys": CodebookMethod(tiny_codebooks, kinds=("key",)),
        "both": CodebookMethod(tiny_codebooks),
        "one layer": CodebookMethod(tiny_codebooks, only_layers=(3,)),
    }
    found = measure_agreement(model, ids, methods, progress=False)
    assert found["plain"].divergence == 0
    assert found["none"].divergence == pytest.approx(0, abs=1e-6)
    assert found["none"].top1 == 1
    assert 0.001 < found["one layer"].divergence < found["both"].divergence
    assert 0.001 < found["keys"].divergence < found["both"].divergence
    assert found["both"].perplexity.increase > 0


def test_layers_are_found_whatever_a_decoder_calls_them() -> None:
    """GPT-2's are not called `layers`."""
    model = SUPPORTED["gpt2"].build()
    assert list(codings(model, CodebookMethod(random_codebooks(model)))) == [0, 1, 2]
