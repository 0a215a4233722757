"""The command merge: a merge as recommend advises."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from deltamerge.cli.options import (
    ABOUT_ROWS,
    AS_JSON,
    DEVICE,
    FOLDER,
    MEMORY,
    MODEL,
    PICKLES,
    QUIET,
    WORKERS,
    calibration_of,
)
from deltamerge.cli.output import say, say_json, tell
from deltamerge.cli.result import Warnings, report_run, summary_of
from deltamerge.errors import app

RECIPES = (".yaml", ".yml")


def _about_rows(command: Any) -> Any:
    for option in reversed(ABOUT_ROWS):
        command = option(command)
    return command


@click.command("merge")
@click.argument("models", type=MODEL, nargs=-1, required=True)
@click.option("--base", type=MODEL, help="What MODELS were fine-tuned from.")
@click.option("--out", type=FOLDER, help="Folder to make; the recipe is written beside it, as OUT.yaml.")
@click.option(
    "--rows", type=click.Path(path_type=Path), metavar="DIR",
    help="Rows of each model: DIR/NAME.jsonl (.csv, .txt), NAME the last part of its path; or one file for all.",
)  # fmt: skip
@_about_rows
@click.option("--no-fit", is_flag=True, help="Fit no coefficients, which takes longest.")
@click.option("--dry-run", is_flag=True, help="Stop before the run: the recipe is written.")
@click.option("--force", is_flag=True, help="Choose anew, and replace OUT.yaml and OUT.")
@DEVICE
@WORKERS
@MEMORY
@PICKLES
@AS_JSON
@QUIET
def command(
    models: tuple[str, ...],
    base: str | None,
    out: Path | None,
    rows: Path | None,
    text: tuple[str, ...],
    sequences: int,
    length: int,
    no_fit: bool,
    dry_run: bool,
    force: bool,
    pickles: bool,
    as_json: bool,
    quiet: bool,
    **where: Any,
) -> None:
    """Merge MODELS into one, by the method that suits them: recommend, its recipe, and run.

    Says in five lines what was chosen, why, what each skill should keep, and what would save one that is in danger.

    \b
    deltamerge merge ./math ./code --base ./base --out merged
    deltamerge merge ./math ./code --base ./base --out merged --rows rows    # rows/math.jsonl, rows/code.jsonl
    """
    if len(models) == 1 and models[0].endswith(RECIPES):
        raise click.UsageError(f"{models[0]} is a recipe: deltamerge run {models[0]}")
    for name, value in (("--base BASE", base), ("--out OUT", out)):
        if value is None:
            raise click.UsageError(f"Missing option '{name}'")
    assert base is not None
    assert out is not None
    with app("recommend"):
        from deltamerge.apps.recommend.advised import advised_merge, in_five_lines, rows_in
    from deltamerge.run.options import Options

    if rows is None:
        calibration_of(None, text)
        found = []
    else:
        about = {key: value for key, value in (calibration_of(".", text) or {}).items() if key != "data"}
        found = rows_in(rows, models, sequences=sequences, length=length, **about)
    begun, warnings = time.monotonic(), Warnings()
    options = Options(force=force, pickles=pickles, watch=warnings.watch, **where)
    made = advised_merge(models, base, out, rows=found, fit=not no_fit, options=options)
    if not (as_json or quiet):
        say("\n".join(in_five_lines(made)))
        for warning in made.advice.warnings:
            warnings.said.add(warning)
            tell(f"warning: {warning}")
    said = {"advice": made.advice.model_dump(mode="json"), "recipe": str(made.recipe)}
    if dry_run:
        if as_json:
            say_json({**said, "run": None})
        elif not quiet:
            tell(f"{made.recipe}: written; deltamerge run {made.recipe} --out {out} makes the merge")
        return
    result = made.run()
    warnings.end(result)
    if as_json:
        say_json({**said, "run": summary_of(result, begun)})
    else:
        report_run(result, begun, as_json=False, quiet=quiet)
