"""The command push."""

from __future__ import annotations

from pathlib import Path

import click

from deltamerge.cli.options import AS_JSON, FOLDER, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.errors import GO_ON, interruptible


@click.command("push")
@click.argument("folder", type=FOLDER)
@click.argument("repository")
@click.option("--public", is_flag=True, help="For everyone to see; without it the repository is private.")
@WORKERS
@AS_JSON
def command(folder: Path, repository: str, public: bool, workers: int | None, as_json: bool) -> None:
    """Publish FOLDER, which a run made, as REPOSITORY on the hub.

    Weights, card, recipe and lock. Logged in with `hf auth login`, or with HF_TOKEN set. Run again after an
    interruption: what has arrived stays.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.publish import push as push_folder

    with interruptible(lambda _: f"what has arrived on the hub stays there: {GO_ON}"):
        url = push_folder(folder, repository, public=public, workers=workers or default_workers())
    say_json({"folder": str(folder), "repository": repository, "url": url}) if as_json else tell(url)
