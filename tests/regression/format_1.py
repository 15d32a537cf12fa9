"""What 0.1.0 wrote, kept as it was: codebooks and saved caches of format version 1, and the numbers they stand for.

`python tests/regression/format_1.py` made the folders beside this file, with transformers-gsrq 0.1.0 (commit 27b8ee9).
It is kept to say what is in them. Do not run it again: another version would write what that version writes.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig
from transformers_gsrq.compat import CACHE_ARGUMENT, library_versions
from transformers_gsrq.config import KINDS

FOLDER = Path(__file__).parent / "format-1"
CODEBOOKS, CACHE, EXPECTED = "codebooks", "cache.safetensors", "expected.safetensors"
# Tokens of the second row's text begin at 0, those of the first behind its padding.
PADDING = 5
PROMPT = (torch.arange(2 * 36) * 7 % 89 + 3).view(2, 36)
MASK = torch.ones_like(PROMPT).index_put((torch.tensor(0), torch.arange(PADDING)), torch.tensor(0))
# Calls that follow the prompt, in the cache that is saved and then in the loaded one; some of them compress.
BEFORE = [(torch.arange(2 * n) * 11 % 90 + 3).view(2, n) for n in (1, 1, 1)]
AFTER = [(torch.arange(2 * n) * 13 % 90 + 3).view(2, n) for n in (3, 1, 1, 1)]
OPTIONS = {"residual_length": 6, "sink_length": 2, "chunk_length": 3}

_COMMON = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 32,
    "short_factor": [1.0, 1.125, 1.25, 1.375],
    "long_factor": [2.0, 2.5, 3.0, 3.5],
}
# Config class and settings; each but the first has something in its file that the others have not.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 12,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "phi3-longrope": (
        "Phi3Config",
        {"head_dim": None, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 32},
    ),
}


def mixed(count: int, salt: int) -> torch.Tensor:
    """Float32 numbers from -0.5 to 0.5 that look random, by integer arithmetic: the same everywhere and forever."""
    number = torch.arange(count, dtype=torch.int64) + salt * 1_000_003
    for _ in range(3):
        number = (number ^ (number >> 15)) * 73_244_475 % 2**32
    return (number % 2**20).float() / 2**20 - 0.5


def build(name: str) -> PreTrainedModel:
    """A tiny model whose weights are the same numbers under every version of torch."""
    config_class, settings = MODELS[name]
    settings = {key: value for key, value in {**_COMMON, **settings}.items() if value is not None}
    config = getattr(importlib.import_module("transformers"), config_class)(**settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for salt, (_, weight) in enumerate(sorted(model.named_parameters())):
            noise = mixed(weight.numel(), salt).view(weight.shape)
            # Norms are made of ones (or zeros, where one is added to them): they are to stay near that.
            weight.copy_(noise if weight.dim() > 1 else weight + noise / 8)
    return model


def codebooks(model: PreTrainedModel) -> GSRQCodebooks:
    """Codebooks that fit the model's geometry and know nothing of its states."""
    config = GSRQConfig.for_model(model.config, bits=4.0, subspace_dim=4, num_centroids=16)
    gains, shapes = {}, {}
    for layer in config.layers:
        for salt, kind in enumerate(KINDS, 100 + 2 * layer):
            shape = (*config.code_shape(layer, kind), config.num_centroids)
            vectors = mixed(shape[0] * shape[1] * shape[2] * 4, salt).view(*shape, 4)
            norms = vectors.norm(dim=-1)
            gains[layer, kind] = norms * 2 * 0.5 ** torch.arange(shape[1])[:, None]
            shapes[layer, kind] = vectors / norms[..., None]
    return GSRQCodebooks(
        config, gains, shapes, {"made by": __file__.rpartition("/")[2], "versions": library_versions()}
    )


@torch.no_grad()
def run(model: PreTrainedModel, cache: GSRQCache, calls: list[torch.Tensor], length: int) -> torch.Tensor:
    """Logits `[B, T, V]` of these calls, with a cache that holds `length` tokens."""
    logits = []
    for tokens in calls:
        length += tokens.shape[1]
        mask = torch.ones(2, length, dtype=torch.long)
        mask[0, :PADDING] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        logits.append(model(tokens, attention_mask=mask, position_ids=positions, **{CACHE_ARGUMENT: cache}).logits)
    return torch.cat(logits, 1)


def states(cache: GSRQCache) -> dict[str, torch.Tensor]:
    """What the cache gives back, without padding: of every compressed layer, every row and kind."""
    out = {}
    for layer in cache.compressed_layers:
        for kind, tensor in zip(KINDS, layer.states(), strict=True):
            for row, start in enumerate((PADDING, 0)):
                out[f"layers.{layer.index}.{kind}.{row}"] = tensor[row, :, start:].clone()
    return out


def main() -> None:
    for name in MODELS:
        folder, model = FOLDER / name, build(name)
        books = codebooks(model)
        books.save_pretrained(folder / CODEBOOKS)
        cache = GSRQCache(books, model, **OPTIONS)
        run(model, cache, [PROMPT, *BEFORE], 0)
        cache.save(folder / CACHE)
        held = states(cache)
        length = cache.get_seq_length()
        save_file({**held, "logits": run(model, cache, AFTER, length)}, folder / EXPECTED)


if __name__ == "__main__":
    main()
