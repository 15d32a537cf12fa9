"""What all commands share: how they report, how they fail, and the arguments they have in common."""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from ..codebooks import check_replaceable
from ..files import check_folder
from ..foreign import printable
from ..hub import TENSORS_NAME
from ..loading import read_dataset, read_texts

# What wrong input, a missing file, a full disk, the Hub or missing memory raise. Anything else is a bug of ours and
# shows its traceback.
EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, SafetensorError)

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="Local folder, Hub id or GGUF file.")]
CodebooksArgument = Annotated[
    str, typer.Argument(metavar="CODEBOOKS", help="Local folder, or Hub id owner/name[/subfolder][@revision].")
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option("--text", help="UTF-8 text file, or folder of .txt files; may be repeated.", metavar="FILE"),
]
DatasetOption = Annotated[str | None, typer.Option(help="Dataset instead of files: Hub id or local folder.")]
DatasetConfigOption = Annotated[str | None, typer.Option(help="Configuration of the dataset.")]
SplitOption = Annotated[str, typer.Option(help="Split of the dataset (train, test ...).")]
ColumnOption = Annotated[str, typer.Option(help="Column of the dataset that holds the texts.")]
DtypeOption = Annotated[str, typer.Option(help="auto (as saved), bfloat16, float16 or float32.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; the GPU if there is one by default.")]
RevisionOption = Annotated[str | None, typer.Option("--model-revision", help="Branch, tag or commit of MODEL.")]
ResidualOption = Annotated[int, typer.Option(help="Latest tokens kept exact.")]
SinkOption = Annotated[int, typer.Option(help="First tokens kept exact.")]
BeamOption = Annotated[int, typer.Option(help="Partial sums kept when encoding; wider is slower and nearer.")]
TokenOption = Annotated[str | None, typer.Option(help="Hub token; by default the one of `hf auth login`.")]


@dataclass(frozen=True)
class Report:
    """What a command found.

    Attributes:
        figures: For machines; JSON types.
        text: For people; empty if the command has printed it already.
        failures: What was left undone once this was found, and why. Told after the rest; the command then ends with 1,
            or with 130 after Ctrl-C.
    """

    figures: dict[str, Any]
    text: str
    failures: Sequence[tuple[str, BaseException]] = ()


class Interrupted(Exception):
    """Ctrl-C, with what was kept and how to go on."""


def command(app: typer.Typer, name: str) -> Callable[[Callable[..., Report]], None]:
    """Add a function as a command, with `--json` and `--debug` and with errors told in one line.

    Args:
        app: The application.
        name: Of the command.
    """

    def add(function: Callable[..., Report]) -> None:
        @functools.wraps(function)
        def run(*, as_json: bool, debug: bool, **arguments: Any) -> None:
            transformers_logging.set_verbosity_error()
            if "as_json" in own.parameters:
                arguments["as_json"] = as_json
            try:
                _check_model(arguments.get("model", ""))
                report = function(**arguments)
            except (KeyboardInterrupt, Interrupted) as stopped:
                _fail(str(stopped) or "Interrupted.", 130, stopped if debug else None)
            except EXPECTED as error:
                _fail(_one_line(error), 1, error if debug else None)
            if as_json:
                typer.echo(json.dumps(_json(report.figures), indent=2, allow_nan=False))
            elif report.text:
                # Names and notes in codebooks are anybody's, and must not command the terminal.
                typer.echo(printable(report.text, layout="\n"))
            if report.failures:
                _fail_after(report.failures, debug)

        own = inspect.signature(function, eval_str=True)
        added = {
            "as_json": Annotated[bool, typer.Option("--json", help="Print the result as JSON.")],
            "debug": Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")],
        }
        parameters = [parameter for parameter in own.parameters.values() if parameter.name not in added]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in added.items()
        ]
        run.__signature__ = own.replace(parameters=parameters, return_annotation=None)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(name, help=inspect.cleandoc(function.__doc__ or ""))(run)

    return add


def _check_model(model: str) -> None:
    """Say that arguments were swapped before somebody else says less."""
    if model and (Path(model) / TENSORS_NAME).is_file():
        raise ValueError(f"MODEL is {model}, which holds codebooks. Name the model first, then CODEBOOKS.")


def _json(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: a standard error of a single number is null."""
    if isinstance(value, dict):
        return {name: _json(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _one_line(error: BaseException) -> str:
    # Libraries end their first paragraph with what happened, and go on with advice for other situations.
    message = str(error).strip().split("\n\n")[0]
    return " ".join(message.split()) or type(error).__name__


def _fail(message: str, code: int, shown: BaseException | None) -> NoReturn:
    if shown is not None:
        raise shown
    typer.echo(f"gsrq: {printable(message)}", err=True)
    sys.exit(code)


def _fail_after(failures: Sequence[tuple[str, BaseException]], debug: bool) -> NoReturn:
    stopped = False
    for undone, error in failures:
        stopped = stopped or isinstance(error, KeyboardInterrupt)
        why = f"Interrupted: {undone}." if isinstance(error, KeyboardInterrupt) else f"{undone}: {_one_line(error)}"
        typer.echo(f"gsrq: {printable(why[0].upper() + why[1:])}", err=True)
    for _, error in failures:
        if debug or not isinstance(error, (KeyboardInterrupt, *EXPECTED)):
            raise error
    sys.exit(130 if stopped else 1)


def command_line() -> str:
    """The command as it was typed, for records; a Hub token is left out."""
    return re.sub(r"(--token[ =])\S+", r"\1...", shlex.join(["gsrq", *sys.argv[1:]]))


def partial_folder(output: Path) -> Path:
    """Where a command that is interrupted keeps what it has done: beside the folder that it would make.

    Raises:
        NotADirectoryError: if no folder can be made there, before the long work.
        PermissionError: if it cannot be written.
        FileExistsError: if something else than codebooks is in it.
    """
    check_folder("--output", output)
    check_replaceable(output)
    folder = output if output.name else output.resolve()
    partial = folder.with_name(folder.name + ".partial")
    check_folder("--output", partial)
    return partial


def remove_partial(folder: Path, name: str) -> None:
    """Remove the files of a finished command from its folder, and the folder if nobody else's are in it.

    Args:
        folder: From `partial_folder`.
        name: What the files are called, as a pattern; what an interrupted `write_tensors` left of them goes too.
    """
    # What was learned is saved by now: a file that stays is no failure.
    with suppress(OSError):
        for path in (*folder.glob(name), *folder.glob(f".{name}-*")):
            path.unlink()
        folder.rmdir()


def files_name(paths: list[Path]) -> str:
    """What to call the text of some files."""
    names = [path.resolve().name for path in paths]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} and {len(names) - 1} more"


def check_source(text: list[Path] | None, dataset: str | None) -> None:
    """Check that one kind of text was named, before anything is read.

    Raises:
        ValueError: if none was, or both.
    """
    if bool(text) == bool(dataset):
        raise ValueError("Say what to read: --text FILE, or --dataset NAME, and not both.")


def named_texts(
    text: list[Path] | None, dataset: str | None, split: str, column: str, config: str | None
) -> tuple[list[str], str]:
    """Texts of files or of a dataset, and what to call them."""
    check_source(text, dataset)
    if text:
        return read_texts(text), files_name(text)
    return read_dataset(dataset or "", split=split, column=column, config=config), f"{dataset}, split {split}"


def table(rows: list[list[str]]) -> str:
    """Rows of cells as text: the first column to the left, the others to the right, the first row underlined."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [
            row[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)),
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "  ".join("-" * width for width in widths), *map(line, rows[1:])])
