"""The command verify."""

from __future__ import annotations

from pathlib import Path

import click

from deltamerge.cli.options import AS_JSON, FOLDER, MODEL, PICKLES, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.errors import app


@click.command("verify")
@click.argument("folder", type=FOLDER)
@click.option(
    "--base", type=MODEL, help="Check the base too: that a delta applies to it, or that the lock lists its files."
)
@WORKERS
@PICKLES
@AS_JSON
def command(folder: Path, base: str | None, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Check the output folder FOLDER against the hashes in its lock.

    For a chain or one of its versions, also checks that each version was made from the result of the one before. For a
    store, checks each delta.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.models.chain.folder import VERSION, is_chain
    from deltamerge.models.chain.publish import is_store
    from deltamerge.run.lock import verify as verify_folder

    workers = workers or default_workers()
    if is_store(folder):
        with app("chain"):
            from deltamerge.apps.chain.squash import verify_store

        deltas = verify_store(folder, base, workers, pickles=pickles)
        if as_json:
            say_json({"folder": str(folder), "deltas": deltas, "base": base})
            return
        for delta in deltas:
            tell(f"{folder / delta['name']}: {len(delta['files'])} files match the lock")
        if base is not None:
            tell(f"{folder}: applied to {base}, every delta gives the tensors it promises")
        return
    if (folder / VERSION).is_file() or is_chain(folder):
        with app("chain"):
            from deltamerge.apps.chain.squash import verify_chain

        versions = verify_chain(folder, base, workers, pickles=pickles)
        if as_json:
            say_json({"folder": str(folder), "versions": versions, "base": base})
            return
        files = sum(len(version["files"]) for version in versions)
        tell(f"{folder}: {len(versions)} versions, {files} files, each made from the result of the one before")
        if base is not None:
            tell(f"{folder}: applied to {base}, every version gives the tensors it promises")
        return
    names = verify_folder(folder, workers)
    about_base = None
    if base is not None:
        from deltamerge.run.apply import verify_base

        about_base = verify_base(folder, base, workers, pickles=pickles)
    if as_json:
        say_json({"folder": str(folder), "files": names, "base": about_base})
        return
    tell(f"{folder}: {len(names)} files match the lock")
    if about_base is not None:
        tell(f"{folder}: {about_base}")
