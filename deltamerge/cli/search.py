"""The command search."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deltamerge.cli import streams
from deltamerge.cli.layout import Column, Row, figure, paragraph, table
from deltamerge.cli.mergekit_flags import evolve_flags, given_flags
from deltamerge.cli.options import (
    ALLOW_COMMAND,
    AS_JSON,
    DEVICE,
    FOLDER,
    MEMORY,
    PICKLES,
    QUIET,
    RECIPE,
    SET,
    TRACK,
    WORKERS,
    tracked,
)
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.apps.search.results import SearchResult
    from deltamerge.recipe.yaml_source import Loc


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
@DEVICE
@WORKERS
@MEMORY
@PICKLES
@ALLOW_COMMAND
@click.option("--force", is_flag=True, help="Discard an earlier study; replace NAME.best.yaml even if it was changed.")
@AS_JSON
@QUIET
@evolve_flags
def command(
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
        tell(f"{found.recipe}: the best recipe; next: deltamerge run {found.recipe} --locked")


def render_search(found: SearchResult, width: int) -> str:
    """Return the result, and the trials that were compared on held-out rows. → is the best."""
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
