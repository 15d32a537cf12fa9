"""Measurements with what they depend on, so that a figure can be made again."""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..codebooks import GSRQCodebooks
from ..compat import computed_with
from ..text import windows_digest
from .measures import Settings
from .perplexity import PLAIN, Perplexity


@functools.cache
def git_commit(file: Path = Path(__file__)) -> str:
    """The commit of the checkout that a file belongs to, "-dirty" if the tree differs from it.

    Args:
        file: A file of the checkout; by default of this package.

    Returns:
        "unknown" for a file that git does not track: an installed package, even inside somebody's checkout.
    """
    git = shutil.which("git")

    def ask(*arguments: str) -> str:
        command = [str(git), "-C", str(file.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    tracked = git is not None and ask("ls-files", file.name)
    return (tracked and ask("describe", "--always", "--dirty", "--abbrev=12")) or "unknown"


def circumstances(model: PreTrainedModel) -> dict[str, Any]:
    """What any measurement on a model depends on, as JSON types."""
    return {"model": model.config.name_or_path, **computed_with(model), "commit": git_commit()}


def run_record(
    model: PreTrainedModel,
    windows: torch.Tensor,
    codebooks: Mapping[str, GSRQCodebooks],
    found: Mapping[str, Mapping[str, Any]],
    settings: Settings,
    *,
    model_fingerprint: str,
    data: str,
    command: str,
) -> dict[str, Any]:
    """The record of a run of `evaluate`: circumstances, caches, and all results by cache name, as JSON types.

    Args:
        model: The model that was measured.
        windows: The windows that it read, `[windows, T]`.
        codebooks: What was measured, by name.
        found: What `evaluate` returned.
        settings: What it was told.
        model_fingerprint: `fingerprint` of the model, taken before it was measured: it must not fail after that.
        data: What to call the text.
        command: The command line.
    """
    results: dict[str, dict[str, Any]] = {}
    for measure, by_name in found.items():
        for name, value in by_name.items():
            if measure == "perplexity":
                entry = perplexity_record(
                    model, windows, by_name, name, data=data, beam_width=settings.beam_width, **settings.reading
                )
            else:
                entry = {measure: _plain_types(value)}
            results[name] = {**results.get(name, {}), **entry}
    first = next(iter(codebooks.values())).config
    size = model.dtype.itemsize
    return {
        **circumstances(model),
        "model_fingerprint": model_fingerprint,
        "command": command,
        "data": data,
        "data_digest": windows_digest(windows),
        "settings": {"windows": windows.shape[0], "window_length": windows.shape[1], **settings.to_dict()},
        "digests": {name: made.digest for name, made in codebooks.items()},
        "caches": {
            PLAIN: {"bits": 8 * size, "bytes_per_token": first.dense_bytes_per_token(size)},
            **{
                name: {
                    "bits": made.config.bits(),
                    "bytes_per_token": made.config.code_bytes_per_token,
                    "config": made.config.to_dict(),
                }
                for name, made in codebooks.items()
            },
        },
        "results": results,
    }


def _plain_types(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Mapping):
        return {name: _plain_types(part) for name, part in value.items()}
    return [_plain_types(part) for part in value] if isinstance(value, (list, tuple)) else value


def perplexity_record(
    model: PreTrainedModel,
    windows: torch.Tensor,
    results: Mapping[str, Perplexity],
    name: str,
    *,
    data: str,
    residual_length: int,
    sink_length: int,
    beam_width: int = 1,
) -> dict[str, Any]:
    """The record of one entry of `measure_perplexity`, for `GSRQCodebooks.with_evaluation`.

    Args:
        model: The model that was measured.
        windows: The windows that it read, `[windows, T]`.
        results: What `measure_perplexity` returned.
        name: The entry.
        data: What to call the text.
        residual_length: Latest tokens that were exact.
        sink_length: First tokens that were exact.
        beam_width: Partial sums that encoding kept.
    """
    found, plain = results[name], results[PLAIN]
    return {
        "data": data,
        "perplexity": found.value,
        "standard_error": found.standard_error,
        "plain_perplexity": plain.value,
        "increase": found.increase,
        "increase_error": found.increase_error,
        "losses": list(found.losses),
        "windows": windows.shape[0],
        "window_length": windows.shape[1],
        "data_digest": windows_digest(windows),
        "residual_length": residual_length,
        "sink_length": sink_length,
        "beam_width": beam_width,
        **circumstances(model),
    }
