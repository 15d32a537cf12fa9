"""Models and texts as the command line takes them: what `from_pretrained` takes, GGUF and text files, datasets."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

# Enough for the paper's 128 windows of 2,048 tokens, at four characters a token, twice over.
MAX_DATASET_CHARACTERS = 2 * 128 * 2048 * 4

# The oldest models have no owner in their name.
_MODEL_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a local folder, a Hub id or a GGUF file.

    Args:
        source: Folder, `owner/name`, `path/to/file.gguf`, or `owner/name/file.gguf` on the Hub.
        dtype: "auto" (as the model was saved; bfloat16 for GGUF files, which are unpacked), or a dtype or its name.
        device: "cpu", "cuda", "cuda:1", ...; by default the GPU if there is one.
        revision: Branch, tag or commit on the Hub.
        token: Access token; by default the one of `hf auth login`.

    Raises:
        OSError: if there is no such model.
        ValueError: if transformers does not know this type of model, or for an unknown dtype or missing device.
        ImportError: if a GGUF file is given and the package `gguf` is not installed.
    """
    given = {"revision": revision, "token": token}
    options: dict[str, Any] = {name: value for name, value in given.items() if value}
    where = _device(device)
    place = str(source)
    if place.endswith(".gguf"):
        place, _, options["gguf_file"] = place.rpartition("/") if "/" in place else (".", "/", place)
        if importlib.util.find_spec("gguf") is None:
            raise ImportError('Reading GGUF files needs the package gguf: pip install "transformers-gsrq[demo]".')
    missing = Path(place).is_dir() and not (Path(place) / options.get("gguf_file", "")).exists()
    if missing or not (Path(place).is_dir() or _MODEL_ID.fullmatch(place)):
        raise FileNotFoundError(
            f"{source} does not exist. Name a local folder, a GGUF file, or a model on the Hub as owner/name."
        )
    # GGUF files are unpacked on loading: the model then counts as a plain one.
    unpacked = {"quantization_config": GgufConfig(dequantize=True)} if "gguf_file" in options else {}
    model = AutoModelForCausalLM.from_pretrained(place, dtype=_dtype(dtype, bool(unpacked)), **unpacked, **options)
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    if unpacked:
        _name_special_tokens(tokenizer, model.config)
    return model.to(where), tokenizer


def _name_special_tokens(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> None:
    """Special tokens as the GGUF file numbers them: transformers 5.17 reads other ones, and none to pad with."""
    for role in ("bos", "eos", "pad"):
        number = getattr(config, f"{role}_token_id", None)
        if isinstance(number, int):
            setattr(tokenizer, f"{role}_token", tokenizer.convert_ids_to_tokens(number))


def _device(name: str | None) -> torch.device:
    count = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda" if count else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{name!r} is not a device. Use cpu, cuda, cuda:1 ...") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"{name!r} is not there: torch sees {count} CUDA devices. Use cpu, or check the driver.")
    return device


def _dtype(dtype: str | torch.dtype, is_gguf: bool) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if is_gguf else "auto"
    legal = ("bfloat16", "float16", "float32")
    if dtype not in legal:
        raise ValueError(f"dtype must be auto or one of {', '.join(legal)}, got {dtype!r}.")
    return getattr(torch, dtype)


def read_texts(paths: Sequence[str | Path]) -> list[str]:
    """Texts of UTF-8 files, one text a file; a folder stands for all `.txt` files below it.

    Raises:
        FileNotFoundError: if a file, or any `.txt` file in a folder, is not there.
        ValueError: if a file is empty or not UTF-8.
    """
    return [_read_text(file) for path in paths for file in _text_files(Path(path))]


def _text_files(path: Path) -> list[Path]:
    files = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        what = "has no .txt files in it" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{path} {what}. Name a text file, or a folder of .txt files.")
    return files


def _read_text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.object[error.start]:#04x} at position {error.start}). Convert it, "
            f"for example with `iconv -f latin1 -t utf-8 {path.name}`."
        ) from error
    if not text.strip():
        raise ValueError(f"{path} is empty. Name a file with text in it.")
    return text


def read_dataset(name: str, *, split: str = "train", column: str = "text", config: str | None = None) -> list[str]:
    """The first texts of a dataset, as many as calibration can use at most (about two million characters).

    Args:
        name: Anything that `datasets.load_dataset` takes: Hub id or local folder.
        split: Its split.
        column: Column that holds the texts.
        config: Its configuration, where it has several.

    Raises:
        ImportError: if the package `datasets` is not installed.
        ValueError: if it has no such column or no text.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ImportError('Reading datasets needs the package datasets: pip install "transformers-gsrq[eval]".')
    import datasets

    rows = datasets.load_dataset(name, config, split=split, streaming=True)
    texts = list(_first_texts(rows, name, column))
    if not texts:
        raise ValueError(f"The split {split!r} of {name} holds no text in column {column!r}.")
    return texts


def _first_texts(rows: Any, name: str, column: str) -> Iterator[str]:
    left = MAX_DATASET_CHARACTERS
    for row in rows:
        if column not in row:
            raise ValueError(f"{name} has no column {column!r}. Its columns: {', '.join(row)}.")
        text = row[column] or ""
        if not isinstance(text, str):
            raise ValueError(f"Column {column!r} of {name} holds {type(text).__name__}, not text.")
        if text.strip():
            yield text
            left -= len(text)
        if left <= 0:
            return
