"""Whole models: time to the first token, tokens a second and memory over contexts; the largest context that fits.

    python benchmarks/models.py                       # a line of JSON for each cache and context
    python benchmarks/models.py --backend triton --contexts 1024 32768
    python benchmarks/models.py --model Qwen/Qwen2.5-1.5B --contexts 32768
    python benchmarks/models.py --largest             # fills each cache until the GPU is full
    python benchmarks/models.py --base HEAD~1         # that commit as well, and the ratio to it

Without --model, the model has the shape of Qwen2.5-1.5B and random weights. Codebooks are random: neither speed nor
memory depends on them. Transformers' quantized caches are measured where optimum-quanto or hqq is installed.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from base import Comparison, add_base_arguments, write_beside_base
from lines import add_arguments
from transformers import Cache, DynamicCache, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from transformers_gsrq import GSRQCache, GSRQCodebooks, GSRQConfig
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.config import KINDS, head_geometry
from transformers_gsrq.evaluation.speed import measure_speed
from transformers_gsrq.loading import load_model

CONTEXTS = (1024, 8192, 32768, 131072)
# Key and value bits: 1 bit on average, divided as perplexity and retrieval together ask for.
KEY_BITS, VALUE_BITS = 0.75, 1.25
# The largest context is looked for from this many tokens on, and found to this share of itself.
FIRST, PRECISION = 65536, 0.02
COMPARISON = Comparison(
    keys=("what", "model", "context", "cache", "backend", "compiled"),
    measures=("prefill_seconds", "token_ms", "cache_bytes", "peak_bytes"),
    ours=lambda line: line["cache"].startswith("gsrq"),
)


def make_model(name: str | None, tiny: bool) -> PreTrainedModel:
    """A model by name, or random weights in Qwen2.5-1.5B's shape, or two small layers to try the script with."""
    if name is not None:
        return load_model(name)[0].eval()
    shape = {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "vocab_size": 151936}
    if tiny:
        shape = {"hidden_size": 1536, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    config = Qwen2Config(
        **shape, num_attention_heads=12, num_key_value_heads=2, max_position_embeddings=2**27, dtype=torch.bfloat16
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return Qwen2ForCausalLM(config).to(torch.bfloat16).eval()


def make_codebooks(
    model: PreTrainedModel, key_bits: float = KEY_BITS, value_bits: float = VALUE_BITS
) -> GSRQCodebooks:
    """Random codebooks, of 1 bit by default, for heads of 128 channels."""
    config = GSRQConfig.for_model(model.config, key_bits=key_bits, value_bits=value_bits, subspace_dim=128)
    gains, shapes = {}, {}
    for index, kind in itertools.product(config.layers, KINDS):
        size = (*config.code_shape(index, kind), config.num_centroids)
        shapes[index, kind] = F.normalize(torch.randn(*size, config.subspace_dim(kind)), dim=-1)
        gains[index, kind] = torch.rand(*size)
    return GSRQCodebooks(config, gains, shapes)


def time_contexts(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every cache at every context."""
    model = make_model(arguments.model, arguments.tiny)
    if arguments.compile:
        model.forward = torch.compile(model.forward, mode=arguments.compile)  # type: ignore[method-assign]
    tokens = torch.randint(0, model.config.vocab_size, (max(arguments.contexts) + 64,))
    named = {} if arguments.model is None else {"model": arguments.model}
    for speed in measure_speed(
        model, make_codebooks(model), tokens, arguments.contexts, new_tokens=32, backend=arguments.backend
    ):
        line = {"what": "model", **vars(speed), "backend": arguments.backend, "compiled": arguments.compile, **named}
        yield {**line, "cudnn_sdpa": not arguments.no_cudnn, "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF")}


def find_largest(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """How many tokens a cache holds beside the model and still decodes one more before the GPU is full.

    The caches are filled with random states and codes, as if they had been loaded: no time goes into a prompt, and
    what reading one would take besides is not counted.
    """
    model = make_model(arguments.model, arguments.tiny)
    codebooks = make_codebooks(model)
    makers: dict[str, Callable[[int], Cache]] = {
        "plain": lambda count: fill_plain(model, count),
        f"gsrq {codebooks.config.bits():g} bits": lambda count: fill_compressed(
            model, GSRQCache(codebooks, model, backend=arguments.backend), count
        ),
    }
    for name, make in makers.items():
        yield {
            "what": "largest context",
            "cache": name,
            "tokens": largest(partial(_decodes, model, make), arguments.limit),
        }


def largest(fits_at: Callable[[int], bool], limit: int) -> int:
    """Double until it does not fit, then halve the interval until it is within `PRECISION`."""
    fits, fails = 0, limit + 1
    count = min(FIRST, limit)
    while count > fits:
        if fits_at(count):
            fits = count
        else:
            fails = count
        count = min(2 * fits, limit) if fails > limit else (fits + fails) // 2
        if fails - fits < PRECISION * fits:
            break
    return fits


@torch.no_grad()
def _decodes(model: PreTrainedModel, make: Callable[[int], Cache], count: int) -> bool:
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        model(token, **{CACHE_ARGUMENT: make(count)}, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return False
    finally:
        if model.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def random_states(model: PreTrainedModel, count: int) -> torch.Tensor:
    """States `[1, H, count, D]`."""
    heads, dim = head_geometry(model.config)
    return torch.randn(1, heads, count, dim, device=model.device, dtype=model.dtype)


def fill_plain(model: PreTrainedModel, count: int) -> Cache:
    """A plain cache of `count` random tokens."""
    cache = DynamicCache(config=model.config)
    for index in range(model.config.num_hidden_layers):
        cache.update(random_states(model, count), random_states(model, count), index)
    return cache


def fill_compressed(model: PreTrainedModel, cache: GSRQCache, count: int) -> GSRQCache:
    """A compressed cache of `count` random tokens, all but the window coded, as `GSRQCache.load` leaves it."""
    options, config = cache.layers[0].options, cache.codebooks.config
    stored = count - options.residual_length
    for index in config.layers:
        tensors = {name: random_states(model, options.residual_length) for name in ("keys", "values")}
        for kind in KINDS:
            tensors[f"{kind}_sinks"] = random_states(model, options.sink_length)
            size = (1, *config.code_shape(index, kind), stored - options.sink_length)
            tensors[f"{kind}_codes"] = torch.randint(0, 256, size, dtype=torch.uint8, device=model.device)
        cache.layers[index].fill(tensors, stored, long_rotary=False)
    positions = torch.arange(count, dtype=torch.int32, device=model.device)[None]
    cache.tokens.fill(count, stored, positions, torch.zeros(1, dtype=torch.long, device=model.device))
    return cache


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, Hub id or GGUF file")
    parser.add_argument("--contexts", type=int, nargs="+", default=list(CONTEXTS))
    parser.add_argument("--backend", default="auto", help="of the compressed cache: auto, torch or triton")
    parser.add_argument("--largest", action="store_true", help="find the largest context that fits instead")
    parser.add_argument("--no-cudnn", action="store_true", help="keep cuDNN's attention out of the plain cache's way")
    parser.add_argument("--limit", type=int, default=2**27, help="look for no larger context than this")
    parser.add_argument("--compile", nargs="?", const="default", metavar="MODE", help="torch.compile the model")
    parser.add_argument("--tiny", action="store_true", help="two small layers, to try the script")
    add_arguments(parser)
    add_base_arguments(parser)
    arguments = parser.parse_args()
    # torch 2.11 hands a plain cache's attention to cuDNN, which plans anew for every length.
    torch.backends.cuda.enable_cudnn_sdp(not arguments.no_cudnn)
    results = find_largest(arguments) if arguments.largest else time_contexts(arguments)
    write_beside_base(results, arguments, COMPARISON)


if __name__ == "__main__":
    main()
