"""Decoding steps as `generate` can speed them up: replayed as a CUDA graph, or compiled.

`generate` asks its model for the call of its decoding steps (`get_compiled_call`) wherever the cache says that it may
be compiled. An attached model answers with `DecodingCall`: for a `GSRQCache` it begins, stages and completes the
forward pass outside of the graph, where lengths are integers of Python, and inside of it the model and the kernels
read counts from the device. A step is recorded as one CUDA graph, which is ready after two tokens; with a
`compile_config` it is compiled first, which takes longer and gives fewer kernels.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_masks_for_generate

from .compat import CACHE_ARGUMENT
from .graphs import record
from .steps import Step, find_cache

logger = logging.getLogger(__name__)

# What else than tensors may be among the inputs of a step that is recorded: part of the graph.
_CONSTANTS = (bool, int, float, str, type(None))
# Modes of torch.compile, and the same without CUDA graphs of its own.
_WITHOUT_GRAPHS = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


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
        self.__setstate__({"model": model, "reason": ""})

    def __getstate__(self) -> dict[str, Any]:
        """What a copy of the model gets: the call of that copy."""
        return {"model": self.model, "reason": self.reason}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Weakly: a model that is dropped is freed at once, its gigabytes do not wait for the garbage collector.
        self._model = weakref.ref(state["model"])
        # Why steps of this model cannot be recorded, once that was found out.
        self.reason: str = state["reason"]

    @property
    def model(self) -> PreTrainedModel:
        """The model; whoever calls this holds it."""
        return self._model()

    def __call__(self, compile_config: Any) -> Callable[..., Any]:
        """The call of a decoding step.

        Args:
            compile_config: transformers' `CompileConfig`; None compiles nothing.
        """
        return functools.partial(self._step, compile_config, _state_of(self.model))

    def _compiled(self, compile_config: Any, mode: str | None) -> Callable[..., Any]:
        if compile_config is not None and mode != compile_config.mode:
            compile_config = copy.copy(compile_config)
            compile_config.mode = mode
        return type(self.model).get_compiled_call(self.model, compile_config)

    def _step(self, compile_config: Any, state: int, /, *args: Any, **inputs: Any) -> Any:
        cache = find_cache(args, inputs)
        if cache is None:
            return type(self.model).get_compiled_call(self.model, compile_config)(*args, **inputs)
        # generate passes everything by name.
        step = None if args else self._read_step(cache, inputs)
        if step is None:
            return self.model(*args, **inputs)
        with _driven(cache, self.model, step):
            if not cache.reads_codes:
                return self.model(**inputs)
            forward: Callable[..., Any] = self.model
            if compile_config is not None:
                # The graph is recorded here, where counts are known, instead of by the compiler.
                forward = self._compiled(compile_config, _WITHOUT_GRAPHS.get(compile_config.mode, compile_config.mode))
            return self._replay(cache, forward, state, inputs)

    def _read_step(self, cache: Any, inputs: dict[str, Any]) -> Step | None:
        """What a model will tell its attention layers, as far as a cache must know it; None if it cannot be seen here.

        A mask that the model would make of lengths in Python is made here, as `generate` does: recorded, it would stay
        what it was.
        """
        ids, positions, mask = (inputs.get(name) for name in ("input_ids", "position_ids", "attention_mask"))
        if ids is None or positions is None or positions.dim() != 2 or not cache:
            return None
        if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
            make = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
            like = torch.empty(*ids.shape, 0, dtype=self.model.dtype, device=ids.device)
            mask = inputs["attention_mask"] = make(
                config=self.model.config,
                inputs_embeds=like,
                attention_mask=mask,
                position_ids=positions,
                **{CACHE_ARGUMENT: cache},
            )
        if isinstance(mask, dict):
            # Of models that name the kinds of their layers; all of those that come here are of one.
            mask = mask.get("full_attention")
        if mask is not None and mask.dim() != 4:
            return None
        return Step(positions, None, mask, ids.shape[0], ids.shape[1], ids.device)

    def _replay(self, cache: Any, forward: Callable[..., Any], state: int, inputs: dict[str, Any]) -> Any:
        reason = self.reason or _why_not_recorded(cache, inputs)
        if reason:
            _log_once(reason)
            return forward(**inputs)
        name = (
            cache.tokens.epoch,
            id(forward),
            state,
            *((path, _describe(value)) for path, value in _leaves(inputs) if value is not cache),
        )
        graph = cache.graphs.get(name)
        if graph is None:
            # The first such step runs as it is: kernels are compiled and libraries set up before anything is recorded.
            cache.graphs = {known: held for known, held in cache.graphs.items() if known[0] == name[0]}
            cache.graphs[name] = _Graph()
            return forward(**inputs)
        if not graph.recorded:
            try:
                graph.record(forward, inputs)
            except torch.OutOfMemoryError:
                _log_once("there was no memory to record it")
                return forward(**inputs)
            except RuntimeError as error:
                self.reason = f"it cannot be recorded ({str(error).splitlines()[0]})"
                cache.graphs.clear()
                _log_once(self.reason)
                return forward(**inputs)
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


def _why_not_recorded(cache: Any, inputs: dict[str, Any]) -> str:
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


def _state_of(model: PreTrainedModel) -> int:
    """A number that changes with what a recorded step of a model depends on beside its inputs.

    Where its weights are, whether it trains, what hooks and adapters it has; weights may change in place.
    """
    # Weights that wrap others, as of torchao, have no memory of their own to point to.
    plain = (torch.Tensor, nn.Parameter)
    weights = itertools.chain(model.parameters(), model.buffers())
    parts: list[Any] = [weight.data_ptr() if type(weight) in plain else id(weight) for weight in weights]
    for module in model.modules():
        adapters = str(getattr(module, "active_adapters", "")), str(getattr(module, "disable_adapters", ""))
        parts.append((module.training, len(module._forward_hooks), len(module._forward_pre_hooks), adapters))
    return hash(tuple(parts))


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
    """A decoding step of a model with tensors of its own for what is given to it; it holds neither model nor cache."""

    def __init__(self) -> None:
        self.recorded: torch.cuda.CUDAGraph | None = None

    def record(self, forward: Callable[..., Any], inputs: dict[str, Any]) -> None:
        """Record the step.

        Raises:
            RuntimeError: if the model does what cannot be recorded, such as waiting for the device.
        """
        held = _cloned(inputs)
        self.held = [value for _, value in _leaves(held) if isinstance(value, torch.Tensor)]
        self.recorded, output = record(lambda: forward(**held), self.held[0].device)
        self.kind = type(output)
        other = [n for n, v in output.items() if not isinstance(v, torch.Tensor) and v is not inputs.get(n)]
        if other:
            self.recorded = None
            raise RuntimeError(f"its output has {', '.join(other)}, which is neither a tensor nor its cache")
        # The cache comes with the inputs of each replay.
        self.output = {name: value if isinstance(value, torch.Tensor) else None for name, value in output.items()}

    def replay(self, inputs: dict[str, Any]) -> Any:
        """The output of the step for these inputs, in memory of its own."""
        given = (value for _, value in _leaves(inputs) if isinstance(value, torch.Tensor))
        for held, value in zip(self.held, given, strict=True):
            held.copy_(value)
        self.recorded.replay()  # type: ignore[union-attr]
        parts = {n: inputs[n] if v is None else v.clone() for n, v in self.output.items()}
        return self.kind(**parts)
