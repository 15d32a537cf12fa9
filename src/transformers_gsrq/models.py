"""What the package asks of a transformers model: its attention modules, its devices, its fingerprint."""

from __future__ import annotations

import hashlib

import torch
from torch import nn
from transformers import PreTrainedModel

# What attention modules call their cache argument.
CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
# Enough numbers to tell two models apart, few enough to read at once.
FINGERPRINT_SAMPLES = 64


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Self-attention modules of a decoder by layer index.

    Raises:
        ValueError: if the model has none that we recognise, or several for a layer.
    """
    found: dict[int, nn.Module] = {}
    for module in model.get_decoder().modules():
        layer = getattr(module, "layer_idx", None)
        if "Attention" in type(module).__name__ and isinstance(layer, int):
            if layer in found:
                raise ValueError(
                    f"{type(model).__name__} has several attention modules with layer_idx={layer}, for an encoder or "
                    "for a pass of its own, so a cache layer has not one attention; this architecture is not "
                    "supported."
                )
            found[layer] = module
    if not found:
        raise ValueError(
            f"No attention modules with a layer_idx were found in {type(model).__name__}; this architecture is not "
            "supported."
        )
    return found


def execution_device(module: nn.Module) -> torch.device:
    """Device that a module computes on, also where accelerate keeps its weights elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    return next(module.parameters()).device


def input_device(model: PreTrainedModel) -> torch.device:
    """Device that a model takes its tokens on; `model.device` is "meta" where accelerate offloads its weights."""
    return execution_device(model.get_input_embeddings())


def fingerprint(model: PreTrainedModel) -> str:
    """Name a model by samples of every parameter of its decoder, in hexadecimal.

    Weights that accelerate offloads are not read; then only their names, shapes and dtypes count.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.get_decoder().named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        if weight.device.type != "meta" and weight.numel():
            flat = weight.detach().flatten()
            # In integers: a float32 cannot count the weights of a large matrix.
            step = torch.arange(FINGERPRINT_SAMPLES, device=flat.device)
            rows = step * (flat.numel() - 1) // (FINGERPRINT_SAMPLES - 1)
            digest.update(flat[rows].cpu().float().numpy().data)
    return digest.hexdigest()
