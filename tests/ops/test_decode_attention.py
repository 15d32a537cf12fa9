"""Decode attention by the kernels against float64, compiled on a GPU or in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import tolerances
from decode_cases import (
    Case,
    as_pages,
    decode_attention_oracle,
    decoded_keys,
    decoded_values,
    relative_error,
    ring_oracle,
    run_triton,
    triton_arguments,
)
from transformers_gsrq.ops.triton import Count, gluon_reason, triton_version, unsupported_reason

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RUNS = triton_version() is not None and unsupported_reason(torch.device(DEVICE), torch.float16) is None
pytestmark = pytest.mark.skipif(not RUNS, reason="needs a GPU, or TRITON_INTERPRET=1 and Triton")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="too large for the interpreter")
HEAD_128 = {"head_dim": 128, "key_subspace": 128, "value_subspace": 128}

CASES = {
    "one_token": Case(tokens=1),
    "nothing_coded": Case(tokens=0),
    "63": Case(tokens=63),
    "64": Case(tokens=64, groups=1),
    "several_queries": Case(queries=3, groups=3, tokens=129),
    "uneven_stages": Case(key_stages=5, value_stages=1),
    "subspace_below_head": Case(head_dim=128, key_subspace=64, value_subspace=32),
    "small_subspaces": Case(key_subspace=16, value_subspace=8),
    "subspace_spans_heads": Case(key_subspace=128, value_subspace=128),
    "head_dim_96": Case(head_dim=96, key_subspace=96, value_subspace=96, heads=1),
    "partial_rotary": Case(rotary_dim=32),
    "no_rotary": Case(rotary_dim=0),
    "soft_cap_and_scaled_rotary": Case(softcap=5.0, factor=1.2),
    "padding_covers_tiles": Case(batch=3, padding=[0, 64, 141], tokens=150),
    "mask": Case(masked="rows", batch=2),
    "mask_per_head": Case(masked="heads", queries=2),
    "mask_of_all_rows": Case(masked="shared", batch=2, queries=3),
    "mask_and_padding": Case(masked="rows", batch=3, padding=[0, 64, 141], tokens=150, ring_head=9),
    "one_token_has_all_weight": Case(peaked=True, tokens=100),
    "no_sinks": Case(sink_length=0, window=0),
    "ring_wraps": Case(queries=3, window=70, ring_head=50),
    "new_tokens_wrap": Case(queries=5, window=20, ring=27, ring_head=5),
    "full_ring": Case(queries=2, window=30, ring=32, ring_head=31),
    "room_for_more": Case(tokens=130, capacity=4096),
    "room_for_more_and_nothing_coded": Case(tokens=0, capacity=4096),
    "no_room_for_more": Case(tokens=256, capacity=256),
    "rows_differ": Case(batch=4, tokens=[0, 300, 64, 1], capacity=1024, queries=2),
    "pages": Case(batch=3, tokens=[0, 200, 65], capacity=512, paged=True),
    "pages_of_small_subspaces": Case(key_subspace=16, value_subspace=8, paged=True, tokens=130),
    "pages_of_head_dim_96": Case(head_dim=96, key_subspace=96, value_subspace=96, heads=1, paged=True, masked="rows"),
}
GPU_CASES = {
    "1000": Case(**HEAD_128, tokens=1000, key_stages=8, value_stages=24),
    "70001": Case(**HEAD_128, tokens=70001, key_stages=3, value_stages=8, heads=1, groups=4),
    "32_stages": Case(**HEAD_128, tokens=1000, key_stages=32, value_stages=32),
    "head_dim_256": Case(head_dim=256, key_subspace=256, value_subspace=256, tokens=777),
    "16_queries": Case(**HEAD_128, queries=16, groups=4, tokens=1000),
    "6_groups": Case(**HEAD_128, groups=6, tokens=1000),
    "peaked": Case(**HEAD_128, tokens=5000, peaked=True),
    "padding": Case(**HEAD_128, batch=2, padding=[0, 3000], tokens=5001),
    "long_pages": Case(**HEAD_128, batch=2, tokens=[40001, 7], paged=True, key_stages=5, groups=4),
    "short_in_131072": Case(**HEAD_128, tokens=2000, capacity=2**17, key_stages=8, value_stages=8),
    "masked_pages": Case(**HEAD_128, tokens=3000, paged=True, masked="heads", queries=2, padding=[100]),
}


def check(case: Case) -> None:
    inputs = case.build(DEVICE)
    expected = decode_attention_oracle(inputs)
    appended = {f"exact_{kind}s": ring_oracle(inputs, kind) for kind in ("key", "value")}
    error = relative_error(run_triton(inputs), expected)
    peaked = case.peaked and case.dtype == torch.float16
    assert error < (tolerances.ATTENTION_PEAKED if peaked else tolerances.ATTENTION[str(case.dtype)[6:]])
    for name, ring in appended.items():
        assert torch.equal(inputs[name].isnan(), ring.isnan()) and torch.equal(
            inputs[name].nan_to_num(), ring.nan_to_num()
        )


@pytest.fixture
def fresh_plans() -> Iterator[None]:
    """Plans are kept, so they must be forgotten where others are made."""
    from transformers_gsrq.ops.triton import decode_attention

    planned = (decode_attention._prepare, decode_attention.plan_decode, decode_attention._plan_values)
    for plan in planned:
        plan.cache_clear()
    yield
    for plan in planned:
        plan.cache_clear()


@pytest.fixture
def portable(fresh_plans: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes the portable kernels."""
    from transformers_gsrq.ops.triton import decode_attention

    monkeypatch.setattr(decode_attention, "gluon_reason", lambda rows: "asked for")


@pytest.mark.parametrize("name", CASES)
def test_equals_the_oracle(name: str) -> None:
    check(CASES[name])


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*CASES, *GPU_CASES])
def test_equals_the_oracle_compiled(name: str, dtype: torch.dtype) -> None:
    case = {**CASES, **GPU_CASES}[name]
    case.dtype = dtype
    check(case)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize(
    "name", ["1000", "6_groups", "padding", "peaked", "long_pages", "short_in_131072", "masked_pages"]
)
def test_portable_kernels_equal_the_oracle(name: str) -> None:
    check(GPU_CASES[name])


@needs_gpu
@pytest.mark.gpu
def test_error_is_within_twice_that_of_attention_on_decoded_states() -> None:
    case = Case(**HEAD_128, heads=8, groups=4, tokens=4096, key_stages=16, value_stages=16, dtype=torch.bfloat16)
    inputs = case.build(DEVICE)
    oracle = decode_attention_oracle(inputs)
    slots = inputs["sink_length"] + case.window
    keys, values = (
        torch.cat([coded[:, :, : case.tokens], inputs[f"exact_{kind}s"][:, :, :slots].cpu(), inputs[kind].cpu()], 2)
        for kind, coded in (("key", decoded_keys(inputs)), ("value", decoded_values(inputs)))
    )
    plain = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"],
        keys.to(DEVICE, torch.bfloat16),
        values.to(DEVICE, torch.bfloat16),
        scale=inputs["scaling"],
        enable_gqa=True,
    ).transpose(1, 2)
    assert relative_error(run_triton(inputs), oracle) <= 2 * relative_error(plain, oracle)


@needs_gpu
@pytest.mark.gpu
def test_a_million_equal_weights() -> None:
    case = Case(heads=1, groups=1, tokens=2**20, key_stages=1, value_stages=1, window=0, sink_length=0)
    inputs = case.build(DEVICE)
    inputs["query"].zero_()
    inputs["value"].zero_()
    codes = inputs["value_codes"][..., : 2**20]
    counts = torch.bincount(codes.flatten().long(), minlength=256).double().cpu()
    expected = counts @ inputs["value_centroids"][0, 0].cpu().double() / (2**20 + 1)
    assert relative_error(run_triton(inputs).flatten(), expected) < tolerances.ATTENTION["float16"]


def grown(inputs: dict, tokens: list[int]) -> dict[str, torch.Tensor]:
    """Counts of the same rows with other numbers of codes and more in the ring, whose slots are filled."""
    counts = inputs["counts"].clone()
    counts[Count.NUM_CODES] = torch.tensor(tokens)
    counts[Count.NUM_STORED] = counts[Count.NUM_CODES] + inputs["sink_length"]
    counts[Count.NUM_EXACT] += 2
    counts[Count.RING_HEAD] += 3
    ring = {name: inputs[name].nan_to_num(nan=0.5) for name in ("exact_keys", "exact_values")}
    return {"counts": counts, **ring}


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_graph_is_replayed_while_a_text_grows(paged: bool, queries: int) -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    case = Case(**HEAD_128, batch=3, tokens=[5, 5, 5], capacity=2**14, queries=queries, ring=40, groups=4, paged=paged)
    inputs = case.build(DEVICE)
    if paged:
        inputs["block_table"] = torch.arange(3 * 256, device=DEVICE).flip(0).view(3, -1).int()
    arguments = triton_arguments(inputs)
    decode_attention(**arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(**arguments)
    for tokens in ([0, 1, 64], [65, 5000, 2**14], [2**14, 4096, 12345]):
        changed = grown(inputs, tokens)
        for name, values in changed.items():
            inputs[name].copy_(values)
        inputs["query"].normal_()
        inputs["key"].normal_()
        arguments["workspace"].fill_(255)
        expected = decode_attention_oracle(inputs)
        rings = {f"exact_{kind}s": ring_oracle(inputs, kind) for kind in ("key", "value")}
        graph.replay()
        assert relative_error(out, expected) < tolerances.ATTENTION["float16"]
        assert all(torch.equal(inputs[name], ring) for name, ring in rings.items())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", ["1000", "long_pages", "masked_pages"])
def test_a_step_is_compiled_with_the_model(name: str) -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    arguments = triton_arguments(GPU_CASES[name].build(DEVICE))
    expected = decode_attention(**arguments)

    def step() -> torch.Tensor:
        return decode_attention(**arguments)

    assert torch.equal(torch.compile(step, fullgraph=True)(), expected)


@pytest.mark.parametrize("case", [Case(tokens=130, queries=2), Case(paged=True, masked="heads", softcap=5.0)])
def test_the_operator_of_compiled_models(case: Case) -> None:
    """Traced without a break, and what it changes is named."""
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    inputs = case.build(DEVICE)
    # opcheck compares what is changed, and NaN equals nothing.
    inputs["exact_keys"], inputs["exact_values"] = (inputs[f"exact_{kind}s"].nan_to_num() for kind in ("key", "value"))
    arguments = triton_arguments(inputs)
    arguments["workspace"].zero_()
    keys = arguments["keys"]
    positional = [arguments[name] for name in ("query", "key", "value", "key_codes", "value_codes")]
    positional += [keys.tables, keys.subspaces, keys.frequencies, keys.amplitudes]
    names = ("value_centroids", "exact_keys", "exact_values", "counts", "workspace", "mask", "block_table")
    positional += [arguments[name] for name in names]
    positional += [keys.exponent, keys.rotary_dim, keys.paired]
    positional += [arguments[name] for name in ("sink_length", "scaling", "softcap")]
    torch.library.opcheck(torch.ops.transformers_gsrq.decode_attention.default, tuple(positional))

    rings = [ring_oracle(inputs, kind) for kind in ("key", "value")]
    expected = decode_attention(**arguments)
    inputs["exact_keys"].copy_(rings[0] * 0)
    arguments["exact_keys"].copy_(inputs["exact_keys"])
    other = decode_attention(**arguments)
    compiled = torch.compile(lambda: decode_attention(**arguments), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(), other) and not torch.equal(other, expected)
    assert torch.equal(arguments["exact_values"], rings[1])


@pytest.mark.parametrize("case", [Case(batch=2, tokens=[130, 64], queries=3, ring_head=14), Case(masked="rows")])
def test_a_step_run_twice_does_the_same(case: Case) -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    inputs = case.build(DEVICE)
    arguments = triton_arguments(inputs)
    first = decode_attention(**arguments)
    appended = inputs["exact_keys"].nan_to_num()
    assert torch.equal(decode_attention(**arguments), first)
    assert torch.equal(inputs["exact_keys"].nan_to_num(), appended)


def test_counts_are_read_at_every_step() -> None:
    """Nothing of the counts is kept between calls: a captured step is nothing but a call without Python."""
    inputs = Case(batch=3, tokens=[5, 5, 5], capacity=512, queries=2, ring=20).build(DEVICE)
    for tokens in ([0, 1, 64], [65, 500, 512]):
        inputs |= grown(inputs, tokens)
        assert relative_error(run_triton(inputs), decode_attention_oracle(inputs)) < tolerances.ATTENTION["float16"]


class Histograms:
    """What `_value_histogram` leaves, by torch: it is written in Gluon, which has no interpreter."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            codes, _, _, counts, _, workspace, *_ = args
            batch, capacity_blocks, stages, streams, chunks, place, _ = args[-7:]
            heads, rows, block = options["H"], options["N"], options["BT"]
            shape = (batch, heads, rows, capacity_blocks * 64)
            scores = workspace[: 4 * math.prod(shape)].view(torch.int32).view(shape).double() / options["SCALE"]
            shape = (batch, heads, chunks, streams, rows, 256)
            found = workspace[16 * place :].view(torch.int32)
            bins = found[: math.prod(shape)].view(shape)
            maxima = found[math.prod(shape) :][: math.prod(shape[:3]) * rows].view(torch.float32)
            maxima = maxima.view(batch, heads, chunks, rows)
            for row, head in itertools.product(range(batch), range(heads)):
                num_codes, first_code = counts[:2, row].tolist()
                chunk = max(1, -(-num_codes // (block * chunks))) * block
                for index, first in enumerate(range(0, num_codes, chunk)):
                    tokens = torch.arange(first, min(first + chunk, num_codes))
                    logits = scores[row, head, :, tokens].masked_fill(tokens < first_code, -torch.inf)
                    maxima[row, head, index] = top = logits.amax(-1)
                    weights = torch.exp2(logits - top.nan_to_num(neginf=0.0)[:, None]) * options["STEPS"]
                    for stream in range(streams):
                        index_of_stream = head * options["D"] // options["S"] * stages + stream
                        code = codes[row].flatten(0, 1)[index_of_stream, tokens].long()
                        total = torch.zeros(rows, 256, dtype=torch.double).index_add_(1, code, weights.round())
                        bins[row, head, index, stream] = total.long().to(torch.int32)

        return launch


@pytest.mark.skipif(triton_version() is None or triton_version() < (3, 8), reason="Triton has no such Gluon")
@pytest.mark.skipif(DEVICE == "cuda", reason="the kernel itself runs here")
@pytest.mark.usefixtures("fresh_plans")
@pytest.mark.parametrize(
    "case",
    [
        Case(tokens=700, capacity=2048),
        Case(tokens=0),
        Case(batch=2, tokens=[1300, 5], capacity=4096, value_subspace=32, queries=2, groups=3, padding=[0, 3]),
        Case(value_subspace=128),
        Case(head_dim=96, key_subspace=96, value_subspace=96, heads=1, sink_length=0),
    ],
)
def test_products_of_histograms_in_the_interpreter(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers_gsrq.ops.triton import decode_attention, value_histogram

    monkeypatch.setattr(decode_attention, "gluon_reason", lambda rows: None)
    monkeypatch.setattr(value_histogram, "_value_histogram", Histograms())
    check(case)


def test_pages_equal_contiguous_codes() -> None:
    case = Case(batch=3, tokens=[0, 200, 65], capacity=512, value_subspace=32, masked="rows")
    inputs = case.build(DEVICE)
    expected = run_triton(inputs)
    codes = [inputs["key_codes"], inputs["value_codes"]]
    pages, inputs["block_table"] = as_pages(codes, torch.tensor(case.tokens), torch.Generator().manual_seed(1))
    inputs["key_codes"], inputs["value_codes"] = pages
    assert torch.equal(run_triton(inputs), expected)


def test_one_workspace_is_enough_for_fewer_tokens() -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention, decode_workspace_bytes

    shape = {
        "batch": 2, "num_heads": 2, "num_query_heads": 8, "head_dim": 128, "value_stages": 9, "value_subspace_dim": 64,
        "capacity": 8192, "device": torch.device(DEVICE),
    }  # fmt: skip
    sizes = [decode_workspace_bytes(num_queries=queries, **shape) for queries in range(1, 17)]
    assert sizes == sorted(sizes)
    arguments = triton_arguments(Case(queries=3).build(DEVICE))
    arguments |= {name: arguments[name][:, :, :2] for name in ("query", "key", "value")}
    assert decode_attention(**arguments).isfinite().all()


def test_a_query_in_the_layout_of_a_model() -> None:
    inputs = Case(queries=3).build(DEVICE)
    inputs["query"] = inputs["query"].transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(run_triton(inputs), decode_attention_oracle(inputs)) < tolerances.ATTENTION["float16"]


def test_a_query_that_is_nan_stays_so() -> None:
    """A model that overflowed must not look as if it saw nothing."""
    inputs = Case(tokens=200).build(DEVICE)
    inputs["query"][:, 1] = torch.nan
    expected = decode_attention_oracle(inputs)
    found = run_triton(inputs).cpu()
    assert torch.equal(found.isnan(), expected.isnan())
    assert found[:, :, 1].isnan().all() and not found[:, :, 0].isnan().any()


def test_wrong_codes_are_seen() -> None:
    """The control: what passes above does not pass for other codes."""
    inputs = Case().build(DEVICE)
    oracle = decode_attention_oracle(inputs)
    inputs["key_codes"] = inputs["key_codes"] ^ 1
    assert relative_error(run_triton(inputs), oracle) > 10 * tolerances.ATTENTION["float16"]


def sliced(codes: torch.Tensor) -> torch.Tensor:
    wide = codes.new_zeros(codes.numel() + 4)
    return wide[4:].view(codes.shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": lambda query: query.new_zeros(1, 4, 17, 64)}, "up to 16 query tokens, not 17"),
        ({"query": lambda query: query[..., :48], "exact_keys": lambda keys: keys[..., :48]}, "head_dim 64.*not 48"),
        ({"mask": lambda _: torch.ones(1, 3, 1, 7).bool()}, r"mask must be .* got \[1, 3, 1, 'tokens'\]"),
        ({"mask": lambda _: torch.zeros(1, 1, 1, 99)}, r"mask must be torch.bool .* got torch.float32"),
        ({"key": lambda key: key[..., :32]}, r"key must be .* got torch.float16 \[1, 2, 1, 32\]"),
        ({"value": lambda value: value.expand(1, 2, 64, 64).mT[:, :, :1]}, "last axis of value must be contiguous"),
        ({name: lambda states: states[:, :, :4].contiguous() for name in ("exact_keys", "exact_values")}, "too short"),
        ({"exact_values": lambda values: values.mT.contiguous().mT}, "exact_values must be contiguous"),
        ({"key_codes": lambda codes: codes[..., :100]}, "key_codes must be contiguous"),
        ({"key_codes": sliced}, "multiples of 16 bytes"),
        ({"value_codes": lambda codes: codes[..., :64].contiguous()}, "value_codes must be"),
        ({"block_table": lambda _: torch.zeros(1, 2).int()}, r"key_codes must be .*64\]"),
        ({"counts": lambda counts: counts.long()}, "counts must be torch.int32"),
        ({"workspace": lambda workspace: workspace[:-1]}, "workspace must be .*decode_workspace_bytes"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    arguments = triton_arguments(Case().build(DEVICE))
    for name, make in change.items():
        made = make(arguments[name])
        arguments[name] = made.to(DEVICE)
    with pytest.raises(ValueError, match=message):
        decode_attention(**arguments)


@pytest.mark.parametrize("capacity", [0, 100])
def test_codes_have_room_for_whole_pages(capacity: int) -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention

    arguments = triton_arguments(Case().build(DEVICE))
    for name in ("key_codes", "value_codes"):
        arguments[name] = arguments[name][..., :capacity].contiguous()
    with pytest.raises(ValueError, match=f"multiple of 64 tokens.*got room for {capacity}"):
        decode_attention(**arguments)


def test_other_dtypes_are_refused() -> None:
    assert "torch.float32" in str(unsupported_reason(torch.device(DEVICE), torch.float32))


@needs_gpu
@pytest.mark.gpu
def test_gluon_is_taken_where_it_is_there() -> None:
    assert (gluon_reason(4) is None) == (triton_version() >= (3, 8))
