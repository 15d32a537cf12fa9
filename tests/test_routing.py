"""An attached model answers like one that was never attached: every architecture, every way to call it.

Attention is routed per module, so that nothing of ours is seen by a model that reads its own config.
"""

from __future__ import annotations

import copy
import os
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tiny_models import REFUSED, SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, attach, check_model, detach
from transformers_gsrq.attention import is_routed
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.models import attention_modules

pytestmark = pytest.mark.host
TOKENS = (torch.arange(24) * 7 % 50 + 3).view(2, 12)
MASK = torch.ones_like(TOKENS)
MASK[0, :5] = 0
# Small in every architecture that has the field; what is missing keeps its default.
SMALL = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "n_embd": 64, "n_head": 4, "n_layer": 2, "d_model": 64, "ffn_dim": 96,
    "max_position_embeddings": 64, "n_positions": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "word_embed_proj_dim": 64, "num_layers": 2, "num_heads": 4, "vocab_size_per_layer_input": 97,
    "hidden_size_per_layer_input": 8, "sliding_window": 8, "alibi": False, "initializer_range": 0.2,
}  # fmt: skip


def build(model_type: str) -> PreTrainedModel:
    """A tiny model of an architecture, with sdpa in half precision as on a GPU.

    Raises:
        Exception: whatever an architecture says that cannot be built so.
    """
    fields = AutoConfig.for_model(model_type).to_dict()
    config = AutoConfig.for_model(model_type, **{name: value for name, value in SMALL.items() if name in fields})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float16, attn_implementation="sdpa").eval()


@torch.no_grad()
def answers(model: PreTrainedModel) -> list[torch.Tensor]:
    """Logits of every way to call a model without a cache of ours."""
    out = []
    for keep in (1, 5, 0):
        for mask in (None, MASK):
            inputs = {"attention_mask": mask, "logits_to_keep": keep}
            out.append(model(TOKENS, **inputs).logits)
            cache = DynamicCache(config=model.config)
            for part in (slice(0, 8), slice(8, 11), slice(11, 12)):
                inputs["attention_mask"] = None if mask is None else mask[:, : part.stop]
                out.append(model(TOKENS[:, part], **inputs, **{CACHE_ARGUMENT: cache}).logits)
    return out


def check(model: PreTrainedModel) -> None:
    expected, config = answers(model), model.config.to_dict()
    implementation = model.config._attn_implementation
    attach(model)
    found = answers(model)
    assert model.config._attn_implementation == implementation and model.config.to_dict() == config
    assert copy.deepcopy(model.config)._attn_implementation == implementation
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())
    detach(model)
    assert not any(map(is_routed, attention_modules(model).values()))


@pytest.mark.parametrize("name", [*SUPPORTED, *REFUSED])
def test_an_attached_model_answers_as_before(name: str) -> None:
    architecture = {**SUPPORTED, **REFUSED}[name]
    try:
        model = architecture.build(torch.float16, "sdpa")
    except ValueError:
        pytest.skip("has no sdpa")
    try:
        attention_modules(model)
        answers(model)
    except (ValueError, RuntimeError, TypeError) as error:
        pytest.skip(f"does not run so by itself: {error}")
    check(model)


# A few that read their config themselves, share states, or pass nothing on; all with GSRQ_ALL_ARCHITECTURES=1.
SOME = ("falcon", "gemma3n_text", "gpt_neo", "opt", "bloom", "phi", "olmo", "starcoder2", "helium", "exaone4")


@pytest.mark.parametrize(
    "name", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) if os.environ.get("GSRQ_ALL_ARCHITECTURES") else SOME
)
def test_an_attached_architecture_answers_as_before(name: str) -> None:
    """Whatever transformers can build tiny with sdpa, on its own terms."""
    try:
        model = build(name)
        attention_modules(model)
        answers(model)
    except Exception as error:  # noqa: BLE001  what an architecture asks for is its own business
        pytest.skip(f"cannot be built or run so: {type(error).__name__}")
    check(model)


def test_falcon_is_left_alone_and_causal() -> None:
    """It asks its config for the name of its attention, and would lose its causal mask with another."""
    model = build("falcon")
    assert check_model(model)
    alone = model(TOKENS[:, :1]).logits
    cache = GSRQCache(random_codebooks(model), model, residual_length=100)
    with torch.no_grad():
        for other in (DynamicCache(config=model.config), cache):
            together = model(TOKENS, **{CACHE_ARGUMENT: other}).logits
            torch.testing.assert_close(together[:, :1], alone, rtol=0, atol=1e-2)
    assert not any(map(is_routed, attention_modules(model).values()))


def test_routing_stays_with_the_modules_that_were_attached() -> None:
    model = SUPPORTED["llama"].build(attention="sdpa")
    GSRQCache(random_codebooks(model), model)
    module = model.model.layers[0].self_attn
    assert is_routed(module) and module.config._attn_implementation == "gsrq_sdpa"
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        config = other.model.layers[0].self_attn.config
        assert config is other.config and config._attn_implementation == "sdpa"
    assert AutoModelForCausalLM.from_config(model.config).config._attn_implementation == "sdpa"
    # What a user changes in the config holds in its view, another attention included.
    model.config.attention_dropout = 0.25
    assert module.config.attention_dropout == 0.25
    model.set_attn_implementation("eager")
    assert module.config._attn_implementation == "eager"
    model.set_attn_implementation("sdpa")
    assert module.config._attn_implementation == "gsrq_sdpa"
    detach(model)
    assert module.config is model.config
