"""Time of the kernels beside the attention they replace, over contexts, shapes and rates.

    python benchmarks/run.py                      # a line of JSON for each measurement
    python benchmarks/run.py --contexts 8192 65536 --rates 16+16
    python benchmarks/run.py --base HEAD~1        # that commit as well, and the ratio to it

The operators' tests run first, and nothing is timed if they fail. Times are medians in microseconds; `graph` replays a
CUDA graph, `eager` includes what Python costs. Baselines run in the same process: what `scaled_dot_product_attention`
takes by itself, FlashAttention and cuDNN as torch has them, flash-attn and FlashInfer where they are installed.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from base import Comparison, add_base_arguments, write_beside_base
from lines import add_arguments
from naive import naive_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from transformers_gsrq.ops.triton import decode_attention as attention
from transformers_gsrq.ops.triton.encode import encode

ROOT = Path(__file__).parents[1]
# KV heads, query heads of each, head_dim.
SHAPES = {"llama-3-8b": (8, 4, 128), "qwen2.5-1.5b": (2, 6, 128), "multi-head": (32, 1, 128)}
# Key and value stages of 128 channels: 2, 1, 1, 0.75 and 0.375 bits.
RATES = ("32+32", "16+16", "8+24", "12+12", "4+8")
CONTEXTS = (1024, 8192, 32768, 65536, 131072, 262144)
SINKS, WINDOW = 4, 128 + 32
# Four for each SM of an H100.
NAIVE_PROGRAMS = 528
COMPARISON = Comparison(
    keys=("operator", "shape", "context", "batch", "what"),
    measures=("eager", "graph", "keys.eager", "keys.graph", "values.eager", "values.graph"),
    ours=lambda line: line.get("what", "gsrq").startswith("gsrq"),
)


def microseconds(function: Callable[[], Any]) -> dict[str, float]:
    """Median times, and half the range from the 20th to the 80th percentile of the replayed graph."""
    eager = triton.testing.do_bench(function, warmup=10, rep=40, return_mode="median")
    times = triton.testing.do_bench_cudagraph(function, rep=20, return_mode="all")
    low, middle, high = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {
        "eager": round(eager * 1e3, 1),
        "graph": round(middle * 1e3, 1),
        "spread": round((high - low) * 500, 1),
    }


def decode_inputs(shape: str, context: int, rate: str, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Random inputs of `decode_attention`, and of `naive_attention` on the same codes."""
    heads, groups, dim = SHAPES[shape]
    stages = [int(part) for part in rate.split("+")]

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

    def codes(count: int) -> torch.Tensor:
        return torch.randint(0, 256, (batch, heads, count, context), device="cuda", dtype=torch.uint8)

    inv_freq = 500000.0 ** (-torch.arange(0, dim, 2, device="cuda") / dim)
    key_centroids, value_centroids = (random(heads, count, 256, dim) * count**-0.5 for count in stages)
    angles = torch.arange(SINKS, context + SINKS, device="cuda")[:, None] * inv_freq
    counts = dict.fromkeys(attention.Count, 0) | {
        attention.Count.NUM_CODES: context,
        attention.Count.FIRST_POSITION: SINKS,
        attention.Count.NUM_SINKS: SINKS,
        attention.Count.NUM_STORED: SINKS + context,
        attention.Count.NUM_EXACT: WINDOW,
    }
    workspace = attention.decode_workspace_bytes(
        batch=batch,
        num_heads=heads,
        num_query_heads=heads * groups,
        num_queries=1,
        head_dim=dim,
        value_stages=stages[1],
        value_subspace_dim=dim,
        capacity=context,
        device=torch.device("cuda"),
    )
    shared = {
        "query": random(batch, heads * groups, 1, dim),
        "key_codes": codes(stages[0]),
        "value_codes": codes(stages[1]),
        "value_centroids": value_centroids,
    }
    naive = {"key_centroids": key_centroids, "cos": angles.cos(), "sin": angles.sin(), "num_programs": NAIVE_PROGRAMS}
    ours = {
        "keys": attention.prepare_keys(key_centroids, heads, dim, inv_freq),
        "key": random(batch, heads, 1, dim),
        "value": random(batch, heads, 1, dim),
        "exact_keys": random(batch, heads, SINKS + WINDOW + 1, dim),
        "exact_values": random(batch, heads, SINKS + WINDOW + 1, dim),
        "counts": torch.tensor(list(counts.values()), dtype=torch.int32, device="cuda")[:, None].repeat(1, batch),
        "workspace": torch.empty(workspace, dtype=torch.uint8, device="cuda"),
        "sink_length": SINKS,
        "mask": None,
        "scaling": dim**-0.5,
    }
    return {**shared, **ours}, {**shared, **naive}


def plain_attentions(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    """Attention to bf16 states, named, each giving `[B, Hq, 1, D]`.

    Args:
        query: `[B, Hq, 1, D]`.
        keys: `[B, H, T, D]`.
        values: `[B, H, T, D]`.
    """
    sdpa = functools.partial(
        F.scaled_dot_product_attention, query, keys, values, enable_gqa=query.shape[1] > keys.shape[1]
    )
    yield "sdpa", sdpa
    for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
        yield f"sdpa, {name}", sdpa_kernel(backend)(sdpa)
    if importlib.util.find_spec("flash_attn"):
        from flash_attn import flash_attn_with_kvcache

        tokens_first = [states.transpose(1, 2).contiguous() for states in (query, keys, values)]
        yield f"flash-attn {version('flash-attn')}", lambda: flash_attn_with_kvcache(*tokens_first).transpose(1, 2)
    if importlib.util.find_spec("flashinfer"):
        yield f"flashinfer {version('flashinfer-python')}", plan_flashinfer(query, keys, values)


def plan_flashinfer(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """FlashInfer's decoding of a batch from pages of 16 tokens."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    batch, heads, context, dim = keys.shape
    pages = [states.transpose(1, 2).reshape(-1, 16, heads, dim).contiguous() for states in (keys, values)]
    groups = query.shape[1] // heads
    # Tensor cores from four query heads to a KV head on, as its documentation advises.
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(2**27, dtype=torch.uint8, device="cuda"), "NHD", use_tensor_cores=groups >= 4
    )
    first_pages = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * (context // 16)
    indices = torch.arange(batch * context // 16, dtype=torch.int32, device="cuda")
    last_lengths = torch.full((batch,), 16, dtype=torch.int32, device="cuda")
    wrapper.plan(
        first_pages, indices, last_lengths, query.shape[1], heads, dim, 16,
        q_data_type=query.dtype, kv_data_type=keys.dtype,
    )  # fmt: skip
    return lambda: wrapper.run(query[:, :, 0], tuple(pages))[:, :, None]


def time_plain(heads: int, groups: int, dim: int, context: int, batch: int) -> tuple[dict[str, Any], float]:
    """Attention to bf16 states by name, and the bytes a microsecond that a copy of them reads and writes."""
    query = torch.randn(batch, heads * groups, 1, dim, device="cuda", dtype=torch.bfloat16)
    keys = torch.randn(batch, heads, context, dim, device="cuda", dtype=torch.bfloat16)
    values = torch.randn_like(keys)
    times: dict[str, Any] = {}
    _, sdpa = next(plain_attentions(query, keys, values))
    expected = sdpa()
    for name, attend in plain_attentions(query, keys, values):
        error = ((attend() - expected).norm() / expected.norm()).item()
        if not error < 0.02:
            raise SystemExit(f"{name} differs from sdpa by {error:.3f}: its time would mean nothing.")
        times[name] = microseconds(attend)
    source, target = (torch.empty(2**28, dtype=torch.uint8, device="cuda") for _ in range(2))
    copied = microseconds(lambda: target.copy_(source))
    return times, 2 * 2**28 / copied["graph"]


def time_decoding(shape: str, context: int, rates: list[str], batch: int) -> Iterator[dict[str, Any]]:
    """Attention to bf16 states and ours; `floor` is what reading their inputs once takes at this card's speed."""
    heads, groups, dim = SHAPES[shape]
    case = {"operator": "decode", "shape": shape, "context": context, "batch": batch}
    if 4 * batch * heads * context * dim > 30e9:
        return
    plain, bytes_per_us = time_plain(heads, groups, dim, context, batch)
    floor = round(4 * batch * heads * context * dim / bytes_per_us, 1)
    for name, times in plain.items():
        yield {**case, "what": name, **times, "floor": floor}
    sdpa = plain["sdpa"]
    for rate in rates:
        inputs, naive = decode_inputs(shape, context, rate, batch)
        check_naive(inputs, naive)
        read = inputs["key_codes"].numel() + inputs["value_codes"].numel()
        read += inputs["keys"].tables.nbytes + inputs["value_centroids"].nbytes
        ours = microseconds(lambda inputs=inputs: attention.decode_attention(**inputs))
        ratios = {name: round(ours[name] / sdpa[name], 2) for name in ("eager", "graph")}
        floor = round(read / bytes_per_us, 1)
        yield {**case, "what": f"gsrq {rate}", **ours, "to_sdpa": ratios, "floor": floor}
        obvious = microseconds(lambda naive=naive: naive_attention(**naive))
        yield {**case, "what": f"naive {rate}", **obvious, "to_sdpa": round(obvious["graph"] / sdpa["graph"], 2)}


def check_naive(inputs: dict[str, Any], naive: dict[str, Any]) -> None:
    """Refuse to time two kernels that disagree on the coded tokens."""
    tokens = torch.arange(SINKS + naive["key_codes"].shape[-1] + WINDOW + 1, device="cuda")
    coded = (tokens >= SINKS) & (tokens < len(tokens) - WINDOW - 1)
    ours = attention.decode_attention(**{**inputs, "mask": coded[None, None, None]}).transpose(1, 2).float()
    error = (naive_attention(**naive).float() - ours).norm() / ours.norm()
    if not error < 0.02:
        raise SystemExit(f"The naive kernel and ours differ by {error:.3f}: their times would mean nothing.")


def time_encoding() -> Iterator[dict[str, Any]]:
    """Keys and values of one layer beside that layer's share of an 8B prefill, 4,096 tokens and 16 stages."""
    left, right = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    product = triton.testing.do_bench(lambda: left @ right, return_mode="median")
    rate = 2 * 8192**3 / product * 1e3
    states = torch.randn(1, 8, 4096, 128, device="cuda", dtype=torch.bfloat16)
    centroids = torch.randn(8, 16, 256, 128, device="cuda", dtype=torch.bfloat16) * 0.25
    codes = torch.empty(1, 8, 16, 4096, device="cuda", dtype=torch.uint8)
    angles = torch.rand(1, 4096, 64, device="cuda") * 6
    cos_sin = angles.cos(), angles.sin()
    parts = [microseconds(lambda c=c: encode(states, centroids, c, codes)) for c in (cos_sin, None)]
    total = sum(part["graph"] for part in parts)
    share = total / (65e12 / 32 / rate * 1e6)
    yield {
        "operator": "encode",
        "keys": parts[0],
        "values": parts[1],
        "matmul_tflops": round(rate / 1e12),
        "share_of_prefill": round(share, 4),
    }


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=CONTEXTS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--tested", action="store_true", help="the tests have just passed: do not run them again")
    add_arguments(parser)
    add_base_arguments(parser)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("The kernels' benchmark needs an NVIDIA GPU.")
    if not arguments.tested:
        tests = subprocess.run([sys.executable, "-m", "pytest", "-q", str(ROOT / "tests" / "ops")], check=False)
        if tests.returncode:
            raise SystemExit("The kernels' tests failed: their times would mean nothing.")
    cases = itertools.product(arguments.shapes, arguments.contexts, arguments.batches)
    parts = [time_decoding(shape, context, list(arguments.rates), batch) for shape, context, batch in cases]
    write_beside_base(itertools.chain(time_encoding(), *parts), arguments, COMPARISON)


if __name__ == "__main__":
    main()
