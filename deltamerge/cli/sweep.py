"""The command sweep."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, cell, figure, paragraph, stacked, table
from deltamerge.cli.options import (
    ALLOW_COMMAND,
    AS_CSV,
    AS_JSON,
    DEVICE,
    FOLDER,
    MEMORY,
    PICKLES,
    QUIET,
    RECIPE,
    SET_OR_SWEEP,
    TRACK,
    WORKERS,
    tracked,
)
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
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
@DEVICE
@WORKERS
@MEMORY
@PICKLES
@ALLOW_COMMAND
@click.option("--force", is_flag=True, help="Discard earlier results; replace NAME.best.yaml even if it was changed.")
@AS_JSON
@AS_CSV
@QUIET
def command(
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
        tell(f"{found.recipe}: the best recipe; next: deltamerge run {found.recipe} --locked")


def render_sweep(found: SweepResult, width: int) -> str:
    """Return a line for each point, seeds averaged. The best is marked."""
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
    """Return what the base or the fine-tunes score in a column: an objective, or a measure of one fine-tune.

    As of candidates, a distance is a share of the base's.
    """
    name, _, measure = column.rpartition(".")
    value = goals.get(column, scores.get(name, {}).get(measure))
    return cell(value / base[name][measure] if name and measure == "distance" and base[name][measure] else value)
