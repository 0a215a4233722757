"""Checks across the documents of one recipe file, and the models that each may open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltamerge.errors import Problem
from deltamerge.recipe.messages import show

if TYPE_CHECKING:
    from deltamerge.recipe.schema import Recipe

FOLDER_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def references(recipe: Recipe) -> frozenset[str]:
    """Every model that a recipe may open, as written; names of other documents are among them."""
    tokens = recipe.tokenizer.tokens.values() if recipe.tokenizer is not None else ()
    sources = (getattr(token.source, "model", token.source) for token in tokens)
    bases = (recipe.base_model, *(part.base for part in recipe.parts))
    models = (model.model for model in recipe.models)
    return frozenset(x for x in (*bases, *models, recipe.tokenizer_of, *sources) if isinstance(x, str))


def problems(recipes: Sequence[Recipe]) -> Iterator[Problem]:
    """Faults across documents: each has a unique name, except for the one that is the output."""
    if len(recipes) == 1:
        return
    named: set[str] = set()
    unnamed = 0
    for recipe in recipes:
        if recipe.name is None:
            unnamed += 1
            if unnamed > 1:
                hint = "name: first; later documents may use that as a model"
                yield recipe.problem((), "a second document without a name", hint)
            continue
        if recipe.name in named:
            yield recipe.problem(("name",), f"another document is named {show(recipe.name)}")
        if not FOLDER_NAME.fullmatch(recipe.name):
            yield recipe.problem(("name",), "must be letters, digits, - _ and .", "it is a folder's name too")
        named.add(recipe.name)
    for recipe in recipes:
        result = recipe.output.kind
        if result != "model" and any(recipe.name in references(other) for other in recipes):
            yield recipe.problem(("output", "kind"), f"other documents use it as a model, and {result} is none")
