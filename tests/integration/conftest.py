"""A small model on disk for tests of whole commands: the first layers of SmolLM2, with its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cli_runner import CALIBRATION, run_json


@pytest.fixture(scope="session")
def short_model(
    first_layers: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The first layers of SmolLM2 in a folder."""
    folder = tmp_path_factory.mktemp("models") / "smollm2-first-layers"
    for part in first_layers:
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_files(texts: tuple[list[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folder of texts to calibrate on, and a file to evaluate on."""
    folder = tmp_path_factory.mktemp("texts")
    calibration = folder / "calibration"
    calibration.mkdir()
    for index, text in enumerate(texts[0][:3]):
        (calibration / f"{index}.txt").write_text(text, encoding="utf-8")
    held_out = folder / "held-out.txt"
    held_out.write_text(texts[1][0], encoding="utf-8")
    return calibration, held_out


@pytest.fixture(scope="session")
def codebooks(
    short_model: Path, text_files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """Folder that `gsrq calibrate` made, and what it said."""
    folder = tmp_path_factory.mktemp("cli") / "codebooks"
    said = run_json("calibrate", short_model, "--text", text_files[0], "-o", folder, "--bits", 1, *CALIBRATION)
    return folder, said
