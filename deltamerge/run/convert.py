"""A model written in another form: the recipe that copies one model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from deltamerge.errors import RecipeError
from deltamerge.recipe.file import RecipeFile, read_text

COMMAND = "convert"


def recipe_of(model: str, dtype: str | None = None, **output: Any) -> RecipeFile:
    """The recipe of `convert`: `passthrough` of one model (a folder, a lone file, a hub id), as if it stood in this
    folder, of torch's own files too. `output` has keys of a recipe's `output`; those that are None are left out.

    RecipeError, of no line, as there is no file: a value that a recipe does not take.
    """
    written = {key: value for key, value in output.items() if value is not None}
    recipe: dict[str, Any] = {"merge_method": "passthrough", "models": [{"model": model}]}
    recipe |= {"dtype": dtype} if dtype is not None else {}
    recipe |= {"pickles": True, **({"output": written} if written else {})}
    try:
        file = read_text(yaml.safe_dump(recipe, sort_keys=False), Path.cwd() / COMMAND)
        return replace(file, made_for=COMMAND)
    except RecipeError as error:
        raise error.of(COMMAND) from None
