"""The benchmarks that need no GPU to be tried run as their help says."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "models.py"), "--tiny", *map(str, arguments)]
    return [json.loads(line) for line in subprocess.run(command, capture_output=True, check=True).stdout.splitlines()]


def test_models(tmp_path: Path) -> None:
    lines = run("--contexts", 300, "--output", tmp_path / "lines.jsonl", "--commit", "abc")
    plain, ours = ({line["cache"]: line for line in lines}[name] for name in ("plain", "gsrq 1 bits"))
    # 33 decoded tokens; 2 layers of 2 heads of 128 channels, keys and values, 16 bits.
    assert plain["cache_bytes"] == 333 * 2 * 2 * 2 * 128 * 2
    assert ours["cache_bytes"] < plain["cache_bytes"]
    assert {line["commit"] for line in lines} == {"abc"}
    assert [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()] == lines


def test_the_largest_context() -> None:
    lines = run("--largest", "--limit", 1000)
    assert {line["cache"]: line["tokens"] for line in lines} == {"plain": 1000, "gsrq 1 bits": 1000}


@pytest.mark.parametrize("room", [0, 1000, 123_456, 10**9])
def test_the_search_ends_at_what_fits(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    models = importlib.import_module("models")
    found = models.largest(lambda count: count <= room, 10**8)
    assert 0.98 * min(room, 10**8) <= found <= min(room, 10**8)


def generate(*arguments: object) -> list[dict[str, Any]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "generate.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.host
def test_decoding_through_generate(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    lines = generate(
        "--models", "tiny", "--contexts", 300, "--batches", 1, 2, "--draft-contexts", 300, "--tokens", 4,
        "--caches", "dynamic", "static", "gsrq-eager", "--output", path,
    )  # fmt: skip
    assert not [line for line in lines if "failed" in line]
    timed = {(line["batch"], line["cache"]): line for line in lines if "token_ms" in line}
    assert set(timed) == {(batch, name) for batch in (1, 2) for name in ("dynamic", "static", "gsrq-eager")}
    for line in timed.values():
        lower, upper = line["quartiles_ms"]
        assert 0 < lower <= line["token_ms"] <= upper
        assert line["first_token_s"] > 0
    drafts = [line for line in lines if line["what"] == "drafts"]
    assert {(line["way"], line["cache"]) for line in drafts} == {
        (way, name) for way in ("assisted", "prompt lookup") for name in ("dynamic", "gsrq-eager")
    }
    # Nearly no draft is accepted, so that a step is a step of as many tokens everywhere.
    assert all(line["tokens_a_step"] < 1.5 for line in drafts)
    assert [json.loads(line) for line in path.read_text().splitlines()] == lines


def test_tables_of_decoding(tmp_path: Path) -> None:
    case = {"what": "tokens", "run": "1", "model": "tiny", "stages": "12,20", "context": 8192, "batch": 1}
    lines = [
        {**case, "cache": "dynamic", "token_ms": 20.0},
        {**case, "cache": "static", "token_ms": 10.0},
        {**case, "cache": "quanto-4", "missing": "optimum-quanto is not installed"},
        {**case, "cache": "gsrq-captured", "token_ms": 4.0},
        {**case, "run": "2", "cache": "static", "missing": "out of memory"},
        {**case, "run": "2", "cache": "gsrq-captured", "token_ms": 5.0},
    ]
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, str(ROOT / "benchmarks" / "generate.py"), "--table", str(tmp_path / "lines.jsonl")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [
        "Milliseconds a token:",
        "",
        "| model, stages | context × rows | dynamic | static | gsrq-captured |",
        "|---|---|---|---|---|",
        "| tiny, 12 + 20 | 8,192 × 1 | 20 | 10 | 4 (0.40) |",
        "| tiny, 12 + 20 | 8,192 × 1 | – | out of memory | 5 |",
        "",
    ]


def test_a_spent_budget_ends_between_lines() -> None:
    arguments = ("--models", "tiny", "--contexts", 64, "--tokens", 2, "--budget", 0)
    assert generate(*arguments) == []


def join(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "fidelity.py"), "--join", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_joined_study_is_printed_drawn_and_joined_again(tmp_path: Path) -> None:
    record = ROOT / "docs" / "records" / "fidelity-smollm2-h200.json"
    done = join(record, "--output", tmp_path / "joined.json", "--images", tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "joined.json").read_text()) == json.loads(record.read_text())
    line = next(line for line in done.stdout.splitlines() if line.startswith("distilled + beam 4 @1 "))
    assert line.split()[4:7] == ["@1", "1", "+14.3%"]
    assert (tmp_path / "fidelity-smollm2-135m-instruct.png").stat().st_size > 10_000


def test_studies_of_other_texts_are_not_joined(tmp_path: Path) -> None:
    records = [ROOT / "docs" / "records" / f"fidelity-{name}-h200.json" for name in ("smollm2", "qwen2.5-coder-1.5b")]
    done = join(*records, "--output", tmp_path / "joined.json")
    assert done.returncode == 1
    assert "measured other texts than the parts before it" in done.stderr
    assert not list(tmp_path.iterdir())
