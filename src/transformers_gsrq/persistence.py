"""A cache on disk: one safetensors file that says which codebooks and which model it belongs to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from .codebooks import GSRQCodebooks
from .files import write_tensors
from .layer import GSRQLayer
from .models import attention_modules, execution_device, fingerprint
from .options import CacheOptions
from .state import TokenState

FORMAT = "gsrq-cache"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CacheFile:
    """What a file says before its tensors are read.

    Attributes:
        path: The file.
        codebooks_digest: `GSRQCodebooks.digest` of the codebooks that its codes are for.
        model_fingerprint: `fingerprint` of the model whose states it holds.
        dtype: Dtype of the exact states, for example "bfloat16".
        options: Run-time choices of the cache.
        num_tokens: Cached tokens, padding included.
        layers: For each layer its kind and numbers, None for one that held nothing.
    """

    path: Path
    codebooks_digest: str
    model_fingerprint: str
    dtype: str
    options: CacheOptions
    num_tokens: int
    layers: list[dict[str, Any] | None]


def write_cache(
    path: str | Path,
    layers: Sequence[Any],
    table: TokenState,
    codebooks: GSRQCodebooks,
    options: CacheOptions,
    model_fingerprint: str,
) -> None:
    """Write a cache to a file, whole or not at all. See `GSRQCache.save`.

    Raises:
        ValueError: if the cache is empty, or has layers of a kind that cannot be saved.
    """
    if table.length == 0:
        raise ValueError("This cache is empty; there is nothing to save.")
    tensors: dict[str, torch.Tensor] = {}
    described = [_collect(f"layers.{index}", layer, tensors) for index, layer in enumerate(layers)]
    for name, tensor in (("positions", table.positions), ("starts", table.starts)):
        if tensor is not None:
            tensors[f"table.{name}"] = tensor
    dtype = next(layer.dtype for layer in layers if isinstance(layer, GSRQLayer))
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "codebooks_digest": codebooks.digest,
        "model_fingerprint": model_fingerprint,
        "dtype": str(dtype).removeprefix("torch."),
        "options": asdict(options),
        "num_tokens": table.length,
        "layers": described,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, tensors, {"gsrq": json.dumps(metadata)})


def read_header(path: str | Path) -> CacheFile:
    """Read what a file says of itself.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a saved cache, is damaged, or is of another format version.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        with safe_open(path, framework="pt") as file:
            document = json.loads((file.metadata() or {}).get("gsrq", "{}"))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}). Save the cache again.") from error
    if document.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that GSRQCache.save wrote.")
    if document["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {document['format_version']}; this transformers-gsrq reads version "
            f"{FORMAT_VERSION}. Upgrade it with `pip install -U transformers-gsrq`, or make the cache again."
        )
    return CacheFile(
        path=path,
        codebooks_digest=document["codebooks_digest"],
        model_fingerprint=document["model_fingerprint"],
        dtype=document["dtype"],
        options=CacheOptions(**document["options"]),
        num_tokens=document["num_tokens"],
        layers=document["layers"],
    )


def check_origin(file: CacheFile, codebooks: GSRQCodebooks, model: PreTrainedModel) -> None:
    """Check that a file belongs to these codebooks and this model.

    Raises:
        ValueError: if it does not; the message says which of them differs.
    """
    if file.codebooks_digest != codebooks.digest:
        raise ValueError(
            f"{file.path} was coded with other codebooks (digest {file.codebooks_digest[:12]}, these are "
            f"{codebooks.digest[:12]}). Load it with the codebooks that made it."
        )
    if file.model_fingerprint != fingerprint(model):
        raise ValueError(
            f"{file.path} holds the states of another model: the weights, their dtype or their quantization differ "
            f"from {model.config.name_or_path or type(model).__name__!r}. Load it with the model that made it."
        )


def fill_cache(file: CacheFile, layers: Sequence[Any], table: TokenState, model: PreTrainedModel) -> None:
    """Give empty layers the states of a file, each on the device of its decoder layer. See `GSRQCache.load`."""
    modules = attention_modules(model)
    with safe_open(file.path, framework="pt") as reader:
        for index, (layer, described) in enumerate(zip(layers, file.layers, strict=True)):
            if described is None:
                continue
            prefix = f"layers.{index}."
            device = execution_device(modules[index])
            tensors = {
                name.removeprefix(prefix): reader.get_tensor(name) for name in reader.keys() if name.startswith(prefix)
            }
            # Codes go straight into their buffer: a copy on the way would be held beside the cache.
            tensors = {
                name: tensor if name.endswith("_codes") else tensor.to(device) for name, tensor in tensors.items()
            }
            if isinstance(layer, GSRQLayer):
                layer.fill(tensors, described["num_stored"], long_rotary=described["long_rotary"])
            else:
                layer.lazy_initialization(tensors["keys"], tensors["values"])
                layer.keys, layer.values = tensors["keys"], tensors["values"]
                layer.cumulative_length = described["cumulative_length"]
            # Then a sliding layer holds more than its window. Files of earlier versions do not say.
            layer.record_past = described.get("record_past", False)
        # Where the table grows: the first compressed layer is the one that is told.
        device = execution_device(modules[next(i for i, layer in enumerate(layers) if isinstance(layer, GSRQLayer))])
        names = set(reader.keys())
        positions, starts = (
            reader.get_tensor(f"table.{name}").to(device) if f"table.{name}" in names else None
            for name in ("positions", "starts")
        )
    num_stored = next(each["num_stored"] for each in file.layers if each and "num_stored" in each)
    table.fill(file.num_tokens, num_stored, positions, starts)


def _collect(prefix: str, layer: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """Add a layer's tensors to `tensors` and describe the rest of it."""
    if isinstance(layer, GSRQLayer):
        for name, tensor in layer.tensors().items():
            tensors[f"{prefix}.{name}"] = tensor
        return {
            "num_stored": layer.num_stored,
            "long_rotary": layer.uses_long_rotary,
            "record_past": layer.record_past,
        }
    if type(layer) is DynamicSlidingWindowLayer:
        tensors[f"{prefix}.keys"], tensors[f"{prefix}.values"] = layer.keys, layer.values
        return {"cumulative_length": layer.cumulative_length, "record_past": layer.record_past}
    if getattr(layer, "keys", None) is None and not hasattr(layer, "conv_states"):
        return None
    raise ValueError(
        f"Caches with a {type(layer).__name__} cannot be saved; only compressed and sliding-window layers can."
    )
