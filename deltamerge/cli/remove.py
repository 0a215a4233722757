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
    """Remove DELTA, the newest version of a chain or a delta of a store.

    A version that another comes after stays: remove that first, or fold both with squash. A folder that holds what no
    run wrote stays too.
    """
    from deltamerge.models.chain.publish import remove_newest

    remove_newest(delta)
    if not quiet:
        tell(f"{delta}: removed")
