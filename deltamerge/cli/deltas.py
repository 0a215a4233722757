"""The commands about delta artifacts and locks: extract, apply, verify."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli.options import (
    AS_JSON,
    DEVICE,
    FOLDER,
    FORCE,
    MEMORY,
    MODEL,
    NONFINITE,
    PICKLES,
    QUIET,
    RESUME,
    WORKERS,
    pruning_methods,
)
from deltamerge.cli.output import Warnings, report_run, say_json, tell
from deltamerge.cli.tables import human

if TYPE_CHECKING:
    from deltamerge.plan.planner import Plan


@click.command()
@click.argument("model", type=MODEL)
@click.argument("origin", type=MODEL, required=False, metavar="[BASE]")
@click.option("--base", type=MODEL, help="What MODEL was fine-tuned from: a folder, or a hub id; or as BASE.")
@click.option("--out", type=FOLDER, help="Folder to make; default: NAME-delta here.")
@click.option(
    "--after", type=MODEL, metavar="VERSION",
    help="The version of a chain that OUT, beside it, comes after; the base is what it makes, or the chain's base.",
)  # fmt: skip
@click.option("--density", type=float, help="Fraction of the delta kept; default: all that changed, exactly.")
@click.option(
    "--method",
    shell_complete=pruning_methods,
    help="How entries are chosen, as prune.method; default: magnitude. "
    "Methods with settings of their own take a recipe.",
)
@click.option("--q", type=float, help="What kept entries are divided by; default: as in recipes.")
@click.option(
    "--values",
    type=click.Choice(["float32", "bfloat16", "int8", "sign"]),
    help="Store values to add, in this form; default: final values.",
)
@DEVICE
@WORKERS
@MEMORY
@RESUME
@FORCE
@NONFINITE
@PICKLES
@AS_JSON
@QUIET
def extract(
    model: str,
    origin: str | None,
    base: str | None,
    out: Path | None,
    after: str | None,
    density: float | None,
    method: str | None,
    q: float | None,
    values: str | None,
    resume: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Make a delta artifact of MODEL, a fine-tune of a base.

    It holds what changed, exactly, or with a density what is kept of it.
    """
    from deltamerge.run.extract import extract as extract_delta
    from deltamerge.run.options import Options
    from deltamerge.run.weights import describe_nonfinite

    if (base is None) == (origin is None):
        raise click.UsageError("name the base once: as BASE, or with --base")
    base = base or origin or ""
    begun, warnings = time.monotonic(), Warnings()

    def watch(plan: Plan) -> Callable[[int], None]:
        warnings.say(plan)
        return lambda _: None

    result = extract_delta(
        model, base, out, density=density, method=method, q=q, values=values, after=after,
        options=Options(watch=watch, force=force, resume=resume or None, **options),
    )  # fmt: skip
    warnings.say(result.plan)
    if result.nonfinite:
        tell(f"warning: {describe_nonfinite(result.nonfinite)}")
    report_run(result, begun, as_json=as_json, quiet=quiet)


@click.command()
@click.argument("delta", type=MODEL)
@click.option(
    "--base", required=True, type=MODEL, help="The checkpoint that the delta was made from: a folder, or a hub id."
)
@click.option("--out", type=FOLDER, required=True, help="Folder to make.")
@WORKERS
@MEMORY
@FORCE
@PICKLES
@AS_JSON
@QUIET
def apply(
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
    """Put DELTA on its base again.

    Writes the whole checkpoint; every tensor is checked before and after by hash.
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


@click.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--base", type=MODEL, help="Check the base too: what a delta makes of it, or that the lock has its files."
)
@WORKERS
@PICKLES
@AS_JSON
def verify(folder: Path, base: str | None, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Check FOLDER, which a run made, against the hashes in its lock.

    Of a chain, or a version of one, that each version was made from what the one before makes.
    """
    from deltamerge.chain.folder import is_chain
    from deltamerge.chain.version import VERSION
    from deltamerge.engine.execute import default_workers
    from deltamerge.run.lock import verify as verify_folder

    workers = workers or default_workers()
    if (folder / VERSION).is_file() or is_chain(folder):
        from deltamerge.run.squash import verify_chain

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
