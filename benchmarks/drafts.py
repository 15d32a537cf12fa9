"""Drafts on SmolLM2-135M: do assisted decoding and prompt lookup give the text of plain greedy decoding?

    python benchmarks/drafts.py --output drafts.json      # some minutes on two CPU cores

What leaves the window is compressed in other chunks when tokens are confirmed several at a time, so later tokens may
attend to the exact or to the stored form of the same token; with a window over the whole text nothing can differ.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_gsrq import GSRQCache, GSRQCodebooks
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.demo import DEFAULT_FOLDER, load_embedded_codebooks, load_embedded_model, load_embedded_texts
from transformers_gsrq.evaluation.agreement import equal_tokens
from transformers_gsrq.evaluation.records import circumstances

DRAFT_LAYERS = 24
LOOKUP_TOKENS = 5


def first_layers(model: PreTrainedModel) -> PreTrainedModel:
    """A draft model that often agrees: the first layers of the same model."""
    draft = copy.deepcopy(model)
    draft.model.layers = draft.model.layers[:DRAFT_LAYERS]
    draft.config.num_hidden_layers = DRAFT_LAYERS
    return draft


def compare(
    model: PreTrainedModel, codebooks: GSRQCodebooks, prompts: list[torch.Tensor], new_tokens: int, window: int
) -> dict[str, Any]:
    """For each way to draft: tokens of each text before it parts from greedy decoding with the same cache settings."""
    ways = {
        "assisted": {"assistant_model": first_layers(model)},
        "prompt lookup": {"prompt_lookup_num_tokens": LOOKUP_TOKENS},
    }
    equal: dict[str, list[int]] = {name: [] for name in ways}
    for prompt in prompts:
        texts = {}
        for name, way in {"greedy": {}, **ways}.items():
            cache = GSRQCache(codebooks, model, residual_length=window)
            settings = {"max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None}
            out = model.generate(prompt[None], **{CACHE_ARGUMENT: cache}, **settings, **way)
            texts[name] = out[0, len(prompt) :]
        for name in ways:
            equal[name].append(equal_tokens(texts[name], texts["greedy"]))
        print({name: f"{sum(counts)} of {len(counts) * new_tokens}" for name, counts in equal.items()}, flush=True)
    return equal


def main() -> None:
    """Generate, compare, print and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON record")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--windows", type=int, nargs="+", default=[32, 128], help="residual_length, each in turn")
    args = parser.parse_args()
    model, tokenizer = load_embedded_model(dtype=torch.float32)
    codebooks = load_embedded_codebooks(model, tokenizer, DEFAULT_FOLDER, print)
    texts = load_embedded_texts()[1][: args.prompts]
    prompts = [tokenizer(text, return_tensors="pt")["input_ids"][0, : args.prompt_tokens] for text in texts]
    equal = {window: compare(model, codebooks, prompts, args.new_tokens, window) for window in args.windows}
    record = {
        "command": "python benchmarks/drafts.py",
        **circumstances(model),
        "digest": codebooks.digest,
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "draft_layers": DRAFT_LAYERS,
        "lookup_tokens": LOOKUP_TOKENS,
        "equal_tokens": equal,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
