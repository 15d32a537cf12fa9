"""Tensors on disk: safetensors files, written whole or not at all."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file


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
