"""Beam search in encoding on SmolLM2-135M: what a width gains, and what it costs.

    python benchmarks/beams.py --output beams.json      # some minutes on two CPU cores

Encoding is timed in torch, as the kernels encode greedily only.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from transformers_gsrq import GSRQCodebooks
from transformers_gsrq.config import KINDS
from transformers_gsrq.demo import DEFAULT_FOLDER, load_embedded_codebooks, load_embedded_model, load_embedded_texts
from transformers_gsrq.evaluation.agreement import measure_agreement
from transformers_gsrq.evaluation.reconstruction import measure_reconstruction
from transformers_gsrq.evaluation.records import circumstances
from transformers_gsrq.evaluation.speed import now
from transformers_gsrq.ops import encode_vectors
from transformers_gsrq.simulation import CodebookMethod
from transformers_gsrq.text import token_windows, windows_digest


def encode_seconds(model: PreTrainedModel, codebooks: GSRQCodebooks, width: int, num_tokens: int) -> float:
    """Seconds to encode keys and values of all layers; random vectors take as long as real ones."""
    total = 0.0
    for layer in codebooks.config.layers:
        for kind in KINDS:
            centroids = codebooks.centroids(layer, kind, model.device, torch.float32)
            vectors = torch.randn(centroids.shape[0], num_tokens, centroids.shape[-1], device=model.device)
            began = now(model)
            encode_vectors(vectors, centroids, width)
            total += now(model) - began
    return total


def measure(model: PreTrainedModel, codebooks: GSRQCodebooks, windows: torch.Tensor, width: int) -> dict[str, Any]:
    """Squared error by kind (mean over layers), perplexity, and time of one width."""
    found = measure_reconstruction(model, windows, {"beam": codebooks}, beam_width=width, progress=False)["beam"]
    method = CodebookMethod(codebooks, beam_width=width)
    perplexity = measure_agreement(model, windows, {"beam": method}, progress=False)["beam"].perplexity
    return {
        "width": width,
        **{kind: mean(one.stages[-1].distortion for one in found if one.kind == kind) for kind in KINDS},
        "increase": perplexity.increase,
        "increase_error": perplexity.increase_error,
        "seconds_per_1000_tokens": min(encode_seconds(model, codebooks, width, 1000) for _ in range(3)),
    }


def main() -> None:
    """Measure every width, print it and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="JSON record")
    parser.add_argument("--widths", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    model, tokenizer = load_embedded_model(dtype=torch.float32)
    codebooks = load_embedded_codebooks(model, tokenizer, DEFAULT_FOLDER, print)
    windows = token_windows(tokenizer, load_embedded_texts()[1], args.length, args.windows)
    rows = []
    for width in args.widths:
        rows.append(measure(model, codebooks, windows, width))
        print(rows[-1], flush=True)
    record = {
        "command": "python benchmarks/beams.py",
        **circumstances(model),
        "digest": codebooks.digest,
        "data": windows_digest(windows),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "rows": rows,
    }
    args.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
