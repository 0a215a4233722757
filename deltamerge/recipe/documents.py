"""Checks across the documents of one recipe file, their size, and the models that each may open."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltamerge.errors import Problem
from deltamerge.recipe.messages import show

if TYPE_CHECKING:
    from deltamerge.recipe.schema import Recipe

# Bounds on the size of a recipe, far above any written by hand: checking and planning always end.
MODELS = 1_000  # in all documents, slices and modules, with repetitions
LAYERS = 10_000  # that slices take, counted once for each source
NAME = 1_000  # characters in a reference or a name
FOLDER_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


def references(recipe: Recipe) -> frozenset[str]:
    """Every model that a recipe may open, as written; names of other documents are among them."""
    tokens = recipe.tokenizer.tokens.values() if recipe.tokenizer is not None else ()
    sources = (getattr(token.source, "model", token.source) for token in tokens)
    bases = (recipe.base_model, *(part.base for part in recipe.parts))
    models = (model.model for model in recipe.models)
    tokenizers = (recipe.tokenizer_of, recipe.transplant)
    return frozenset(x for x in (*bases, *models, *tokenizers, *sources) if isinstance(x, str))


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
        output = recipe.output
        if not output.rules.reusable and any(recipe.name in references(other) for other in recipes):
            yield recipe.problem(("output", "kind"), f"other documents use it as a model, and {output.kind} is none")


def beyond_bounds(recipes: Sequence[Recipe]) -> Iterator[Problem]:
    """The first bound that the documents of a file exceed; they are then not checked further."""
    models = layers = 0
    for recipe in recipes:
        if len(recipe.base_model or "") > NAME:
            yield recipe.problem(("base_model",), f"is longer than {NAME:,} characters", "a path or a hub id")
            return
        for part in recipe.parts:
            models += len(part.members)
            layers += part.layers * len(part.members) if part.ranges else 0
            if models > MODELS:
                yield recipe.problem(part.loc, f"more than {MODELS:,} models", "merge them in several runs")
                return
            if layers > LAYERS:
                message = f"more than {LAYERS:,} layers of all sources of the slices"
                yield recipe.problem(part.loc, message, "see layer_range: it counts the layers of the model")
                return
        for i, model in enumerate(recipe.models):
            if len(model.model) > NAME or len(model.name or "") > NAME:
                yield recipe.problem(("models", i), f"a name longer than {NAME:,} characters", "a path or a hub id")
                return
