"""The commands that examine and make no model: check, plan, inspect, recommend, diff."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge import errors
from deltamerge.cli.options import (
    AS_JSON,
    BASE,
    DEVICE,
    FILE,
    MEMORY,
    MERGEKIT_EXACT,
    MODEL,
    PICKLES,
    RECIPE,
    WORKERS,
    calibration_of,
    rows_of_text,
)
from deltamerge.cli.output import Progress, complain, say, say_json, say_model, tell
from deltamerge.cli.tables import human, render_diff, render_plan
from deltamerge.errors import DeltamergeError
from deltamerge.errors.shown import shown

if TYPE_CHECKING:
    from deltamerge.plan.planner import Plan


@click.command()
@click.argument("recipes", type=RECIPE, nargs=-1, required=True)
@click.option("--offline", is_flag=True, help="Only the recipes themselves; opens no model and no network.")
@MERGEKIT_EXACT
@PICKLES
def check(recipes: tuple[Path, ...], offline: bool, mergekit_exact: bool, pickles: bool) -> None:
    """Validate RECIPES and the headers of their models.

    Reads no weights; of hub models only the headers are fetched.
    """
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.plans import make_plans

    worst = 0
    for recipe in recipes:
        try:
            file = read_recipe(recipe, mergekit_exact=mergekit_exact)
            options = Options(device="cpu", pickles=pickles)
            plan = None if offline else make_plans(file, options=options)[-1]
        except DeltamergeError as error:
            complain(error, str(recipe))
            worst = max(worst, error.exit_code)
        else:
            several = f", {len(file.documents)} documents" if len(file.documents) > 1 else ""
            size = f", {len(plan.outputs)} tensors, {check_size(plan)}" if plan else ""
            tell(f"{recipe}: ok{several}{size}")
            for warning in plan.warnings if plan else ():
                tell(f"{recipe}: warning: {warning}")
            for note in plan.notes if plan else ():
                tell(f"{recipe}: note: {note}")
    if worst:
        raise click.exceptions.Exit(worst)


def check_size(plan: Plan) -> str:
    """The bytes of a run's output."""
    delta = plan.describe()["delta"] if plan.recipe.output.kind == "delta" else None
    return human(plan.nbytes) if delta is None else f"a delta of about {human(delta['estimated_bytes'])}"


@click.command()
@click.argument("recipe", type=RECIPE)
@DEVICE
@WORKERS
@MEMORY
@click.option("--diff", "old", type=RECIPE, help="Only what RECIPE does otherwise than this one, in Markdown.")
@click.option("--graph", is_flag=True, help="The stages as a Mermaid flowchart.")
@MERGEKIT_EXACT
@PICKLES
@AS_JSON
def plan(
    recipe: Path,
    device: str,
    workers: int | None,
    memory: int | None,
    old: Path | None,
    graph: bool,
    mergekit_exact: bool,
    pickles: bool,
    as_json: bool,
) -> None:
    """Show what a run of RECIPE would do, tensor by tensor.

    The dry run: sources, method, bytes and file of every output tensor, and the memory; reads no weights.

    \b
    deltamerge plan recipe.yaml --json
    deltamerge plan --diff old.yaml new.yaml    # for a pull request
    """
    from deltamerge.plan import review
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.plans import make_plans

    def describe(path: Path) -> dict[str, Any]:
        file = read_recipe(path, mergekit_exact=mergekit_exact)
        options = Options(device=device, workers=workers, memory=memory, pickles=pickles)
        *before, planned = make_plans(file, options=options)
        intermediate = {plan.recipe.name: plan.describe() for plan in before}
        return planned.describe() | ({"intermediate": intermediate} if before else {})

    if graph and (old or as_json):
        raise click.UsageError("--graph stands alone")
    described = describe(recipe)
    if old is not None:
        with errors.context(str(old)):
            found = review.difference(describe(old), described)
        say_json(found) if as_json else say(review.markdown(found, str(old), str(recipe)))
    elif graph:
        say(review.mermaid(described))
    elif as_json:
        say_json(described)
    else:
        for name, one in described.get("intermediate", {}).items():
            say(f"document {shown(name)}\n{render_plan(one)}\n")
        say(render_plan(described))


@click.command(epilog="Example: deltamerge inspect ./models/math --base ./models/base --calibration calib.jsonl")
@click.argument("model", type=MODEL)
@BASE
@rows_of_text
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.01,
    show_default=True,
    help="Of the bound and the errors, with --calibration.",
)
@click.option("--tensors", is_flag=True, help="List every tensor, not only layers.")
@click.option("--report", "page", type=click.Path(path_type=Path), metavar="FILE", help="Draw them on an HTML page.")
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
@DEVICE
@WORKERS
@AS_JSON
def inspect(
    model: str,
    base: str,
    calibration: str | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    density: float,
    tensors: bool,
    page: Path | None,
    force: bool,
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Measure the delta of MODEL: how large it is, and where.

    Per tensor, layer and in all, and what pruning would keep. With --calibration also what the delta does to
    activations: influence, coherence, massive activations, the bound and the error of DARE. Where MODEL is a folder
    that a run made, --report draws what its lock says, too.
    """
    from deltamerge.inspect.statistics import render
    from deltamerge.inspect.study import inspect as inspect_delta

    if force and page is None:
        raise click.UsageError("--force is for the FILE of --report")
    rows = calibration_of(calibration, text, sequences=sequences, length=length)
    progress = Progress(shown=sys.stderr.isatty())
    report = inspect_delta(
        model, base, calibration=rows, density=density, out=page, force=force,
        device=device, workers=workers, watch=progress.start,
    )  # fmt: skip
    progress.stop()
    say_model(report) if as_json else say(render(report, tensors=tensors))
    if page is not None:
        tell(f"{page}: written")


@click.command(
    epilog="Example: deltamerge recommend ./models/math --base ./models/base --density 0.01 --calibration calib.jsonl"
)
@click.argument("model", type=MODEL)
@BASE
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True, max_open=True), required=True, help="Fraction to keep."
)
@rows_of_text
@click.option("--label", metavar="KEY", help="Field of the label: show the metric on held-out rows too.")
@click.option("--out", type=RECIPE, metavar="FILE", help="Write the recipe there; default: only print it.")
@DEVICE
@WORKERS
@AS_JSON
def recommend(
    model: str,
    base: str,
    density: float,
    calibration: str | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    label: str | None,
    out: Path | None,
    device: str,
    workers: int | None,
    as_json: bool,
) -> None:
    """Say which pruning suits the delta of MODEL at a density.

    With evidence, and the recipe that does it.

    Without --calibration the delta's own statistics decide; with rows of text each method's mask is drawn and measured.
    """
    from deltamerge.inspect.recommend import render
    from deltamerge.inspect.study import recommend as recommend_pruning

    rows = calibration_of(calibration, text, sequences=sequences, length=length, label=label)
    progress = Progress(shown=sys.stderr.isatty())
    answer = recommend_pruning(
        model, base, density, calibration=rows, out=out, device=device, workers=workers, watch=progress.start
    )
    progress.stop()
    say_model(answer) if as_json else say(render(answer))
    if out is not None:
        tell(f"{out}: written")


@click.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@WORKERS
@AS_JSON
def diff(a: str, b: str, workers: int | None, as_json: bool) -> None:
    """Show what differs between two checkpoints or two locks.

    A and B are folders or hub ids (one may be a delta of the other), or two recipe.lock files.
    """
    from deltamerge.engine.execute import default_workers
    from deltamerge.inspect.diff import diff as compare

    found = compare(a, b, workers or default_workers())
    say_json(found) if as_json else say(render_diff(found))
