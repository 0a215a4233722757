"""The command schema."""

from __future__ import annotations

import json

import click

from deltamerge.cli.output import say


@click.command("schema")
def command() -> None:
    """Print the JSON schema of a recipe, for editors."""
    from deltamerge.recipe.schema import schema as recipe_schema

    say(json.dumps(recipe_schema(), indent=2))
