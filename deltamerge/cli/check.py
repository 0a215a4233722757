"""The command check."""

from __future__ import annotations

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
@click.option("--offline", is_flag=True, help="Only the recipes themselves; opens no model and no network.")
@MERGEKIT_EXACT
@SET
@PICKLES
@click.option(
    "--output-format", type=click.Choice(["text", "json", "github"]), default="text", show_default=True,
    help="json: one object on stdout; github: annotations of a workflow's run.",
)  # fmt: skip
@AS_JSON
def command(
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

    options = None
    if not offline:
        from deltamerge.run.options import Options

        options = Options(device="cpu", pickles=pickles)
    say_one = None if as_json else {"text": _say_checked, "github": _annotate_checked}.get(output_format)
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


def _say_checked(found: RecipeCheck) -> None:
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


def _annotate_checked(found: RecipeCheck) -> None:
    error = found.error
    for problem in error.problems if isinstance(error, RecipeError) else ():
        said = ": ".join(part for part in (problem.location, problem.message, problem.hint) if part)
        annotate("error", said, found.name, problem.line, problem.column)
    if error is not None and not isinstance(error, RecipeError):
        annotate("error", ": ".join(part for part in (str(error), error.hint) if part), found.name)
    for warning in found.warnings:
        annotate("warning", warning, found.name)
