"""The model card of a repository of codebooks, generated from what their config files say was done and measured."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .config import GSRQConfig
from .foreign import printable
from .hub import CARD_MARK

PAPER = "https://arxiv.org/abs/2607.01065"
TAGS = ("transformers", "kv-cache", "kv-cache-compression", "vector-quantization", "gsrq")
UNNAMED = "the model they were calibrated for"


@dataclass(frozen=True)
class Rate:
    """What the card says about one set of codebooks.

    Attributes:
        config: Geometry.
        provenance: How they were made; see `GSRQCodebooks`.
        digest: Their SHA-256.
    """

    config: GSRQConfig
    provenance: Mapping[str, Any]
    digest: str

    @property
    def base_model(self) -> str | None:
        """Hub id of the base model; None if it was a local folder or file."""
        name = self.provenance.get("base_model") or ""
        return name if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not os.path.exists(name) else None


def model_card(repo_id: str, rates: Mapping[str, Rate]) -> str:
    """Text of `README.md` for a repository.

    Args:
        repo_id: The repository, for the load snippet.
        rates: What it holds, by subfolder ("" for its root).
    """
    first_name, first = next(iter(rates.items()))
    base = first.base_model
    front = ["---", "library_name: transformers-gsrq"]
    if base:
        front += [f"base_model: {base}", "base_model_relation: adapter"]
    front += ["tags:", *(f"- {tag}" for tag in TAGS), "---"]
    source = f"{repo_id}/{first_name}" if first_name else repo_id
    sections = [
        "\n".join(front),
        CARD_MARK,
        f"# KV-cache codebooks for {base or first.config.model_type}",
        f"With these codebooks transformers-gsrq stores the KV cache of "
        f"{_link(base)} in a few bits per element, by Gain-Shape Residual Quantization ([paper]({PAPER})). They hold "
        "no weights of the model.",
        "## What is here",
        _rates_table(rates),
        "A plain cache of the same layers takes "
        f"{first.config.dense_bytes_per_token():,} bytes per token in bfloat16. The codebooks stay in memory beside "
        "the cache, once for all sequences: below the break-even, counted in cached tokens over all sequences, the "
        "plain cache is smaller.",
        "## Use",
        _snippet(base, source),
        "## Measured",
        _measurements(rates),
        "## How they were made",
        *(_making(name, rate) for name, rate in rates.items()),
        "## Limits",
        _limits(first),
    ]
    return "\n\n".join(sections) + "\n"


def _cell(value: object) -> str:
    """A name that somebody chose, on one line and inside of its cell."""
    return printable(" ".join(str(value).split())).replace("|", "\\|")


def _link(base: str | None) -> str:
    return f"[{base}](https://huggingface.co/{base})" if base else UNNAMED


def _rates_table(rates: Mapping[str, Rate]) -> str:
    rows = ["| folder | bits per element (keys, values) | bytes per token | codebooks | break-even | digest |"]
    rows.append("|---|---|---|---|---|---|")
    for name, rate in rates.items():
        config = rate.config
        rows.append(
            f"| {_cell(name or '(root)')} | {config.bits():g} ({config.bits('key'):g}, {config.bits('value'):g}) "
            f"| {config.code_bytes_per_token:,} | {config.codebook_bytes / 2**20:,.1f} MiB "
            f"| {config.break_even_tokens:,.0f} tokens | `{rate.digest[:12]}` |"
        )
    return "\n".join(rows)


def _snippet(base: str | None, source: str) -> str:
    return f"""```bash
pip install transformers-gsrq
```

```python
from transformers import AutoModelForCausalLM, AutoTokenizer
import transformers_gsrq  # makes "gsrq" a cache implementation

base = "{base or "path/to/the/model"}"
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
inputs = tokenizer("The history of the compass begins", return_tensors="pt")
output = model.generate(
    **inputs, max_new_tokens=50, cache_implementation="gsrq", cache_config={{"codebooks": "{source}"}}
)
print(tokenizer.decode(output[0]))
```"""


def _measurements(rates: Mapping[str, Rate]) -> str:
    rows = ["| folder | text | perplexity | plain cache | increase |", "|---|---|---|---|---|"]
    for name, rate in rates.items():
        for record in rate.provenance.get("evaluations", ()):
            # A single window has no standard error.
            value, increase = f"{record['perplexity']:.2f}", f"{record['increase']:+.1%}"
            if record["standard_error"] is not None:
                value += f" ± {record['standard_error']:.2f}"
            if record["increase_error"] is not None:
                increase += f" ± {record['increase_error']:.1%}"
            plain = f"{record['plain_perplexity']:.2f}"
            rows.append(f"| {_cell(name or '(root)')} | {_cell(record['data'])} | {value} | {plain} | {increase} |")
    if len(rows) == 2:
        return "Nothing has been measured on text yet. `gsrq eval MODEL CODEBOOKS --text FILE --save` does it."
    notes = ["Every token attended to what the cache stores. How each figure was made:"]
    for name, rate in rates.items():
        for record in rate.provenance.get("evaluations", ()):
            notes.append(f"- {_cell(name or '(root)')}, {_cell(record['data'])}: {_cell(_circumstances(record))}")
    return "\n".join(rows) + "\n\n" + "\n".join(notes)


def _circumstances(record: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return (
        f"{record['model']}, {record['windows']} windows of {record['window_length']} tokens (SHA-256 "
        f"{record['data_digest'][:12]}), {record['residual_length']} latest and {record['sink_length']} first tokens "
        f"exact, beam {record['beam_width']}, {record['dtype']} on {record['device']}, {versions}."
    )


def _making(name: str, rate: Rate) -> str:
    made = rate.provenance
    calibration, data = made.get("calibration", {}), made.get("data", {})
    facts = {
        "base model": made.get("base_model"),
        "its revision": made.get("base_model_revision"),
        "text": data.get("name"),
        "tokens read": calibration.get("tokens_read"),
        "SHA-256 of the tokens": calibration.get("data_digest"),
        "vectors per codebook": calibration.get("vectors"),
        "clustering": calibration.get("method"),
        "weights": calibration.get("weighting"),
        "iterations": calibration.get("iterations"),
        "seed": calibration.get("seed"),
        **training_steps(made),
        "computed in": made.get("dtype") and f"{made['dtype']} on {made.get('device')}",
        "versions": ", ".join(f"{key} {value}" for key, value in made.get("versions", {}).items()),
    }
    rows = [f"| {_cell(key)} | {_cell(value)} |" for key, value in facts.items() if value not in (None, "")]
    title = f"### {_cell(name)}\n\n" if name else ""
    return title + "\n".join(["| | |", "|---|---|", *rows])


def training_steps(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What was done to codebooks after calibration, in order, a line for each step."""
    lines = {}
    for number, step in enumerate(provenance.get("training", ()), 2):
        if step["step"] == "refinement":
            said = f"up to {step['rounds']} rounds, beam {step['beam_width']}"
        elif step["step"] != "distillation":
            said = "by a newer transformers-gsrq"
        else:
            said = (
                f"{step['best_step']} steps of {step['batch_size'] * step['processes']} windows of "
                f"{step['window_length']:,} tokens of {step['data'] or 'unnamed text'} (SHA-256 "
                f"{step['data_digest'][:12]}), from {step['base_model']}"
            )
            if step["measured"]:
                course = {point["step"]: point["kl"] for point in step["measured"]["course"]}
                before, after = nats(course[0]), nats(course[step["best_step"]])
                said += f"; divergence on held-out text {before} before, {after} after"
        lines[f"step {number}, {step['step']}"] = said
    return lines


def nats(divergence: float | None) -> str:
    """A divergence in words; None was not a finite number."""
    return "not finite" if divergence is None else f"{divergence:.4f} nats"


def _limits(rate: Rate) -> str:
    config = rate.config
    return "\n".join(
        [
            f"- They fit one model geometry only ({config.model_type}, {config.num_hidden_layers} layers, "
            f"{config.num_kv_heads} KV heads of {config.head_dim}); another model is refused when they are loaded.",
            "- The cache is approximate: text can differ from what the plain cache gives, more so at fewer bits. "
            "Exact recall of numbers and names from a long context suffers before perplexity shows it: measure your "
            "own task.",
            "- Text unlike the calibration text is stored less well.",
        ]
    )
