"""Checks of `output.kind: sum`, the running sum of an average."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from deltamerge.errors import Problem
from deltamerge.recipe.effective_prune import effective_prune
from deltamerge.recipe.lookup import is_given, known_method, levels
from deltamerge.recipe.series import running

if TYPE_CHECKING:
    from deltamerge.recipe.schema import Recipe

ANEW = "an average of these is made anew from all its models: kind: model"


def problems(recipe: Recipe) -> Iterator[Problem]:
    """A running sum is one of whole models by weights that no later one changes, in float32."""
    if not recipe.output.rules.accumulates:
        return
    kind = ("output", "kind")
    method = known_method(recipe)
    if method is not None and method.name != "linear":
        yield recipe.problem(kind, f"a running sum is of linear, not {method.name}", "merge_method: linear")
    if recipe.slices or recipe.modules:
        yield recipe.problem(kind, "a running sum is of whole models", "models: run/step-*")
    for key in ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "template", "chat_template"):
        if is_given(recipe, key):
            hint = "set it where the average is made"
            yield recipe.problem((key,), "is not for a running sum, which is float32 and no model", hint, key=True)
    if any(effective_prune(recipe, i).method != "none" for i in range(len(recipe.models))):
        yield recipe.problem(("prune",), "models of a running sum are whole", key=True)
    for loc, _, parameters in levels(recipe):
        if "normalize" in parameters:
            message = "is not for a running sum: the average that is made of it is divided"
            yield recipe.problem((*loc, "normalize"), message, key=True)
        if is_given(recipe, *loc, "weight"):
            message = "weights of a running sum are those of its schedule"
            yield recipe.problem((*loc, "weight"), message, "schedule: constant or ema", key=True)
    for i, model in enumerate(recipe.models):
        if model.window is not None:
            message = "a running sum has no window: the next checkpoint would take one away"
            yield recipe.problem(("models", i, "window"), message, ANEW, key=True)
            return
        if model.schedule == "minus_sqrt":
            message = "minus_sqrt has no running sum: each checkpoint changes the weights of all before it"
            yield recipe.problem(("models", i, "schedule"), message, ANEW)
            return
    for series in recipe.series:
        if series.schedule == "ema" and running("ema", 0, len(series.names), series.decay) is None:
            message = f"a running sum of {len(series.names)} models with decay {series.decay:g} leaves float32's range"
            yield recipe.problem(kind, message, ANEW)
