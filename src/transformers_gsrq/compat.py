"""What differs between library versions, and nothing else: the only module that looks at them."""

from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError
from packaging.version import Version
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel, QuantizedCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

OLDEST_TRANSFORMERS = Version("5.17.0")
# What models and `generate` call their cache: "cache" from transformers 5.24 on, where the old name only warns yet.
CACHE_ARGUMENT = (
    "cache"
    if "cache" in inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)
# What the Hub's client raises when it gets no answer: httpx.HTTPError, from huggingface-hub 2.0 on httpx2.HTTPError.
TransportError: type[Exception] = HfHubHTTPError.__bases__[0]


def check_transformers() -> None:
    """Refuse a transformers older than the oldest one whose cache contract we know.

    Raises:
        ImportError: if the installed transformers is older than `OLDEST_TRANSFORMERS`.
    """
    installed = Version(importlib.metadata.version("transformers"))
    if installed < OLDEST_TRANSFORMERS:
        raise ImportError(
            f"transformers-gsrq needs transformers >= {OLDEST_TRANSFORMERS}, but {installed} is installed. "
            "Upgrade it with `pip install -U transformers`."
        )


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a saved artefact or a measurement depends on, by distribution name."""
    names = ("transformers-gsrq", "torch", "transformers", "huggingface-hub", "triton")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def device_name(device: torch.device) -> str:
    """What a measurement ran on: the name of the GPU, else the type of the device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def computed_with(model: PreTrainedModel) -> dict[str, Any]:
    """What any result of a model depends on beside its weights: dtype, device and versions, as JSON types."""
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": device_name(model.device),
        "versions": library_versions(),
    }


def quantized_cache(config: PreTrainedConfig, backend: str, nbits: int) -> Cache:
    """Transformers' own quantized cache with its default groups and exact window.

    Args:
        config: The model's config.
        backend: "quanto" or "hqq"; see `quantized_backends`.
        nbits: Bits of an element, without scales.
    """
    return QuantizedCache(backend=backend, config=config.get_text_config(decoder=True), nbits=nbits)


def quantized_codec(config: PreTrainedConfig, backend: str, nbits: int, kind: str) -> Callable:
    """What transformers' quantized cache gives back for states `[B, H, T, D]` that it has quantized at once.

    Args:
        config: The model's config.
        backend: "quanto" or "hqq"; see `quantized_backends`.
        nbits: Bits of an element, without scales.
        kind: "key" or "value".
    """
    layer = quantized_cache(config, backend, nbits).layers[0]
    axis = layer.axis_key if kind == "key" else layer.axis_value

    def codec(states: torch.Tensor) -> torch.Tensor:
        # hqq asks the layer's own keys for device and dtype.
        layer.keys = states
        return layer._dequantize(layer._quantize(states.contiguous(), axis=axis)).to(states.dtype)

    return codec


def quantized_backends() -> list[str]:
    """Backends of transformers' quantized cache whose packages are installed."""
    packages = {"quanto": "optimum-quanto", "hqq": "hqq"}
    installed = {distribution.name for distribution in importlib.metadata.distributions()}
    return [backend for backend, package in packages.items() if package in installed]


def native_layers(config: PreTrainedConfig) -> list[CacheLayerMixin]:
    """One of transformers' own cache layers for each layer of the model, in the model's order.

    Asking transformers itself keeps sliding, chunked, linear and shared layers exactly as they are without us.
    """
    return DynamicCache(config=config).layers


def attributes(layer: CacheLayerMixin) -> dict[str, Any]:
    """What a native cache layer holds, by reference; new tokens do not change the result, but see `holds_states`.

    Putting it back undoes a crop or a forward pass, and empties a layer where `reset` does not: in transformers 5.17
    that leaves zeros that new tokens are appended to, and in no version does it end the recording of the past.
    """
    return {name: dict(value) if isinstance(value, dict) else value for name, value in vars(layer).items()}


def holds_states(layer: CacheLayerMixin) -> bool:
    """Whether a native cache layer holds states of linear attention, which models change in place."""
    states = [getattr(layer, name, {}) for name in ("conv_states", "recurrent_states")]
    return any(state is not None for each in states for state in each.values())


def restart_length(config: PreTrainedConfig) -> int | None:
    """Cached tokens at which `generate` of such a model drops its cache and starts over, None if it never does.

    The Phi-3 family switches rotary frequencies there (`Phi3ForCausalLM.prepare_inputs_for_generation`).
    """
    if config.model_type in ("phi3", "phimoe"):
        return getattr(config, "original_max_position_embeddings", None)
    return None


def is_full_attention(layer: CacheLayerMixin) -> bool:
    """Whether a native cache layer belongs to plain full attention, the only kind whose states we compress."""
    return type(layer) is DynamicLayer
