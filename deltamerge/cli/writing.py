"""The commands that help to write a recipe: init, schema."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deltamerge.cli.options import FOLDER


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


@click.command()
def schema() -> None:
    """The JSON schema of a recipe, for editors."""
    from deltamerge.recipe import schema as recipe_schema

    click.echo(json.dumps(recipe_schema(), indent=2))
