"""Decoding steps that `generate` compiles or replays as a CUDA graph: the text and the cache of eager mode.

Compiled ones run in Triton's interpreter too (`ops/test_interpreter.py` does so where there is no GPU); what is
captured needs a GPU.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cache,
    CompileConfig,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    StaticCache,
)
from transformers.generation.streamers import BaseStreamer

from test_cache_errors import assert_unchanged, contents
from tiny_models import random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks, attach, decoding, detach
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.ops.triton import triton_version, unsupported_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = triton_version() is not None and unsupported_reason(torch.device(DEVICE), torch.float16) is None
needs_kernels = pytest.mark.skipif(not RUNS, reason="needs a GPU, or TRITON_INTERPRET=1 and Triton")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SIZES = {
    "vocab_size": 64, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 2048, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig(**SIZES), "qwen2": Qwen2Config(**SIZES)}
# A chunk leaves the window in the third step after a prompt.
OPTIONS = {"residual_length": 8, "chunk_length": 2, "sink_length": 2}
SETTINGS = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}
IDS = (torch.arange(66) * 7 % 61 + 1).view(2, 33)
WAYS = ["compiled", pytest.param("captured", marks=[pytest.mark.gpu, needs_gpu])]


def build(name: str = "llama") -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float16).to(DEVICE).eval()


@pytest.fixture(scope="module", params=list(CONFIGS))
def each_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build()


def decoding_call(model: PreTrainedModel, config: CompileConfig | None = None) -> Callable[..., Any]:
    """The call of a decoding step of a model with our hooks."""
    attach(model)
    return model.get_compiled_call(config)


def books(model: PreTrainedModel) -> GSRQCodebooks:
    return random_codebooks(model, bits=0.25, subspace_dim=64, num_centroids=256)


def make_cache(model: PreTrainedModel, codebooks: GSRQCodebooks) -> GSRQCache:
    return GSRQCache(codebooks, model, **OPTIONS, backend="triton")


def counting_compiler(fullgraph: bool = True) -> tuple[CompileConfig, list[int]]:
    """A compiler that changes nothing, and how often each of its graphs attends to codes."""
    torch.compiler.reset()
    operators: list[int] = []

    # A function: generate copies its settings, and an object would be another one then.
    def compile_graph(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        operators.append(sum("decode_attention" in str(node.target) for node in graph.graph.nodes))
        return graph.forward

    config = CompileConfig(backend=compile_graph, mode=None, fullgraph=fullgraph)
    config._compile_all_devices = True
    return config, operators


def generate(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any
) -> Any:
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {**SETTINGS, "max_new_tokens": 4, CACHE_ARGUMENT: cache, **settings}
    return model.generate(ids.to(DEVICE), attention_mask=mask.to(DEVICE), **settings)


def step(call: Callable[..., Any], cache: Cache, ids: torch.Tensor, position: int) -> torch.Tensor:
    """Logits of one token of each row, as `generate` asks for them."""
    positions = torch.full_like(ids, position)
    with torch.no_grad():
        return call(
            input_ids=ids.to(DEVICE), position_ids=positions.to(DEVICE), attention_mask=None, **{CACHE_ARGUMENT: cache}
        ).logits


def prefill(model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> Cache:
    with torch.no_grad():
        model(ids.to(DEVICE), **{CACHE_ARGUMENT: cache})
    return cache


@pytest.mark.host
@needs_kernels
def test_a_step_is_compiled_once(each_model: PreTrainedModel) -> None:
    """One graph for all layers: for another cache, a longer prompt, padding, and when a chunk leaves the window."""
    codebooks, (config, graphs) = books(each_model), counting_compiler()
    padded = torch.ones_like(IDS)
    padded[1, :9] = 0
    prompts = [(IDS[:, :20], None)] * 2 + [(IDS, padded)]
    expected: Any = None
    for turn, (ids, mask) in enumerate(prompts):
        if turn != 1:
            expected = generate(each_model, make_cache(each_model, codebooks), ids, mask, disable_compile=True)
            assert len(graphs) == min(turn, 1)
        cache = make_cache(each_model, codebooks)
        found = generate(each_model, cache, ids, mask, compile_config=config)
        assert torch.equal(found.sequences, expected.sequences)
        assert cache.backend == "triton" and cache.layers[0].num_stored == ids.shape[1] - 8 + 2
        assert graphs == [each_model.config.num_hidden_layers]


DRAFT = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 2}


@needs_kernels
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["beams", "prompt-lookup", "assisted"])
def test_modes_of_generate(model: PreTrainedModel, mode: str, way: str) -> None:
    codebooks, results = books(model), []
    ids = {"beams": IDS[:1, :20], "prompt-lookup": IDS[:1, :7].repeat(1, 3), "assisted": IDS[:1, :20]}[mode]
    draft = build()
    # Never more tokens at once than kernels take.
    draft.generation_config.num_assistant_tokens = 3
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    settings = {"beams": {"num_beams": 2}, "prompt-lookup": DRAFT, "assisted": {"assistant_model": draft}}[mode]
    speed_up = {"compile_config": counting_compiler()[0]} if way == "compiled" else {}
    for each in ({"disable_compile": True}, speed_up):
        cache = make_cache(model, codebooks)
        results.append(generate(model, cache, ids, **settings, **each).sequences)
        assert cache.backend == "triton"
    assert torch.equal(*results)


@pytest.mark.host
@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_other_caches_are_compiled_as_without_us(kind: str) -> None:
    model, results = build(), []
    for attached in (False, True, False):
        (attach if attached else detach)(model)
        config, graphs = counting_compiler()
        cache = DynamicCache(config=model.config)
        if kind == "static":
            cache = StaticCache(config=model.config, max_cache_len=40)
        prefill(model, cache, IDS[:, :20])
        call = model.get_compiled_call(config)
        logits = [step(call, cache, IDS[:, i : i + 1], i) for i in range(20, 24)]
        with torch.no_grad():
            # By place, too.
            logits.append(call(IDS[:, :1].to(DEVICE)).logits)
        results.append((torch.cat(logits, 1), graphs))
        assert graphs and not any(graphs)
        assert ("get_compiled_call" in vars(model)) == attached
    for logits, graphs in results[1:]:
        assert torch.equal(logits, results[0][0]) and graphs == results[0][1]


@needs_kernels
@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_fails_leaves_the_cache_as_it_was(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    torch.compiler.reset()
    call = decoding_call(model, CompileConfig(backend="eager", mode=None) if way == "compiled" else None)
    cache = prefill(model, make_cache(model, books(model)), IDS[:1, :20])
    for index in (20, 21):
        step(model, cache, IDS[:1, index : index + 1], index)
    before, other, ids = contents(cache), copy.deepcopy(cache), IDS[:1, 22:23]

    with pytest.raises(ValueError, match="holds 1 rows, but the model was given 2"):
        step(call, cache, IDS[:, 22:23], 22)
    assert_unchanged(cache, before)

    for error in (RuntimeError, KeyboardInterrupt):

        @torch.compiler.disable
        def fail(*args: object, kind: type[BaseException] = error) -> None:
            raise kind("in the middle")

        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", fail)
            with pytest.raises(error, match="in the middle"):
                step(call, cache, ids, 22)
        assert_unchanged(cache, before)
    torch.compiler.reset()
    found, expected = step(call, cache, ids, 22), step(model, other, ids, 22)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert cache.layers[0].num_stored == 14
    assert_unchanged(cache, contents(other))


# Captured steps


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The epoch of each step that is captured."""
    made: list[int] = []
    real = decoding._Graph.record

    def record(graph: decoding._Graph, forward: Any, inputs: dict[str, Any]) -> None:
        real(graph, forward, inputs)
        made.append(inputs[CACHE_ARGUMENT].tokens.epoch)

    monkeypatch.setattr(decoding._Graph, "record", record)
    return made


def assert_same(found: Any, expected: Any) -> None:
    """The same text from the same logits, bit for bit."""
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.logits, expected.logits, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.gpu
@needs_gpu
def test_captured_text_is_the_eager_one(each_model: PreTrainedModel, captures: list[int]) -> None:
    """Two turns on one cache, padded, past chunks and a page of codes."""
    codebooks, padded, turns = books(each_model), torch.ones_like(IDS), {}
    padded[1, :9] = 0
    for eager in (True, False):
        cache, ids, mask, turns[eager] = make_cache(each_model, codebooks), IDS, padded, []
        for _ in range(2):
            settings = {"max_new_tokens": 80, "output_logits": True, "disable_compile": eager}
            turns[eager].append(generate(each_model, cache, ids, mask, **settings))
            ids = torch.cat([turns[eager][-1].sequences.cpu(), IDS[:, :5]], 1)
            mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - mask.shape[1])], 1)
        assert len(captures) == (0 if eager else len(set(captures)))
    # Room for a longer text, and for the several tokens of the second prompt, moves what a graph reads.
    assert 1 <= len(captures) <= 3
    for found, expected in zip(turns[False], turns[True], strict=True):
        assert_same(found, expected)


@pytest.mark.gpu
@needs_gpu
def test_a_text_of_unknown_length_is_captured_a_few_times(model: PreTrainedModel, captures: list[int]) -> None:
    """Room for codes doubles: only then does anything move that a graph reads."""
    codebooks, tokens, logits = books(model), 600, {}
    for way, call in (("eager", model), ("captured", decoding_call(model))):
        cache = prefill(model, make_cache(model, codebooks), IDS[:, :20])
        each = [step(call, cache, IDS[:, i % 33 :][:, :1], i) for i in range(20, 20 + tokens)]
        logits[way] = torch.cat(each, 1)
    assert 1 < len(captures) <= 1 + math.log2(cache.tokens.capacity / 64)
    assert torch.equal(logits["captured"], logits["eager"])


@pytest.mark.gpu
@needs_gpu
def test_crops_and_other_caches_between_replays(model: PreTrainedModel, captures: list[int]) -> None:
    """Each cache has graphs of its own, which go on after a crop, into the codes too."""
    make = torch.Generator().manual_seed(1)
    logits = {}
    codebooks = books(model)
    for way, call in (("eager", model), ("captured", decoding_call(model))):
        make.manual_seed(1)
        caches = [prefill(model, make_cache(model, codebooks), IDS[:, :width]) for width in (20, 30)]
        logits[way] = []
        for turn in range(30):
            cache = caches[turn % 2]
            if turn in (11, 14, 25):
                cache.crop(-(turn - 8))
            ids = torch.randint(1, 64, (2, 1), generator=make)
            logits[way].append(step(call, cache, ids, cache.get_seq_length()))
    assert torch.equal(torch.cat(logits["captured"], 1), torch.cat(logits["eager"], 1))
    assert len(captures) == 2


class Interrupter(BaseStreamer):
    """Ctrl-C after some tokens."""

    def __init__(self, puts: int) -> None:
        self.puts = puts

    def put(self, value: torch.Tensor) -> None:
        self.puts -= 1
        if self.puts == 0:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


@pytest.mark.gpu
@needs_gpu
def test_an_interrupt_between_replays(model: PreTrainedModel, captures: list[int]) -> None:
    codebooks = books(model)
    ids = IDS[:1, :20]
    expected = generate(model, make_cache(model, codebooks), ids, max_new_tokens=30, disable_compile=True).sequences
    cache = make_cache(model, codebooks)
    with pytest.raises(KeyboardInterrupt):
        generate(model, cache, ids, max_new_tokens=30, streamer=Interrupter(9))
    held = cache.get_seq_length()
    assert len(captures) == 1 and 20 < held < 50
    # The text goes on from where the cache is, in its last token.
    rest = generate(model, cache, expected[:, : held + 1].cpu(), max_new_tokens=50 - held - 1).sequences
    assert torch.equal(rest, expected)


@pytest.mark.gpu
@needs_gpu
def test_an_interrupt_in_a_replay(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the graph wrote does not count: the same step again gives the same."""
    call = decoding_call(model)
    cache = prefill(model, make_cache(model, books(model)), IDS[:, :20])
    for index in range(20, 24):
        step(call, cache, IDS[:, index : index + 1], index)
    other = copy.deepcopy(cache)
    real = decoding._Graph.replay

    def replay(graph: decoding._Graph, inputs: dict[str, Any]) -> Any:
        real(graph, inputs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoding._Graph, "replay", replay)
        with pytest.raises(KeyboardInterrupt):
            step(call, cache, IDS[:, 30:31], 24)
    assert cache.get_seq_length() == 24
    for index in range(24, 30):
        ids = IDS[:, index : index + 1]
        assert torch.equal(step(call, cache, ids, index), step(model, other, ids, index))
    assert_unchanged(cache, contents(other))


@pytest.mark.gpu
@needs_gpu
def test_a_model_that_waits_for_the_device_is_not_captured(
    captures: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    model = build()
    codebooks = books(model)
    expected = generate(model, make_cache(model, codebooks), IDS[:, :20], max_new_tokens=20, disable_compile=True)
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, out: (out.sum().item(), None)[1])
    decoding._log_once.cache_clear()
    with caplog.at_level(logging.INFO, "transformers_gsrq.decoding"):
        for _ in range(2):
            found = generate(model, make_cache(model, codebooks), IDS[:, :20], max_new_tokens=20)
            assert torch.equal(found.sequences, expected.sequences)
    assert captures == []
    assert len(caplog.records) == 1 and "not replayed as a CUDA graph" in caplog.text
