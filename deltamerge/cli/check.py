"""The command check."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deltamerge.cli.options import AS_JSON, MERGEKIT_EXACT, PICKLES, RECIPE, SET
from deltamerge.cli.output import annotate, complain, error_as_json, say_json, tell
from deltamerge.errors import RecipeError
from deltamerge.errors.shown import human

if TYPE_CHECKING:
    from deltamerge.recipe.yaml_source import Loc
    from deltamerge.run.check import RecipeCheck


@click.command("check")
@click.argument("recipes", type=RECIPE, nargs=-1, required=True)
@click.option("--offline", is_flag=True, help="Check the recipes alone: open no model, use no network.")
@MERGEKIT_EXACT
@SET
@PICKLES
@click.option(
    "--output-format", type=click.Choice(["text", "json", "github"]), default="text", show_default=True,
    help="json: one object on stdout. github: annotations for GitHub Actions.",
)  # fmt: skip
@AS_JSON
@click.option("-v", "--verbose", is_flag=True, help="Print the notes of `plan` too.")
def command(
    recipes: tuple[Path, ...],
    offline: bool,
    mergekit_exact: bool,
    settings: dict[Loc, str],
    pickles: bool,
    output_format: str,
    as_json: bool,
    verbose: bool,
) -> None:
    """Validate RECIPES, and the headers of the models they name.

    Reads no weights; for hub models, fetches headers and tokenizers. RECIPES are files, folders of recipes, or - for
    stdin.
    """
    from deltamerge.run.check import check_recipe, recipes_in

    options = None
    if not offline:
        from deltamerge.run.options import Options

        options = Options(device="cpu", pickles=pickles)
    ways: dict[str, Callable[[RecipeCheck], None]] = {
        "text": partial(_say_checked, verbose=verbose),
        "github": _annotate_checked,
    }
    say_one = None if as_json else ways.get(output_format)
    checked = []
    for recipe in recipes_in(recipes):
        found = check_recipe(recipe, options, mergekit_exact=mergekit_exact, settings=settings)
        checked.append(found)
        if say_one is not None:
            say_one(checked[-1])
    if say_one is None:
        errors = ({} if one.error is None else {"error": error_as_json(one.error, one.name)} for one in checked)
        say_json({"recipes": [one.describe() | error for one, error in zip(checked, errors, strict=True)]})
    if worst := max((one.error.exit_code for one in checked if one.error), default=0):
        raise click.exceptions.Exit(worst)


def _say_checked(found: RecipeCheck, *, verbose: bool) -> None:
    if found.error is not None:
        complain(found.error, found.name)
        return
    several = f", {found.documents} documents" if found.documents > 1 else ""
    about = "a delta of about " if found.is_delta else ""
    size = f", {found.tensors} tensors, {about}{human(found.nbytes)}" if found.nbytes is not None else ""
    tell(f"{found.name}: ok{several}{size}")
    for line in found.warnings:
        tell(f"{found.name}: warning: {line}")
    for line in found.notes if verbose else ():
        tell(f"{found.name}: note: {line}")


def _annotate_checked(found: RecipeCheck) -> None:
    error = found.error
    for problem in error.problems if isinstance(error, RecipeError) else ():
        said = ": ".join(part for part in (problem.location, problem.message, problem.hint) if part)
        annotate("error", said, found.name, problem.line, problem.column)
    if error is not None and not isinstance(error, RecipeError):
        annotate("error", ": ".join(part for part in (str(error), error.hint) if part), found.name)
    for warning in found.warnings:
        annotate("warning", warning, found.name)
