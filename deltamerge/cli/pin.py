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
    """Send the servers of a chain to VERSION and keep them there: a rollback.

    Servers that follow the chain, or are given its own name, go there from any version, exactly. One that was killed
    on its way goes there when it starts again. Trainers go on writing.

    \b
    deltamerge pin run/000040
    deltamerge pin run --release
    """
    from deltamerge.models.chain import publish

    if release:
        publish.release(version)
    else:
        publish.pin(version)
    if not quiet:
        tell(f"{version}: servers go to {'its newest version' if release else 'it, and stay there'}")
