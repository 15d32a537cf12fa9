"""A cache on disk: one safetensors file that says which codebooks and which model it belongs to."""

from __future__ import annotations

import json
import string
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from .codebooks import GSRQCodebooks
from .config import KINDS
from .files import write_tensors
from .foreign import shown
from .layer import GSRQLayer
from .models import attention_modules, execution_device, fingerprint
from .options import CacheOptions
from .state import TokenState

FORMAT = "gsrq-cache"
FORMAT_VERSION = 1
# Dtypes of exact states, as safetensors names them and as the header does.
STATE_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# More than any context, and less than what overflows when it is multiplied by sizes.
MAX_TOKENS = 2**31 - 1
UPGRADE = "Upgrade it with `pip install -U transformers-gsrq`"

_AGAIN = "It is damaged, or was changed: save the cache again."

# Fields of the header and of the layers in it, by their types.
_HEADER = {
    "format": str,
    "format_version": int,
    "codebooks_digest": str,
    "model_fingerprint": str,
    "dtype": str,
    "options": dict,
    "num_tokens": int,
    "layers": list,
}
_COMPRESSED = {"num_stored": int, "long_rotary": bool, "record_past": bool}
_SLIDING = {"cumulative_length": int, "record_past": bool}


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
        "num_tokens": int(table.length),
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
    with _opened(path) as file:
        text = (file.metadata() or {}).get("gsrq", "{}")
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} has a header that is not valid JSON ({shown(str(error))}). {_AGAIN}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but not one that GSRQCache.save wrote.")
    version = document.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {shown(version)}; this transformers-gsrq reads version {FORMAT_VERSION}. "
            f"{UPGRADE}, or make the cache again."
        )
    _check_fields(f"The header of {path}", document, _HEADER)
    for name in ("codebooks_digest", "model_fingerprint"):
        if len(document[name]) != 64 or not set(document[name]) <= set(string.hexdigits):
            raise ValueError(f"{path} has a {name} that is no SHA-256 ({shown(document[name])}). {_AGAIN}")
    if document["dtype"] not in STATE_DTYPES.values():
        raise ValueError(
            f"{path} holds states of dtype {shown(document['dtype'])}; legal: {sorted(STATE_DTYPES.values())}. "
            f"{_AGAIN}"
        )
    if not 1 <= document["num_tokens"] <= MAX_TOKENS:
        raise ValueError(f"{path} says that it holds {document['num_tokens']} tokens. {_AGAIN}")
    _check_fields(f"The options in {path}", document["options"], dict.fromkeys(asdict(CacheOptions())))
    try:
        options = CacheOptions(**document["options"])
    except ValueError as error:
        raise ValueError(
            f"{path} was saved with an option that this transformers-gsrq does not take ({shown(str(error))}). It is "
            f"damaged, or made by a newer version: {UPGRADE}."
        ) from error
    return CacheFile(
        path=path,
        codebooks_digest=document["codebooks_digest"],
        model_fingerprint=document["model_fingerprint"],
        dtype=document["dtype"],
        options=options,
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
    """Give empty layers the states of a file, each on the device of its decoder layer. See `GSRQCache.load`.

    Raises:
        ValueError: if the parts of the file do not fit these layers or one another. Sizes are checked before any
            tensor is read.
    """
    modules = attention_modules(model)
    with _opened(file.path) as reader:
        held = {name: (part.get_dtype(), part.get_shape()) for name, part in _slices(reader).items()}
        _check_parts(file, held, layers, model)
        starts = reader.get_tensor("table.starts")
        if (starts < 0).any():
            raise ValueError(f"{file.path}: a row of table.starts begins before token 0. {_AGAIN}")
        for index, (layer, described) in enumerate(zip(layers, file.layers, strict=True)):
            if described is None:
                continue
            prefix = f"layers.{index}."
            device = execution_device(modules[index])
            tensors = {name.removeprefix(prefix): reader.get_tensor(name) for name in held if name.startswith(prefix)}
            if isinstance(layer, GSRQLayer):
                _check_codes(file, prefix, tensors, layer.codebooks.config.num_centroids)
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
            # Then a sliding layer holds more than its window.
            layer.record_past = described["record_past"]
        # Where the table grows: the first compressed layer is the one that is told.
        device = execution_device(modules[next(i for i, layer in enumerate(layers) if isinstance(layer, GSRQLayer))])
        positions = reader.get_tensor("table.positions").to(device) if "table.positions" in held else None
    # A row that was cut back into its padding begins nowhere yet, wherever it once began.
    num_stored = next(each["num_stored"] for each in file.layers if each and "num_stored" in each)
    table.fill(file.num_tokens, num_stored, positions, starts.clamp(max=file.num_tokens).to(device))


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file.

    Raises:
        ValueError: if it is not a whole one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a complete safetensors file ({shown(str(error))}). Save the cache again."
        ) from error


def _slices(reader: Any) -> dict[str, Any]:
    """The tensors of a file by name, none of them read yet."""
    return {name: reader.get_slice(name) for name in reader.keys()}


def _check_fields(what: str, fields: Any, types: Mapping[str, type | None]) -> None:
    """Check names and types of what a file says; a type of None is checked elsewhere.

    Raises:
        ValueError: for a field that is unknown, missing or of another type.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"{what} must have the fields {list(types)}, got {shown(fields)}. {_AGAIN}")
    unknown = sorted(fields.keys() - types.keys())
    if unknown:
        raise ValueError(
            f"{what}: {shown(unknown)} is not known to this transformers-gsrq, so the file was made by a newer "
            f"version. {UPGRADE}, or make the cache again."
        )
    missing = sorted(types.keys() - fields.keys())
    if missing:
        raise ValueError(f"{what}: {missing} is missing. {_AGAIN}")
    for name, kind in types.items():
        # Exactly this type: a bool is an int to Python.
        if kind is not None and type(fields[name]) is not kind:
            raise ValueError(f"{what}: {name} must be of type {kind.__name__}, got {shown(fields[name])}. {_AGAIN}")


def _check_parts(
    file: CacheFile, held: Mapping[str, tuple[str, list[int]]], layers: Sequence[Any], model: PreTrainedModel
) -> None:
    """Check what a file says of its layers, and dtype and shape of its tensors, against the layers and each other.

    Args:
        file: The file.
        held: Dtype, as safetensors names it, and shape of every tensor in it.
        layers: The empty layers.
        model: The model.

    Raises:
        ValueError: naming the first part that does not fit.
    """
    if len(file.layers) != len(layers):
        raise ValueError(f"{file.path} has {len(file.layers)} layers, this model's cache {len(layers)}. {_AGAIN}")
    names = {"table.starts"}
    for index, (layer, described) in enumerate(zip(layers, file.layers, strict=True)):
        names |= {f"layers.{index}.{part}" for part in _check_layer(file, index, layer, described)}
    rotates = any(isinstance(layer, GSRQLayer) and layer.rotary is not None for layer in layers)
    missing = sorted((names | ({"table.positions"} if rotates else set())) - held.keys())
    if missing:
        raise ValueError(f"{file.path} lacks the tensors {missing[:4]}. {_AGAIN}")
    unknown = sorted(held.keys() - names - {"table.positions"})
    if unknown:
        raise ValueError(
            f"{file.path} has tensors that this transformers-gsrq does not know ({shown(unknown[:4])}), so it was "
            f"made by a newer version. {UPGRADE}, or make the cache again."
        )
    starts = held["table.starts"][1]
    rows = starts[0] if starts else 0
    if rows < 1:
        raise ValueError(f"{file.path}: table.starts must be [B] with a number for each row, got {starts}. {_AGAIN}")
    expected: dict[str, tuple[str, list[int]]] = {"table.starts": ("I64", [rows])}
    if "table.positions" in held:
        # Who passes positions that its model does not use need not pass all.
        known = file.num_tokens if rotates else min((held["table.positions"][1] or [0])[-1], file.num_tokens)
        expected["table.positions"] = ("I32", [rows, known])
    for index, (layer, described) in enumerate(zip(layers, file.layers, strict=True)):
        if described is not None:
            parts = _layer_parts(file, index, layer, rows, held, model)
            expected.update({f"layers.{index}.{part}": each for part, each in parts.items()})
    for name, wanted in expected.items():
        if held[name] != wanted:
            raise ValueError(
                f"{file.path}: {name} is {' '.join(map(str, held[name]))}, but {' '.join(map(str, wanted))} is what "
                f"fits the codebooks, the options and the rest of the file. {_AGAIN}"
            )
    first = next(index for index, layer in enumerate(layers) if isinstance(layer, GSRQLayer))
    dtype = STATE_DTYPES[held[f"layers.{first}.keys"][0]]
    if dtype != file.dtype:
        raise ValueError(f"{file.path} says that its states are {file.dtype}, but they are {dtype}. {_AGAIN}")


def _check_layer(file: CacheFile, index: int, layer: Any, described: Any) -> list[str]:
    """Check what a file says of one layer, and name the tensors that it must have of it."""
    what = f"Layer {index} in {file.path}"
    if isinstance(layer, GSRQLayer):
        _check_fields(what, described, _COMPRESSED)
        longer = layer.rotary is not None and layer.rotary.longer is not None
        if not 0 <= described["num_stored"] <= file.num_tokens:
            raise ValueError(
                f"{what}: num_stored must be 0 to {file.num_tokens}, got {described['num_stored']}. {_AGAIN}"
            )
        if described["long_rotary"] and not longer:
            raise ValueError(f"{what} has a second rotary embedding (long_rotary), the model none. {_AGAIN}")
        return ["keys", "values", *(f"{kind}_{part}" for kind in KINDS for part in ("sinks", "codes"))]
    if type(layer) is DynamicSlidingWindowLayer:
        _check_fields(what, described, _SLIDING)
        if described["cumulative_length"] != file.num_tokens:
            raise ValueError(
                f"{what} has seen {described['cumulative_length']} tokens, the cache holds {file.num_tokens}. {_AGAIN}"
            )
        return ["keys", "values"]
    if described is not None:
        raise ValueError(f"{what} holds states, but this model's cache has a {type(layer).__name__} there. {_AGAIN}")
    return []


def _layer_parts(
    file: CacheFile,
    index: int,
    layer: Any,
    rows: int,
    held: Mapping[str, tuple[str, list[int]]],
    model: PreTrainedModel,
) -> dict[str, tuple[str, list[int]]]:
    """Dtype and shape that each tensor of a layer must have.

    Dtypes of keys and values are their own, since they differ under autocast, but must be those of states.
    """
    described: Any = file.layers[index]
    dtypes = {}
    for states in ("keys", "values"):
        name = f"layers.{index}.{states}"
        dtypes[states] = held[name][0]
        if dtypes[states] not in STATE_DTYPES:
            raise ValueError(f"{file.path}: {name} is {dtypes[states]}; legal: {list(STATE_DTYPES)}. {_AGAIN}")
    if isinstance(layer, GSRQLayer):
        config, stored = layer.codebooks.config, described["num_stored"]
        shape = [rows, config.num_kv_heads, file.num_tokens - stored, config.head_dim]
        out = {states: (dtypes[states], shape) for states in dtypes}
        sinks = file.options.sink_length
        for kind, states in zip(KINDS, dtypes, strict=True):
            out[f"{kind}_sinks"] = dtypes[states], [rows, config.num_kv_heads, sinks, config.head_dim]
            out[f"{kind}_codes"] = "U8", [rows, *config.code_shape(index, kind), max(0, stored - sinks)]
        return out
    heads, head_dim = _sliding_geometry(model, index)
    window = min(file.num_tokens, layer.sliding_window - 1)
    if described["record_past"]:
        # Then everything since that was asked for is held.
        shape = held[f"layers.{index}.keys"][1]
        window = min(max(window, shape[2] if len(shape) == 4 else 0), file.num_tokens)
    return {states: (dtypes[states], [rows, heads, window, head_dim]) for states in dtypes}


def _sliding_geometry(model: PreTrainedModel, index: int) -> tuple[int, int]:
    """Heads H and channels D of a layer with a sliding window, which may differ from the compressed layers'."""
    config = model.config.get_text_config(decoder=True).per_layer_config[index]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads, head_dim


def _check_codes(file: CacheFile, prefix: str, tensors: Mapping[str, torch.Tensor], num_centroids: int) -> None:
    for kind in KINDS:
        codes = tensors[f"{kind}_codes"]
        if codes.numel() and int(codes.max()) >= num_centroids:
            raise ValueError(
                f"{file.path}: {prefix}{kind}_codes has code {codes.max()}, the codebooks {num_centroids} centroids, "
                f"counted from 0. {_AGAIN}"
            )


def _collect(prefix: str, layer: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any] | None:
    """Add a layer's tensors to `tensors` and describe the rest of it."""
    if isinstance(layer, GSRQLayer):
        for name, tensor in layer.tensors().items():
            # One after another: what lies in two parts of a ring is joined in memory of its own.
            tensors[f"{prefix}.{name}"] = tensor.detach().cpu()
        return {
            # transformers 5.17 crops by a tensor.
            "num_stored": int(layer.num_stored),
            "long_rotary": layer.uses_long_rotary,
            "record_past": layer.record_past,
        }
    if type(layer) is DynamicSlidingWindowLayer:
        tensors[f"{prefix}.keys"], tensors[f"{prefix}.values"] = layer.keys, layer.values
        return {"cumulative_length": int(layer.cumulative_length), "record_past": layer.record_past}
    if getattr(layer, "keys", None) is None and not hasattr(layer, "conv_states"):
        return None
    raise ValueError(
        f"Caches with a {type(layer).__name__} cannot be saved; only compressed and sliding-window layers can."
    )
