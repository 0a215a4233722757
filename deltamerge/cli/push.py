"""The command that publishes on the hub: push."""

from __future__ import annotations

from pathlib import Path

import click

from deltamerge.cli.options import FOLDER, WORKERS
from deltamerge.cli.output import tell


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("repository")
@click.option("--public", is_flag=True, help="For everyone to see; without it the repository is private.")
@WORKERS
def push(folder: Path, repository: str, public: bool, workers: int | None) -> None:
    """Publish FOLDER, which a run made, as REPOSITORY on the hub.

    Weights, card, recipe and lock. Logged in with `hf auth login`, or with HF_TOKEN set. Run again after an
    interruption: what has arrived stays.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.publish import push as push_folder

    tell(push_folder(folder, repository, public=public, workers=workers or default_workers()))
