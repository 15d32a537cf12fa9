"""CUDA graphs: what Python launches one by one, recorded once and replayed with one call."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


def record(run: Callable[[], Any], device: torch.device, pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Record what a function launches on the current stream; nothing of it is computed.

    Unlike `torch.cuda.graph` it neither waits for the device nor empties the allocator's cache, which a step in the
    middle of a text would pay for.

    Args:
        run: The function. It has run before, so that kernels are compiled and libraries set up.
        device: Where it runs.
        pool: `torch.cuda.graph_pool_handle()` of the memory that it may allocate; its own by default.

    Returns:
        The graph, and what `run` returned: tensors that a replay fills.

    Raises:
        RuntimeError: if it does what cannot be recorded, such as waiting for the device.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        stream, current = _recording_stream(torch.cuda.current_device()), torch.cuda.current_stream()
        random = torch.cuda.default_generators[torch.cuda.current_device()]
        state = random.get_state()
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                # Other threads may allocate meanwhile.
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    out = run()
                finally:
                    graph.capture_end()
        except BaseException:
            # Torch leaves its generator waiting for the end of the recording.
            fresh = torch.Generator(device=f"cuda:{torch.cuda.current_device()}")
            fresh.set_state(state)
            random.graphsafe_set_state(fresh)
            raise
        finally:
            current.wait_stream(stream)
    return graph, out


@cache
def _recording_stream(device: int) -> torch.cuda.Stream:
    # One for all recordings: libraries keep a workspace for every stream that they have seen.
    return torch.cuda.Stream(device)


class StepInputs:
    """Tensors of their own for what each layer's attention is given in a step, shared by the layers of a device.

    Args:
        query: Like the queries to come, `[B, Hq, Q, D]`.
        key: Like the new keys, `[B, H, Q, D]`.
        value: Like the new values, `[B, H, Q, D]`.
        mask: Like the masks, or None.
    """

    @torch.inference_mode(False)
    def __init__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        self.query, self.key, self.value = (
            torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in (query, key, value)
        )
        self.mask = None if mask is None else torch.empty(mask.shape, dtype=mask.dtype, device=mask.device)
        # Memory of what is recorded with these inputs, which all layers share: they run one after another.
        self.pool = torch.cuda.graph_pool_handle()
        # The mask of this pass; the next may bring the same tensor with other numbers in it.
        self.given: torch.Tensor | None = None

    def take(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Copy what a layer is given; the mask once in a pass."""
        torch._foreach_copy_([self.query, self.key, self.value], [query, key, value])
        if self.mask is not None and mask is not None and self.given is not mask:
            self.mask.copy_(mask)
            self.given = mask

    def tensors(self) -> list[torch.Tensor]:
        """Everything held here."""
        parts = [self.query, self.key, self.value]
        return parts if self.mask is None else [*parts, self.mask]
