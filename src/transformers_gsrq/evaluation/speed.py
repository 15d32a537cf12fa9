"""Time and memory of decoding with a cache, over context lengths."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from ..cache import GSRQCache
from ..codebooks import GSRQCodebooks
from ..compat import CACHE_ARGUMENT, is_full_attention, native_layers, quantized_backends, quantized_cache
from ..memory import held_bytes
from ..models import check_length, input_device

QUANTIZED_BITS = (4, 2)


@dataclass(frozen=True)
class Speed:
    """One cache at one context length.

    Attributes:
        cache: Its name.
        context: Tokens of the prompt.
        prefill_seconds: Reading the prompt, once.
        token_ms: Median time of one decoded token, in milliseconds.
        token_ms_spread: Half of the range between the quartiles, in milliseconds.
        cache_bytes: Bytes that the cache holds at the end; None where the cache does not tell.
        codebook_bytes: Bytes of codebooks beside it.
        allocated_bytes: What the allocator of the GPU says that the cache holds at the end; None on other devices.
        prefill_peak_bytes: The most that reading the prompt took on the GPU, cache included; None on other devices.
        peak_bytes: The most that decoding took on the GPU, cache included; None on other devices.
    """

    cache: str
    context: int
    prefill_seconds: float
    token_ms: float
    token_ms_spread: float
    cache_bytes: int | None
    codebook_bytes: int
    allocated_bytes: int | None
    prefill_peak_bytes: int | None
    peak_bytes: int | None


def measure_speed(
    model: PreTrainedModel,
    codebooks: GSRQCodebooks,
    token_ids: torch.Tensor,
    context_lengths: list[int],
    *,
    new_tokens: int = 16,
    backend: str = "auto",
) -> Iterator[Speed]:
    """Prefill and decode with the model's plain cache, with the codebooks, and with transformers' quantized caches.

    The last are measured where their packages (`optimum-quanto`, `hqq`) are installed, and where all layers have full
    attention: they take no others. Every cache decodes the same text. Each has run at two short contexts before
    anything is measured (a compiler that has seen two lengths expects any); the first token after a prefill is not
    timed.

    Args:
        model: The model.
        codebooks: The codebooks.
        token_ids: int64 `[T]`, a text of at least the longest context plus `new_tokens` + 1.
        context_lengths: Tokens of the prompts.
        new_tokens: Tokens to time.
        backend: As for `GSRQCache`.

    Yields:
        One result for each context length and cache, as they are measured.

    Raises:
        ValueError: if the text is too short, longer than the model can read, or the codebooks are of another model.
    """
    needed = max(context_lengths) + new_tokens + 1
    if token_ids.numel() < needed:
        raise ValueError(
            f"The text has {token_ids.numel()} tokens; {needed} are needed for the longest context. "
            "Pass more text, shorter contexts, or no text."
        )
    check_length(model, needed, "Pass shorter contexts.")
    codebooks.config.check_model(model.config)
    makers: dict[str, Callable[[], Cache]] = {
        "plain": lambda: DynamicCache(config=model.config),
        f"gsrq {codebooks.config.bits():g} bits": lambda: GSRQCache(codebooks, model, backend=backend),
    }
    only_full = all(map(is_full_attention, native_layers(model.config)))
    for package in quantized_backends() if only_full else ():
        for nbits in QUANTIZED_BITS:
            makers[f"{package} {nbits} bits"] = lambda p=package, n=nbits: quantized_cache(model.config, p, n)  # type: ignore[misc]
    ids = token_ids[None].to(input_device(model))
    shortest = min(context_lengths)
    for make in makers.values():
        for context in (shortest, max(2, shortest // 2)):
            _measure(model, make(), "", ids, context, 2)
    for context in context_lengths:
        for name, make in makers.items():
            yield _measure(model, make(), name, ids, context, new_tokens)


@torch.no_grad()
def _measure(
    model: PreTrainedModel, cache: Cache, name: str, token_ids: torch.Tensor, context: int, new_tokens: int
) -> Speed:
    device = input_device(model)
    on_gpu = device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if on_gpu else 0

    def take_peak() -> int | None:
        """The most that was allocated since the last call, beyond what was there before."""
        if not on_gpu:
            return None
        peak = torch.cuda.max_memory_allocated(device) - before
        torch.cuda.reset_peak_memory_stats(device)
        return peak

    take_peak()
    began = now(model)
    model(input_ids=token_ids[:, :context], **{CACHE_ARGUMENT: cache}, use_cache=True, logits_to_keep=1)
    prefill = now(model) - began
    prefill_peak = take_peak()
    times = []
    for index in range(context, context + new_tokens + 1):
        began = now(model)
        model(input_ids=token_ids[:, index : index + 1], **{CACHE_ARGUMENT: cache}, use_cache=True)
        times.append((now(model) - began) * 1000)
    lower, median, upper = statistics.quantiles(times[1:], n=4)
    allocated = torch.cuda.memory_allocated(device) - before if on_gpu else None
    spread = (upper - lower) / 2
    return Speed(name, context, prefill, median, spread, *_bytes(cache), allocated, prefill_peak, take_peak())


def now(model: PreTrainedModel) -> float:
    """Seconds of a clock, once the model's device has done its work."""
    device = input_device(model)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _bytes(cache: Cache) -> tuple[int | None, int]:
    if isinstance(cache, GSRQCache):
        memory = cache.memory()
        return memory.cache, memory.codebooks
    if type(cache) is DynamicCache:
        return held_bytes([vars(layer) for layer in cache.layers]), 0
    # Packed tensors of other libraries do not tell their size in one way.
    return None, 0
