"""Perplexity of SmolLM2-135M against bits, for every way to learn the codebooks: the table in the README.

    python benchmarks/rates.py --output rates.json

Every variant shares text, start, seed and iterations. Codebooks are learned at 2 bits; lower rates are their first
stages, which is what learning them alone gives.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig
from transformers_gsrq.calibration import capture, fit
from transformers_gsrq.compat import CACHE_ARGUMENT, library_versions
from transformers_gsrq.demo import load_embedded_model, load_embedded_texts
from transformers_gsrq.evaluation import measure_perplexity
from transformers_gsrq.evaluation.records import git_commit
from transformers_gsrq.text import token_windows, windows_digest

# Stages of 64 channels: 2, 1, 0.75 and 0.5 bits.
STAGES = (16, 8, 6, 4)
PROMPT_TOKENS = 600
VARIANTS = [("kmeans", "none"), ("gskm", "none"), ("kmeans", "log"), ("gskm", "log")]


def learn(model: PreTrainedModel, windows: torch.Tensor, args: argparse.Namespace) -> dict[str, GSRQCodebooks]:
    """All codebooks of the table by name."""
    config = GSRQConfig.for_model(model.config, bits=2.0)
    options = {"iterations": args.iterations, "seed": args.seed}
    samples = capture(model, windows, config, max_vectors=args.max_vectors, seed=args.seed)
    made = {}
    for method, weighting in VARIANTS:
        full = fit(samples, config, method=method, weighting=weighting, **options)
        for stages in STAGES:
            made[f"{method}, weights {weighting}, {stages / 8:g} bits"] = full.with_stages(stages, stages)
    narrow = GSRQConfig.for_model(model.config, bits=1.0, subspace_dim=8)
    made["one stage of 8 channels (CQ), weights log, 1 bits"] = fit(samples, narrow, **options)
    rotated = GSRQConfig.for_model(model.config, bits=1.0, key_space="after_rope")
    samples = capture(model, windows, rotated, max_vectors=args.max_vectors, seed=args.seed)
    made["gskm, weights log, keys after RoPE, 1 bits"] = fit(samples, rotated, **options)
    return made


def show_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, codebooks: GSRQCodebooks
) -> dict[str, str]:
    """Greedy continuations of a long prompt with the plain cache, and with sinks and a window of 128 at these bits."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :PROMPT_TOKENS].to(model.device)
    made = {}
    for name, cache in (("plain", None), ("gsrq", GSRQCache(codebooks, model))):
        out = model.generate(ids, **{CACHE_ARGUMENT: cache}, max_new_tokens=80, do_sample=False)
        made[name] = tokenizer.decode(out[0, ids.shape[1] :])
        print(f"--- {name}: {made[name]}")
    return made


def main() -> None:
    """Learn, measure, print a table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON record")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 1,024 tokens")
    parser.add_argument("--max-vectors", type=int, default=8192)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--evaluate", type=int, default=6, help="evaluation windows of 1,024 tokens")
    parser.add_argument("--commit", default=git_commit(), help="kept in the record; needed outside a checkout")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.perf_counter()
    model, tokenizer = load_embedded_model()
    model = model.to(args.device)
    calibration, evaluation = load_embedded_texts()
    codebooks = learn(model, token_windows(tokenizer, calibration, 1024, args.windows, args.seed), args)
    test = token_windows(tokenizer, evaluation, 1024, args.evaluate, args.seed)
    results = measure_perplexity(model, test, codebooks)
    full = codebooks["gskm, weights log, 2 bits"]
    record = {
        "text_at_2_bits": show_text(model, tokenizer, evaluation[0], full),
        "results": {name: dataclasses.asdict(result) for name, result in results.items()},
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "data_digest": windows_digest(test),
        "commit": args.commit,
        "versions": library_versions(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu",
        "seconds": round(time.perf_counter() - began),
    }
    args.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name, result in results.items():
        print(
            f"{name:52} {result.value:7.2f} +- {result.standard_error:.2f}  "
            f"{result.increase:+7.1%} +- {result.increase_error:.1%}"
        )


if __name__ == "__main__":
    main()
