"""Decoding through `generate`: time of each token, first token, warm-up and memory, beside transformers' own caches.

    python benchmarks/generate.py --output lines.jsonl      # a line of JSON for each cache, as it is measured
    python benchmarks/generate.py --models qwen2.5-1.5b --contexts 8192 --caches dynamic static gsrq-captured
    python benchmarks/generate.py --models tiny --contexts 64 --tokens 4       # to try it, on a CPU too
    python benchmarks/generate.py --table lines.jsonl       # tables in Markdown of what was measured

Models have random weights and codebooks are random: speed and memory depend on neither. A token's time is when
`generate` has it on the host. The rates are stages of 128 channels of keys and values: 12,20 is 1 bit.

Long prompts are read once and kept in a file by the compressed caches, and plain caches of very many tokens are filled
with random states; they have no time to the first token. `--budget` ends the run between two lines.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from base import Comparison, add_base_arguments, write_beside_base
from device_work import kernel_times, our_kernels
from lines import add_arguments
from models import make_codebooks
from steps import DEVICE, SEED, SHAPES, Clock, draft_options, random_model, random_tokens, run_generate
from transformers import Cache, CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from transformers_gsrq import GSRQCache, GSRQCodebooks, detach
from transformers_gsrq.compat import CACHE_ARGUMENT, quantized_backends, quantized_cache
from transformers_gsrq.config import head_geometry

PLAIN = ("dynamic", "static", "dynamic-flash", "quanto-4")
# How `generate` is told to decode with ours: replaying a captured step is the default where it can.
OURS: dict[str, dict[str, Any]] = {
    "gsrq-captured": {},
    "gsrq-compiled": {"compile_config": CompileConfig()},
    "gsrq-eager": {"disable_compile": True},
}
WAYS = ("assisted", "prompt lookup")
# Steps between the first token and those that are timed, in which a step is compiled or captured.
WARM_UP = 12
# A step no slower than this many medians is a fast one.
FAST = 1.5
# A static cache needs a mask of the prompt squared, so longer ones are filled.
LONGEST_STATIC_PROMPT = 32768
# Tokens in all rows from which on a plain cache is filled, and one row of a compressed one is read and repeated.
LARGEST_PROMPT = 150_000
BANDWIDTH_BYTES = 2**30
# What names a measurement, and what of it is better smaller.
COMPARISON = Comparison(
    keys=("what", "model", "context", "batch", "stages", "cache", "way"),
    measures=("token_ms", "step_ms", "first_token_s", "until_fast_s", "peak_mb"),
    ours=lambda line: line["cache"].startswith("gsrq"),
)


class NotHere(Exception):
    """A cache cannot be measured here, for the reason given."""


@dataclass
class Bench:
    """One model, its codebooks and what was made ready for them.

    Attributes:
        name: The model's shape.
        model: The model.
        codebooks: Random codebooks.
        stages: Stages of keys and values.
        tokens: Tokens to time.
        prefill_chunk: Tokens that `generate` reads of a prompt at once; all by default.
        folder: Where caches that have read a prompt are kept.
        weight_bytes: Memory of the model.
        first_tokens: Seconds to the first token with a compressed cache, by context and rows read.
    """

    name: str
    model: PreTrainedModel
    codebooks: GSRQCodebooks
    stages: str
    tokens: int
    prefill_chunk: int | None
    folder: Path
    weight_bytes: int
    first_tokens: dict[tuple[int, int], float] = field(default_factory=dict)

    def reading(self) -> dict[str, Any]:
        """Keywords of `generate` about the prompt."""
        return {} if self.prefill_chunk is None else {"prefill_chunk_size": self.prefill_chunk}


def allocated() -> int:
    """Bytes on the GPU, once everything that can go is gone; 0 without one."""
    gc.collect()
    if DEVICE != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def take_peaks(before: int) -> dict[str, float]:
    """The most that was taken beside `before` bytes since the last call, in MB; nothing without a GPU."""
    if DEVICE != "cuda":
        return {}
    peaks = {"peak_mb": torch.cuda.max_memory_allocated(), "reserved_mb": torch.cuda.max_memory_reserved()}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return {name: round((peak - before) / 1e6, 1) for name, peak in peaks.items()}


def time_tokens(bench: Bench, prompt: torch.Tensor, before: int, options: dict[str, Any]) -> dict[str, Any]:
    """Generate under a clock and summarize it."""
    peaks: dict[str, float] = {}
    take_peaks(before)
    clock = Clock({1: lambda: peaks.update(take_peaks(before))})
    run_generate(bench.model, prompt, 1 + WARM_UP + bench.tokens, clock, **options)
    steps = [second * 1e3 for second in clock.seconds[1:]]
    lower, median, upper = statistics.quantiles(steps[-bench.tokens :], n=4)
    fast = next(index for index, step in enumerate(steps) if step <= FAST * median)
    prompt_peak = {"prompt_peak_mb": peaks["peak_mb"]} if peaks else {}
    return {
        "token_ms": round(median, 3),
        "quartiles_ms": [round(lower, 3), round(upper, 3)],
        "mean_ms": round(statistics.mean(steps[-bench.tokens :]), 3),
        "tokens": bench.tokens,
        "first_token_s": round(clock.seconds[0], 4),
        "until_fast_s": round(sum(steps[: fast + 1]) / 1e3, 3),
        **prompt_peak,
        **take_peaks(before),
    }


def fill(cache: Cache, model: PreTrainedModel, batch: int, count: int) -> Cache:
    """Give a plain cache so many random tokens."""
    heads, dim = head_geometry(model.config)
    states = torch.randn(batch, heads, count, dim, device=model.device, dtype=model.dtype)
    for index in range(model.config.num_hidden_layers):
        cache.update(states, states, index)
    return cache


def time_plain(bench: Bench, name: str, context: int, batch: int) -> dict[str, Any]:
    """One of transformers' own caches, on a model that knows nothing of ours."""
    detach(bench.model)
    config = bench.model.config
    if name == "dynamic-flash" and importlib.util.find_spec("flash_attn") is None:
        raise NotHere("flash-attn is not installed")
    if name == "quanto-4" and "quanto" not in quantized_backends():
        raise NotHere("optimum-quanto is not installed")
    before = allocated()
    fills = batch * context > LARGEST_PROMPT or (name == "static" and context > LONGEST_STATIC_PROMPT)
    options: dict[str, Any] = bench.reading()
    if name == "static" and not fills:
        options["cache_implementation"] = "static"
    else:
        if name == "static":
            cache = StaticCache(config=config, max_cache_len=context + 1 + WARM_UP + bench.tokens)
        else:
            cache = quantized_cache(config, "quanto", 4) if name == "quanto-4" else DynamicCache(config=config)
        options[CACHE_ARGUMENT] = fill(cache, bench.model, batch, context - 1) if fills else cache
        del cache
    try:
        if name == "dynamic-flash":
            bench.model.set_attn_implementation("flash_attention_2")
        found = time_tokens(bench, random_tokens(bench.model, batch, context), before, options)
    finally:
        bench.model.set_attn_implementation("sdpa")
    return {**found, "first_token_s": None} if fills else found


def read_prompt(bench: Bench, context: int, batch: int) -> Path:
    """A file of the compressed cache that has read a prompt; made once."""
    path = bench.folder / f"{context}-{batch}.safetensors"
    if not path.exists():
        cache = GSRQCache(bench.codebooks, bench.model, max_length=context)
        clock = Clock()
        prompt = random_tokens(bench.model, batch, context)
        run_generate(bench.model, prompt, 1, clock, **bench.reading(), **{CACHE_ARGUMENT: cache})
        bench.first_tokens[context, batch] = round(clock.seconds[0], 4)
        cache.save(path)
    return path


def load_prompt(bench: Bench, context: int, batch: int, room: int) -> tuple[GSRQCache, int]:
    """A compressed cache of `context` tokens with room for more, and the rows that read the prompt themselves."""
    read = 1 if batch * context > LARGEST_PROMPT else batch
    cache = GSRQCache.load(read_prompt(bench, context, read), bench.codebooks, bench.model, max_length=context + room)
    if read < batch:
        cache.batch_repeat_interleave(batch)
    return cache, read


def continued_prompt(bench: Bench, context: int, batch: int) -> torch.Tensor:
    """The prompt of `load_prompt` and one token more."""
    return torch.cat([random_tokens(bench.model, batch, context), random_tokens(bench.model, batch, 1)], -1)


def time_ours(bench: Bench, name: str, context: int, batch: int) -> dict[str, Any]:
    """A compressed cache, decoding as `name` says."""
    cache, read = load_prompt(bench, context, batch, 2 + WARM_UP + bench.tokens)
    if name != "gsrq-eager" and not (DEVICE == "cuda" and cache.is_compileable):
        raise NotHere("generate decodes in eager mode with this cache here")
    allocated()
    prompt = continued_prompt(bench, context, batch)
    options = {**OURS[name], CACHE_ARGUMENT: cache}
    found = time_tokens(bench, prompt, bench.weight_bytes, options)
    memory = cache.memory()
    found.pop("prompt_peak_mb", None)
    first = bench.first_tokens[context, batch] if read == batch else None
    sizes = {"cache_mb": memory.cache / 1e6, "codebooks_mb": memory.codebooks / 1e6}
    return {**found, "first_token_s": first, **{key: round(size, 2) for key, size in sizes.items()}}


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a copy on the device reads and writes."""
    source, target = (torch.empty(BANDWIDTH_BYTES, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    times = []
    for _ in range(10):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        target.copy_(source)
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) / 1e3)
    return 2 * BANDWIDTH_BYTES / statistics.median(times)


def find_floor(bench: Bench, context: int, batch: int) -> dict[str, Any]:
    """What a token takes at least: every weight read once at the speed of a copy, and our attention kernels."""
    if DEVICE != "cuda":
        raise NotHere("needs a GPU")
    model, steps = bench.model, 4
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if not model.config.tie_word_embeddings:
        embedding = model.get_input_embeddings().weight
        weights -= embedding.numel() * embedding.element_size()
    cache, _ = load_prompt(bench, context, batch, 2 * WARM_UP)
    options = {**OURS["gsrq-eager"], CACHE_ARGUMENT: cache}
    times = kernel_times(model, continued_prompt(bench, context, batch), WARM_UP // 2, steps, options)
    names = our_kernels()
    attention = sum(took for name, took in times.items() if name in names) / 1e3
    weights_ms = weights / copy_bandwidth() * 1e3
    return {
        "token_ms": round(weights_ms + attention, 3),
        "weights_ms": round(weights_ms, 3),
        "attention_ms": round(attention, 3),
        "device_ms": round(sum(times.values()) / 1e3, 3),
        "copy_tb_per_s": round(copy_bandwidth() / 1e12, 3),
    }


def time_drafts(bench: Bench, name: str, way: str, context: int, batch: int) -> dict[str, Any]:
    """Time of a step that verifies drafts. Nothing is compiled: queries differ in number."""
    options: dict[str, Any] = {"disable_compile": True}
    prompt = random_tokens(bench.model, batch, context)
    if name == "gsrq-eager":
        cache: Cache = GSRQCache(bench.codebooks, bench.model)
    else:
        detach(bench.model)
        cache = DynamicCache(config=bench.model.config)
    options |= bench.reading()
    clock = Clock()
    options |= {CACHE_ARGUMENT: cache, **draft_options(way, prompt, random_model(bench.name, num_hidden_layers=1))}
    run_generate(bench.model, prompt, 1 + WARM_UP + bench.tokens, clock, **options)
    # Drafts are shorter at the end.
    steps, sizes = clock.seconds[3:-6], clock.sizes[3:-6]
    lower, median, upper = statistics.quantiles([second * 1e3 for second in steps], n=4)
    return {
        "step_ms": round(median, 3),
        "quartiles_ms": [round(lower, 3), round(upper, 3)],
        "steps": len(steps),
        "tokens_a_step": round(statistics.mean(sizes), 2),
    }


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What was measured, or why not; nothing of it stays in memory."""
    try:
        return measure()
    except NotHere as error:
        return {"missing": str(error)}
    except torch.OutOfMemoryError:
        return {"missing": "out of memory"}
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        return {"failed": f"{type(error).__name__}: {error}"[:500]}
    finally:
        # As in a new process: sizes of the last case do not make the next one's compiled code general, and slower.
        torch._dynamo.reset()
        allocated()


def make_bench(name: str, stages: str, arguments: argparse.Namespace, folder: Path) -> Bench:
    """A model and its codebooks; libraries and kernels are loaded and compiled, so that no first token pays for it."""
    before = allocated()
    model = random_model(name)
    prompt = random_tokens(model, 1, 320)
    run_generate(model, prompt, 4, Clock(), disable_compile=True)
    weight_bytes = allocated() - before
    key, value = (int(count) for count in stages.split(","))
    codebooks = make_codebooks(model, key_bits=key * 8 / 128, value_bits=value * 8 / 128)
    cache = GSRQCache(codebooks, model)
    run_generate(model, prompt, 4, Clock(), disable_compile=True, **{CACHE_ARGUMENT: cache})
    return Bench(name, model, codebooks, stages, arguments.tokens, arguments.prefill_chunk, folder, weight_bytes)


def measure_all(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every case, cache after cache, until the budget is spent."""
    began = time.monotonic()
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for name, stages in itertools.product(arguments.models, arguments.stages):
        with tempfile.TemporaryDirectory() as folder:
            bench = make_bench(name, stages, arguments, Path(folder))
            for about, measure in cases(bench, arguments):
                if arguments.budget is not None and time.monotonic() - began > arguments.budget:
                    print(f"The budget of {arguments.budget} s is spent.", file=sys.stderr)
                    return
                about = {"run": run, "model": name, "stages": stages, "seed": SEED, **about}
                yield {"cudnn_sdpa": arguments.cudnn, **about, **attempt(measure)}
            del bench, about, measure


def cases(
    bench: Bench, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """What to measure of a model, each as what it is and a function."""
    for batch, context in itertools.product(arguments.batches, arguments.contexts):
        about = {"what": "tokens", "context": context, "batch": batch}
        for name in arguments.caches:
            timed = time_ours if name in OURS else time_plain
            yield {**about, "cache": name}, functools.partial(timed, bench, name, context, batch)
        if not set(OURS).isdisjoint(arguments.caches):
            yield {**about, "cache": "floor"}, functools.partial(find_floor, bench, context, batch)
        if batch > 1 or context not in arguments.draft_contexts:
            continue
        for way, name in itertools.product(WAYS, ("dynamic", "gsrq-eager")):
            measured = functools.partial(time_drafts, bench, name, way, context, batch)
            yield {**about, "what": "drafts", "way": way, "cache": name}, measured


def tables(lines: Iterable[dict[str, Any]]) -> str:
    """Markdown of what was measured; in brackets the ratio to the fastest plain cache of the same run."""
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for line in lines:
        case = tuple(line[key] for key in ("what", "run", "model", "stages", "context", "batch")) + (line.get("way"),)
        groups.setdefault(case, {})[line["cache"]] = line
    tokens = {case: rows for case, rows in groups.items() if case[0] == "tokens"}
    drafts = {case: rows for case, rows in groups.items() if case[0] == "drafts"}
    parts = [
        table("Milliseconds a token", tokens, "token_ms", [*PLAIN, *OURS, "floor"], PLAIN),
        table("Seconds to the first token", tokens, "first_token_s", [*PLAIN, *OURS], ("dynamic",)),
        table("Seconds from there to the first fast token", tokens, "until_fast_s", [*PLAIN, *OURS], ("static",)),
        table("MB beside the model while decoding", tokens, "peak_mb", [*PLAIN, *OURS], ("dynamic",)),
        table("Milliseconds a step with drafts", drafts, "step_ms", ["dynamic", "gsrq-eager"], ("dynamic",)),
    ]
    return "\n".join(part for part in parts if part)


def table(
    title: str,
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]],
    measure: str,
    caches: list[str],
    baselines: tuple[str, ...],
) -> str:
    """One measure of all caches as a table; empty if nothing was measured."""
    caches = [name for name in caches if any(measure in rows.get(name, {}) for rows in groups.values())]
    if not caches:
        return ""
    lines = [f"{title}:", "", f"| model, stages | context × rows | {' | '.join(caches)} |"]
    lines.append("|---" * (2 + len(caches)) + "|")
    for (_, _, model, stages, context, batch, way), rows in groups.items():
        known = [rows[name][measure] for name in baselines if rows.get(name, {}).get(measure)]
        cells = []
        for name in caches:
            row = rows.get(name, {})
            value = row.get(measure)
            text = row.get("missing", "failed" if "failed" in row else "–") if value is None else f"{value:,.4g}"
            if value is not None and known and name in OURS:
                text += f" ({value / min(known):.2f})"
            cells.append(text)
        what = f"{model}, {stages.replace(',', ' + ')}" + (f", {way}" if way else "")
        lines.append(f"| {what} | {context:,} × {batch} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["qwen2.5-1.5b", "llama-3-8b"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[8192, 32768, 131072, 1024])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--caches", nargs="+", choices=[*PLAIN, *OURS], default=[*PLAIN, *OURS])
    parser.add_argument("--draft-contexts", type=int, nargs="*", default=[8192], help="where drafts are timed as well")
    parser.add_argument("--stages", nargs="+", default=["12,20"], metavar="K,V", help="of keys and values")
    parser.add_argument("--tokens", type=int, default=48, help="to time with each cache, 2 or more")
    parser.add_argument("--prefill-chunk", type=int, help="tokens of a prompt to read at once; all by default")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="begin no measurement after so long")
    parser.add_argument("--cudnn", action="store_true", help="let torch take cuDNN's attention for plain caches")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print tables of these lines instead")
    add_arguments(parser)
    add_base_arguments(parser)
    arguments = parser.parse_args()
    if arguments.table:
        print(tables(map(json.loads, arguments.table.read_text(encoding="utf-8").splitlines())))
        return
    # torch 2.11 hands a plain cache's attention to cuDNN, which plans anew for every length.
    torch.backends.cuda.enable_cudnn_sdp(arguments.cudnn)
    write_beside_base(measure_all(arguments), arguments, COMPARISON)


if __name__ == "__main__":
    main()
