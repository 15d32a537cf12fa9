"""Benchmarks beside another commit: the other source is measured, ratios are right, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# A checkout of a package that says how long it takes, with a benchmark that asks it. The true package and `lines.py`
# would take their time to import, often.
TOY = """
import argparse
from base import Comparison, add_base_arguments, write_beside_base
from lines import add_arguments
import transformers_gsrq

parser = argparse.ArgumentParser()
parser.add_argument("--rows", type=int, default=1)
add_arguments(parser)
add_base_arguments(parser)
arguments = parser.parse_args()
token = {{"ms": transformers_gsrq.{name}}}
rows = [("gsrq", row) for row in range(arguments.rows)] + [("plain", row) for row in range(arguments.rows)]
lines = ({{"cache": cache, "row": row, "token": token}} for cache, row in rows)
write_beside_base(lines, arguments, Comparison(("cache", "row"), ("token.ms",), lambda line: line["cache"] == "gsrq"))
"""
LINES = """
import json
from pathlib import Path

def add_arguments(parser):
    parser.add_argument("--output", type=Path)
    parser.add_argument("--commit", default="unknown")

def write(results, arguments):
    for result in results:
        line = json.dumps(result | {"commit": arguments.commit})
        print(line)
        if arguments.output:
            with arguments.output.open("a") as file:
                file.write(line + "\\n")
"""


def make_checkout(folder: Path, name: str, milliseconds: float) -> Path:
    """The toy in a folder; returns its benchmark."""
    for path, text in {
        "src/transformers_gsrq/__init__.py": f"{name} = {milliseconds}",
        "benchmarks/toy.py": TOY.format(name=name),
        "benchmarks/lines.py": LINES,
        "benchmarks/base.py": (ROOT / "benchmarks" / "base.py").read_text(),
    }.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder / "benchmarks" / "toy.py"


def run(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(script.parents[1] / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, str(script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def parse(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    return subprocess.run(["git", *who, *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("base_name", ["SPEED", "OLD_SPEED"], ids=["this script", "the base's own script"])
def test_a_base_is_measured_and_compared(base_name: str, tmp_path: Path) -> None:
    toy = make_checkout(tmp_path / "here", "SPEED", 3.0)
    make_checkout(tmp_path / "base", base_name, 2.0)
    output = tmp_path / "lines.jsonl"
    arguments = ("--base-source", tmp_path / "base", "--output", output, "--commit", "new")
    done = run(toy, "--rows", 2, *arguments)
    assert done.returncode == 0, done.stderr
    assert ("the base's own runs" in done.stderr) == (base_name != "SPEED")
    lines = parse(done.stdout)
    assert parse(output.read_text()) == lines
    assert [(line["token"]["ms"], line.get("base", False)) for line in lines] == 4 * [(2.0, True)] + 4 * [(3.0, False)]
    assert [line["to_base"] for line in lines[4:]] == 4 * [{"token.ms": 1.5}]
    assert [line["commit"] for line in lines] == 4 * ["unknown"] + 4 * ["new"]
    assert {line["commit"] for line in parse(run(toy, "--base", "old", *arguments).stdout)} == {"old", "new"}


@pytest.mark.parametrize(("bound", "status"), [(1.6, 0), (1.4, 1)])
def test_what_is_worse_than_the_bound_ends_with_status_1(bound: float, status: int, tmp_path: Path) -> None:
    toy = make_checkout(tmp_path / "here", "SPEED", 3.0)
    make_checkout(tmp_path / "base", "SPEED", 2.0)
    done = run(toy, "--base-source", tmp_path / "base", "--worse", bound)
    assert done.returncode == status
    # The plain cache is not ours to make faster.
    assert done.stderr.splitlines() == (
        [] if status == 0 else ["More than 1.4 times the base:", "gsrq 0: token.ms 1.5"]
    )


def test_a_commit_is_measured_in_a_worktree_that_goes_away(tmp_path: Path) -> None:
    toy = make_checkout(tmp_path, "SPEED", 2.0)
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "slow")
    make_checkout(tmp_path, "SPEED", 1.0)
    done = run(toy, "--base", "HEAD")
    assert done.returncode == 0, done.stderr
    assert [line["token"]["ms"] for line in parse(done.stdout)] == [2.0, 2.0, 1.0, 1.0]
    assert [line["to_base"] for line in parse(done.stdout)[2:]] == 2 * [{"token.ms": 0.5}]
    assert len(git(tmp_path, "worktree", "list").splitlines()) == 1
    unknown = run(toy, "--base", "no-such-ref")
    assert (unknown.returncode, unknown.stderr) == (1, "--base no-such-ref: fatal: invalid reference: no-such-ref\n")
    assert len(git(tmp_path, "worktree", "list").splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--worse", 1.1], "--worse compares with another commit: name it by --base or --base-source."),
        (["--base-source", "nowhere"], "--base-source nowhere has no src/transformers_gsrq: give a checkout."),
        (
            ["--base", "HEAD"],
            "--base needs git and its history, which are not here: give a checkout by --base-source.",
        ),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(arguments: list[object], words: str, tmp_path: Path) -> None:
    done = run(make_checkout(tmp_path, "SPEED", 3.0), *arguments)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", words + "\n")


def test_an_installed_package_is_not_taken_for_the_base(tmp_path: Path) -> None:
    toy = make_checkout(tmp_path / "here", "SPEED", 3.0)
    make_checkout(tmp_path / "base", "SPEED", 2.0)
    finder = "import sys; sys.path.insert(0, {!r})".format(str(tmp_path / "here" / "src"))
    (tmp_path / "here" / "src" / "sitecustomize.py").write_text(finder)
    done = run(toy, "--base-source", tmp_path / "base")
    assert done.returncode == 1
    assert "ratios would be 1." in done.stderr


def test_models_beside_a_checkout() -> None:
    done = run(ROOT / "benchmarks" / "models.py", "--tiny", "--contexts", 300, "--base-source", ROOT)
    assert done.returncode == 0, done.stderr
    lines = parse(done.stdout)
    assert [line.get("base", False) for line in lines] == [True, True, False, False]
    for line, base in zip(lines[2:], lines[:2], strict=True):
        assert line["base_commit"] == base["commit"]
        assert line["to_base"]["cache_bytes"] == 1.0
        assert line["to_base"]["token_ms"] == round(line["token_ms"] / base["token_ms"], 3)
