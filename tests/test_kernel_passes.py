"""When a forward pass reads codes by kernels, when it does not, and what is held for it.

Needs a GPU or TRITON_INTERPRET=1, as `test_kernels.py`.
"""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import transformers_gsrq
from test_kernels import DEVICE, RUNS, make_cache
from test_kernels import codebooks as codebooks
from test_kernels import model as model
from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT

pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or TRITON_INTERPRET=1 and Triton")
TOKENS = torch.randint(3, 60, (2, 80), generator=torch.Generator().manual_seed(5)).to(DEVICE)


def step(model: nn.Module, cache: GSRQCache, first: int, last: int, **more: Any) -> torch.Tensor:
    """Logits of tokens `first` to `last`."""
    return model(TOKENS[:, first:last], **more, **{CACHE_ARGUMENT: cache}).logits[:, first - last :].float()


def started(model: LlamaForCausalLM, codebooks: GSRQCodebooks, backend: str = "auto") -> GSRQCache:
    """A cache of twenty tokens, some of them coded."""
    cache = make_cache(model, codebooks, backend)
    with torch.no_grad():
        step(model, cache, 0, 20)
    return cache


def test_gradients_reach_what_is_given(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    """Kernels have no backward pass: of embeddings, with weights that are frozen, and of weights."""
    frozen, gradients = copy.deepcopy(model).requires_grad_(False), []
    for backend in ("torch", "auto"):
        cache = started(frozen, codebooks, backend)
        embeddings = frozen.get_input_embeddings()(TOKENS[:, 20:23]).detach().requires_grad_()
        frozen(inputs_embeds=embeddings, **{CACHE_ARGUMENT: cache}).logits.float().square().sum().backward()
        assert cache.backend == "torch"
        gradients.append(embeddings.grad.float())
    assert (gradients[1] - gradients[0]).norm() < 2e-2 * gradients[0].norm()
    step(model, started(model, codebooks), 20, 21).sum().backward()
    model.zero_grad()


@torch.no_grad()
def test_passes_that_decode_after_all(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    """Their mask was made for all the room of the cache."""
    cache = make_cache(model, codebooks, "auto")
    positions = torch.arange(20, device=DEVICE).repeat(2, 1)
    positions[:, 5:] += 7
    step(model, cache, 0, 20, position_ids=positions)
    step(model, cache, 20, 21, position_ids=positions[:, -1:] + 1)
    assert cache.backend == "torch"
    dropping = copy.deepcopy(model).train()
    cache = started(dropping, codebooks)
    for layer in dropping.model.layers:
        layer.self_attn.attention_dropout = 0.1
    step(dropping, cache, 20, 21)
    assert cache.backend == "torch"


@torch.no_grad()
def test_a_mask_that_is_too_short(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    cache = started(model, codebooks)
    with pytest.raises(ValueError, match="covers 5 tokens, but there are 21: 20 cached and 1 new"):
        step(model, cache, 20, 21, attention_mask=torch.ones(2, 1, 1, 5, dtype=torch.bool, device=DEVICE))
    step(model, cache, 20, 21)
    assert cache.backend == "triton"


@torch.no_grad()
def test_other_dtypes_in_the_middle_of_a_text(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    cache = started(model, codebooks)
    step(model, cache, 20, 21)
    with torch.autocast(DEVICE, torch.bfloat16):
        step(model, cache, 21, 22)
    assert cache.backend == "torch"
    step(model, cache, 22, 23)
    other = copy.deepcopy(model)
    cache = started(other, codebooks)
    other.float()
    step(other, cache, 20, 21)
    assert cache.backend == "torch"


@torch.no_grad()
def test_rows_that_are_left_behind_are_freed(model: LlamaForCausalLM, codebooks: GSRQCodebooks) -> None:
    cache = started(model, codebooks)
    step(model, cache, 20, 21)
    held = [weakref.ref(tensor) for layer in cache.compressed_layers for tensor in layer.state.tensors()]
    cache.batch_select_indices([1])
    gc.collect()
    assert not any(ref() is not None for ref in held)
    other = copy.deepcopy(cache)
    assert all(layer.quantizers["key"] is cache.layers[0].quantizers["key"] for layer in other.layers[:1])


@pytest.mark.skipif(DEVICE == "cpu", reason="a minute in the interpreter")
@torch.no_grad()
def test_room_that_was_made_in_a_pass_that_failed(
    model: LlamaForCausalLM, codebooks: GSRQCodebooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes have moved, the text is cut back to what fitted before: the kernels read them where they are."""
    logits = []
    for backend in ("torch", "triton"):
        cache = GSRQCache(codebooks, model, residual_length=4, chunk_length=16, sink_length=0, backend=backend)
        # 56 codes of room for 64; then 72 are due.
        step(model, cache, 0, 60)
        for first in range(60, 76):
            step(model, cache, first, first + 1)
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].mlp, "forward", lambda hidden: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                step(model, cache, 76, 77)
        cache.crop(-(76 - 30))
        steps = [
            model((TOKENS[:, i : i + 1] + 17) % 60, **{CACHE_ARGUMENT: cache}).logits.float() for i in range(30, 36)
        ]
        logits.append(torch.cat(steps, 1))
        assert cache.backend == backend
    assert (logits[1] - logits[0]).norm() < 5e-3 * logits[0].norm()


@torch.no_grad()
def test_a_first_layer_that_does_not_turn_its_keys() -> None:
    """Whether positions follow one another is asked for the layers that do."""
    settings = {**SUPPORTED["smollm3"].settings, "hidden_size": 256, "head_dim": 64, "no_rope_layers": [0, 1, 1]}
    architecture = copy.copy(SUPPORTED["smollm3"])
    object.__setattr__(architecture, "settings", settings)
    model = architecture.build(torch.float16, "sdpa").to(DEVICE)
    codebooks = random_codebooks(model, bits=0.5, subspace_dim=64, num_centroids=256)
    positions = torch.arange(24, device=DEVICE).repeat(2, 1)
    positions[:, 9:] += 5
    cache = GSRQCache(codebooks, model, residual_length=4, sink_length=2)
    step(model, cache, 0, 24, position_ids=positions)
    step(model, cache, 24, 25, position_ids=positions[:, -1:] + 1)
    assert cache.backend == "torch"


def calls_of_a_token(num_layers: int) -> int:
    """Python functions of the package that a decoded token calls, without those of the kernels themselves."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(DEVICE, torch.float16).eval()
    cache = GSRQCache(random_codebooks(model, bits=0.25, subspace_dim=64, num_centroids=256), model, residual_length=8)
    package, calls = str(Path(transformers_gsrq.__file__).parent), 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        file = frame.f_code.co_filename
        calls += event == "call" and file.startswith(package) and "/ops/" not in file

    with torch.no_grad():
        step(model, cache, 0, 20)
        # Recorded by the third, on a GPU.
        for first in range(20, 23):
            step(model, cache, first, first + 1)
        sys.setprofile(count)
        try:
            step(model, cache, 23, 24)
        finally:
            sys.setprofile(None)
    assert cache.backend == "triton"
    return calls


def test_a_layer_calls_few_functions_a_token() -> None:
    assert calls_of_a_token(3) - calls_of_a_token(2) <= 12
