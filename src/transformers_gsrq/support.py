"""Whether a model's cache can be compressed, and if not, why."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from .config import compressible_layers, head_geometry
from .models import CACHE_ARGUMENTS, attention_modules
from .rope import check_cache_layer, read_rotary


@dataclass(frozen=True)
class Support:
    """Answer of `check_model`.

    Attributes:
        supported: Whether the model's cache can be compressed.
        reason: Why not; empty if it can.
        layers: Indices of the layers that are compressed; the others keep transformers' own caches.
        num_layers: Decoder layers in all.
    """

    supported: bool
    reason: str
    layers: tuple[int, ...]
    num_layers: int

    def __bool__(self) -> bool:
        return self.supported

    def __str__(self) -> str:
        if not self.supported:
            return f"Not supported: {self.reason}"
        return f"Supported: {len(self.layers)} of {self.num_layers} layers are compressed."


def check_model(model: PreTrainedModel) -> Support:
    """Say whether a model is supported, before any calibration.

    The architecture, the attention layers and the rotary embedding are looked at; none of its weights is used.

    Args:
        model: A transformers model, on any device.

    Returns:
        The answer; true where a truth value is asked.
    """
    num_layers = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", 0)
    try:
        layers = compressible_layers(model.config)
        head_geometry(model.config.get_text_config(decoder=True))
        modules = attention_modules(model)
        for layer in layers:
            if layer not in modules:
                raise ValueError(f"No attention module with layer_idx={layer} was found in {type(model).__name__}.")
            check_attention(modules[layer])
        read_rotary(model, layers)
    except ValueError as error:
        return Support(False, str(error), (), num_layers)
    return Support(True, "", layers, num_layers)


def check_attention(module: nn.Module) -> None:
    """Check that an attention module takes its cache by a name we know, and writes to its own layer of it.

    Raises:
        ValueError: if it does not.
    """
    parameters = inspect.signature(module.forward).parameters
    if not any(name in parameters for name in CACHE_ARGUMENTS):
        raise ValueError(
            f"{type(module).__name__} takes no argument named {' or '.join(CACHE_ARGUMENTS)}, so its keys cannot be "
            "matched with their positions; this architecture is not supported."
        )
    check_cache_layer(module)
