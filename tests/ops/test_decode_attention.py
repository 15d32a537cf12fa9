"""Decode attention by the kernels against float64, compiled on a GPU or in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

import tolerances
from decode_cases import Case, decode_attention_oracle, decoded_keys, relative_error, run_triton
from transformers_gsrq.ops.triton import gluon_reason, triton_version, unsupported_reason

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
    "one_token_has_all_weight": Case(peaked=True, tokens=100),
    "no_sinks": Case(sink_length=0, window=0),
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
}


def poison() -> None:
    """Leave NaN in the memory that outputs will be allocated from."""
    if DEVICE == "cuda":
        blocks = [torch.full((size,), float("nan"), device=DEVICE) for size in (2**10, 2**16, 2**20, 2**24) * 4]
        del blocks


def check(case: Case, tolerance: float | None = None) -> None:
    inputs = case.build(DEVICE)
    poison()
    error = relative_error(run_triton(inputs), decode_attention_oracle(inputs))
    assert error < (tolerance or tolerances.ATTENTION[str(case.dtype).removeprefix("torch.")])


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
@pytest.mark.parametrize("name", ["1000", "6_groups", "padding", "peaked"])
def test_portable_kernels_equal_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers_gsrq.ops.triton import decode_attention

    monkeypatch.setattr(decode_attention, "gluon_reason", lambda rows: "asked for")
    check(GPU_CASES[name], tolerances.ATTENTION_PEAKED if name == "peaked" else None)


@needs_gpu
@pytest.mark.gpu
def test_error_is_within_twice_that_of_attention_on_decoded_states() -> None:
    case = Case(**HEAD_128, heads=8, groups=4, tokens=4096, key_stages=16, value_stages=16, dtype=torch.bfloat16)
    inputs = case.build(DEVICE)
    oracle = decode_attention_oracle(inputs)
    from oracles import decode_oracle

    keys = torch.cat([decoded_keys(inputs), inputs["exact_keys"].cpu().double()], 2)
    values = decode_oracle(inputs["value_codes"].cpu(), inputs["value_centroids"].cpu(), 8)
    values = torch.cat([values, inputs["exact_values"].cpu().double()], 2)
    plain = torch.nn.functional.scaled_dot_product_attention(
        inputs["query"],
        keys.to(DEVICE, torch.bfloat16),
        values.to(DEVICE, torch.bfloat16),
        scale=inputs["scaling"],
        enable_gqa=True,
    )
    assert relative_error(run_triton(inputs), oracle) <= 2 * relative_error(plain, oracle)


@needs_gpu
@pytest.mark.gpu
def test_a_million_equal_weights() -> None:
    case = Case(heads=1, groups=1, tokens=2**20, key_stages=1, value_stages=1, window=0, sink_length=0)
    inputs = case.build(DEVICE)
    inputs["query"].zero_()
    inputs["exact_values"].zero_()
    counts = torch.bincount(inputs["value_codes"].flatten().long(), minlength=256).double().cpu()
    expected = counts @ inputs["value_centroids"][0, 0].cpu().double() / (2**20 + 1)
    assert relative_error(run_triton(inputs).flatten(), expected) < tolerances.ATTENTION["float16"]


@needs_gpu
@pytest.mark.gpu
def test_a_step_can_be_captured_in_a_graph_and_compiled() -> None:
    from transformers_gsrq.ops.triton.decode_attention import decode_attention, prepare_keys

    inputs = Case(**HEAD_128, tokens=1000).build(DEVICE)
    keys = prepare_keys(inputs.pop("key_centroids"), 2, 128, inputs.pop("inv_freq"), inputs.pop("rope_scaling"))

    def step() -> torch.Tensor:
        return decode_attention(keys=keys, **inputs)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)
    assert torch.equal(torch.compile(step, fullgraph=True)(), expected)


def test_rows_that_are_not_aligned_are_copied() -> None:
    inputs = Case(tokens=61).build(DEVICE)
    for kind in ("key_codes", "value_codes"):
        wide = inputs[kind].new_zeros(*inputs[kind].shape[:3], 67)
        wide[..., 3:64] = inputs[kind]
        inputs[kind] = wide[..., 3:64]
    inputs["exact_keys"] = inputs["exact_keys"].transpose(1, 2).contiguous().transpose(1, 2)
    assert relative_error(run_triton(inputs), decode_attention_oracle(inputs)) < tolerances.ATTENTION["float16"]


def test_a_query_that_is_nan_stays_so() -> None:
    """A model that overflowed must not look as if it saw nothing."""
    inputs = Case(tokens=200).build(DEVICE)
    inputs["query"][:, 1] = torch.nan
    found = run_triton(inputs).cpu()
    assert torch.equal(found.isnan(), decode_attention_oracle(inputs).isnan())
    assert found[:, 1].isnan().all() and not found[:, 0].isnan().any()


def test_wrong_codes_are_seen() -> None:
    """The control: what passes above does not pass for other codes."""
    inputs = Case().build(DEVICE)
    oracle = decode_attention_oracle(inputs)
    inputs["key_codes"] = inputs["key_codes"] ^ 1
    assert relative_error(run_triton(inputs), oracle) > 10 * tolerances.ATTENTION["float16"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.zeros(1, 4, 17, 64)}, "up to 16 query tokens, not 17"),
        ({"query": torch.zeros(1, 4, 1, 48)}, "head_dim 64.*not 48"),
        ({"mask": torch.zeros(1, 1, 1, 7)}, r"mask must be .* got \[1, 1, 1, 7\]"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    inputs = Case().build(DEVICE)
    inputs.update({k: v.to(inputs["query"]) for k, v in change.items()})
    if inputs["query"].shape[-1] == 48:
        inputs["exact_keys"] = inputs["exact_keys"][..., :48]
        inputs["key_centroids"] = inputs["key_centroids"][..., :48]
        inputs["inv_freq"] = inputs["inv_freq"][:24]
    with pytest.raises(ValueError, match=message):
        run_triton(inputs)


def test_other_dtypes_are_refused() -> None:
    assert "torch.float32" in str(unsupported_reason(torch.device(DEVICE), torch.float32))


@needs_gpu
@pytest.mark.gpu
def test_gluon_is_taken_where_it_is_there() -> None:
    assert (gluon_reason(4) is None) == (triton_version() >= (3, 8))
