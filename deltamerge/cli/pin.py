"""The command pin."""

from __future__ import annotations

from pathlib import Path

import click

from deltamerge.cli.options import FOLDER, QUIET
from deltamerge.cli.output import tell


@click.command("pin")
@click.argument("version", type=FOLDER)
@click.option("--release", is_flag=True, help="VERSION is a chain: its servers go on to its newest version.")
@QUIET
def command(version: Path, release: bool, quiet: bool) -> None:
    """Let the servers of a chain go to VERSION, an earlier or a later one, and stay there.

    Followers, and servers that are told the chain's own name, go to it from any version, exactly; one that was killed
    meanwhile goes to it when it starts again. Trainers write on. Other readers of the chain see no difference.
    """
    from deltamerge.models.chain import publish

    if release:
        publish.release(version)
    else:
        publish.pin(version)
    if not quiet:
        tell(f"{version}: servers go to {'its newest version' if release else 'it, and stay there'}")
