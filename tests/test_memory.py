"""`cache.memory()` counts what is there, to the byte."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from types import FunctionType, ModuleType

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig, ResidualQuantizer
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.rope import Rotary

LENGTH = 2000


@pytest.fixture(scope="module")
def cache(
    smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    tiny_codebooks: GSRQCodebooks,
    texts: tuple[list[str], list[str]],
) -> GSRQCache:
    model, tokenizer = smollm2
    ids = tokenizer(texts[1][1], return_tensors="pt")["input_ids"][:, :LENGTH]
    cache = GSRQCache(tiny_codebooks, model, residual_length=128, sink_length=4)
    with torch.no_grad():
        model(ids, **{CACHE_ARGUMENT: cache}, logits_to_keep=1)
    return cache


def test_codes_are_one_byte_for_each_stage_and_subspace(cache: GSRQCache) -> None:
    memory = cache.memory()
    stored = LENGTH - 128 - 4
    # 30 layers, 3 subspaces of 64 channels, 8 stages, keys and values: 1440 bytes a token.
    assert memory.codes == stored * 30 * 3 * 8 * 2 == stored * cache.codebooks.config.code_bytes_per_token
    # Room is made for pages of 64 tokens.
    assert memory.reserved == -stored % 64 * 30 * 3 * 8 * 2
    held = sum(codes.nbytes for layer in cache.layers for codes in layer.state.codes.values())
    assert memory.codes + memory.reserved == held


def test_every_other_byte_is_counted(cache: GSRQCache) -> None:
    memory = cache.memory()
    token = 30 * 2 * 3 * 64 * 4  # float32
    assert memory.tokens == LENGTH
    assert memory.sinks == 4 * token
    # Decoding fills 128 + 64 tokens and one new one, and slots are a multiple of 16.
    assert memory.window == 208 * token
    assert memory.workspace == 0
    assert memory.plain == LENGTH * token
    assert memory.native == 0
    assert memory.positions == LENGTH * 4 + 8
    assert memory.codebooks == sum(
        q.centroids.untyped_storage().nbytes() for layer in cache.layers for q in layer.quantizers.values()
    )
    assert memory.total == memory.cache + memory.codebooks
    assert memory.cache == memory.codes + memory.reserved + memory.sinks + memory.window + memory.positions


def test_the_readme_says_the_same(cache: GSRQCache, smollm2: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    memory = cache.memory()
    # There the model is in bfloat16, whose exact tokens take half of what they take here.
    plain = memory.plain / 2
    window = memory.window / 2
    whole = memory.codes + memory.reserved + memory.sinks / 2 + window + memory.positions
    assert f"codes {memory.codes:,} bytes, which is {memory.codes // (LENGTH - 132):,} for each of the" in readme
    assert f"the whole cache {whole / 1e6:.1f} MB where a plain one takes {plain / 1e6:.1f} MB" in readme
    assert f"({whole / plain * 100:.1f} %); {window / 1e6:.1f} MB of it are the 208 exact tokens" in readme
    # Of 256 centroids a stage, where these have 64.
    codebooks = GSRQConfig.for_model(smollm2[0].config, bits=1.0).codebook_bytes
    assert f"the codebooks {codebooks / 1e6:.1f} MB on top" in readme


def test_nothing_uncounted_is_held(cache: GSRQCache) -> None:
    """All storages that Python can reach from the cache, shared ones once, against the report."""
    assert reachable_bytes(cache) == cache.memory().cache
    cache = copy.deepcopy(cache)
    for layer in cache.layers:
        layer.states()
    assert reachable_bytes(cache) == cache.memory().cache


# Codebooks, rotary embeddings and models are not the cache's own.
NOT_OF_THE_CACHE = (GSRQCodebooks, ResidualQuantizer, Rotary, nn.Module, type, ModuleType, FunctionType)


def reachable_bytes(cache: GSRQCache) -> int:
    found, todo, storages = set(), [vars(cache)], {}
    while todo:
        thing = todo.pop()
        if id(thing) in found or isinstance(thing, NOT_OF_THE_CACHE):
            continue
        found.add(id(thing))
        if isinstance(thing, torch.Tensor):
            storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
        else:
            todo += gc.get_referents(thing)
    return sum(storages.values())


@pytest.mark.host
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma3", "gpt2"])
def test_a_window_that_held_a_long_prompt_shrinks_again(name: str) -> None:
    """What is held is counted where keys and values were parts of larger tensors, and where they wait to be coded."""
    model = SUPPORTED[name].build()
    cache = GSRQCache(random_codebooks(model), model, residual_length=60)
    cache.activate_past_recording()
    with torch.no_grad():
        model(torch.randint(3, 90, (2, 300)), **{CACHE_ARGUMENT: cache})
    token = 2 * 2 * model.config.hidden_size // model.config.num_attention_heads * 4
    token *= getattr(model.config, "num_key_value_heads", model.config.num_attention_heads)
    layers = len(cache.compressed_layers)
    # Phi-3 and GPT-2 compute queries, keys and values in one tensor, which nothing here keeps.
    assert cache.memory().window == 304 * layers * token
    assert reachable_bytes(cache) == cache.memory().cache
    # A crop copies nothing and frees nothing; the next token does.
    cache.crop(-290)
    assert cache.memory().window == 304 * layers * token
    assert reachable_bytes(cache) == cache.memory().cache
    with torch.no_grad():
        model(torch.randint(3, 90, (2, 1)), **{CACHE_ARGUMENT: cache})
    memory = cache.memory()
    # 60 + 64 + 1 tokens, in slots that are a multiple of 16.
    assert memory.window == 128 * layers * token
    assert reachable_bytes(cache) == memory.cache
    assert memory.plain == 11 * layers * token + memory.native


def test_sliding_layers_count_what_they_keep() -> None:
    """After a prompt transformers' layer keeps all of it, of which it shows the window."""
    model = SUPPORTED["gemma3"].build()
    cache = GSRQCache(random_codebooks(model), model, residual_length=8)
    with torch.no_grad():
        model(torch.randint(3, 90, (1, 400)), **{CACHE_ARGUMENT: cache})
    shown = cache.layers[0].keys.nbytes + cache.layers[0].values.nbytes
    assert cache.memory().native > 10 * shown
    assert reachable_bytes(cache) == cache.memory().cache


def test_the_report_reads_well(cache: GSRQCache) -> None:
    text = str(cache.memory())
    assert "codes" in text and "plain" in text and "2000 tokens" in text
