"""Commands that judge many merges: sweep, search, bisect."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, cell, figure, paragraph, stacked, table
from deltamerge.cli.mergekit_flags import evolve_flags, given_flags
from deltamerge.cli.options import (
    ABOUT_ROWS,
    ALLOW_COMMAND,
    AS_CSV,
    AS_JSON,
    DEVICE,
    FOLDER,
    FORCE_FILES,
    PICKLES,
    QUIET,
    RECIPE,
    RESOURCES,
    SET,
    SET_OR_SWEEP,
    TRACK,
    WORKERS,
    HomePath,
    rows_in_folder,
    tracked,
)
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.apps.search.bisect import Bisection, Suspect
    from deltamerge.apps.search.results import SearchResult
    from deltamerge.apps.search.sweep import Keep, SweepResult
    from deltamerge.recipe.yaml_source import Loc


@click.command("sweep")
@click.argument("recipe", type=RECIPE)
@SET_OR_SWEEP
@click.option("--out", type=FOLDER, help="Folder for the results. Default: NAME-sweep beside RECIPE.")
@click.option(
    "--keep",
    type=click.Choice(["best", "all", "none"]),
    default="none",
    show_default=True,
    help="Merged models to write.",
)
@TRACK
@RESOURCES
@PICKLES
@ALLOW_COMMAND
@click.option("--force", is_flag=True, help="Discard earlier results; replace NAME.best.yaml even if it was changed.")
@AS_JSON
@AS_CSV
@QUIET
def sweep(
    recipe: Path,
    settings: dict[Loc, str],
    out: Path | None,
    keep: Keep,
    track: str | None,
    allow_command: bool,
    force: bool,
    as_json: bool,
    as_csv: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Try every combination of the values listed in RECIPE.

    Write the values as lists: density: {sweep: [0.1, 0.01]}. Candidates are scored in memory on the same rows, as set
    in `study`. NAME-sweep gets a table, JSON and a picture, NAME.best.yaml the best recipe. Run again, it continues
    where it stopped.

    \b
    deltamerge sweep recipe.yaml --keep best
    deltamerge sweep recipe.yaml --set prune.density=0.1 --set prune.density=0.01 --set seed=0 --set seed=1
    """
    with app("search"):
        from deltamerge.apps.search.sweep import as_csv as csv_of
        from deltamerge.apps.search.sweep import sweep as run_sweep
    from deltamerge.recipe.file import read_template
    from deltamerge.run.options import Options

    file = read_template(recipe, settings)
    with tracked(track, f"sweep {recipe.stem}", file.template.source.data) as log:
        found = run_sweep(file, Options(**options), out, keep=keep, force=force, commands=allow_command, log=log)
    if as_csv:
        say(csv_of(found).removesuffix("\n"))
    elif as_json:
        say_json(found.describe())
    elif not quiet:
        say(render_sweep(found, streams.columns()))
    if not quiet:
        for row in found.rows:
            if row.outcome.error is not None:
                tell(f"{', '.join(row.labels.values())}: failed: {row.outcome.error}")
        tell(f"{found.folder}: sweep.csv, sweep.json, sweep.svg")
        tell(f"{found.recipe}: the best recipe; next: deltamerge run {quote(str(found.recipe))} --locked")


def render_sweep(found: SweepResult, width: int) -> str:
    """Return a line for each point, averaged over seeds. The best is marked."""
    columns = [Column(stacked(name)) for name in found.columns]
    best = dict(found.rows[found.best].labels) if found.best is not None else {}
    rows: list[Row] = []
    for labels, numbers in found.averaged():
        mark = "→ " if all(best.get(axis) == label for axis, label in labels.items()) else "  "
        cells = [_spread(numbers[name]) for name in found.columns]
        rows.append((mark + (" · ".join(labels.values()) or "every seed"), cells))
    ways = ", ".join(f"{name} ({'less' if low else 'more'} is better)" for name, low in found.goals.items())
    counts = ", ".join(f"{count:,} of {name.removeprefix('./')}" for name, count in found.test_rows.items())
    foot = f"→: best by {ways}" + (f"; rows: {counts}" if counts else "")
    references: list[Row] = []
    for kind, scores in found.references.items():
        goals = found.reference_goals.get(kind, {})
        references.append(
            (f"  {kind}", [_reference(goals, scores, found.references["base"], name) for name in found.columns])
        )
    return one_a_line(
        [*table(columns, [rows, *([references] if references else [])], width), "", *paragraph(foot, width)]
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    return figure(mean) if len(values) == 1 else f"{figure(mean)} ± {statistics.pstdev(values):.2g}"


def _reference(goals: Any, scores: Any, base: Any, column: str) -> str:
    """Return the score of the base or the fine-tunes in a column: an objective, or a measure of one fine-tune.

    As for candidates, a distance is a share of the base's distance.
    """
    name, _, measure = column.rpartition(".")
    value = goals.get(column, scores.get(name, {}).get(measure))
    return cell(value / base[name][measure] if name and measure == "distance" and base[name][measure] else value)


SHOWN_ERRORS = 5


@click.command("search")
@click.argument("recipe", type=RECIPE)
@SET
@click.option("--out", type=FOLDER, help="Folder of the study. Default: NAME-search beside RECIPE.")
@click.option("--trials", type=click.IntRange(1), help="Number of candidates to try. Overrides study.trials.")
@click.option(
    "--keep",
    type=click.Choice(["best", "none"]),
    default="none",
    show_default=True,
    help="Merged model to write.",
)
@click.option(
    "--ray", metavar="[ADDRESS]", is_flag=False, flag_value="local",
    help="Judge candidates on the Ray cluster at ADDRESS, or on this machine's cores (extra `ray`).",
)  # fmt: skip
@TRACK
@RESOURCES
@PICKLES
@ALLOW_COMMAND
@click.option("--force", is_flag=True, help="Discard an earlier study; replace NAME.best.yaml even if it was changed.")
@AS_JSON
@QUIET
@evolve_flags
def search(
    recipe: Path,
    settings: dict[Loc, str],
    out: Path | None,
    trials: int | None,
    keep: Literal["best", "none"],
    ray: str | None,
    track: str | None,
    allow_command: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Search for the best values within the bounds given in RECIPE.

    Write bounds or choices in the recipe: weight: {search: [0, 1]}. Optuna proposes candidates, which are scored in
    memory as set in `study`. The best is chosen on rows that no trial has seen, and written to NAME.best.yaml with
    its lock. Run again, a study continues; --trials may be larger.

    \b
    deltamerge search recipe.yaml --trials 200
    optuna-dashboard sqlite:///recipe-search/study.db
    """
    with app("search"):
        from deltamerge.apps.search.search import search as run_search
    from deltamerge.recipe.file import read_template
    from deltamerge.run.options import Options

    theirs = given_flags(click.get_current_context())
    out, trials = out or theirs.out_path, trials or theirs.trials
    if theirs.warning and not quiet:
        tell(f"warning: {theirs.warning}")
    file = read_template(recipe, {**(theirs.settings or {}), **settings})
    with tracked(track, f"search {recipe.stem}", file.template.source.data) as log:
        found = run_search(
            file,
            Options(**options),
            out,
            trials=trials,
            keep=keep,
            force=force,
            commands=allow_command,
            ray=ray,
            log=log,
        )
    if as_json:
        say_json(found.describe())
    elif not quiet:
        say(render_search(found, streams.columns()))
    if not quiet:
        errors = dict.fromkeys(trial.outcome.error for trial in found.trials if trial.outcome.error)
        for error in list(errors)[:SHOWN_ERRORS]:
            count = sum(trial.outcome.error == error for trial in found.trials)
            tell(f"{count} trial{'s' * (count > 1)} failed: {error}")
        tell(f"{found.folder}: study.db, study.json, trials.csv, report.html")
        tell(f"{found.recipe}: the best recipe; next: deltamerge run {quote(str(found.recipe))} --locked")


def render_search(found: SearchResult, width: int) -> str:
    """Return the result, and the trials that were compared on held-out rows. → marks the best."""
    from deltamerge.apps.search.results import label

    names = list(found.chosen.params)
    goals = list(found.goals)
    columns = [Column(name) for name in goals] + [Column(f"held out\n{name}") for name in goals]
    columns += [Column(label(name, found.models).replace(": ", "\n"), 1) for name in names]
    rows: list[Row] = []
    low = next(iter(found.goals.values()))
    compared = [t for t in found.trials if t.held is not None] or [found.chosen]
    for trial in sorted(compared, key=lambda t: t.outcome.values[0] if low else -t.outcome.values[0]):
        held = trial.held.values if trial.held is not None else ()
        figures = [figure(v) for v in trial.outcome.values] + ([figure(v) for v in held] or ["–"] * len(goals))
        values = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in (trial.params[name] for name in names)]
        mark = "→ " if trial.number == found.chosen.number else "  "
        rows.append((f"{mark}trial {trial.number}", [*figures, *values]))
    ways = ", ".join(f"{name} ({'less' if low else 'more'} is better)" for name, low in found.goals.items())
    states = {state: sum(t.state == state for t in found.trials) for state in ("complete", "pruned", "failed")}
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    foot = f"→: the best {found.why}, by {ways}; {len(found.trials)} trials by {found.sampler}: {counted}"
    return one_a_line([*table(columns, [rows], width), "", *paragraph(foot, width)])


SHOWN = 8


@click.command("bisect")
@click.argument("recipe", type=RECIPE)
@click.option(
    "--rows", type=HomePath(path_type=Path), metavar="DIR",
    help="Rows of each model: DIR/NAME.jsonl (.csv, .txt, .parquet), or one file for all. Default: the "
    "recipe's calibration.",
)  # fmt: skip
@ABOUT_ROWS
@click.option("--of", "skill", metavar="NAME", help="Model whose skill to explain. Default: the model that loses most.")
@click.option("--plot", type=HomePath(dir_okay=False, path_type=Path), metavar="FILE.svg", help="Draw it there.")
@FORCE_FILES
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
def bisect(
    recipe: Path,
    rows: Path | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    skill: str | None,
    plot: Path | None,
    force: bool,
    as_json: bool,
    **where: Any,
) -> None:
    """Name the model, the layers and the tensors that cost a skill of RECIPE's merge most.

    Tensors are exchanged in memory for the fine-tune's own, and models are left out, in at most 40 passes over its
    rows. The rows need no labels, and no merge is written.

    \b
    deltamerge bisect recipe.yaml --rows rows --plot cost.svg
    deltamerge bisect recipe.yaml --rows rows --of math
    """
    with app("search"):
        from deltamerge.apps.report.pictures import check_plot
        from deltamerge.apps.search.bisect import bisect, draw
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options

    file = read_recipe(recipe)
    if plot is not None:
        check_plot(plot, file.path.name, force=force)
    models = [file.output.recipe.models[i].model for i in file.output.recipe.fine_tunes]
    folder = None if rows is None else rows.resolve()
    found = rows_in_folder(folder, models, text=text, sequences=sequences, length=length)
    answer = bisect(file, rows=found, skill=skill, options=Options(**where))
    say_json(answer.describe()) if as_json else say(render_bisection(answer, streams.columns()))
    if plot is not None:
        draw(answer, plot, file.path.name, force=force)
        tell(f"{plot}: written")


def render_bisection(found: Bisection, width: int) -> str:
    """Return the loss of each skill, and the greatest costs of the worst skill."""
    columns = [Column("lost")]
    rows: list[Row] = [(name, [f"{value:.1%}"]) for name, value in found.lost.items()]
    lines = [*table(columns, [rows], width), ""]
    for title, some in (
        ("layers, exchanged for its own", found.layers),
        ("tensors of the worst", found.tensors),
        ("models, left out", found.models),
    ):
        if some:
            lines += [
                f"{title}:",
                *table([Column("lost"), Column("won")], [[_suspect(one) for one in some[:SHOWN]]], width),
                "",
            ]
    about = "lost: distance of outputs from the fine-tune's, as a share of the base's; won: by how much lost falls"
    lines += paragraph(f"{about}. {found.passes} passes over the rows of {found.skill}", width)
    lines += [f"note: {note}" for note in found.notes]
    return one_a_line([*lines, "", *paragraph(verdict(found), width)])


def _suspect(one: Suspect) -> Row:
    return one.name, [f"{one.lost:.1%}", f"{one.won:.1%}"]


def verdict(found: Bisection) -> str:
    """Return the finding in a sentence."""
    said, (layer, tensor, model) = [f"{found.skill} loses {found.lost[found.skill]:.1%}"], found.costs
    there = f", there {tensor.name} ({tensor.won:.1%})" if tensor else ""
    said.append(f"most by {layer.name} ({layer.won:.1%}){there}" if layer else "no layer alone costs it")
    if model:
        said.append(f"of the models most by {model.name} ({model.won:.1%})")
    return "; ".join(said)
