"""The commands that run a recipe: run, calibrate."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli.options import (
    AS_JSON,
    DEVICE,
    FOLDER,
    MEMORY,
    MERGEKIT_EXACT,
    NONFINITE,
    QUIET,
    RECIPE,
    RESUME,
    WORKERS,
    RecipePath,
)
from deltamerge.cli.output import Progress, Warnings, report_run, say, say_json, tell
from deltamerge.cli.tables import render_calibration
from deltamerge.io import kernels
from deltamerge.io.files import scratch

if TYPE_CHECKING:
    from deltamerge.plan.planner import Plan


@click.command()
@click.argument("recipe", type=RecipePath())
@click.option("--out", type=FOLDER, help="Folder to make; default: the recipe's output.path, or NAME-merged beside it.")
@DEVICE
@WORKERS
@MEMORY
@click.option("--part", metavar="I/N", help="Write only the I-th of N parts, whole shards each.")
@click.option("--finish", is_flag=True, help="Make the target of what all parts wrote.")
@click.option(
    "--ray", metavar="[ADDRESS]", is_flag=False, flag_value="local",
    help="Run all parts on the Ray cluster at ADDRESS, or on this machine's cores (extra `ray`).",
)  # fmt: skip
@RESUME
@click.option("--force", is_flag=True, help="Replace a target that is not empty; forget an interrupted run.")
@click.option("--locked", is_flag=True, help="Refuse inputs that differ from the lock beside the recipe.")
@MERGEKIT_EXACT
@NONFINITE
@click.option("--pictures", is_flag=True, help="Draw delta and search for the model card (extra `plot`).")
@AS_JSON
@QUIET
def run(
    recipe: str,
    out: Path | None,
    device: str,
    workers: int | None,
    memory: int | None,
    part: str | None,
    finish: bool,
    ray: str | None,
    resume: bool,
    force: bool,
    locked: bool,
    mergekit_exact: bool,
    allow_nonfinite: bool,
    pictures: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Merge the models of RECIPE into one that transformers loads.

    Of several documents those with a name are made first, beside the output, where they would differ.

    \b
    deltamerge run recipe.yaml --memory 2GB
    deltamerge run hf://org/name    # again, what someone pushed; says whether the bytes agree
    deltamerge run recipe.yaml --ray 10.0.0.1:6379    # its parts on a cluster

    An interrupted run leaves .NAME.partial beside its target, to be resumed, or forgotten by force.
    """
    from deltamerge.inspect.pictures import drawing
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.lock import Lock
    from deltamerge.run.options import Options
    from deltamerge.run.partition import Part
    from deltamerge.run.publish import SCHEME, fetch
    from deltamerge.run.runner import finish as finish_parts
    from deltamerge.run.runner import run as run_recipe
    from deltamerge.run.weights import describe_nonfinite

    if sum((finish, part is not None, ray is not None)) > 1:
        raise click.UsageError("--part, --finish and --ray exclude each other")
    if ray is not None and recipe.startswith(SCHEME):
        raise click.UsageError("--ray takes a recipe that every machine of the cluster sees, not hf://")
    if pictures and part is not None:
        raise click.UsageError("--pictures is for --finish, when every part is done")

    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    elif line := kernels.missing():
        tell(line)
    progress, warnings = Progress(shown=not quiet and sys.stderr.isatty()), Warnings()

    def watch(plan: Plan) -> Callable[[int], None]:
        warnings.say(plan)
        return progress.start(plan.made_bytes)

    options = Options(
        device=device, workers=workers, memory=memory, resume=resume, force=force, allow_nonfinite=allow_nonfinite,
        watch=watch, drawing=drawing if pictures else None,
    )  # fmt: skip
    published = None
    with ExitStack() as held:
        path = Path(recipe)
        if recipe.startswith(SCHEME):
            out = out or Path(f"{recipe.partition('@')[0].rpartition('/')[2]}-merged")
            published = fetch(recipe, held.enter_context(scratch(out.absolute().parent)))
            path = published.recipe
            options = replace(options, lock=published.lock, pins=published.pins)
        file = read_recipe(path, mergekit_exact=mergekit_exact)
        if locked and published is None:
            options = replace(options, lock=Lock.read(file.lock_path))
        if finish:
            result = finish_parts(file, out, options)
        elif ray is not None:
            from deltamerge.run.cluster import run_on_ray

            result = run_on_ray(file, out, options, address=ray)
        else:
            result = run_recipe(file, out, options, part=Part.parse(part) if part else None)
    warnings.say(result.plan)
    if result.nonfinite:
        tell(f"warning: {describe_nonfinite(result.nonfinite)}")
    differing = published.differences(result.lock["outputs"]) if published and not part else []
    found: dict[str, Any] = {"intermediate": {str(folder): made for folder, made in result.intermediate.items()}}
    if published:
        found["published"] = {"commit": published.commit, "differs": differing}
    report_run(result, progress, as_json=as_json, quiet=quiet, **found)
    if part and not (quiet or as_json):
        tell("hint: when every part is done, run the same command with --finish")
    if published is not None and not part:
        agreed = f"not the bytes of {recipe}: {', '.join(differing)}" if differing else f"the same bytes as {recipe}"
        tell(f"{result.folder}: {agreed} at {published.commit[:12]}")
    if differing:
        raise click.exceptions.Exit(1)


@click.command()
@click.argument("recipe", type=RECIPE)
@DEVICE
@WORKERS
@MEMORY
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw the search (extra `plot`).")
@AS_JSON
def calibrate(
    recipe: Path, device: str, workers: int | None, memory: int | None, plot: Path | None, as_json: bool
) -> None:
    """Choose the q's of RECIPE on its calibration data, no more.

    Writes them to the lock beside RECIPE, for run --locked.
    """
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.runner import calibrate as calibrate_recipe

    file = read_recipe(recipe)
    found = calibrate_recipe(file, Options(device=device, workers=workers, memory=memory))
    if plot is not None:
        from deltamerge.inspect.plots import draw

        draw(found, plot)
    say_json(found) if as_json else say(render_calibration(found))
    tell(f"{file.lock_path}: written")
