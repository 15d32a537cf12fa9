"""Tiny random models of every architecture that is claimed or refused, built from configs without any download."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_gsrq import GSRQCodebooks, GSRQConfig
from transformers_gsrq.config import KINDS

VOCABULARY = 97
# The sliding window of models that have one: shorter than the test contexts, so that it does slide.
WINDOW = 24
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough that attention looks at some tokens more than at others.
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_SECTIONS = {"rope_theta": 10000.0}


@dataclass(frozen=True)
class Architecture:
    """How to build a tiny model, and what is said of it.

    Attributes:
        title: What the documentation calls it.
        config_class: Name of the config class in transformers.
        settings: What differs from the common settings; None removes one.
        supported: Whether its cache can be compressed.
        layers: Indices of the layers that are compressed.
        refusal: Words that the reason for a refusal must contain.
        note: What the documentation says about it.
        sliding: Whether some layers have a sliding window.
        model_class: Name of the model class, where the automatic one is not meant.
    """

    title: str
    config_class: str
    settings: dict[str, Any] = field(default_factory=dict)
    supported: bool = True
    layers: tuple[int, ...] = (0, 1, 2)
    refusal: str = ""
    note: str = ""
    sliding: bool = False
    model_class: str | None = None

    def build(
        self, dtype: torch.dtype = torch.float32, attention: str | None = None, seed: int = 0
    ) -> PreTrainedModel:
        """A model of this architecture with random weights."""
        settings = {**_COMMON, **self.settings}
        settings = {name: value for name, value in settings.items() if value is not REMOVED}
        config = getattr(importlib.import_module("transformers"), self.config_class)(**settings)
        torch.manual_seed(seed)
        if self.model_class is not None:
            model = getattr(importlib.import_module("transformers"), self.model_class)._from_config(
                config, dtype=dtype, attn_implementation=attention
            )
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        return model.eval()


REMOVED = object()


def _rope(rope_type: str, **extra: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, **_SECTIONS, **extra}}


# Half the pairs of a head of 16: factors of the longrope models.
_FACTORS = {"short_factor": [1.0 + i / 8 for i in range(8)], "long_factor": [2.0 + i / 2 for i in range(8)]}

SUPPORTED = {
    "llama": Architecture("Llama", "LlamaConfig"),
    "llama-linear": Architecture("Llama, linear rope", "LlamaConfig", _rope("linear", factor=4.0)),
    "llama-llama3": Architecture(
        "Llama 3.1, llama3 rope",
        "LlamaConfig",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama-yarn": Architecture(
        "Llama, yarn rope", "LlamaConfig", _rope("yarn", factor=4.0, original_max_position_embeddings=128)
    ),
    "mistral": Architecture("Mistral without sliding window", "MistralConfig", {"sliding_window": None}),
    "qwen2": Architecture("Qwen2", "Qwen2Config"),
    "qwen2-sliding": Architecture(
        "Qwen2 with sliding window in some layers",
        "Qwen2Config",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
        layers=(0, 1),
        sliding=True,
    ),
    "qwen3": Architecture("Qwen3", "Qwen3Config", {"head_dim": 16}),
    "phi3": Architecture("Phi-3", "Phi3Config"),
    "phi3-longrope": Architecture(
        "Phi-3, longrope",
        "Phi3Config",
        {
            **_rope("longrope", original_max_position_embeddings=256, **_FACTORS),
            "original_max_position_embeddings": 256,
        },
        note="A context cannot cross `original_max_position_embeddings`: transformers itself starts over there.",
    ),
    "stablelm": Architecture("StableLM", "StableLmConfig", {"partial_rotary_factor": 0.25}, note="Partial rotary."),
    "gpt-neox": Architecture(
        "GPT-NeoX (Pythia)", "GPTNeoXConfig", {"num_key_value_heads": REMOVED}, note="Partial rotary."
    ),
    "olmo2": Architecture("OLMo 2", "Olmo2Config"),
    "smollm3": Architecture(
        "SmolLM3", "SmolLM3Config", {"no_rope_layers": [1, 0, 1]}, note="Layers without rotary embedding."
    ),
    "gemma2": Architecture(
        "Gemma 2",
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
        layers=(1,),
        sliding=True,
        note="Soft-capping; sliding-window layers keep transformers' cache.",
    ),
    "gemma3": Architecture(
        "Gemma 3",
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        layers=(1, 2),
        sliding=True,
        note="Two rotary embeddings; sliding-window layers keep transformers' cache.",
    ),
    "granite": Architecture("Granite", "GraniteConfig", {"attention_multiplier": 0.25}),
    "mixtral": Architecture("Mixtral", "MixtralConfig", {"num_local_experts": 4, "sliding_window": None}),
    "qwen3-moe": Architecture(
        "Qwen3-MoE",
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    ),
    "exaone4": Architecture(
        "EXAONE 4",
        "Exaone4Config",
        {
            "head_dim": 16,
            "sliding_window": WINDOW,
            "sliding_window_pattern": 3,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        layers=(1, 2),
        sliding=True,
        note="Only sliding-window layers have rotary embedding; they keep transformers' cache.",
    ),
    "gpt2": Architecture(
        "GPT-2",
        "GPT2Config",
        {"num_key_value_heads": REMOVED, "intermediate_size": REMOVED},
        note="No rotary embedding.",
    ),
}

REFUSED = {
    "mistral-sliding": Architecture(
        "Mistral, every layer with sliding window",
        "MistralConfig",
        {"sliding_window": WINDOW},
        supported=False,
        refusal="no layer with plain full attention",
    ),
    "llama-dynamic": Architecture(
        "Llama, dynamic rope",
        "LlamaConfig",
        _rope("dynamic", factor=4.0),
        supported=False,
        refusal="'dynamic'",
    ),
    "cohere": Architecture("Cohere", "CohereConfig", supported=False, refusal="interleaved"),
    "gptj": Architecture(
        "GPT-J",
        "GPTJConfig",
        {"num_key_value_heads": REMOVED, "intermediate_size": REMOVED, "rotary_dim": 8},
        supported=False,
        refusal="rotary",
    ),
    "deepseek-v3": Architecture(
        "DeepSeek-V3",
        "DeepseekV3Config",
        {
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 16,
            "n_routed_experts": 8,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
        },
        supported=False,
        refusal="latent attention",
    ),
    "qwen2.5-vl": Architecture(
        "Qwen2.5-VL",
        "Qwen2_5_VLConfig",
        {
            "text_config": {
                **_COMMON,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], **_SECTIONS},
            },
            "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64},
        },
        supported=False,
        refusal="mrope",
        model_class="Qwen2_5_VLForConditionalGeneration",
    ),
    "gpt-oss": Architecture(
        "GPT-OSS",
        "GptOssConfig",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": WINDOW},
        supported=False,
        refusal="does not run by itself",
    ),
    "gemma3n": Architecture(
        "Gemma 3n",
        "Gemma3nTextConfig",
        {
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
        },
        supported=False,
        refusal="other arguments than",
    ),
    "mimo-v2-flash": Architecture(
        "MiMo-V2-Flash",
        "MiMoV2FlashConfig",
        {
            "head_dim": 16,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        },
        supported=False,
        refusal="only heads of one width",
    ),
    "minimax": Architecture("MiniMax", "MiniMaxConfig", supported=False, refusal="no cache but its own"),
    "cpmant": Architecture(
        "CPM-Ant",
        "CpmAntConfig",
        {"dim_ff": 96, "dim_head": 16, "num_key_value_heads": REMOVED},
        supported=False,
        refusal="without its name",
    ),
    "bart": Architecture(
        "Bart as a decoder (also BigBird-Pegasus, Blenderbot, Marian, MBart, MVP, Pegasus, TrOCR)",
        "BartConfig",
        {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 96, "is_decoder": True},
        supported=False,
        refusal="several attention modules",
        model_class="BartForCausalLM",
    ),
    "mamba": Architecture(
        "Mamba", "MambaConfig", {"num_attention_heads": REMOVED}, supported=False, refusal="plain full attention"
    ),
    "t5": Architecture(
        "T5",
        "T5Config",
        {"d_model": 64, "d_ff": 96, "d_kv": 16, "decoder_start_token_id": 0},
        supported=False,
        refusal="encoder-decoder",
        model_class="T5ForConditionalGeneration",
    ),
}


def random_codebooks(
    model: PreTrainedModel,
    bits: float = 2.0,
    subspace_dim: int = 8,
    seed: int = 0,
    key_space: str = "before_rope",
    num_centroids: int = 64,
) -> GSRQCodebooks:
    """Codebooks that fit a model's geometry and know nothing of its states; kernels take 256 centroids."""
    config = GSRQConfig.for_model(
        model.config, bits=bits, subspace_dim=subspace_dim, num_centroids=num_centroids, key_space=key_space
    )
    generator = torch.Generator().manual_seed(seed)
    gains, shapes = {}, {}
    for layer in config.layers:
        for kind in KINDS:
            shape = (*config.code_shape(layer, kind), config.num_centroids)
            vectors = torch.randn(*shape, config.subspace_dim(kind), generator=generator)
            norms = vectors.norm(dim=-1)
            # Later stages code what is left, which is smaller.
            scale = 0.5 ** torch.arange(shape[1])[:, None]
            gains[layer, kind] = norms * scale * 0.3
            shapes[layer, kind] = vectors / norms[..., None]
    return GSRQCodebooks(config, gains, shapes)
