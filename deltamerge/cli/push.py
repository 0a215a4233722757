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
@click.option("--public", is_flag=True, help="Make the repository public. Default: private.")
@WORKERS
@AS_JSON
def command(folder: Path, repository: str, public: bool, workers: int | None, as_json: bool) -> None:
    """Publish the output folder FOLDER on the hub as REPOSITORY.

    Uploads weights, model card, recipe and lock. Log in first with `hf auth login`, or set HF_TOKEN. Run it again
    after an interruption: files that have arrived are not sent again.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.publish import push as push_folder

    with interruptible(lambda _: f"what has arrived on the hub stays there: {GO_ON}"):
        url = push_folder(folder, repository, public=public, workers=workers or default_workers())
    say_json({"folder": str(folder), "repository": repository, "url": url}) if as_json else tell(url)
