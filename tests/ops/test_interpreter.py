"""Runs the kernels' tests in Triton's interpreter where there is no GPU.

Triton decides at import whether to interpret, so this takes a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from transformers_gsrq.ops.triton import interpreting, triton_version

TESTS = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.skipif(triton_version() is None, reason="Triton is not installed")
@pytest.mark.skipif(interpreting(), reason="already in the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run compiled here")
@pytest.mark.parametrize(
    "file",
    [
        "ops/test_encode.py",
        "ops/test_decode_attention.py",
        "test_kernel_passes.py",
        pytest.param("test_kernels.py", marks=pytest.mark.host),
        pytest.param("test_decoding.py", marks=pytest.mark.host),
    ],
)
def test_kernels_in_the_interpreter(file: str, request: pytest.FixtureRequest) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / file)]
    # On the oldest host its own tests are enough.
    command += ["-m", request.config.option.markexpr] if request.config.option.markexpr else []
    result = subprocess.run(command, env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
