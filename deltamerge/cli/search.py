"""The commands that judge candidates: eval, sweep, search."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, paragraph, table
from deltamerge.cli.options import (
    AS_CSV,
    AS_JSON,
    DEVICE,
    FILE,
    FOLDER,
    MEMORY,
    MODEL,
    PICKLES,
    QUIET,
    RECIPE,
    SET,
    SET_OR_SWEEP,
    WORKERS,
    calibration_of,
)
from deltamerge.cli.output import say, say_csv, say_json, tell
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.apps.search.evaluate import Evaluation
    from deltamerge.apps.search.results import Found
    from deltamerge.apps.search.sweep import Keep, Swept
    from deltamerge.recipe.yaml_source import Loc

SHOWN_ERRORS = 5
ALLOW_COMMAND = click.option(
    "--allow-command", is_flag=True, help="Run the program that study.objective names, as this user."
)
METRICS = ("accuracy", "matthews_correlation", "f1", "accuracy_f1", "pearson_spearman", "exact_match", "loss")


@click.command("eval")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option(
    "--calibration", type=FILE, metavar="FILE", help="Labelled rows: .jsonl, .csv, pictures, or a hub data set."
)
@click.option("--recipe", type=RECIPE, help="Take rows and heads from a recipe: each fine-tune's, by its own head.")
@click.option("--text", multiple=True, metavar="KEY", help="Its field of text; twice for sentence pairs.")
@click.option("--label", metavar="KEY", help="Its field of the label; default: label.")
@click.option(
    "--task", type=click.Choice(["text-classification", "text-generation", "image-classification", "causal-lm"])
)
@click.option("--metric", "metrics", multiple=True, type=click.Choice(METRICS), help="Default: all that fit the head.")
@click.option("--answer", metavar="PATTERN", help="exact_match: pattern of the answer in a text.")
@click.option("--new-tokens", type=click.IntRange(1), help="exact_match: tokens generated for an answer, at most.")
@click.option("--sequences", type=click.IntRange(1), help="Rows to use; default: all.")
@click.option("--length", type=click.IntRange(1), help="Tokens a row; default: 128.")
@click.option("--head", type=MODEL, help="Whose head answers, where a merge has another task's.")
@click.option("--base", type=MODEL, help="The base of adapters and delta artifacts.")
@DEVICE
@PICKLES
@AS_JSON
@AS_CSV
def evaluate(
    models: tuple[str, ...],
    calibration: str | None,
    recipe: Path | None,
    text: tuple[str, ...],
    label: str | None,
    task: str | None,
    metrics: tuple[str, ...],
    answer: str | None,
    new_tokens: int | None,
    sequences: int | None,
    length: int | None,
    head: str | None,
    base: str | None,
    device: str,
    pickles: bool,
    as_json: bool,
    as_csv: bool,
) -> None:
    """Score MODELS on labelled rows, side by side.

    Folders, hub ids, base+adapter, delta artifacts: what was merged, and what it was merged from.

    \b
    deltamerge eval ./merged ./models/math --calibration test.jsonl
    deltamerge eval ./merged ./models/* --recipe recipe.yaml    # every task, by its own head
    """
    from deltamerge.apps.search.evaluate import Question, evaluate, questions_of
    from deltamerge.recipe.file import read_recipe
    from deltamerge.recipe.schema import Calibration

    more = {"label": label, "task": task, "answer": answer, "new_tokens": new_tokens, "length": length}
    rows = calibration_of(calibration, text, **more)
    if (rows is None) == (recipe is None):
        raise click.UsageError("give the rows by --calibration, or by --recipe")
    if recipe is not None and (head is not None or any(value is not None for value in more.values())):
        raise click.UsageError("--recipe has rows and heads of its own: it stands alone")
    if recipe is not None:
        questions = questions_of(read_recipe(recipe))
    else:
        if "exact_match" in metrics:
            rows = {**(rows or {}), "metric": "exact_match", "task": "text-generation"}
        questions = [Question("", Calibration.model_validate(rows), Path.cwd(), head)]
    found = evaluate(models, questions, metrics=metrics, sequences=sequences, base=base, device=device, pickles=pickles)
    if as_csv:
        say_csv([{"model": one.model, **_flat(one.scores)} for one in found.models])
    else:
        say_json(found.describe()) if as_json else say(render(found, streams.columns()))


@click.command()
@click.argument("recipe", type=RECIPE)
@SET_OR_SWEEP
@click.option("--out", type=FOLDER, help="Folder for what is found; default: NAME-sweep beside RECIPE.")
@click.option(
    "--keep",
    type=click.Choice(["best", "all", "none"]),
    default="none",
    show_default=True,
    help="Merged folders that are written.",
)
@DEVICE
@WORKERS
@MEMORY
@PICKLES
@ALLOW_COMMAND
@click.option("--force", is_flag=True, help="Forget what an earlier sweep found; replace a changed NAME.best.yaml.")
@AS_JSON
@AS_CSV
@QUIET
def sweep(
    recipe: Path,
    settings: dict[Loc, str],
    out: Path | None,
    keep: Keep,
    allow_command: bool,
    force: bool,
    as_json: bool,
    as_csv: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Try every combination of the values that RECIPE leaves open.

    Values are lists: density: {sweep: [0.1, 0.01]}. Candidates are judged in memory on the same rows, as `study` says;
    a table, JSON and a picture go to NAME-sweep, the best recipe to NAME.best.yaml. Run again, it goes on where it
    stopped.

    \b
    deltamerge sweep recipe.yaml --keep best
    deltamerge sweep recipe.yaml --set prune.density=0.1 --set prune.density=0.01 --set seed=0 --set seed=1
    """
    from deltamerge.apps.search.sweep import as_csv as csv_of
    from deltamerge.apps.search.sweep import sweep as run_sweep
    from deltamerge.recipe.file import read_template
    from deltamerge.run.options import Options

    found = run_sweep(
        read_template(recipe, settings), Options(**options), out, keep=keep, force=force, commands=allow_command
    )
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
        tell(f"{found.recipe}: the best recipe; next: deltamerge run {found.recipe} --locked")


@click.command()
@click.argument("recipe", type=RECIPE)
@SET
@click.option("--out", type=FOLDER, help="Folder of the study; default: NAME-search beside RECIPE.")
@click.option("--trials", type=click.IntRange(1), help="Candidates to try in all; wins over study.trials.")
@click.option(
    "--keep",
    type=click.Choice(["best", "none"]),
    default="none",
    show_default=True,
    help="Merged folder that is written.",
)
@click.option(
    "--ray", metavar="[ADDRESS]", is_flag=False, flag_value="local",
    help="Judge candidates on the Ray cluster at ADDRESS, or on this machine's cores (extra `ray`).",
)  # fmt: skip
@DEVICE
@WORKERS
@MEMORY
@PICKLES
@ALLOW_COMMAND
@click.option("--force", is_flag=True, help="Forget an earlier study; replace a changed NAME.best.yaml.")
@AS_JSON
@QUIET
def search(
    recipe: Path,
    settings: dict[Loc, str],
    out: Path | None,
    trials: int | None,
    keep: Literal["best", "none"],
    ray: str | None,
    allow_command: bool,
    force: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Search the values that RECIPE leaves open for the best.

    Values are bounds or choices: weight: {search: [0, 1]}. Optuna proposes candidates, which are judged in memory as
    `study` says; rows that no trial has seen decide. The best goes to NAME.best.yaml, with its lock. Run again, a study
    goes on where it stopped, to more trials if there are to be more.

    \b
    deltamerge search recipe.yaml --trials 200
    optuna-dashboard sqlite:///recipe-search/study.db
    """
    from deltamerge.apps.search.search import search as run_search
    from deltamerge.recipe.file import read_template
    from deltamerge.run.options import Options

    found = run_search(
        read_template(recipe, settings),
        Options(**options),
        out,
        trials=trials,
        keep=keep,
        force=force,
        commands=allow_command,
        ray=ray,
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
        tell(f"{found.recipe}: the best recipe; next: deltamerge run {found.recipe} --locked")


def _flat(scores: Any) -> dict[str, float]:
    return {f"{task}.{name}" if task else name: value for task, own in scores.items() for name, value in own.items()}


def render(found: Evaluation, width: int) -> str:
    """A line for each model, a column for each metric of each task."""
    flat = {one.model: _flat(one.scores) for one in found.models}
    names = list(dict.fromkeys(name for own in flat.values() for name in own))
    columns = [Column(name.replace(".", "\n")) for name in names]
    rows: list[Row] = [(model, [f"{own[n]:.4f}" if n in own else "–" for n in names]) for model, own in flat.items()]
    counts = dict.fromkeys(found.rows.values())
    several = ", ".join(f"{count:,} of {task}" for task, count in found.rows.items())
    foot = f"{next(iter(counts)):,} rows" if len(counts) == 1 else f"rows: {several}"
    return one_a_line([*table(columns, [rows], width), "", foot])


def render_sweep(found: Swept, width: int) -> str:
    """A line for each point, seeds averaged; the best is marked."""
    columns = [Column(name.replace(".", "\n")) for name in found.columns]
    best = dict(found.rows[found.best].labels) if found.best is not None else {}
    rows: list[Row] = []
    for labels, numbers in found.averaged():
        mark = "→ " if all(best.get(axis) == label for axis, label in labels.items()) else "  "
        cells = [_spread(numbers[name]) for name in found.columns]
        rows.append((mark + (" · ".join(labels.values()) or "every seed"), cells))
    ways = ", ".join(f"{name} ({'less' if low else 'more'} is better)" for name, low in found.goals.items())
    counts = ", ".join(f"{count:,} of {name}" for name, count in found.test_rows.items())
    foot = f"→: best by {ways}" + (f"; rows: {counts}" if counts else "")
    references = [
        (f"  {kind}", [_reference(scores, name) for name in found.columns]) for kind, scores in found.references.items()
    ]
    return one_a_line(
        [*table(columns, [rows, *([references] if references else [])], width), "", *paragraph(foot, width)]
    )


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.fmean(values)
    return f"{mean:.4f}" if len(values) == 1 else f"{mean:.4f} ± {statistics.pstdev(values):.4f}"


def _reference(scores: Any, column: str) -> str:
    """What the base or the fine-tune scores in a column, where that is one of the metrics."""
    name, _, measure = column.rpartition(".")
    value = scores.get(name, {}).get(measure)
    return "–" if value is None or measure == "distance" else f"{value:.4f}"


def render_search(found: Found, width: int) -> str:
    """What was found, and the trials that were compared on held-out rows; → is the best."""
    names = list(found.chosen.params)
    goals = list(found.goals)
    columns = [Column(name) for name in goals] + [Column(f"held out\n{name}") for name in goals]
    columns += [Column(name.replace("].", "]\n"), 1) for name in names]
    rows: list[Row] = []
    low = next(iter(found.goals.values()))
    compared = [t for t in found.trials if t.held is not None] or [found.chosen]
    for trial in sorted(compared, key=lambda t: t.outcome.values[0] if low else -t.outcome.values[0]):
        held = trial.held.values if trial.held is not None else ()
        figures = [f"{v:.4f}" for v in trial.outcome.values] + ([f"{v:.4f}" for v in held] or ["–"] * len(goals))
        values = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in (trial.params[name] for name in names)]
        mark = "→ " if trial.number == found.chosen.number else "  "
        rows.append((f"{mark}trial {trial.number}", [*figures, *values]))
    ways = ", ".join(f"{name} ({'less' if low else 'more'} is better)" for name, low in found.goals.items())
    states = {state: sum(t.state == state for t in found.trials) for state in ("complete", "pruned", "failed")}
    counted = ", ".join(f"{count} {state}" for state, count in states.items() if count)
    foot = f"→: the best {found.why}, by {ways}; {len(found.trials)} trials by {found.sampler}: {counted}"
    return one_a_line([*table(columns, [rows], width), "", *paragraph(foot, width)])
