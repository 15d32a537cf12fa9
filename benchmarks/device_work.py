"""What the GPU does in a step of `generate`, by torch's profiler."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from steps import Clock, run_generate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch")


@dataclass
class DeviceWork:
    """What ran on the GPU.

    Attributes:
        launches: Kernels and graphs that the host started.
        times: Microseconds of each kernel, copy and fill by name, all calls together.
    """

    launches: int = 0
    times: dict[str, float] = field(default_factory=dict)


@contextmanager
def watch_device() -> Iterator[DeviceWork]:
    """Fill in what ran on the GPU inside of the context; nothing without a GPU."""
    work = DeviceWork()
    if not torch.cuda.is_available():
        yield work
        return
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        yield work
        torch.cuda.synchronize()
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA:
            work.times[event.key] = work.times.get(event.key, 0.0) + event.self_device_time_total
        elif event.key.startswith(LAUNCHES):
            work.launches += event.count


def kernel_times(
    model: PreTrainedModel, tokens: torch.Tensor, skip: int, steps: int, options: dict[str, Any]
) -> dict[str, float]:
    """Microseconds of a step by kernel.

    Args:
        model: The model.
        tokens: The prompt `[B, T]`.
        skip: Steps before the first one that counts.
        steps: Steps to average over.
        options: Keywords of `generate`.
    """
    watch = watch_device()
    works = []
    clock = Clock(
        {skip: lambda: works.append(watch.__enter__()), skip + steps: lambda: watch.__exit__(None, None, None)}
    )
    run_generate(model, tokens, skip + steps + 1, clock, **options)
    return {name: took / steps for name, took in works[0].times.items()}


def our_kernels() -> set[str]:
    """Names of the package's kernels, as a profiler shows them."""
    import triton

    package = importlib.import_module("transformers_gsrq.ops.triton")
    names = set()
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        names |= {value.fn.__name__ for value in vars(module).values() if isinstance(value, triton.JITFunction)}
    return names
