"""Writes `docs/supported-models.md` from the tables that the tests run through: python tests/supported_models.py."""

from __future__ import annotations

import json
from pathlib import Path

from operations import OPERATIONS
from tiny_models import REFUSED, SUPPORTED, Architecture
from transformers_gsrq import check_model

RECORDS = Path(__file__).parents[1] / "docs" / "records"
PAGE = Path(__file__).parents[1] / "docs" / "supported-models.md"
HEAD = """<!-- Made by `python tests/supported_models.py` from the tables that the tests run through; do not edit. -->
# Supported models

Decoder-only models of transformers with at least one layer of plain full attention, half-split rotary embedding or \
none. Any size and fine-tune of an architecture counts as that architecture. `check_model` answers for any model, and \
runs nothing:

```python
from transformers import AutoModelForCausalLM

from transformers_gsrq import check_model

model = AutoModelForCausalLM.from_pretrained(".cache/gsrq-demo/smollm2-135m-instruct")
print(check_model(model))
```

## Architectures

Each is built with random weights, and each operation below is compared with a dense reference cache, token by token \
and logit by logit. *Compressed* counts the layers of the tiny model; layers with a sliding window keep \
transformers' own cache, which does not grow with the text.

"""
SETTINGS = """
Dtypes: float32, bfloat16, float16. Attention implementations: eager, sdpa, flex_attention; flash attention was not \
run. Rotary embedding: default, linear, llama3, yarn, longrope, partial, none.

"""
REFUSED_HEAD = """## Refused

By name, before anything is calibrated or cached. Where only the rotary embedding is in the way (Cohere, GPT-J, \
dynamic), `GSRQConfig.for_model(..., key_space="after_rope")` stores keys as they come; that works, at a loss of \
quality that you have to measure. Models that run some of their layers several times (Dory, HRM-Text, Inkling 2 Loop) \
are refused too.

"""

CHECKED = """
## Seen once, at length

*Random sequences.* Appends, crops, reorders, repeats, selections, copies, saves and loads in random order, every \
state compared with an oracle after each: {steps:,} operations without a mismatch (seed {seed}, commit `{commit}`, \
transformers {transformers}, torch {torch}). Every test run tries 10,000; `GSRQ_CACHE_STEPS=1000000 \
GSRQ_CACHE_SEED={seed} python -m pytest tests/test_cache_states.py -s` tried these.

*Drafts.* Assisted decoding and prompt lookup give the text of plain greedy decoding token by token while the window \
covers the text, and every token is the likeliest one on the state that it was verified on. Beyond the window the \
texts may part, because confirmed tokens leave the window in other chunks. On SmolLM2-135M at 1 bit, {prompts} \
prompts of {prompt_tokens} tokens and {new_tokens} new ones (`python benchmarks/drafts.py`, \
[record](records/drafts-smollm2-cpu.json)), share of tokens before the texts part:

| window (`residual_length`) | assisted | prompt lookup |
|---|---|---|
"""
DEVICES = """
*Several devices.* Llama, Gemma 3 and StableLM on a GPU give what they give on a CPU, operation by operation; layers \
spread over two GPUs, or over two GPUs and weights offloaded to the CPU, generate, search with beams, calibrate, save \
and load as on one (`python -m pytest tests/test_devices.py`, {device}, commit `{commit}`, transformers \
{transformers}, torch {torch}: {passed} tests passed). With Gemma 3 a loaded cache differed from the saved one in the \
device of one table; since that was repaired, all of `tests/test_devices.py` and `tests/test_kernels.py` pass there, \
with kernels on each layer's own GPU (commit `ab4f3cd`, Triton 3.9.0: 85 tests). Weights offloaded by accelerate are \
part of every test run.

*Memory of each operation* on a GPU, beside a cache of {cache:.1f} MiB (a plain one: {plain:,.0f} MiB) for {rows} \
rows of {tokens:,} tokens in {layers} layers ([record](records/devices-h200.json)). The decoded token is that of the \
path in torch, which decoded the states of one layer at once (since then it takes blocks of tokens); kernels decode \
none.

| operation | MiB at its peak |
|---|---|
"""


def support_line(architecture: Architecture) -> str:
    answer = check_model(architecture.build())
    return f"| {architecture.title} | {len(answer.layers)} of {answer.num_layers} | {architecture.note} |"


def refusal_line(architecture: Architecture) -> str:
    return f"| {architecture.title} | {check_model(architecture.build()).reason} |"


def cell(architecture: Architecture, name: str, notes: list[str]) -> str:
    """What a test of `test_operations.py` shows: done, or the note that says why not."""
    operation = OPERATIONS[name]
    for note, mark in ((operation.sliding, "no"), (operation.host_sliding, "yes")):
        if architecture.sliding and note:
            if note not in notes:
                notes.append(note)
            return f"{mark} ({notes.index(note) + 1})"
    return "yes"


def render() -> str:
    lines = ["| model | compressed | remarks |", "|---|---|---|", *map(support_line, SUPPORTED.values())]
    parts = [HEAD, "\n".join(lines), "\n", SETTINGS]
    parts += [REFUSED_HEAD]
    lines = ["| model | what `check_model` says |", "|---|---|", *map(refusal_line, REFUSED.values())]
    parts += ["\n".join(lines), "\n\n## Operations\n\n"]
    numbered = [f"{number}. {operation.title}" for number, operation in enumerate(OPERATIONS.values(), 1)]
    parts += ["Each cell is a test; columns are these operations:\n\n", "\n".join(numbered), "\n\n"]
    notes: list[str] = []
    lines = ["| model | " + " | ".join(str(n) for n in range(1, len(OPERATIONS) + 1)) + " |"]
    lines += ["|---" * (len(OPERATIONS) + 1) + "|"]
    for architecture in SUPPORTED.values():
        cells = [cell(architecture, name, notes) for name in OPERATIONS]
        lines.append(f"| {architecture.title} | " + " | ".join(cells) + " |")
    parts += ["\n".join(lines), "\n"]
    if notes:
        parts += ["\n", *(f"({number}) {note[0].upper()}{note[1:]}.\n\n" for number, note in enumerate(notes, 1))]
    return "".join([*parts, checked()]).rstrip("\n") + "\n"


def checked() -> str:
    """What takes too long for every test run, from its records."""
    states = json.loads((RECORDS / "cache-states-cpu.json").read_text(encoding="utf-8"))
    drafts = json.loads((RECORDS / "drafts-smollm2-cpu.json").read_text(encoding="utf-8"))
    settings = drafts["settings"]
    total = settings["prompts"] * settings["new_tokens"]
    rows = [
        f"| {window} | " + " | ".join(f"{sum(counts) / total:.0%}" for counts in ways.values()) + " |\n"
        for window, ways in drafts["equal_tokens"].items()
    ]
    seen = CHECKED.format(**states, **states["versions"], **settings) + "".join(rows)
    devices = json.loads((RECORDS / "devices-h200.json").read_text(encoding="utf-8"))
    memory = devices.pop("mebibytes")
    totals = {name: memory.pop(name) for name in ("cache", "plain")}
    rows = [f"| {name} | {mebibytes:.1f} |\n" for name, mebibytes in memory.items()]
    return seen + DEVICES.format(**devices, **devices["versions"], **devices["settings"], **totals) + "".join(rows)


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
