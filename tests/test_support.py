"""What `check_model` says of models that the table of architectures has not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from tiny_models import SUPPORTED, random_codebooks
from transformers_gsrq import GSRQCache, check_model
from transformers_gsrq.rope import attention_modules, check_cache_layer

DORY = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 8, "num_attention_heads": 4,
    "head_dim": 16, "num_key_value_heads": 2, "sliding_window": 16, "n_input_layers": 2, "n_output_layers": 2,
}  # fmt: skip
INKLING = {
    "vocab_size": 97, "unpadded_vocab_size": 97, "hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16, "num_hidden_layers": 24,
}  # fmt: skip


def build(name: str, config: str, **settings: Any) -> PreTrainedModel:
    if not hasattr(transformers, config):
        pytest.skip(f"this transformers has no {name}")
    return getattr(transformers, name)(getattr(transformers, config)(**settings)).eval()


@pytest.mark.parametrize("mode", ["per_loop", "last_loop"])
def test_a_model_that_runs_its_layers_several_times(mode: str) -> None:
    """Of its 41 keys a layer read 5 in all but the last time, and wrote to layers of another index."""
    model = build("DoryForCausalLM", "DoryConfig", **DORY, recurrent_kv_cache_mode=mode)
    answer = check_model(model)
    assert not answer and "runs some of its layers several times" in answer.reason
    for space in ("before_rope", "after_rope"):
        with pytest.raises(ValueError, match="runs some of its layers several times"):
            GSRQCache(random_codebooks(model, key_space=space), model)


def test_others_of_that_family() -> None:
    """Refused as a whole for what else they are; of their attention alone it cannot be told."""
    model = build("Inkling2LoopForCausalLM", "Inkling2LoopTextConfig", **INKLING)
    assert not check_model(model)
    with pytest.raises(ValueError, match="takes a number cache_offset.*not supported"):
        check_cache_layer(attention_modules(model)[0])


def test_what_is_asked_of_the_module_costs_nothing() -> None:
    """No number of its weights is read: they may be anywhere."""
    model = build("DoryForCausalLM", "DoryConfig", **DORY).to("meta")
    with pytest.raises(ValueError, match="writes to other cache layers"):
        check_cache_layer(attention_modules(model)[2])
    with torch.device("meta"):
        llama = SUPPORTED["llama"].build()
    check_cache_layer(attention_modules(llama)[0])
