"""`gsrq bench`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer

from ..codebooks import GSRQCodebooks
from ..evaluation.records import circumstances
from ..evaluation.speed import Speed, measure_speed
from ..loading import load_model, read_texts
from .common import (
    CodebooksArgument,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Report,
    RevisionOption,
    TextOption,
    TokenOption,
    table,
)


def run(
    model: ModelArgument,
    codebooks: CodebooksArgument,
    contexts: Annotated[str, typer.Option(help="Context lengths in tokens, separated by commas.")] = "512,1024,2048",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to time at each length.")] = 16,
    text: TextOption = None,
    backend: Annotated[str, typer.Option(help="Of the compressed cache: auto, torch or triton.")] = "auto",
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    model_revision: RevisionOption = None,
    token: TokenOption = None,
) -> Report:
    """Measure time and memory per token.

    Over context lengths: the plain cache, CODEBOOKS, and transformers' own quantized caches if optimum-quanto or hqq
    is installed. Without --text random tokens are read: times and bytes do not depend on what the text says.
    """
    lengths = _lengths(contexts)
    learned = GSRQCodebooks.from_pretrained(codebooks, token=token)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, revision=model_revision, token=token)
    needed = max(lengths) + new_tokens + 1
    if text:
        token_ids = torch.tensor([i for part in read_texts(text) for i in tokenizer(part, verbose=False)["input_ids"]])
    else:
        token_ids = torch.randint(len(tokenizer), (needed,), generator=torch.Generator().manual_seed(0))
    results = []
    for speed in measure_speed(loaded, learned, token_ids, lengths, new_tokens=new_tokens, backend=backend):
        typer.echo(f"{speed.cache}, {speed.context} tokens: {speed.token_ms:.1f} ms a token", err=True)
        results.append(speed)
    figures: dict[str, Any] = {**circumstances(loaded), "backend": backend}
    figures["results"] = [asdict(speed) for speed in results]
    note = f"Batch 1, {figures['dtype']} on {figures['device']}; median of {new_tokens} tokens."
    columns = len(_HEAD) if torch.cuda.is_available() else _HEAD.index("GPU MiB")
    rows = [_HEAD, *(_row(speed, new_tokens) for speed in results)]
    return Report(figures, f"{table([row[:columns] for row in rows])}\n{note}")


def _lengths(contexts: str) -> list[int]:
    try:
        lengths = [int(number) for number in contexts.split(",")]
    except ValueError:
        lengths = []
    if not lengths or min(lengths) < 2:
        raise ValueError(f"--contexts must be whole numbers from 2 up, separated by commas, got {contexts!r}.")
    return lengths


_HEAD = [
    "cache", "context", "prefill s", "ms/token", "+-", "cache MiB", "bytes/token", "codebooks MiB", "GPU MiB",
    "prefill peak MiB", "peak MiB",
]  # fmt: skip


def _row(speed: Speed, new_tokens: int) -> list[str]:
    # One more token warms the decoding up.
    held, tokens = speed.cache_bytes, speed.context + new_tokens + 1
    return [
        speed.cache,
        f"{speed.context:,}",
        f"{speed.prefill_seconds:.2f}",
        f"{speed.token_ms:.1f}",
        f"{speed.token_ms_spread:.1f}",
        "?" if held is None else f"{held / 2**20:.2f}",
        "?" if held is None else f"{held / tokens:,.0f}",
        f"{speed.codebook_bytes / 2**20:.1f}",
        *(
            "-" if held is None else f"{held / 2**20:.2f}"
            for held in (speed.allocated_bytes, speed.prefill_peak_bytes, speed.peak_bytes)
        ),
    ]
