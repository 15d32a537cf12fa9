"""`gsrq push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..codebooks import GSRQCodebooks
from ..hub import HubId
from .common import Report, TokenOption


def run(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of codebooks.")],
    repo_id: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Repository; created if it is not there.")],
    subfolder: Annotated[str, typer.Option(help="Where in the repository, for several rates: 1bit, 0.5bit ...")] = "",
    revision: Annotated[str | None, typer.Option(help="Branch; created if it is not there.")] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    message: Annotated[str | None, typer.Option(help="Title of the commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: TokenOption = None,
) -> Report:
    """Push codebooks to the Hub.

    The model card is made from what was measured (`gsrq eval --save`) and lists all rates in the repository. A card
    that you edited, without its first comment, stays as it is.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder. Make codebooks with `gsrq calibrate MODEL --output DIR`.")
    codebooks = GSRQCodebooks.from_pretrained(folder)
    info = codebooks.push_to_hub(
        repo_id,
        subfolder=subfolder,
        revision=revision,
        private=private or None,
        token=token,
        commit_message=message,
        create_pr=create_pr,
    )
    # A name without an owner was one in the account of the token.
    place = str(HubId(info.repo_url.repo_id, subfolder, revision))
    figures = {
        "commit": info.oid,
        "url": info.pr_url or info.commit_url,
        "codebooks": place,
        "digest": codebooks.digest,
    }
    return Report(figures, f"Pushed: {figures['url']}\nLoad them with cache_config={{'codebooks': '{place}'}}.")
