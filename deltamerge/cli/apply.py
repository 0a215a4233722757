"""The command apply."""

from __future__ import annotations

import time
from pathlib import Path

import click

from deltamerge.cli.options import AS_JSON, FOLDER, FORCE, MEMORY, MODEL, PICKLES, QUIET, WORKERS
from deltamerge.cli.output import say_json, tell
from deltamerge.errors.shown import human


@click.command("apply")
@click.argument("delta", type=MODEL)
@click.option(
    "--base", required=True, type=MODEL, help="Checkpoint that the delta was made from: a folder or a hub id."
)
@click.option("--out", type=FOLDER, required=True, help="Folder to make.")
@WORKERS
@MEMORY
@FORCE
@PICKLES
@AS_JSON
@QUIET
def command(
    delta: str,
    base: str,
    out: Path,
    workers: int | None,
    memory: int | None,
    force: bool,
    pickles: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Apply DELTA to its base.

    Writes the whole checkpoint. Every tensor is checked by hash before and after.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.apply import apply as apply_delta

    begun = time.monotonic()
    done = apply_delta(
        delta, base, out, workers=workers or default_workers(), memory=memory, force=force, pickles=pickles
    )
    seconds = time.monotonic() - begun
    if as_json:
        summary = {
            "out": str(done.folder),
            "bytes": done.nbytes,
            "tensors": done.tensors,
            "seconds": round(seconds, 3),
            "lock": done.lock,
        }
        say_json(summary)
    elif not quiet:
        size = human(done.nbytes)
        tell(f"{done.folder}: {done.tensors} tensors, {size} in {seconds:.1f} s")
