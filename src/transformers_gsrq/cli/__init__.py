"""The command `gsrq`: one word per job, each a thin call of the library."""

from __future__ import annotations

from typing import Annotated

import typer

from ..compat import library_versions
from . import bench, calibrate, demo, evaluate, finetune, generate, inspect, push
from .common import command

app = typer.Typer(
    name="gsrq",
    help="KV caches of 0.25 to 4 bits per element for Hugging Face Transformers.",
    epilog="CODEBOOKS is a local folder or a Hub id owner/name[/subfolder][@revision]. MODEL is a local folder, a Hub "
    "id or a GGUF file. Results go to standard output, progress and errors to standard error. Exit codes: 0 done, "
    "1 failed, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # square brackets mean optional parts here
)


def print_versions(wanted: bool) -> None:
    """Print the versions that a report of a bug should name."""
    if wanted:
        typer.echo("\n".join(f"{name} {version}" for name, version in library_versions().items()))
        raise typer.Exit


command(app, "calibrate")(calibrate.run)
command(app, "finetune")(finetune.run)
command(app, "eval")(evaluate.run)
command(app, "inspect")(inspect.run)
command(app, "push")(push.run)
command(app, "generate")(generate.run)
command(app, "bench")(bench.run)
command(app, "demo")(demo.run)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print versions and exit.", is_eager=True, callback=print_versions)
    ] = False,
) -> None:
    """Options of `gsrq` itself."""


def main() -> None:
    """Entry point of the console script."""
    app()
