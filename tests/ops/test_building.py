"""Without a C compiler or Python's headers Triton launches nothing, so kernels are not chosen."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from transformers_gsrq.ops.triton import build_reason


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "C compiler" in build_reason()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert "C compiler" not in (build_reason() or "")


def test_missing_headers_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    assert str(tmp_path) in build_reason()
    (tmp_path / "Python.h").touch()
    assert build_reason() is None
