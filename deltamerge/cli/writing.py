"""The commands that help to write a recipe: init, methods, schema."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deltamerge.cli.options import AS_JSON, FOLDER
from deltamerge.show import render_methods


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--base", required=True, help="What the models were fine-tuned from.")
@click.option("--calibration", "data", type=FOLDER, help="Text to calibrate q on: .jsonl, .csv or .txt.")
@click.option("--out", default="recipe.yaml", show_default=True, help="The recipe to write; - is stdout.")
def init(models: tuple[str, ...], base: str, data: Path | None, out: str) -> None:
    """Write a commented recipe that prunes one of MODELS, or merges several; folders or hub ids.

    \b
    deltamerge init ./math ./code --base ./base
    deltamerge init ./math --base ./base --calibration sentences.jsonl --out - | less
    """
    from deltamerge.init import first_recipe, write_new

    path = Path("recipe.yaml" if out == "-" else out)
    text = first_recipe(base, models, path, data)
    if out == "-":
        click.echo(text, nl=False)
        return
    write_new(path, text)
    click.echo(f"{path}: written; next: deltamerge plan {path}", err=True)


def _names(context: click.Context, option: click.Parameter, incomplete: str) -> list[str]:
    from deltamerge.methods import MERGE, PRUNE

    return sorted(name for name in {*MERGE, *PRUNE} if name.startswith(incomplete))


@click.command()
@click.argument("name", required=False, shell_complete=_names)
@AS_JSON
def methods(name: str | None, as_json: bool) -> None:
    """Every merge and pruning method, or those called NAME: parameters, defaults, ranges, where it comes from."""
    from deltamerge.catalogue import catalogue

    found = catalogue(name)
    click.echo(json.dumps(found, sort_keys=True) if as_json else render_methods(found))


@click.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from deltamerge.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
