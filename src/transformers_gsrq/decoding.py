"""Decoding steps as `generate` can speed them up: replayed as a CUDA graph, or compiled.

`generate` asks its model for the call of its decoding steps (`get_compiled_call`) wherever the cache says that it may
be compiled. An attached model answers with `DecodingCall`: for a `GSRQCache` it begins, stages and completes the
forward pass outside of the graph, where lengths are integers of Python, and inside of it the model and the kernels
read counts from the device. Without a `compile_config` a step is captured as one CUDA graph, which is ready after two
tokens; with one, `torch.compile` makes of it what it can.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from .compat import mark_static
from .steps import Step, find_cache

logger = logging.getLogger(__name__)

# What else than tensors may be among the inputs of a step that is captured: part of the graph.
_CONSTANTS = (bool, int, float, str, type(None))


def install(model: PreTrainedModel) -> None:
    """Let `generate` ask us for the call of its decoding steps; doing it again changes nothing."""
    if not isinstance(vars(model).get("get_compiled_call"), DecodingCall):
        model.get_compiled_call = DecodingCall(model)


def uninstall(model: PreTrainedModel) -> None:
    """Let `generate` ask the model's class again."""
    if isinstance(vars(model).get("get_compiled_call"), DecodingCall):
        del model.get_compiled_call


class DecodingCall:
    """Stands for `model.get_compiled_call`; other caches get what they would get without it.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        # Why steps of this model cannot be captured, once that was found out.
        self.reason = ""

    def __call__(self, compile_config: Any) -> Callable[..., Any]:
        """The call of a decoding step.

        Args:
            compile_config: transformers' `CompileConfig`; None captures a CUDA graph.
        """
        return functools.partial(self._step, compile_config)

    def _step(self, compile_config: Any, /, *args: Any, **inputs: Any) -> Any:
        cache = find_cache(args, inputs)
        compiled = functools.partial(type(self.model).get_compiled_call, self.model, compile_config)
        if cache is None:
            return compiled()(*args, **inputs)
        # generate passes everything by name.
        step = None if args else _read_step(inputs)
        if step is None:
            return self.model(*args, **inputs)
        with _driven(cache, self.model, step):
            if not cache.reads_codes:
                return self.model(**inputs)
            if compile_config is None:
                return self._replay(cache, inputs)
            mark_static(cache.kernel_tensors())
            return compiled()(**inputs)

    def _replay(self, cache: Any, inputs: dict[str, Any]) -> Any:
        reason = self.reason or _why_not_captured(cache, inputs)
        if reason:
            _log_once(reason)
            return self.model(**inputs)
        name = cache.tokens.epoch, *((path, _describe(value)) for path, value in _leaves(inputs) if value is not cache)
        graph = cache.graphs.get(name)
        if graph is None:
            # The first such step runs as it is: kernels are compiled and libraries set up before anything is captured.
            cache.graphs = {known: held for known, held in cache.graphs.items() if known[0] == name[0]}
            cache.graphs[name] = _Graph(self.model, inputs)
            return self.model(**inputs)
        if not graph.captured:
            try:
                graph.capture()
            except RuntimeError as error:
                self.reason = f"it cannot be captured ({str(error).splitlines()[0]})"
                cache.graphs.clear()
                _log_once(self.reason)
                return self.model(**inputs)
        return graph.replay(inputs)


class _driven:
    """A forward pass that is begun, staged and completed here instead of by the hooks of `attach`."""

    def __init__(self, cache: Any, model: PreTrainedModel, step: Step) -> None:
        self.cache, self.model, self.step = cache, model, step

    def __enter__(self) -> None:
        cache = self.cache
        cache.begin_pass(self.model.get_decoder())
        try:
            cache.stage_first(self.step)
        except BaseException:
            cache.roll_back()
            raise
        cache.driven = True

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        cache = self.cache
        try:
            if kind is None:
                cache.commit_pass()
            else:
                cache.roll_back()
        finally:
            cache.driven = False


def _read_step(inputs: dict[str, Any]) -> Step | None:
    """What a model will tell its attention layers, as far as a cache must know it; None if it cannot be seen here."""
    ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
    if isinstance(mask, dict):
        # Of models that name the kinds of their layers; all of those that come here are of one.
        mask = mask.get("full_attention")
    if ids is None or positions is None or positions.dim() != 2 or (mask is not None and mask.dim() != 4):
        return None
    return Step(positions, None, mask, ids.shape[0], ids.shape[1], ids.device)


def _why_not_captured(cache: Any, inputs: dict[str, Any]) -> str:
    devices = {layer.device for layer in cache.compressed_layers}
    if len(devices) > 1:
        return "the model is spread over several devices"
    if next(iter(devices)).type != "cuda":
        return "it does not run on a CUDA device"
    for path, value in _leaves(inputs):
        if value is not cache and not isinstance(value, (torch.Tensor, *_CONSTANTS)):
            return f"it is given {'.'.join(path)}, a {type(value).__name__}"
    if inputs.get("output_attentions") or inputs.get("output_hidden_states"):
        return "attentions or hidden states were asked for"
    return ""


def _leaves(inputs: dict[str, Any], *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What a model is given, each with its name; masks may come as a dictionary."""
    for name, value in inputs.items():
        if isinstance(value, dict):
            yield from _leaves(value, *above, name)
        else:
            yield (*above, name), value


def _describe(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, torch.Tensor) else value


@functools.cache
def _log_once(reason: str) -> None:
    logger.info(f"A decoding step is not replayed as a CUDA graph, but run by Python: {reason}.")


def _cloned(inputs: dict[str, Any]) -> dict[str, Any]:
    out = {}
    for name, value in inputs.items():
        out[name] = _cloned(value) if isinstance(value, dict) else value
        if isinstance(value, torch.Tensor):
            out[name] = value.clone()
    return out


class _Graph:
    """A decoding step of a model with tensors of its own for what is given to it."""

    def __init__(self, model: PreTrainedModel, inputs: dict[str, Any]) -> None:
        self.model, self.inputs = model, inputs
        self.captured: torch.cuda.CUDAGraph | None = None

    def capture(self) -> None:
        """Record the step.

        Raises:
            RuntimeError: if the model does what cannot be recorded, such as waiting for the device.
        """
        held = _cloned(self.inputs)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.output = self.model(**held)
        self.held = [value for _, value in _leaves(held) if isinstance(value, torch.Tensor)]
        self.captured, self.inputs = graph, {}

    def replay(self, inputs: dict[str, Any]) -> Any:
        """The output of the step for these inputs, in memory of its own."""
        given = (value for _, value in _leaves(inputs) if isinstance(value, torch.Tensor))
        for held, value in zip(self.held, given, strict=True):
            held.copy_(value)
        self.captured.replay()  # type: ignore[union-attr]
        parts = {n: v.clone() if isinstance(v, torch.Tensor) else v for n, v in self.output.items()}
        return type(self.output)(**parts)
