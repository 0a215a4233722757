"""The commands that help to write a recipe: init, methods, schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from deltamerge.cli.options import AS_JSON, DEVICE, MODEL, PICKLES, WORKERS, RecipePath, rows_of_text
from deltamerge.cli.output import say, say_json, tell
from deltamerge.cli.streams import columns
from deltamerge.cli.tables import render_method, render_methods


@click.command()
@click.argument("models", nargs=-1, required=True, type=MODEL)
@click.option("--base", required=True, type=MODEL, help="What the models were fine-tuned from.")
@rows_of_text
@click.option(
    "--density",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Fraction of each delta to keep.  [default: 0.05 of one model, 0.2 of several]",
)
@click.option("--out", type=RecipePath(), default="recipe.yaml", show_default=True, help="To write; - is stdout.")
@DEVICE
@WORKERS
@PICKLES
@AS_JSON
def init(
    models: tuple[str, ...],
    base: str,
    calibration: dict[str, Any] | None,
    density: float | None,
    out: str,
    device: str,
    workers: int | None,
    pickles: bool,
    as_json: bool,
) -> None:
    """Write a commented first recipe for MODELS and their base.

    One model is pruned, several are merged; folders or hub ids. With --calibration `recommend` chooses each model's
    pruning: its masks are drawn and measured on the rows, and the evidence stands in the recipe.

    \b
    deltamerge init ./math ./code --base ./base
    deltamerge init ./math --base ./base --calibration sentences.jsonl --density 0.01
    """
    from deltamerge.apps.recommend.first_recipe import check_new, first_recipe, write_new

    path = Path("recipe.yaml" if out == "-" else out)
    if out != "-":
        check_new(path)
    density = density or (0.05 if len(models) == 1 else 0.2)
    advice = []
    if calibration is not None:
        from deltamerge.apps.recommend.study import recommend

        given: dict[str, Any] = {"calibration": calibration, "device": device, "workers": workers, "pickles": pickles}
        advice = [recommend(model, base, density, **given) for model in models]
    written = first_recipe(base, models, path, density=density, calibration=calibration, advice=advice, pickles=pickles)
    if as_json:
        if out != "-":
            write_new(path, written)
        say_json({"out": None if out == "-" else str(path), "recipe": written})
        return
    if out == "-":
        say(written.removesuffix("\n"))
        return
    write_new(path, written)
    tell(f"{path}: written; next: deltamerge plan {path}")


def _names(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    from deltamerge.methods.registry import MERGE, PRUNE

    return sorted(name for name in {*MERGE, *PRUNE} if name.startswith(incomplete))


@click.command()
@click.argument("name", required=False, shell_complete=_names)
@AS_JSON
def methods(name: str | None, as_json: bool) -> None:
    """List merge and pruning methods, a line each.

    With NAME those called so: their parameters, defaults, ranges, and where they come from.
    """
    from deltamerge.cli.catalogue import catalogue

    found = catalogue(name)
    render = render_method if name else render_methods
    say_json(found) if as_json else say(render(found, columns()))


@click.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from deltamerge.recipe.schema import schema as recipe_schema

    say(json.dumps(recipe_schema(), indent=2))
