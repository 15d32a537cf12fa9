"""What the package asks of a transformers model: its attention modules, its devices, its fingerprint."""

from __future__ import annotations

import hashlib
import logging
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

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
    held = next(chain(module.parameters(), module.buffers()), None)
    # torch's own int8 layers hold packed weights, which are neither, and run on the CPU only.
    return torch.device("cpu") if held is None else held.device


def input_device(model: PreTrainedModel) -> torch.device:
    """Device that a model takes its tokens on; `model.device` is "meta" where accelerate offloads its weights."""
    return execution_device(model.get_input_embeddings())


def fingerprint(model: PreTrainedModel) -> str:
    """Name a model by samples of every parameter of its decoder, in hexadecimal.

    Weights that accelerate offloads are not read; then only their names, shapes and dtypes count. Of weights that wrap
    other tensors (torchao, quanto, DTensor) those are read, as they are stored.
    """
    digest = hashlib.sha256()
    # Whatever a subclass makes of indexing, its numbers are wanted.
    with torch._C.DisableTorchFunctionSubclass():
        for name, weight in sorted(model.get_decoder().named_parameters()):
            _add_weight(digest, name, weight)
    return digest.hexdigest()


def _add_weight(digest: hashlib._Hash, name: str, weight: torch.Tensor) -> None:
    digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
    if hasattr(weight, "__tensor_flatten__"):
        # What torch.compile, too, asks such a tensor for: the names of those that it consists of.
        for inner in weight.__tensor_flatten__()[0]:
            _add_weight(digest, inner, getattr(weight, inner))
        return
    # A tensor that answers operators by itself and does not say what it consists of may refuse any of them.
    opaque = type(weight).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if not opaque and weight.device.type != "meta" and weight.numel():
        flat = weight.detach().flatten()
        # In integers: a float32 cannot count the weights of a large matrix.
        step = torch.arange(FINGERPRINT_SAMPLES, device=flat.device)
        rows = step * (flat.numel() - 1) // (FINGERPRINT_SAMPLES - 1)
        digest.update(flat[rows].cpu().float().numpy().data)


def position_limit(model: PreTrainedModel) -> int | None:
    """Tokens that a model can read at all, None if there is no such limit.

    Positions that are looked up end with their table, learned (GPT-2, OPT, BERT) or computed (CTRL, GPT-J, MPT).
    Rotary embedding and ALiBi go on: `max_position_embeddings` is then only what the model was trained for.
    """
    decoder = model.get_decoder()
    limits = []
    for path, module in decoder.named_modules():
        name = path.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and (name == "wpe" or "position" in name):
            # OPT keeps its first rows for other uses; RoBERTa counts from behind the padding token.
            padding = -1 if module.padding_idx is None else module.padding_idx
            limits.append(module.num_embeddings - getattr(module, "offset", padding + 1))
        for table in ("pos_encoding", "embed_positions"):
            if isinstance(getattr(module, table, None), torch.Tensor):
                limits.append(getattr(module, table).shape[0])
    if hasattr(decoder, "build_mpt_alibi_tensor"):
        limits.append(decoder.config.max_seq_len)
    return min(limits, default=None)


def capped_length(model: PreTrainedModel, window_length: int) -> int:
    """`window_length` tokens, or those that the model can read if they are fewer, which a warning says."""
    limit = position_limit(model)
    if limit is None or window_length <= limit:
        return window_length
    logger.warning(
        "%s has positions for %d tokens: windows are that long, not %d.", type(model).__name__, limit, window_length
    )
    return limit


def check_length(model: PreTrainedModel, num_tokens: int, advice: str) -> None:
    """Check that a model can read a text of `num_tokens` tokens.

    Args:
        model: The model.
        num_tokens: The longest text that it is to read, with what it generates.
        advice: What to do if it is too long, a sentence.

    Raises:
        ValueError: if its positions end before.
    """
    limit = position_limit(model)
    if limit is not None and num_tokens > limit:
        raise ValueError(
            f"{type(model).__name__} has positions for {limit} tokens and cannot read {num_tokens}. {advice}"
        )
