"""`gsrq demo`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..demo import DEFAULT_FOLDER, run_demo
from .common import Interrupted, Report


def run(
    folder: Annotated[Path, typer.Option(help="Keeps the converted model and the codebooks.")] = DEFAULT_FOLDER,
    as_json: bool = False,
) -> Report:
    """Try it on a small real model.

    Calibrates SmolLM2-135M at 1 bit (once), generates the same text with both caches, and shows perplexities and
    bytes side by side.
    """
    # For machines standard output is left to the figures.
    say = partial(print, file=sys.stderr if as_json else sys.stdout, flush=True)
    try:
        return Report(run_demo(folder, say=say), "")
    except KeyboardInterrupt as stopped:
        raise Interrupted(
            f"Interrupted. What is finished is kept in {folder}; the same command goes on from there."
        ) from stopped
