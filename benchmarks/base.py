"""The same measurement on another commit, in the same run on the same device, and the ratio to it."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lines import write

ROOT = Path(__file__).parents[1]
# Arguments of this run that are not the other commit's.
_OURS = ("--base", "--base-source", "--worse", "--output", "--commit")


@dataclass(frozen=True)
class Comparison:
    """How the lines of a benchmark are compared.

    Attributes:
        keys: What of a line names its measurement.
        measures: What of a line is better smaller; dots lead into nested parts.
        ours: Whether a line is about the package, so that it counts for `--worse`; others show the noise.
    """

    keys: tuple[str, ...]
    measures: tuple[str, ...]
    ours: Callable[[dict[str, Any]], bool]

    def name(self, line: dict[str, Any]) -> tuple[Any, ...]:
        """What a line measured."""
        return tuple(line.get(key) for key in self.keys)

    def ratios(self, line: dict[str, Any], base: dict[str, Any]) -> dict[str, float]:
        """Each measure of a line divided by that of the other commit."""
        values = ((measure, _find(line, measure), _find(base, measure)) for measure in self.measures)
        return {measure: round(value / before, 3) for measure, value, before in values if value and before}


def _find(line: Any, measure: str) -> float | None:
    for name in measure.split("."):
        line = line.get(name) if isinstance(line, dict) else None
    return line


def add_base_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `write_beside_base` needs."""
    parser.add_argument("--base", metavar="REF", help="measure this commit first, and print the ratio to it")
    parser.add_argument("--base-source", type=Path, metavar="FOLDER", help="a checkout of it, without git")
    parser.add_argument(
        "--worse", type=float, metavar="RATIO", help="exit with 1 where ours takes more than this times the base"
    )


def write_beside_base(
    results: Iterable[dict[str, Any]], arguments: argparse.Namespace, comparison: Comparison
) -> None:
    """Write the results, and where a base was asked for its results before them and `to_base` in each line.

    Args:
        results: What this commit measures; nothing of it runs before the base is through.
        arguments: Of the command line.
        comparison: How to compare.

    Raises:
        SystemExit: if the base cannot be measured, a measurement has no counterpart, or, with status 1, one of ours
            is worse than `--worse` allows.
    """
    if arguments.base is None and arguments.base_source is None:
        if arguments.worse is not None:
            raise SystemExit("--worse compares with another commit: name it by --base or --base-source.")
        write(results, arguments)
        return
    with base_folder(arguments) as folder:
        before = {comparison.name(line): line for line in measure_base(folder, arguments)}
    worse: list[str] = []
    compared = 0

    def beside() -> Iterator[dict[str, Any]]:
        nonlocal compared
        for line in results:
            base = before.get(comparison.name(line))
            ratios = {} if base is None else comparison.ratios(line, base)
            compared += bool(ratios)
            if arguments.worse is not None and comparison.ours(line):
                name = " ".join(str(part) for part in comparison.name(line) if part is not None)
                worse.extend(f"{name}: {key} {ratio}" for key, ratio in ratios.items() if ratio > arguments.worse)
            yield {**line, "to_base": ratios, "base_commit": None if base is None else base["commit"]}

    write(beside(), arguments)
    if not compared:
        raise SystemExit("Nothing that the base measured is measured here, so there is no ratio.")
    if worse:
        raise SystemExit(f"More than {arguments.worse} times the base:\n" + "\n".join(worse))


@contextmanager
def base_folder(arguments: argparse.Namespace) -> Iterator[Path]:
    """A checkout of the base: the folder that was given, else a git worktree that is removed afterwards."""
    if arguments.base_source is not None:
        if not (arguments.base_source / "src" / "transformers_gsrq").is_dir():
            raise SystemExit(f"--base-source {arguments.base_source} has no src/transformers_gsrq: give a checkout.")
        yield arguments.base_source.resolve()
        return
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        raise SystemExit("--base needs git and its history, which are not here: give a checkout by --base-source.")
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "base"
        made = subprocess.run(
            [git, "-C", str(ROOT), "worktree", "add", "--detach", str(folder), arguments.base],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if made.returncode:
            raise SystemExit(f"--base {arguments.base}: {made.stderr.strip()}")
        try:
            yield folder
        finally:
            subprocess.run([git, "-C", str(ROOT), "worktree", "remove", "--force", str(folder)], check=True)


def measure_base(folder: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Lines of the base by this benchmark; by the base's own where this one does not know its interface."""
    script = Path(sys.argv[0]).resolve()
    own = folder / "benchmarks" / script.name
    lines, error = run_script(script, folder, arguments)
    if error and not lines and own.is_file():
        print(f"{script.name} failed on the base, so the base's own runs:\n{error[-1000:]}", file=sys.stderr)
        lines, error = run_script(own, folder, arguments)
    if error:
        raise SystemExit(f"{script.name} failed on the base:\n{error[-3000:]}")
    return lines


def run_script(script: Path, folder: Path, arguments: argparse.Namespace) -> tuple[list[dict[str, Any]], str]:
    """Run a benchmark on the source in a folder with this run's other arguments; print its lines and keep them.

    Returns:
        The lines, and what the benchmark said if it failed.
    """
    path = os.pathsep.join([str(folder / "src"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    check_source(folder, environment)
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in _OURS:
        parser.add_argument(name)
    _, rest = parser.parse_known_args(sys.argv[1:])
    # A folder without history does not know its commit.
    named = {} if arguments.base is None or arguments.base_source is None else {"commit": arguments.base}
    command = [sys.executable, str(script), *rest]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            lines = []
            for text in process.stdout or ():
                if text.startswith("{"):
                    lines.append({**json.loads(text), **named, "base": True})
                    text = json.dumps(lines[-1]) + "\n"
                    if arguments.output:
                        with arguments.output.open("a", encoding="utf-8") as file:
                            file.write(text)
                print(text, end="", flush=True)
        errors.seek(0)
        said = errors.read()
    return lines, (said or f"exit status {process.returncode}") if process.returncode else ""


def check_source(folder: Path, environment: dict[str, str]) -> None:
    """Refuse to compare the package with itself: an installed one may come before `PYTHONPATH`.

    Raises:
        SystemExit: if Python finds another `transformers_gsrq` than the one in the folder.
    """
    code = "import importlib.util; print(importlib.util.find_spec('transformers_gsrq').origin)"
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if not Path(found.stdout.strip()).resolve().is_relative_to((folder / "src").resolve()):
        raise SystemExit(f"Python takes {found.stdout.strip()} and not the package in {folder}: ratios would be 1.")
