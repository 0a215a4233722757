"""Bounds on the size of a recipe: far above any written by hand, so that checking and planning always end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from deltamerge.errors import Problem

if TYPE_CHECKING:
    from deltamerge.recipe.schema import Recipe

MODELS = 1_000  # in all documents, slices and modules, with repetitions
LAYERS = 10_000  # that slices take, counted once for each source
NAME = 1_000  # characters in a reference or a name


def problems(recipes: Sequence[Recipe]) -> Iterator[Problem]:
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
