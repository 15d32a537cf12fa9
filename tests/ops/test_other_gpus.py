"""Every kernel compiles, and its tables fit in shared memory, on GPUs that nobody here has.

What the wrappers would launch is recorded instead of launched, then compiled for each target; no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from decode_cases import Case, run_triton
from transformers_gsrq.ops import triton as kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(kernels.triton_version() is None, reason="Triton is not installed"),
    pytest.mark.skipif(kernels.interpreting(), reason="the interpreter compiles nothing"),
]
# Compute capability: bytes of shared memory that a program may have (CUDA programming guide, compute capabilities).
TARGETS = {80: 163 * 1024, 86: 99 * 1024}
TYPES = {
    torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
OPTIONS = ("num_warps", "num_stages", "maxnreg")
HEAD_128 = {"head_dim": 128, "key_subspace": 128, "value_subspace": 128}
DECODING = {
    "8_heads": Case(**HEAD_128, heads=8, groups=4, key_stages=16, value_stages=24, tokens=5000),
    "16_queries": Case(**HEAD_128, queries=16, tokens=1000),
    "head_dim_64": Case(head_dim=64, key_subspace=64, value_subspace=64, heads=3, groups=3, tokens=1000),
    "head_dim_256": Case(head_dim=256, key_subspace=256, value_subspace=256, tokens=777),
    "subspace_spans_heads": Case(head_dim=64, key_subspace=128, value_subspace=128, tokens=1000),
    "pages": Case(**HEAD_128, heads=8, groups=4, tokens=[1000], paged=True, masked="rows"),
}
# What fits on 8.6 fits on 8.0, which has the same instructions; only the plan of the keys differs. 9.0 was run.
PLACES = [*((name, 86) for name in DECODING), ("8_heads", 80)]

Launch = tuple[Any, dict[str, Any], dict[str, int]]


def forget_plans() -> None:
    """Plans are kept, and were made for another device or other kernels."""
    from transformers_gsrq.ops.triton import decode_attention

    for plan in (decode_attention._prepare, decode_attention.plan_decode, decode_attention._plan_values):
        plan.cache_clear()


@pytest.fixture
def record(
    monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Callable[[Callable[[], Any], int], list[Launch]]:
    """Call something and return what it would have launched on a GPU of a compute capability."""
    from triton.runtime.jit import KernelInterface

    from transformers_gsrq.ops.triton import decode_attention

    launches: list[Launch] = []

    def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            options = {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}
            launches.append((kernel, kernel.signature.bind(*args, **kwargs).arguments, options))

        return launch

    monkeypatch.setattr(KernelInterface, "__getitem__", launcher)
    monkeypatch.setattr(kernels, "unsupported_reason", lambda device, dtype: None)
    request.addfinalizer(forget_plans)

    def run(call: Callable[[], Any], capability: int) -> list[Launch]:
        monkeypatch.setattr(decode_attention, "_device_size", lambda device: (108, TARGETS[capability]))
        forget_plans()
        launches.clear()
        call()
        return list(launches)

    return run


def is_aligned(parameter: Any, value: int) -> bool:
    """Whether Triton compiles for a multiple of 16."""
    return value % 16 == 0 and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)


def compile_for(capability: int, kernel: Any, arguments: dict[str, Any], options: dict[str, int]) -> int:
    """Bytes of shared memory that a launch takes on a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if kernel.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource as ASTSource
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[parameter.num,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[parameter.num,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
            if is_aligned(parameter, value):
                attributes[parameter.num,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


@pytest.fixture(params=["portable", "gluon"])
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding takes the kernels of this kind."""
    from transformers_gsrq.ops.triton import decode_attention

    if request.param == "portable":
        monkeypatch.setattr(decode_attention, "gluon_reason", lambda rows: "asked for")
    elif kernels.gluon_reason(1) is not None:
        pytest.skip(kernels.gluon_reason(1))


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize(("name", "capability"), PLACES)
def test_decoding_compiles_and_fits(name: str, capability: int, record: Callable) -> None:
    case = DECODING[name]
    case.dtype = torch.bfloat16
    launches = record(lambda: run_triton(case.build("cpu")), capability)
    assert len(launches) >= 4
    for kernel, arguments, options in launches:
        assert compile_for(capability, kernel, arguments, options) <= TARGETS[capability], kernel.fn.__name__


@pytest.mark.parametrize(("head_dim", "subspace"), [(128, 128), (64, 64), (256, 256), (64, 128), (128, 32)])
def test_encoding_compiles_and_fits(head_dim: int, subspace: int, record: Callable) -> None:
    from transformers_gsrq.ops.triton.encode import encode

    num_subspaces = 2 * head_dim // subspace
    states = torch.zeros(1, 2, 200, head_dim, dtype=torch.bfloat16)
    centroids = torch.zeros(num_subspaces, 3, 256, subspace, dtype=torch.bfloat16)
    codes = torch.zeros(1, num_subspaces, 3, 200, dtype=torch.uint8)
    angles = torch.zeros(1, 200, head_dim // 2)
    for cos_sin in ((angles, angles), None):
        (launch,) = record(lambda cos_sin=cos_sin: encode(states, centroids, cos_sin, codes), 86)
        assert compile_for(86, *launch) <= TARGETS[86]


def specialization(kernel: Any, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for, but for options and types."""
    found: list[Any] = [kernel.fn.__name__]
    for parameter in kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr:
            found.append(value)
        elif isinstance(value, int) and not parameter.do_not_specialize:
            found.append((value == 1, is_aligned(parameter, value)))
    return tuple(found)


@pytest.mark.usefixtures("variant")
@pytest.mark.parametrize("masked", ["", "rows"])
def test_nothing_is_compiled_anew_while_a_text_grows(masked: str, record: Callable) -> None:
    """A new variant in the middle of a text would hold it up for seconds."""
    variants = set()
    for step in range(130):
        tokens, window = 5000 + step // 64 * 64, 128 + step % 64
        case = Case(heads=2, groups=4, tokens=tokens, window=window, masked=masked)
        variants |= {
            specialization(kernel, arguments)
            for kernel, arguments, _ in record(lambda case=case: run_triton(case.build("cpu")), 86)
        }
    assert len(variants) == len({variant[0] for variant in variants})
