"""`gsrq generate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedTokenizerBase, TextStreamer

from ..cache import GSRQCache
from ..codebooks import GSRQCodebooks
from ..compat import CACHE_ARGUMENT
from ..loading import load_model, read_texts
from ..models import check_length
from .common import (
    BeamOption,
    CodebooksArgument,
    DeviceOption,
    DtypeOption,
    ModelArgument,
    Report,
    ResidualOption,
    RevisionOption,
    SinkOption,
    TokenOption,
)


def run(
    model: ModelArgument,
    codebooks: CodebooksArgument,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="UTF-8 file; goes before --prompt.", metavar="FILE")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token always.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    chat: Annotated[bool, typer.Option(help="Use the model's chat template, if it has one.")] = True,
    residual_length: ResidualOption = 128,
    sink_length: SinkOption = 4,
    beam_width: BeamOption = 1,
    dtype: DtypeOption = "auto",
    device: DeviceOption = None,
    model_revision: RevisionOption = None,
    token: TokenOption = None,
    as_json: bool = False,
) -> Report:
    """Generate text with a compressed cache.

    The text appears on standard output as it comes, and on standard error what the cache took.
    """
    parts = [*(read_texts([prompt_file]) if prompt_file else ()), *([prompt] if prompt else ())]
    if not parts:
        raise ValueError("There is nothing to continue: give --prompt TEXT, --prompt-file FILE, or both.")
    learned = GSRQCodebooks.from_pretrained(codebooks, token=token)
    loaded, tokenizer = load_model(model, dtype=dtype, device=device, revision=model_revision, token=token)
    cache = GSRQCache(
        learned,
        loaded,
        residual_length=residual_length,
        sink_length=sink_length,
        beam_width=beam_width,
    )
    inputs = _inputs(tokenizer, "\n\n".join(parts), chat).to(loaded.device)
    prompt_tokens = inputs["input_ids"].shape[1]
    # Nobody reads the last token.
    check_length(
        loaded,
        prompt_tokens + max_new_tokens - 1,
        f"The prompt has {prompt_tokens} and --max-new-tokens is {max_new_tokens}: shorten it, or generate less.",
    )
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    out = loaded.generate(
        **inputs,
        **{CACHE_ARGUMENT: cache},
        max_new_tokens=max_new_tokens,
        streamer=None if as_json else TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
        **sampling,
    )
    memory = cache.memory()
    figures = {
        "text": tokenizer.decode(out[0, prompt_tokens:], skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "new_tokens": out.shape[1] - prompt_tokens,
        "cache_bytes": memory.cache,
        "codebook_bytes": memory.codebooks,
        "plain_bytes": memory.plain,
        "digest": cache.codebooks.digest,
    }
    typer.echo(
        f"[{memory.tokens} tokens cached in {memory.cache / 2**20:.2f} MiB, a plain cache takes "
        f"{memory.plain / 2**20:.2f}; codebooks {memory.codebooks / 2**20:.1f} MiB]",
        err=True,
    )
    return Report(figures, "")


def _inputs(tokenizer: PreTrainedTokenizerBase, text: str, chat: bool) -> Any:
    if chat and tokenizer.chat_template:
        messages = [{"role": "user", "content": text}]
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    return tokenizer(text, return_tensors="pt")
