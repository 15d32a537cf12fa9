"""What `generate` does in one token, one step with drafts and one prompt, beside the plain cache.

    python benchmarks/profile_step.py --output record.json
    python benchmarks/profile_step.py --model tiny      # calls and synchronizations, without a GPU
    TRITON_INTERPRET=1 python benchmarks/profile_step.py --dtype float16 --stages 4,4      # where kernels decode

Counts are of the package: Python calls into it, in all and of them those inside of a decoder layer, for each layer;
synchronizations of host and GPU; and on a GPU launches, and device time by kernel. On a CPU, synchronizations are the
operations that would be one on a GPU (`item`, `bool`, `nonzero` and the like). `generate` itself makes one or two a
step: compare with the plain cache.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch
from device_work import DeviceWork, watch_device
from models import make_codebooks
from steps import DEVICE, SEED, SHAPES, Clock, draft_options, random_model, random_tokens, run_generate
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, PreTrainedModel

import transformers_gsrq
from transformers_gsrq import GSRQCache, GSRQCodebooks, detach
from transformers_gsrq.compat import CACHE_ARGUMENT
from transformers_gsrq.evaluation.records import circumstances

PACKAGE = str(Path(transformers_gsrq.__file__).parent)
# Kernels that Triton interprets are Python too, but no calls of the host.
INTERPRETER = str(Path("triton", "runtime", "interpreter.py"))
PHASES = ("token", "draft step", "prompt")
# Steps before those that are counted, and how many of them.
SKIP, STEPS = 6, 4
_aten = torch.ops.aten
SYNCHRONIZING = {
    _aten._local_scalar_dense.default,
    _aten.nonzero.default,
    _aten.equal.default,
    _aten.is_nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
}
# These tell no dispatcher of themselves where the tensor is on the CPU already.
SYNCHRONIZING_METHODS = ("cpu", "tolist", "numpy")


@dataclass
class Counts:
    """What happened in some steps, all together.

    Attributes:
        calls: Python calls of functions in the package.
        layer_calls: Those of them inside of decoder layers.
        syncs: Synchronizations of host and GPU.
        device: What ran on the GPU.
        paused: Whether a kernel is running in Triton's interpreter, of which nothing counts.
    """

    calls: int = 0
    layer_calls: int = 0
    syncs: int = 0
    paused: bool = False
    device: DeviceWork = field(default_factory=DeviceWork)

    def summary(self, num_layers: int, steps: int) -> dict[str, Any]:
        """Counts of one step; `layer_calls` of one layer. JSON types."""
        found = {
            "calls": self.calls / steps,
            "layer_calls": self.layer_calls / steps / num_layers,
            "syncs": self.syncs / steps,
        }
        if self.device.times:
            kernels = sorted(self.device.times.items(), key=lambda item: -item[1])
            found |= {"launches": self.device.launches / steps, "device_us": sum(self.device.times.values()) / steps}
            return {**_rounded(found), "kernels": _rounded({name: took / steps for name, took in kernels})}
        return _rounded(found)


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 2) for name, value in values.items()}


@contextmanager
def count(model: PreTrainedModel) -> Iterator[Counts]:
    """Count what happens inside of the context while a model runs."""
    counts = Counts()
    with ExitStack() as stack:
        counts.device = stack.enter_context(watch_device())
        if DEVICE == "cuda":
            stack.enter_context(_count_warnings(counts))
        else:
            stack.enter_context(_CountOperations(counts))
            for name in SYNCHRONIZING_METHODS:
                stack.enter_context(_count_method(name, counts))
        stack.enter_context(_count_calls(model, counts))
        yield counts


@contextmanager
def _count_calls(model: PreTrainedModel, counts: Counts) -> Iterator[None]:
    layers: set[CodeType] = {inspect.unwrap(type(layer).forward).__code__ for layer in model.get_decoder().layers}
    layer: FrameType | None = None
    interpreter: FrameType | None = None

    def follow(frame: FrameType, event: str, _: Any) -> None:
        nonlocal layer, interpreter
        if event == "return":
            layer = None if frame is layer else layer
            interpreter = None if frame is interpreter else interpreter
            counts.paused = interpreter is not None
        elif event == "call" and interpreter is None:
            code = frame.f_code
            if code in layers:
                layer = frame
            elif code.co_filename.endswith(INTERPRETER):
                interpreter, counts.paused = frame, True
            elif code.co_filename.startswith(PACKAGE):
                counts.calls += 1
                counts.layer_calls += layer is not None

    sys.setprofile(follow)
    try:
        yield
    finally:
        sys.setprofile(None)


class _CountOperations(TorchDispatchMode):
    """Count operations whose results the host needs."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func is _aten.index.Tensor and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        self.counts.syncs += not self.counts.paused and (masks or func in SYNCHRONIZING)
        return func(*args, **(kwargs or {}))


@contextmanager
def _count_method(name: str, counts: Counts) -> Iterator[None]:
    method: Callable[..., Any] = getattr(torch.Tensor, name)

    def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        counts.syncs += not counts.paused
        return method(tensor, *args, **kwargs)

    with mock.patch.object(torch.Tensor, name, counted):
        yield


@contextmanager
def _count_warnings(counts: Counts) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    counts.syncs += sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def profile_phase(
    model: PreTrainedModel, tokens: torch.Tensor, phase: str, options: dict[str, Any], draft: PreTrainedModel
) -> dict[str, Any]:
    """Counts of one step in a phase of `generate`.

    Args:
        model: The model.
        tokens: The prompt `[1, T]`.
        phase: One of `PHASES`.
        options: Keywords of `generate`, the cache among them.
        draft: The model that would draft; prompts are looked up here, so that nothing else runs in a step.
    """
    # Put 0 is the prompt going in; the first step gives the first token.
    first, steps = (0, 1) if phase == "prompt" else (SKIP, STEPS)
    if phase == "draft step":
        options = {**options, "disable_compile": True, **draft_options("prompt lookup", tokens, draft)}
    context, found = count(model), []
    clock = Clock(
        {
            first: lambda: found.append(context.__enter__()),
            first + steps: lambda: context.__exit__(None, None, None),
        }
    )
    # Drafts are shorter at the end.
    run_generate(model, tokens, first + steps + 8, clock, **options)
    return found[0].summary(model.config.num_hidden_layers, steps)


def profile_all(model: PreTrainedModel, codebooks: GSRQCodebooks, tokens: torch.Tensor) -> dict[str, Any]:
    """Counts of every phase by cache: `{cache: {phase: counts}}`."""
    caches: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
        "plain": (lambda: DynamicCache(config=model.config), {}),
        "gsrq eager": (lambda: GSRQCache(codebooks, model), {"disable_compile": True}),
    }
    if DEVICE == "cuda" and "graph" in inspect.signature(GSRQCache).parameters:
        caches["gsrq captured"] = caches["gsrq eager"][0], {}
    found: dict[str, Any] = {}
    for name, (make, options) in caches.items():
        found[name] = {}
        for phase in PHASES:
            if name == "plain":
                detach(model)
            # The first time kernels are compiled and tables made.
            for _ in range(2):
                given = {**options, CACHE_ARGUMENT: make()}
                found[name][phase] = profile_phase(model, tokens, phase, given, model)
    return found


def table(found: dict[str, Any], kernels: int) -> str:
    """The counts as text, the kernels that take longest below."""
    lines = [f"{'':24}{'calls':>10}{'in a layer':>12}{'syncs':>8}{'launches':>10}{'device µs':>12}"]
    for phase in PHASES:
        for name in found:
            row = found[name][phase]
            gpu = f"{row['launches']:10,.0f}{row['device_us']:12,.0f}" if "kernels" in row else f"{'–':>10}{'–':>12}"
            label = f"{phase}, {name}"
            lines.append(f"{label:28}{row['calls']:6,.0f}{row['layer_calls']:12,.1f}{row['syncs']:8,.1f}{gpu}")
    for phase in PHASES:
        for name in found:
            longest = list(found[name][phase].get("kernels", {}).items())[:kernels]
            lines += [f"\n{phase}, {name}: µs by kernel"] if longest else []
            lines += [f"{took:12,.1f}  {kernel[:100]}" for kernel, took in longest]
    return "\n".join(lines)


def main() -> None:
    """Profile, print a table and keep the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="qwen2.5-1.5b" if DEVICE == "cuda" else "tiny")
    parser.add_argument("--context", type=int, default=8192 if DEVICE == "cuda" else 400)
    parser.add_argument("--stages", default="12,20", metavar="K,V", help="of keys and values")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--kernels", type=int, default=8, help="to list of each phase")
    parser.add_argument("--output", type=Path, help="JSON record")
    arguments = parser.parse_args()
    # As in generate.py.
    torch.backends.cuda.enable_cudnn_sdp(False)
    model = random_model(arguments.model).to(getattr(torch, arguments.dtype))
    key, value = (int(count) for count in arguments.stages.split(","))
    codebooks = make_codebooks(model, key_bits=key * 8 / 128, value_bits=value * 8 / 128)
    found = profile_all(model, codebooks, random_tokens(model, 1, arguments.context))
    print(table(found, arguments.kernels))
    if arguments.output:
        settings = {"shape": arguments.model, "context": arguments.context, "stages": arguments.stages, "seed": SEED}
        record = {"command": "python benchmarks/profile_step.py", **circumstances(model), **settings, "counts": found}
        arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
