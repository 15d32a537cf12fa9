"""`torch.compile` of a model goes around the cache: the same numbers, and nothing compiled anew as the text grows."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from operations import OPTIONS
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache
from transformers_gsrq.compat import CACHE_ARGUMENT

pytestmark = pytest.mark.host
PROMPT = 40
# Past the window, so that tokens are compressed in between.
TOKENS = PROMPT + 3 * OPTIONS["chunk_length"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch.compiler.reset()
    counters.clear()


def test_a_compiled_model_decodes_the_same_and_compiles_once() -> None:
    model = SUPPORTED["llama"].build()
    codebooks = random_codebooks(model)
    ids = (torch.arange(TOKENS) * 7 % 50)[None]
    compiled: list[int] = []

    @torch.no_grad()
    def decode(module: nn.Module) -> torch.Tensor:
        cache = GSRQCache(codebooks, model, **OPTIONS)
        logits = [module(ids[:, :PROMPT], **{CACHE_ARGUMENT: cache}).logits[:, -1:]]
        for index in range(PROMPT, TOKENS):
            logits.append(module(ids[:, index : index + 1], **{CACHE_ARGUMENT: cache}).logits)
            compiled.append(counters["frames"]["total"])
        assert cache.layers[0].num_stored > PROMPT
        return torch.cat(logits, 1)

    expected = decode(model)
    assert compiled[-1] == 0
    # Traced, not translated by a compiler for the CPU: that takes a minute and tests torch.
    torch.testing.assert_close(decode(torch.compile(model, backend="eager")), expected, rtol=0, atol=1e-5)
    assert compiled[-1] > 0
    # Two tokens may differ from the prompt, and from each other, in what torch takes for fixed.
    assert len(set(compiled[-(TOKENS - PROMPT) + 2 :])) == 1


def test_nothing_keeps_a_deleted_model() -> None:
    model = SUPPORTED["llama"].build()
    cache = GSRQCache(random_codebooks(model), model, **OPTIONS)
    with torch.no_grad():
        model(torch.arange(PROMPT)[None], **{CACHE_ARGUMENT: cache})
    attention = weakref.ref(model.model.layers[0].self_attn)
    del model, cache
    gc.collect()
    assert attention() is None
