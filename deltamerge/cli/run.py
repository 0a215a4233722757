"""The command run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli.mergekit_flags import given_flags, mergekit_flags
from deltamerge.cli.options import (
    AS_JSON,
    FILE,
    FOLDER,
    MERGEKIT_EXACT,
    NONFINITE,
    PICKLES,
    QUIET,
    RESOURCES,
    RESUME,
    SET,
    TRACK,
    RecipePath,
    tracked,
)
from deltamerge.cli.output import tell
from deltamerge.cli.result import Warnings, report_run, summary_of
from deltamerge.errors import DeltamergeError, app

if TYPE_CHECKING:
    from deltamerge.apps.probe import Probe
    from deltamerge.plan.planner import Plan
    from deltamerge.recipe.yaml_source import Loc
    from deltamerge.run.options import Watch
    from deltamerge.run.runner import Result

WHOLE = 100  # percent
PUBLISHED = "hf://"  # the prefix of a recipe that was pushed to the hub


@click.command("run")
@click.argument("recipe", type=RecipePath())
@click.argument("target", metavar="[OUT]", type=FOLDER, required=False)
@click.option("--out", type=FOLDER, help="Output folder. Default: the recipe's output.path, or NAME-merged beside it.")
@RESOURCES
@click.option("--part", metavar="I/N", help="Write only part I of N. A part is one or more whole shards.")
@click.option("--finish", is_flag=True, help="Assemble the output from all parts.")
@click.option(
    "--ray", metavar="[ADDRESS]", is_flag=False, flag_value="local",
    help="Run all parts on the Ray cluster at ADDRESS, or on this machine's cores (extra `ray`).",
)  # fmt: skip
@RESUME
@click.option(
    "--force", is_flag=True,
    help="Start over: replace an output that was changed, or that another recipe or command made; drop partial work.",
)  # fmt: skip
@click.option("--locked", is_flag=True, help="Fail if the recipe or its inputs differ from the lock beside the recipe.")
@click.option(
    "--lock", "lock_path", type=FILE, metavar="PATH", help="The same, with this lock, or the lock of an output folder."
)
@MERGEKIT_EXACT
@NONFINITE
@SET
@PICKLES
@click.option("--pictures", is_flag=True, help="Add pictures of the delta and the search to the model card.")
@click.option("--probe", is_flag=True, help="Ask a merged language model and its parents a few prompts.")
@TRACK
@AS_JSON
@QUIET
@click.option(
    "-v", "--verbose", "--verbosity", count=True, help="Print the notes of `plan`, and of a LoRA a line per layer."
)
@mergekit_flags
@click.pass_context
def command(
    context: click.Context,
    recipe: str,
    target: Path | None,
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
    lock_path: str | None,
    mergekit_exact: bool,
    allow_nonfinite: bool,
    settings: dict[Loc, str],
    pickles: bool,
    pictures: bool,
    probe: bool,
    track: str | None,
    as_json: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Merge the models of RECIPE into one checkpoint.

    If RECIPE has several documents, named documents are merged first, beside the output. Up-to-date results are kept.

    \b
    deltamerge run recipe.yaml --memory 2GB
    deltamerge run recipe.yaml ./merged --set seed=1    # OUT may stand alone, as mergekit's
    deltamerge run hf://org/name    # again, what someone pushed; says whether the bytes agree
    deltamerge run recipe.yaml --ray 10.0.0.1:6379    # its parts on a cluster

    Run again: a finished recipe is up to date, a changed one replaces its own result, and an interrupted one
    continues from .NAME.partial beside its output. --force starts over.
    """
    from deltamerge.engine import kernels
    from deltamerge.files.descriptors import scratch
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.lock import Lock
    from deltamerge.run.options import Options
    from deltamerge.run.partition import Part
    from deltamerge.run.plans import lock_for
    from deltamerge.run.runner import finish as finish_parts
    from deltamerge.run.runner import run as run_recipe

    if sum((finish, part is not None, ray is not None)) > 1:
        raise click.UsageError("--part, --finish and --ray exclude each other")
    if ray is not None and recipe.startswith(PUBLISHED):
        raise click.UsageError("--ray takes a recipe that every machine of the cluster sees, not hf://")
    if pictures and part is not None:
        raise click.UsageError("--pictures is for --finish, when every part is done")
    if probe and part is not None:
        raise click.UsageError("--probe is for --finish, when every part is done")
    theirs = given_flags(context)
    if target is not None and out is not None:
        raise click.UsageError("OUT and --out name the output twice")
    out = out or target or theirs.out_path
    device = theirs.device or device if device == "auto" else device
    workers = workers or theirs.workers
    settings = {**(theirs.settings or {}), **settings}
    if settings and recipe.startswith(PUBLISHED):
        raise click.UsageError("hf:// runs a pushed recipe, whose keys cannot be set")

    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    elif line := kernels.missing():
        tell(line)
    if theirs.warning and not quiet:
        tell(f"warning: {theirs.warning}")
    begun, warnings = time.monotonic(), Warnings()
    options = Options(
        device=device, workers=workers, memory=memory, resume=resume or None, force=force,
        allow_nonfinite=allow_nonfinite,
        pickles=pickles, watch=warnings.watch, drawing=_drawing() if pictures else None,
    )  # fmt: skip
    published = None
    with ExitStack() as held:
        path = Path(recipe)
        if recipe.startswith(PUBLISHED):
            from deltamerge.run.publish import fetch

            out = out or Path(f"{recipe.partition('@')[0].rpartition('/')[2]}-merged")
            published = fetch(recipe, held.enter_context(scratch(out.absolute().parent)))
            path = published.recipe
            options = replace(options, lock=published.lock, pins=published.pins)
        file = read_recipe(path, mergekit_exact=mergekit_exact, settings=settings)
        if published is not None:
            file = replace(file, made_for=recipe.partition("@")[0])
        if (locked or lock_path) and published is None:
            options = replace(options, lock=Lock.read(lock_for(file, out, lock_path)))
        name = path.stem if published is None else recipe.removeprefix(PUBLISHED)
        log = held.enter_context(tracked(track, f"run {name}", file.output.recipe.source.data))
        if track is not None:
            options = replace(options, watch=partial(_watch, log, warnings.watch))
        if finish:
            result = finish_parts(file, out, options)
        elif ray is not None:
            from deltamerge.run.ray import run_on_ray

            result = run_on_ray(file, out, options, address=ray)
        else:
            result = run_recipe(file, out, options, part=Part.parse(part) if part else None)
        log({key: value for key, value in summary_of(result, begun).items() if key != "lock"}, WHOLE)
    warnings.end(result)
    lock = options.lock if not part else None
    differing = lock.differences(result.lock["outputs"]) if lock is not None and lock.content["outputs"] else []
    found: dict[str, Any] = {"intermediate": {str(folder): made for folder, made in result.intermediate.items()}}
    if published:
        found["published"] = {"commit": published.commit, "differs": differing}
    seen = _probed(result, device) if probe else None
    found |= {} if seen is None else {"probe": seen.describe()}
    for note in result.plan.notes if verbose and not (quiet or as_json) else ():
        tell(f"note: {note}")
    report_run(result, begun, as_json=as_json, quiet=quiet, verbose=bool(verbose), **found)
    if seen is not None and not (quiet or as_json):
        _tell_probe(seen)
    if part and not (quiet or as_json):
        tell("hint: when every part is done, run the same command with --finish")
    if lock is not None and lock.content["outputs"] and not (quiet and not differing):
        whose = f"{recipe} at {published.commit[:12]}" if published else str(lock.path)
        agreed = f"not the bytes of {whose}: {', '.join(differing)}" if differing else f"the same bytes as {whose}"
        tell(f"{result.folder}: {agreed}")
    if differing:
        raise click.exceptions.Exit(1)


def _watch(log: Callable[[Mapping[str, Any], int], None], watch: Watch, plan: Plan) -> Callable[[int], None]:
    """Log each percent of a plan's bytes once. With the first two arguments bound, it serves as `Options.watch`."""
    told, done, said = watch(plan), 0, 0

    def step(nbytes: int) -> None:
        nonlocal done, said
        told(nbytes)
        done += nbytes
        percent = min(WHOLE - 1, WHOLE * done // max(1, plan.made_bytes))
        if percent > said:
            said = percent
            log({"written/percent": percent, "written/bytes": done}, percent)

    return step


def _probed(result: Result, device: str) -> Probe | None:
    """Probe a finished merge and its parents. Warn if it cannot be probed; the merge stays."""
    with app("probe"):
        from deltamerge.apps.probe import probe_models
        from deltamerge.apps.search.evaluate import open_model
    from deltamerge.models.checkpoint import decoded

    inputs = result.plan.inputs
    parents = [*(() if inputs.base is None else (inputs.base,)), *inputs.tunes]
    try:
        models = {str(result.folder): open_model(str(result.folder), None)}
        models |= {one.name: decoded(one.checkpoint) for one in parents}
        return probe_models(models, device=device)
    except DeltamergeError as error:
        tell(f"warning: --probe: {error}")
        return None


def _tell_probe(found: Probe) -> None:
    """Print the perplexities and the faults of a merge."""
    from deltamerge.cli.eval import wrong_with
    from deltamerge.cli.layout import cell

    models = (found.merge, *found.parents)
    tell(f"perplexity: {', '.join(f'{one.model} {cell(one.perplexity)}' for one in models)}")
    for prompt, answer in zip(found.prompts, found.merge.answers, strict=True):
        tell(f"  {' '.join(prompt.split())} → {' '.join(answer.split()) or '(nothing)'}")
    for line in wrong_with(found):
        tell(line)


def _drawing() -> Any:
    with app("report"):
        from deltamerge.apps.report.pictures import drawing

    return drawing
