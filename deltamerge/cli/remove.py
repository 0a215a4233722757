"""The command remove."""

from __future__ import annotations

from pathlib import Path

import click

from deltamerge.cli.options import FOLDER, QUIET
from deltamerge.cli.output import tell


@click.command("remove")
@click.argument("delta", type=FOLDER)
@QUIET
def command(delta: Path, quiet: bool) -> None:
    """Remove DELTA: the newest version of a chain, or a delta of a store.

    A version with a successor is refused: remove the successor first, or fold both with `squash`. So is a folder with
    files that no run wrote.
    """
    from deltamerge.models.chain.publish import remove_newest

    remove_newest(delta)
    if not quiet:
        tell(f"{delta}: removed")
