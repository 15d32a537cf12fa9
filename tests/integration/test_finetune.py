"""`gsrq finetune`, in one process and in two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli_runner import assert_one_line, run, run_json
from transformers_gsrq import GSRQCodebooks

QUICK = ("--steps", 4, "--window-length", 48)
Codebooks = tuple[Path, dict[str, Any]]


def arguments(model: Path, codebooks: Codebooks, texts: tuple[Path, Path], output: Path) -> list[object]:
    return ["finetune", model, codebooks[0], "-o", output, "--text", texts[0], "--guard", texts[1], *QUICK]


def test_finetune(short_model: Path, codebooks: Codebooks, text_files: tuple[Path, Path], tmp_path: Path) -> None:
    # What an evaluation that was killed left behind.
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / ".state.safetensors-0").touch()
    said = run_json(*arguments(short_model, codebooks, text_files, tmp_path / "out"), "--batch-size", 2)
    made = GSRQCodebooks.from_pretrained(tmp_path / "out")
    assert made.digest == said["digest"]
    assert said["from_digest"] == codebooks[1]["digest"]
    # Whether a few steps on a few words help is another test's question; the best codebooks are kept.
    assert said["best_step"] == min(said["course"], key=lambda point: point["kl"])["step"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    # Two processes that read a window each do what one does that reads two.
    # (`accelerate launch` starts several processes on a CPU by MPI only.)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "transformers_gsrq"]
    command += map(str, arguments(short_model, codebooks, text_files, tmp_path / "two"))
    (tmp_path / "two.partial").mkdir()
    (tmp_path / "two.partial" / "notes.txt").touch()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    shared = json.loads(result.stdout)
    assert shared["processes"] == 2
    for ours, theirs in zip(shared["course"], said["course"], strict=True):
        assert ours["kl"] == pytest.approx(theirs["kl"], rel=1e-3)
        assert ours["guard_kl"] == pytest.approx(theirs["guard_kl"], rel=1e-3)
    assert GSRQCodebooks.from_pretrained(tmp_path / "two").digest == shared["digest"]
    assert [path.name for path in (tmp_path / "two.partial").iterdir()] == ["notes.txt"]


def test_too_little_text(short_model: Path, codebooks: Codebooks, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.", encoding="utf-8")
    options = ("--text", tmp_path / "short.txt", *QUICK)
    assert_one_line(run("finetune", short_model, codebooks[0], "-o", tmp_path / "out", *options), "48")
    assert not (tmp_path / "out").exists()
