"""Models in which linear attention, whose states change in place, comes before the first compressed layer."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3NextConfig

import transformers_gsrq
from operations import OPTIONS
from test_cache_errors import OUT_OF_MEMORY, PROMPT, fail_at
from tiny_models import VOCABULARY, random_codebooks
from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT

pytestmark = pytest.mark.host
MUST_RESET = r"linear-attention states.*cache\.reset\(\)"


def build() -> PreTrainedModel:
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16,
        linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, layer_types=["linear_attention"] * 3 + ["full_attention"],
        initializer_range=0.2, partial_rotary_factor=0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return build()


@pytest.fixture(scope="module")
def codebooks(model: PreTrainedModel) -> GSRQCodebooks:
    return random_codebooks(model)


@torch.no_grad()
def read(model: PreTrainedModel, cache: GSRQCache, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, **{CACHE_ARGUMENT: cache}).logits


@pytest.fixture
def cache(model: PreTrainedModel, codebooks: GSRQCodebooks) -> GSRQCache:
    """Thirty tokens in two rows."""
    cache = GSRQCache(codebooks, model, **OPTIONS)
    read(model, cache, PROMPT)
    return cache


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, KeyboardInterrupt()])
@pytest.mark.parametrize("layer", [1, 3])
def test_a_failed_pass_cannot_be_undone(
    error: BaseException, layer: int, model: PreTrainedModel, cache: GSRQCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = model.model.layers[layer].mlp
    with monkeypatch.context() as patch:
        patch.setattr(mlp, "forward", fail_at(1, error, mlp.forward))
        with pytest.raises(type(error)):
            read(model, cache, PROMPT[:, :1])
    for _ in range(2):
        with pytest.raises(RuntimeError, match=MUST_RESET):
            read(model, cache, PROMPT[:, :1])
    cache.reset()
    fresh = GSRQCache(cache.codebooks, model, **OPTIONS)
    assert torch.equal(read(model, cache, PROMPT), read(model, fresh, PROMPT))


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["embed_tokens", "layers.1.mlp", "layers.3.mlp"])
def test_an_empty_cache_is_empty_again(
    error: BaseException,
    place: str,
    model: PreTrainedModel,
    codebooks: GSRQCodebooks,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache, part = GSRQCache(codebooks, model, **OPTIONS), model.model.get_submodule(place)
    with monkeypatch.context() as patch:
        patch.setattr(part, "forward", fail_at(1, error, part.forward))
        with pytest.raises(type(error)):
            read(model, cache, PROMPT)
    assert cache.get_seq_length() == 0
    fresh = GSRQCache(codebooks, model, **OPTIONS)
    assert torch.equal(read(model, cache, PROMPT), read(model, fresh, PROMPT))


def test_a_detached_model_changes_states_too(codebooks: GSRQCodebooks) -> None:
    model = build()
    cache = GSRQCache(codebooks, model, **OPTIONS)
    read(model, cache, PROMPT)
    transformers_gsrq.detach(model)
    with pytest.raises(RuntimeError, match="detached"):
        read(model, cache, PROMPT[:, :1])
    transformers_gsrq.attach(model)
    with pytest.raises(RuntimeError, match=MUST_RESET):
        read(model, cache, PROMPT[:, :1])


def test_rows(model: PreTrainedModel, codebooks: GSRQCodebooks, cache: GSRQCache) -> None:
    """Transformers' linear layers cannot select or repeat rows by name; reordering them does both."""
    following = PROMPT[:, 5:9]

    def alone(rows: list[int]) -> torch.Tensor:
        fresh = GSRQCache(codebooks, model, **OPTIONS)
        read(model, fresh, PROMPT[rows])
        return read(model, fresh, following[rows])

    for operation, rows in (
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([True, False])), [0]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 1])), [1, 1]),
    ):
        changed = copy.deepcopy(cache)
        operation(changed)
        torch.testing.assert_close(read(model, changed, following[rows]), alone(rows), rtol=0, atol=1e-4)


def test_reset_ends_the_recording_of_drafts(model: PreTrainedModel, cache: GSRQCache) -> None:
    cache.reset()
    cache.activate_past_recording()
    read(model, cache, PROMPT)
    cache.reset()
    fresh = GSRQCache(cache.codebooks, model, **OPTIONS)
    assert cache.memory() == fresh.memory()
    for tokens in (PROMPT, PROMPT[:, :1]):
        assert torch.equal(read(model, cache, tokens), read(model, fresh, tokens))


def test_memory_counts_the_states(model: PreTrainedModel, cache: GSRQCache) -> None:
    states = [layer.conv_states[0].nbytes + layer.recurrent_states[0].nbytes for layer in cache.layers[:3]]
    memory = cache.memory()
    assert memory.native == sum(states) > 0
    assert memory.plain == memory.native + 2 * 30 * cache.codebooks.config.dense_bytes_per_token(4)
