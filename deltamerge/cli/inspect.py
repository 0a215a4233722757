"""The commands that examine and make no model: check, plan, inspect, recommend, diff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge import errors
from deltamerge.cli import streams
from deltamerge.cli.layout import paragraph
from deltamerge.cli.options import (
    AS_CSV,
    AS_JSON,
    BASE,
    DEVICE,
    FILE,
    MEMORY,
    MERGEKIT_EXACT,
    MODEL,
    PICKLES,
    RECIPE,
    SET,
    WORKERS,
    rows_of_each,
    rows_of_text,
)
from deltamerge.cli.output import (
    annotate,
    complain,
    error_as_json,
    say,
    say_json,
    say_model,
    say_table,
    tell,
)
from deltamerge.cli.plan_view import render_plan
from deltamerge.cli.tables import human, render_diff
from deltamerge.errors import RecipeError
from deltamerge.errors.shown import shown

if TYPE_CHECKING:
    from deltamerge.recipe.file import RecipeFile
    from deltamerge.recipe.open_values import Template
    from deltamerge.recipe.yaml_source import Loc
    from deltamerge.run.check import Checked


@click.command()
@click.argument("recipes", type=RECIPE, nargs=-1, required=True)
@click.option("--offline", is_flag=True, help="Only the recipes themselves; opens no model and no network.")
@MERGEKIT_EXACT
@SET
@PICKLES
@click.option(
    "--output-format", type=click.Choice(["text", "json", "github"]), default="text", show_default=True,
    help="json: one object on stdout; github: annotations of a workflow's run.",
)  # fmt: skip
@AS_JSON
def check(
    recipes: tuple[Path, ...],
    offline: bool,
    mergekit_exact: bool,
    settings: dict[Loc, str],
    pickles: bool,
    output_format: str,
    as_json: bool,
) -> None:
    """Validate RECIPES and the headers of their models.

    Reads no weights; of hub models headers and tokenizers are fetched. Of a folder all recipes in it are checked; - is
    stdin.
    """
    from deltamerge.run.check import check_recipe, recipes_in
    from deltamerge.run.options import Options

    say_one = None if as_json else {"text": _say_checked, "github": _annotate_checked}.get(output_format)
    checked = []
    for recipe in recipes_in(recipes):
        found = check_recipe(
            recipe,
            Options(device="cpu", pickles=pickles),
            offline=offline,
            mergekit_exact=mergekit_exact,
            settings=settings,
        )
        checked.append(found)
        if say_one is not None:
            say_one(checked[-1])
    if say_one is None:
        errors = ({} if one.error is None else {"error": error_as_json(one.error, one.name)} for one in checked)
        say_json({"recipes": [one.describe() | error for one, error in zip(checked, errors, strict=True)]})
    if worst := max((one.error.exit_code for one in checked if one.error), default=0):
        raise click.exceptions.Exit(worst)


def _say_checked(found: Checked) -> None:
    if found.error is not None:
        complain(found.error, found.name)
        return
    several = f", {found.documents} documents" if found.documents > 1 else ""
    about = "a delta of about " if found.is_delta else ""
    size = f", {found.tensors} tensors, {about}{human(found.nbytes)}" if found.nbytes is not None else ""
    tell(f"{found.name}: ok{several}{size}")
    for kind, several_lines in (("warning", found.warnings), ("note", found.notes)):
        for line in several_lines:
            tell(f"{found.name}: {kind}: {line}")


def _annotate_checked(found: Checked) -> None:
    error = found.error
    for problem in error.problems if isinstance(error, RecipeError) else ():
        said = ": ".join(part for part in (problem.location, problem.message, problem.hint) if part)
        annotate("error", said, found.name, problem.line, problem.column)
    if error is not None and not isinstance(error, RecipeError):
        annotate("error", ": ".join(part for part in (str(error), error.hint) if part), found.name)
    for warning in found.warnings:
        annotate("warning", warning, found.name)


@click.command()
@click.argument("recipe", type=RECIPE)
@DEVICE
@WORKERS
@MEMORY
@click.option("--diff", "old", type=RECIPE, help="Only what RECIPE does otherwise than this one, in Markdown.")
@click.option("--graph", is_flag=True, help="The stages as a Mermaid flowchart.")
@click.option("--tensors", is_flag=True, help="List every tensor, with its sources and file.")
@MERGEKIT_EXACT
@SET
@PICKLES
@AS_JSON
def plan(
    recipe: Path,
    old: Path | None,
    graph: bool,
    tensors: bool,
    mergekit_exact: bool,
    settings: dict[Loc, str],
    as_json: bool,
    **options: Any,
) -> None:
    """Show what a run of RECIPE would do, and what it takes.

    The dry run: output, disk, memory, about how long, and the tensors by kind; reads no weights.

    \b
    deltamerge plan recipe.yaml --tensors       # each with its sources and file; --json for machines
    deltamerge plan --diff old.yaml new.yaml    # for a pull request
    """
    from deltamerge.apps.search.cost import describe_study
    from deltamerge.plan import review
    from deltamerge.recipe.file import TemplateFile, read_either, read_recipe
    from deltamerge.run.check import in_words
    from deltamerge.run.options import Options
    from deltamerge.run.plans import make_plans, target_of

    def describe(file: RecipeFile, template: Template | None = None) -> dict[str, Any]:
        *before, planned = make_plans(file, options=Options(**options))
        intermediate = {plan.recipe.name: plan.describe() for plan in before}
        study = None if template is None else template.describe() | describe_study(planned)
        more = {"intermediate": intermediate} if before else {}
        return planned.describe() | more | ({} if study is None else {"study": study})

    if graph and (old or as_json):
        raise click.UsageError("--graph stands alone")
    read = read_either(recipe, mergekit_exact=mergekit_exact, settings=settings)
    template = read.template if isinstance(read, TemplateFile) else None
    file = read.file(next(read.template.examples())) if isinstance(read, TemplateFile) else read
    described = describe(file, template)
    if old is not None:
        with errors.context(str(old)):
            before = describe(read_recipe(old, mergekit_exact=mergekit_exact))
            found = review.difference(before, described)
        say_json(found) if as_json else say(review.markdown(found, str(old), str(recipe)))
    elif graph:
        say(review.mermaid(described))
    elif as_json:
        say_json(described)
    else:
        width = streams.columns()
        for name, one in described.get("intermediate", {}).items():
            say(f"document {shown(name)}\n{render_plan(one, width=width, tensors=tensors)}\n")
        say(render_plan(described, width=width, target=target_of(file, None), tensors=tensors))
        if template is not None:
            study = described["study"]
            took = f"{study['together']} candidates a walk in about {human(study['memory'])} of memory"
            say("\n".join(paragraph(f"study: {in_words(template)}; {took}", width)))


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
@PICKLES
@AS_JSON
@AS_CSV
def inspect(
    model: str,
    base: str,
    calibration: dict[str, Any] | None,
    density: float,
    tensors: bool,
    page: Path | None,
    force: bool,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Measure the delta of MODEL: how large it is, and where.

    Per tensor, layer and in all, and what pruning would keep. With --calibration also what the delta does to
    activations: influence, coherence, massive activations, the bound and the error of DARE. Where MODEL is a folder
    that a run made, --report draws what its lock says, too.
    """
    from deltamerge.apps.recommend.study import inspect as inspect_delta
    from deltamerge.cli.studies import render_inspect

    if force and page is None:
        raise click.UsageError("--force is for the FILE of --report")
    report = inspect_delta(model, base, calibration=calibration, density=density, out=page, force=force, **options)
    if as_csv:
        say_table(report.tensors)
    else:
        say_model(report) if as_json else say(render_inspect(report, tensors=tensors, width=streams.columns()))
    if page is not None:
        tell(f"{page}: written")


@click.command()
@click.argument("models", type=MODEL, nargs=-1, required=True)
@BASE
@click.option(
    "--density", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Of one MODEL: the fraction to keep."
)
@rows_of_each
@click.option("--label", metavar="KEY", help="Field of the label: show the metric on held-out rows too.")
@click.option("--no-fit", is_flag=True, help="Of several MODELS: fit no coefficients, which takes longest.")
@click.option("--out", type=RECIPE, metavar="FILE", help="Write the recipe there; default: only print it.")
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
@AS_CSV
def recommend(
    models: tuple[str, ...],
    base: str,
    density: float | None,
    calibration: list[dict[str, Any] | None],
    no_fit: bool,
    out: Path | None,
    as_json: bool,
    as_csv: bool,
    **options: Any,
) -> None:
    """Say which pruning suits the delta of MODEL at a density, or which merge suits several MODELS.

    With evidence, and the recipe that does it.

    Without --calibration the deltas' own statistics decide; with rows of text each method is tried and measured: the
    masks of a pruning, or merges at several λ and with fitted coefficients, on each model's rows.

    \b
    deltamerge recommend ./math --base ./base --density 0.01 --calibration calib.jsonl
    deltamerge recommend ./math ./code --base ./base --calibration math.jsonl --calibration code.jsonl
    """
    from deltamerge.cli.studies import render_merge_advice, render_recommend

    if len(models) > 1:
        from deltamerge.apps.recommend.merge import recommend_merge
        from deltamerge.run.options import Options

        rows = [one for one in calibration if one]
        if density is not None or any("label" in one for one in rows):
            raise click.UsageError("--density and --label are for one MODEL, and these are several")
        merge = recommend_merge(models, base, calibration=rows, fit=not no_fit, out=out, options=Options(**options))
        if as_csv:
            say_table(merge.candidates)
        else:
            say_model(merge) if as_json else say(render_merge_advice(merge, width=streams.columns()))
    else:
        from deltamerge.apps.recommend.study import recommend as recommend_pruning

        if density is None:
            raise click.UsageError("Missing option '--density', which one MODEL needs")
        if no_fit or len(calibration) > 1:
            raise click.UsageError("--no-fit and several --calibration are for several MODELS, and this is one")
        answer = recommend_pruning(models[0], base, density, calibration=calibration[0], out=out, **options)
        if as_csv:
            say_table(answer.candidates)
        else:
            say_model(answer) if as_json else say(render_recommend(answer, width=streams.columns()))
    if out is not None:
        tell(f"{out}: written")


@click.command()
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@WORKERS
@PICKLES
@AS_JSON
def diff(a: str, b: str, workers: int | None, pickles: bool, as_json: bool) -> None:
    """Show what differs between two checkpoints or two locks.

    A and B are folders or hub ids (one may be a delta of the other), or two recipe.lock files.
    """
    from deltamerge.apps.inspect.diff import diff as compare
    from deltamerge.engine.execute import default_workers

    found = compare(a, b, workers or default_workers(), pickles=pickles)
    say_json(found) if as_json else say(render_diff(found))
