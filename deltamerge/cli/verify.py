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
    "--base", type=MODEL, help="Check the base too: what a delta makes of it, or that the lock has its files."
)
@WORKERS
@PICKLES
@AS_JSON
def command(folder: Path, base: str | None, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Check FOLDER, which a run made, against the hashes in its lock.

    Of a chain, or a version of one, that each version was made from what the one before makes; of a store each of its
    deltas.
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
            tell(f"{folder / delta['name']}: {len(delta['files'])} files as the lock says")
        if base is not None:
            tell(f"{folder}: every tensor of every delta, from {base}, as the deltas say")
        return
    if (folder / VERSION).is_file() or is_chain(folder):
        with app("chain"):
            from deltamerge.apps.chain.squash import verify_chain

        versions = verify_chain(folder, base, workers, pickles=pickles)
        if as_json:
            say_json({"folder": str(folder), "versions": versions, "base": base})
            return
        files = sum(len(version["files"]) for version in versions)
        tell(f"{folder}: {len(versions)} versions, {files} files, each made from what the one before makes")
        if base is not None:
            tell(f"{folder}: every tensor of every version, from {base}, as the deltas say")
        return
    names = verify_folder(folder, workers)
    about_base = None
    if base is not None:
        from deltamerge.run.apply import verify_base

        about_base = verify_base(folder, base, workers, pickles=pickles)
    if as_json:
        say_json({"folder": str(folder), "files": names, "base": about_base})
        return
    tell(f"{folder}: {len(names)} files as the lock says")
    if about_base is not None:
        tell(f"{folder}: {about_base}")
