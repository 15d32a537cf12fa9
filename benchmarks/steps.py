"""What the benchmarks through `generate` share: models of random weights, their prompts, and a clock of steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from transformers.generation import BaseStreamer

SEED = 0
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "qwen2.5-1.5b": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "llama-3-8b": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        },
    ),
    # To try the benchmarks on a CPU.
    "tiny": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "hidden_size": 256,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 512,
        },
    ),
}


def random_model(name: str, **changes: Any) -> PreTrainedModel:
    """A model of a shape in `SHAPES` in bfloat16, its random weights made on the device; it never ends a text.

    Args:
        name: The shape.
        **changes: Settings of its config that differ.
    """
    model_class, config_class, shape = SHAPES[name]
    config = config_class(**{"max_position_embeddings": 2**20, **shape, **changes})
    torch.manual_seed(SEED)
    with torch.device(DEVICE):
        model = model_class._from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval()


def random_tokens(model: PreTrainedModel, batch: int, count: int) -> torch.Tensor:
    """int64 `[batch, count]`."""
    torch.manual_seed(SEED)
    return torch.randint(3, model.config.vocab_size, (batch, count), device=model.device)


class Clock(BaseStreamer):
    """A streamer that notes when each step's tokens reach the host.

    Args:
        at: What to call after a step, by its number: 0 is the prompt going in, 1 the first token, and so on. What it
            takes counts for no step.

    Attributes:
        began: Seconds at which `generate` took the prompt.
        seconds: Seconds of each step; the first holds the prompt.
        sizes: Tokens that each step gave, of all rows.
    """

    def __init__(self, at: Mapping[int, Callable[[], None]] | None = None) -> None:
        self.at = at or {}
        self.seconds: list[float] = []
        self.sizes: list[int] = []
        self._last: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Take tokens, which `generate` copies to the host for this."""
        now = time.perf_counter()
        if self._last is not None:
            self.seconds.append(now - self._last)
            self.sizes.append(value.numel())
        self.at.get(len(self.seconds), lambda: None)()
        self._last = time.perf_counter()

    def end(self) -> None:
        """Do nothing."""


def run_generate(model: PreTrainedModel, tokens: torch.Tensor, new_tokens: int, clock: Clock, **options: Any) -> None:
    """Greedy `generate` under a clock, for so many tokens.

    Args:
        model: The model.
        tokens: The prompt `[B, T]`.
        new_tokens: Tokens to generate in each row.
        clock: The clock.
        **options: Keywords of `generate`.
    """
    settings = {"do_sample": False, "max_new_tokens": new_tokens, "pad_token_id": 0}
    model.generate(tokens, attention_mask=torch.ones_like(tokens), streamer=clock, **settings, **options)


class FromThePrompt(LogitsProcessor):
    """Make every generated token one of the prompt, so that looking it up there always finds a draft.

    Args:
        prompt: The prompt `[1, T]`.
    """

    def __init__(self, prompt: torch.Tensor) -> None:
        self.script = prompt[0].flip(0).tolist()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Put the token of this place first."""
        scores = scores.clone()
        scores[:, self.script[input_ids.shape[1] % len(self.script)]] = 1e4
        return scores


DRAFT_TOKENS = 5


def draft_options(way: str, tokens: torch.Tensor, draft: PreTrainedModel) -> dict[str, Any]:
    """Keywords of `generate` that verify some `DRAFT_TOKENS` tokens at every step, of which hardly any are accepted.

    Args:
        way: "assisted" or "prompt lookup".
        tokens: The prompt `[1, T]`.
        draft: The model that drafts, for "assisted".
    """
    if way == "prompt lookup":
        return {"prompt_lookup_num_tokens": DRAFT_TOKENS, "logits_processor": [FromThePrompt(tokens)]}
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = DRAFT_TOKENS, "constant"
    settings.assistant_confidence_threshold = 0.0
    return {"assistant_model": draft}
