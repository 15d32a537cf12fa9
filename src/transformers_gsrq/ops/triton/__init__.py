"""Triton kernels, and the facts that decide whether they can run. Importing this module does not import Triton."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from enum import IntEnum
from functools import cache
from pathlib import Path

import torch

OLDEST_TRITON = (3, 6)
# Gathers from shared memory, and atomics on it, came to Gluon with this version.
OLDEST_GLUON_TRITON = (3, 8)
OLDEST_CAPABILITY = (8, 0)
HEAD_DIMS = (64, 80, 96, 128, 160, 192, 256)
MAX_QUERIES = 16
NUM_CENTROIDS = 256
# Tokens of a page of codes; capacities are multiples of it.
PAGE_TOKENS = 64


class Count(IntEnum):
    """Rows of `counts`, int32 `[len(Count), B]`: how far each row of a batch has come.

    Attributes:
        NUM_CODES: Coded tokens: codes j < NUM_CODES exist.
        FIRST_CODE: Codes before this one are padding or sinks and never seen.
        FIRST_POSITION: Position of code 0; code j stands at FIRST_POSITION + j.
        NUM_SINKS: Filled slots of sinks.
        FIRST_TOKEN: Token that sink slot 0 holds.
        NUM_STORED: The oldest token of the ring.
        RING_HEAD: Ring slot of that token.
        NUM_EXACT: Tokens in the ring, without the new ones of this step.
    """

    NUM_CODES = 0
    FIRST_CODE = 1
    FIRST_POSITION = 2
    NUM_SINKS = 3
    FIRST_TOKEN = 4
    NUM_STORED = 5
    RING_HEAD = 6
    NUM_EXACT = 7


@cache
def triton_version() -> tuple[int, int] | None:
    """Major and minor version of the installed Triton, None without one."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


@cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on any device and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel can run on tensors of this device and dtype; None if they can."""
    version = triton_version()
    if version is None:
        return "Triton is not installed (pip install 'transformers-gsrq[triton]')"
    if version < OLDEST_TRITON:
        return f"Triton {version[0]}.{version[1]} is too old; {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} or newer is needed"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"kernels take float16 and bfloat16, not {dtype}"
    if interpreting():
        return "Triton's interpreter cannot multiply bfloat16" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"kernels run on NVIDIA GPUs, not on {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"{device} has compute capability {capability[0]}.{capability[1]}; 8.0 or newer is needed"
    return build_reason()


def build_reason() -> str | None:
    """Why Triton cannot build the C code that launches kernels, as in slim container images; None if it can."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler to launch kernels: install gcc, or set CC"
    # Debian's own scheme names a folder for local additions.
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    headers = Path(sysconfig.get_paths(scheme)["include"])
    if not (headers / "Python.h").is_file():
        return f"Triton needs Python's C headers to launch kernels, and there are none in {headers} (python3-dev)"
    return None


def unsupported_encode_reason(
    device: torch.device, dtype: torch.dtype, subspace_dim: int, num_centroids: int = NUM_CENTROIDS
) -> str | None:
    """Why `encode` cannot run; None if it can.

    Args:
        device: Device of the states.
        dtype: Dtype of states and centroids.
        subspace_dim: S.
        num_centroids: K.
    """
    if num_centroids != NUM_CENTROIDS:
        return f"kernels take codebooks of {NUM_CENTROIDS} centroids, not {num_centroids}"
    if subspace_dim > 256:
        return f"the encode kernel takes subspaces of up to 256 channels, not {subspace_dim}"
    return unsupported_reason(device, dtype)


def unsupported_decode_reason(
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_heads: int,
    head_dim: int,
    key_subspace_dim: int,
    value_subspace_dim: int,
    rotary_dim: int,
    num_centroids: int = NUM_CENTROIDS,
    num_queries: int = 1,
) -> str | None:
    """Why `decode_attention` cannot run; None if it can.

    Args:
        device: Device of the query.
        dtype: Dtype of the query, the exact states and the centroids.
        num_heads: H.
        head_dim: D.
        key_subspace_dim: S of keys.
        value_subspace_dim: S of values.
        rotary_dim: Rotating channels of a key head, 0 without rotary embedding.
        num_centroids: K of keys and values.
        num_queries: Q.
    """
    reason = unsupported_reason(device, dtype)
    if reason:
        return reason
    from .key_tables import key_layout

    if head_dim not in HEAD_DIMS:
        return f"kernels take head_dim {', '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    if num_centroids != NUM_CENTROIDS:
        return f"kernels take codebooks of {NUM_CENTROIDS} centroids, not {num_centroids}"
    if num_queries > MAX_QUERIES:
        return f"kernels take up to {MAX_QUERIES} query tokens, not {num_queries}"
    if key_layout(num_heads, head_dim, key_subspace_dim, rotary_dim) is None:
        return f"kernels have no layout for key subspaces of {key_subspace_dim} channels in heads of {head_dim}"
    if value_subspace_dim % 8:
        return f"kernels take value subspaces of a multiple of 8 channels, not {value_subspace_dim}"
    return None


@cache
def gluon_reason(num_rows: int) -> str | None:
    """Why keys and values take the portable kernels instead of those written in Gluon; None if they need not.

    Args:
        num_rows: N = G * Q, the queries of one KV head.
    """
    if interpreting():
        return "Gluon has no interpreter"
    if triton_version() < OLDEST_GLUON_TRITON:
        return f"Triton is older than {OLDEST_GLUON_TRITON[0]}.{OLDEST_GLUON_TRITON[1]}"
    if num_rows > 8:
        return "more than 8 queries share a KV head, where portable kernels are as fast"
    return None
