"""Rotary embedding read from real model classes, checked against keys that the models really rotated."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    CohereConfig,
    Exaone4Config,
    FalconConfig,
    GPT2Config,
    GPTJConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RoFormerConfig,
    SmolLM3Config,
    StableLmConfig,
)
from transformers.models.gemma3n import modeling_gemma3n

from transformers_gsrq import GSRQConfig
from transformers_gsrq.calibration import capture
from transformers_gsrq.models import attention_modules
from transformers_gsrq.rope import Rotary, check_layout, read_rotary, rotates_keys

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "linear": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4},
}

pytestmark = pytest.mark.host


def build(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def projected_keys(model: PreTrainedModel, windows: torch.Tensor, layer: int) -> torch.Tensor:
    """Keys `[N, H, D]` straight from the projection, before any rotation."""
    seen = []
    module = model.model.layers[layer].self_attn
    handle = module.k_proj.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(windows)
    handle.remove()
    return seen[0].flatten(0, 1).unflatten(-1, (2, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rope", ROPES)
def test_captured_keys_are_those_before_rotation(rope: str, dtype: torch.dtype) -> None:
    model = build(LlamaConfig(**SIZES, rope_parameters=ROPES[rope]), dtype)
    windows = torch.randint(0, 128, (1, 200))
    config = GSRQConfig.for_model(model.config, bits=1.0)
    samples = capture(model, windows, config, gradients=False, progress=False, max_vectors=200)
    for layer in (0, 1):
        expected = projected_keys(model, windows, layer).float()
        error = (samples.states[layer, "key"].float() - expected).norm() / expected.norm()
        # One rounding to the model's dtype after rotating, one after un-rotating.
        assert error < 2 * torch.finfo(dtype).eps


def test_partial_rotary_leaves_the_rest_alone() -> None:
    model = build(StableLmConfig(**SIZES))
    rotary = read_rotary(model, [0])[0]
    assert 0 < rotary.inv_freq.numel() * 2 < 16
    windows = torch.randint(0, 128, (1, 50))
    config = GSRQConfig.for_model(model.config, bits=1.0)
    samples = capture(model, windows, config, gradients=False, progress=False, max_vectors=50)
    torch.testing.assert_close(samples.states[1, "key"], projected_keys(model, windows, 1), rtol=1e-5, atol=1e-6)


def test_a_model_without_rotary_keeps_its_keys() -> None:
    model = build(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=128))
    assert read_rotary(model, [0, 1]) == {0: None, 1: None}


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}


@pytest.mark.parametrize(
    ("config", "rotated"),
    [
        (LlamaConfig(**SIZES), [True, True]),
        (SmolLM3Config(**SIZES, no_rope_layers=[1, 0], pad_token_id=0), [True, False]),
        # Their code says it by the sliding window, which only layers with rotary embedding have.
        (Exaone4Config(**SIZES, **MIXED, head_dim=16), [True, False]),
        (Cohere2Config(**SIZES, **MIXED), [True, False]),
        (FalconConfig(**SIZES, alibi=True), [False, False]),
        (FalconConfig(**SIZES, alibi=False), [True, True]),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_each_layer_says_whether_it_rotates(config: PreTrainedConfig, rotated: list[bool]) -> None:
    model = build(config)
    assert [rotates_keys(model, attention) for attention in attention_modules(model).values()] == rotated


def test_weights_are_not_needed_to_say_it() -> None:
    """As where they are offloaded, or quantized; nor are gradients, or tensors that record them."""
    config = Exaone4Config(**SIZES, **MIXED, head_dim=16)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with torch.inference_mode():
        assert [rotates_keys(model, attention) for attention in attention_modules(model).values()] == [True, False]
    with pytest.raises(ValueError, match="on the meta device"):
        read_rotary(model, [0])


def test_a_layer_with_a_rotary_embedding_of_its_own_is_refused() -> None:
    model = build(LlamaConfig(**SIZES, layer_rope_theta=[1e4, 0]))
    assert read_rotary(model, [1]) == {1: None}
    model.config.layer_rope_theta = [1e4, 5e5]
    assert read_rotary(model, [0])[0] is not None
    with pytest.raises(ValueError, match="Layer 1 of 'llama' has a rotary embedding of its own"):
        read_rotary(model, [0, 1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torchs_defaults_do_not_matter(dtype: torch.dtype) -> None:
    model = build(LlamaConfig(**SIZES))
    expected = read_rotary(model, [0])[0].inv_freq
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            # Another model, since what was found out about one is kept.
            found = read_rotary(copy.deepcopy(model), [0])[0].inv_freq
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            GptOssConfig(**SIZES, **MIXED, head_dim=16, num_local_experts=2),
            "'gpt_oss' rotates its keys cannot be found out, because GptOssAttention does not run by itself",
        ),
        (RoFormerConfig(**SIZES, is_decoder=True), "'roformer'.*not supported"),
        (CohereConfig(**SIZES), "'cohere'.*interleaved"),
        (GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=128), "'gptj'.*not supported"),
        (
            LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "'dynamic'.*change with the context length",
        ),
    ],
)
def test_other_layouts_are_refused_by_name(config: PreTrainedConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_rotary(build(config), [0])


def test_a_rotation_of_other_arguments_is_refused_by_name() -> None:
    """Gemma 3n's takes one of queries and keys."""
    attention = modeling_gemma3n.Gemma3nTextAttention
    with pytest.raises(ValueError, match="'gemma3n' rotates keys by a function that takes other arguments"):
        check_layout(attention.__new__(attention), 8, "gemma3n")


def test_tables_that_differ_from_the_models_are_noticed() -> None:
    positions = torch.arange(40)[None]
    rotary = Rotary(torch.tensor([1.0, 0.1]), 1.0)
    cos, sin = rotary.cos_sin(positions, torch.float32)
    right = (torch.cat([cos, cos], -1), torch.cat([sin, sin], -1))
    rotary.check(rotary.error(positions, right).item())
    # Other positions, and the layout of interleaved pairs.
    for at, seen in ((positions + 1, right), (positions, tuple(table[..., [0, 2, 1, 3]] for table in right))):
        with pytest.raises(ValueError, match="differs from the one read from it"):
            rotary.check(rotary.error(at, seen).item())
    with pytest.raises(ValueError, match="differs from the one read from it"):
        rotary.check(rotary.error(positions, (right[0] * torch.nan, right[1])).item())
    with pytest.raises(ValueError, match="rotates 2 channels"):
        rotary.error(positions, (cos, sin))
