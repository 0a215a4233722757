"""The commands lock and calibrate: write input hashes, and q values chosen on rows, beside a recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli.options import AS_JSON, FORCE_FILES, MERGEKIT_EXACT, PICKLES, RECIPE, RESOURCES, SET, HomePath
from deltamerge.cli.output import say, say_json, tell
from deltamerge.errors import app
from deltamerge.errors.shown import lines as one_a_line

if TYPE_CHECKING:
    from deltamerge.recipe.yaml_source import Loc


@click.command("lock")
@click.argument("recipe", type=RECIPE)
@click.option("--check", is_flag=True, help="Write nothing. Exit 1 if RECIPE or its inputs differ from the lock.")
@RESOURCES
@MERGEKIT_EXACT
@SET
@PICKLES
@FORCE_FILES
def lock(
    recipe: Path,
    check: bool,
    force: bool,
    mergekit_exact: bool,
    settings: dict[Loc, str],
    **options: Any,
) -> None:
    """Lock RECIPE: write the hashes of its inputs, and its q values, beside it.

    `run --locked` then refuses a recipe or inputs that differ from the lock, on this machine or another.

    \b
    deltamerge lock recipe.yaml            # writes recipe.lock, to be kept in git
    deltamerge lock recipe.yaml --check    # in CI
    """
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.runner import check_lock
    from deltamerge.run.runner import lock as lock_recipe

    file = read_recipe(recipe, mergekit_exact=mergekit_exact, settings=settings)
    chosen = Options(force=force, **options)
    if check:
        check_lock(file, chosen)
        tell(f"{file.lock_path}: up to date")
        return
    written = lock_recipe(file, chosen)
    found = f", q values of {len(written.calibration)} models" if written.calibration else ""
    tell(f"{file.lock_path}: written; {len(written.content['inputs'])} inputs{found}")


@click.command("calibrate")
@click.argument("recipe", type=RECIPE)
@RESOURCES
@SET
@PICKLES
@click.option("--plot", type=HomePath(path_type=Path), metavar="FILE.svg", help="Draw the search.")
@FORCE_FILES
@AS_JSON
def calibrate(
    recipe: Path,
    settings: dict[Loc, str],
    plot: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Choose the q values of RECIPE on its calibration data.

    Writes them to the lock beside RECIPE, where `run --locked` reads them.
    """
    from deltamerge.recipe.file import read_recipe
    from deltamerge.run.options import Options
    from deltamerge.run.runner import calibrate as calibrate_recipe

    file = read_recipe(recipe, settings=settings)
    if plot is not None:
        with app("report"):
            from deltamerge.apps.report.pictures import check_plot, draw

        check_plot(plot, file.path.name, force=force)
    found = calibrate_recipe(file, Options(force=force, **options))
    if plot is not None:
        draw(found, plot, file.path.name, force=force)
    say_json(found) if as_json else say(render_calibration(found))
    tell(f"{file.lock_path}: written")


def render_calibration(found: Mapping[str, Any]) -> str:
    """Return the chosen q of every model, the points of its search, and each tensor's q where it differs."""
    lines = []
    for model, entry in found.items():
        path = [f"  {' '.join(f'{x:.4g}' if isinstance(x, float) else str(x) for x in step)}" for step in entry["path"]]
        lines += [
            f"model           {model}",
            f"objective       {entry['objective']}, scope {entry['scope']}, search {entry['search']}",
            f"chosen          {entry['chosen']}: {entry['why']}",
            *(f"candidate       {_candidate(candidate)}" for candidate in entry["candidates"]),
            f"value           {entry['value']:.6g}, without calibration {entry['plain']['value']:.6g}",
            f"forward passes  {entry['forward_passes']} of {entry['sequences']} sequences",
            *(["search path", *path] if path else []),
            *(f"q               {q:<10.6g} {name}" for name, q in entry["q"].items()),
            *([f"q of rows       {entry['rows']}"] if "rows" in entry else []),
        ]
    return one_a_line(lines)


def _candidate(candidate: dict[str, Any]) -> str:
    named = {name: x for name, x in candidate.items() if name not in ("value", "held_out")}
    text = " ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{x}" for name, x in named.items())
    return f"{text}: objective {candidate['value']:.4g}, held out {candidate['held_out']:.4g}"
