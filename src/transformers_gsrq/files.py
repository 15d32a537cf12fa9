"""Files on disk: folders that can be written, safetensors files written whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


def check_folder(option: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written, before the long work.

    Args:
        option: That named it.
        folder: There or not.

    Raises:
        NotADirectoryError: if it, or a folder that it would lie in, is a file.
        PermissionError: if it cannot be written.
    """
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{option} {folder}: {there} is a file. Name a folder that is not there yet.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"{option} {folder}: {there} is not writable. Make it so, or name another folder.")


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a safetensors file, beside it first and then renamed into place.

    Args:
        path: The file; its folder is there.
        tensors: Of any device and strides.
        metadata: What the file says of itself.

    Raises:
        OSError: if it cannot be written, for example because the disk is full.
    """
    staging = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        # safetensors makes files that only their owner can read.
        staging.touch()
        mode = staging.stat().st_mode
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, staging, metadata=None if metadata is None else dict(metadata))
        staging.chmod(mode)
        staging.replace(path)
    except SafetensorError as error:
        raise OSError(
            f"{path.name} cannot be written ({error}). Free some space, or write to another folder."
        ) from error
    finally:
        staging.unlink(missing_ok=True)
