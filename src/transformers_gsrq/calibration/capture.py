"""Collect keys before rotary embedding, values and their gradients from a model that reads calibration text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..compat import CACHE_ARGUMENT, native_layers
from ..config import KINDS, GSRQConfig, Kind
from ..hooks import attach, detach, is_attached
from ..models import check_length, fingerprint, input_device
from ..ops.reference import unrotate
from ..rope import Rotary, read_rotary
from ..steps import Step, SteppedCache
from ..text import windows_digest


@dataclass
class Samples:
    """Sampled states of all compressed layers.

    Attributes:
        states: `(layer, kind)` to `[N, H, D]`, keys as the config's `key_space` says, in the model's dtype, on the
            device of the layer.
        gradients: The same for the gradients of the language-model loss; empty if they were not asked for.
        data_digest: Names the token windows.
        num_tokens: Tokens that the model read.
        origin: Names the model's weights and the sample.
    """

    states: dict[tuple[int, Kind], torch.Tensor]
    gradients: dict[tuple[int, Kind], torch.Tensor]
    data_digest: str
    num_tokens: int
    origin: str = ""

    @property
    def num_vectors(self) -> int:
        """Sampled tokens N."""
        return next(iter(self.states.values())).shape[0]


class RecordingLayer(DynamicLayer):
    """Plain cache layer that keeps what it was given, with its graph, until the forward pass is over."""

    def __init__(self, with_gradients: bool) -> None:
        super().__init__()
        self.with_gradients = with_gradients
        self.step: Step | None = None
        self.recorded: dict[Kind, torch.Tensor] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Record states `[B, H, T, D]` and return them."""
        if self.with_gradients:
            # Without trainable parameters the graph begins at the first recorded state.
            key_states, value_states = (
                states if states.requires_grad else states.detach().requires_grad_()
                for states in (key_states, value_states)
            )
        self.recorded = {"key": key_states, "value": value_states}
        return super().update(key_states, value_states)


class RecordingCache(SteppedCache):
    """Cache of one forward pass that records every full-attention layer."""

    def __init__(self, model: PreTrainedModel, config: GSRQConfig, with_gradients: bool) -> None:
        layers = native_layers(model.config)
        for index in config.layers:
            layers[index] = RecordingLayer(with_gradients)
        super().__init__(layers=layers)

    def stage_step(self, module: nn.Module, step: Step) -> None:
        """Keep the step with its layer."""
        layer = self.layers[module.layer_idx]
        if isinstance(layer, RecordingLayer):
            layer.step = step

    def roll_back(self) -> None:
        """Nothing to undo: the cache is dropped with its forward pass."""


@torch.inference_mode(False)
def capture(
    model: PreTrainedModel,
    windows: torch.Tensor,
    config: GSRQConfig,
    *,
    max_vectors: int = 65536,
    gradients: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Samples:
    """Run the model over token windows and sample the states of its compressed layers.

    The same tokens are sampled in every layer, uniformly, at most `max_vectors` in all and from every window as many
    as from another, give or take one. Windows that none are taken from are not read.

    Args:
        model: The model; attached while it runs, its parameters are not changed.
        windows: int64 `[windows, T]`.
        config: Which layers, and whether keys are taken before rotary embedding.
        max_vectors: Tokens to keep.
        gradients: Also collect gradients of the mean next-token loss (Eq. 9).
        seed: Of the sample.
        progress: Show a progress bar.

    Returns:
        The samples.

    Raises:
        ValueError: if the windows are longer than the model can read, or gradients are asked for of a model whose
            weights were made under `torch.inference_mode`.
        RuntimeError: if the model's layers have no backward pass.
    """
    check_length(model, windows.shape[1], "Pass shorter windows.")
    if gradients:
        check_differentiable(model, ', or calibrate with weighting="none"')
    # Before the long work: what cannot be named could not be kept either.
    origin = f"{fingerprint(model)} {seed}"
    rotaries: dict[int, Rotary | None] = dict.fromkeys(config.layers)
    if config.key_space == "before_rope":
        rotaries = read_rotary(model, config.layers)
    generator = torch.Generator().manual_seed(seed)
    # Tokens made under inference_mode cannot be used with gradients; a copy can.
    windows = windows.clone()
    wanted = min(max_vectors, windows.numel())
    num_tokens = 0
    states: dict[tuple[int, Kind], list[torch.Tensor]] = {(i, kind): [] for i in config.layers for kind in KINDS}
    slopes: dict[tuple[int, Kind], list[torch.Tensor]] = {key: [] for key in states}
    with attached(model):
        for index, window in enumerate(tqdm(windows, desc="Reading text", unit="window", disable=not progress)):
            count = (index + 1) * wanted // len(windows) - index * wanted // len(windows)
            chosen = torch.randperm(len(window), generator=generator)[:count].sort().values
            if not count:
                continue
            num_tokens += len(window)
            for key, state, slope in _read_window(model, window, config, rotaries, gradients, chosen):
                states[key].append(state)
                if slope is not None:
                    slopes[key].append(slope)
    return Samples(
        states=_joined(states),
        gradients=_joined(slopes) if gradients else {},
        data_digest=windows_digest(windows),
        num_tokens=num_tokens,
        origin=origin,
    )


@contextmanager
def attached(model: PreTrainedModel) -> Iterator[None]:
    """The model attached and without dropout; afterwards its hooks, and the mode of each module, are as before."""
    before = is_attached(model)
    modes = {module: module.training for module in model.modules()}
    attach(model)
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        if not before:
            detach(model)


@contextmanager
def backward_pass(model: PreTrainedModel, advice: str) -> Iterator[None]:
    """A backward pass through a model; if it fails, the error says what else can be done.

    Raises:
        RuntimeError: if it fails, but for a lack of memory, which is raised as it is.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise RuntimeError(
            f"No gradients come through this {type(model).__name__} ({said}). Layers of some quantized weights have "
            f"no backward pass. {advice}"
        ) from error


def check_differentiable(model: PreTrainedModel, advice: str) -> None:
    """Check that gradients can be computed with a model's weights.

    Raises:
        ValueError: if the model was made under `torch.inference_mode`.
    """
    if any(tensor.is_inference() for tensor in chain(model.parameters(), model.buffers())):
        raise ValueError(
            f"This {type(model).__name__} was made under torch.inference_mode, and no gradients can be computed with "
            f"such weights. Load it outside of inference_mode{advice}."
        )


def _joined(parts: dict[tuple[int, Kind], list[torch.Tensor]]) -> dict[tuple[int, Kind], torch.Tensor]:
    """Each key's parts as one tensor; they are let go one by one, so that not everything is there twice."""
    return {key: torch.cat(parts.pop(key)) for key in list(parts)}


def _read_window(
    model: PreTrainedModel,
    window: torch.Tensor,
    config: GSRQConfig,
    rotaries: dict[int, Rotary | None],
    gradients: bool,
    chosen: torch.Tensor,
) -> list[tuple[tuple[int, Kind], torch.Tensor, torch.Tensor | None]]:
    cache = RecordingCache(model, config, gradients)
    input_ids = window[None].to(input_device(model))
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=input_ids, **{CACHE_ARGUMENT: cache}, use_cache=True).logits
        keys = [(index, kind) for index in config.layers for kind in KINDS]
        recorded = [cache.layers[index].recorded[kind] for index, kind in keys]
        slopes: tuple[torch.Tensor | None, ...] = (None,) * len(recorded)
        if gradients:
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), input_ids[0, 1:].to(logits.device))
            # Scaled so that tiny per-token gradients survive half precision; weights only use ratios.
            with backward_pass(model, 'Calibrate with weighting="none", which needs none.'):
                slopes = torch.autograd.grad(loss * input_ids.numel(), recorded)
    out = []
    for key, state, slope in zip(keys, recorded, slopes, strict=True):
        rotary = rotaries[key[0]] if key[1] == "key" else None
        step = cache.layers[key[0]].step
        taken = [_take(tensor, rotary, step, chosen) for tensor in (state, slope) if tensor is not None]
        out.append((key, taken[0], taken[1] if slope is not None else None))
    return out


def _take(states: torch.Tensor, rotary: Rotary | None, step: Step, chosen: torch.Tensor) -> torch.Tensor:
    """Chosen tokens of `[1, H, T, D]` as `[N, H, D]`, rotation undone."""
    states = states.detach()
    if rotary is not None:
        # A gradient turns with its key: its transpose rotation is the same un-rotation up to a constant factor.
        if step.position_ids is None:
            raise ValueError(
                "The model did not pass position_ids to its attention layers, so its keys cannot be un-rotated. "
                "This architecture is not supported."
            )
        positions = step.position_ids.to(states.device)
        rotary = rotary.for_length(states.shape[-2])
        if step.position_embeddings is not None:
            Rotary.check(rotary.error(positions, step.position_embeddings).item())
        states = unrotate(states, rotary.cos_sin(positions, states.dtype)).to(states.dtype)
    return states[0].transpose(0, 1)[chosen.to(states.device)]
