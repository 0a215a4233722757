"""Lookups that all checks of a recipe share: its method, raw values, places of numbers and of `prune`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from deltamerge.errors import Problem
from deltamerge.methods.registry import MERGE, MOE, PRUNE, MergeMethod, Param
from deltamerge.recipe.messages import show
from deltamerge.recipe.parts import written
from deltamerge.recipe.values import Value, leaves
from deltamerge.recipe.yaml_source import Loc

if TYPE_CHECKING:
    from deltamerge.recipe.prune_keys import Prune
    from deltamerge.recipe.schema import Recipe


@cache
def prune_params() -> Mapping[str, Param]:
    """Return the parameters of all pruning methods, which are imported for it.

    Where several have one name, a method of this package wins.
    """
    return {name: param for method in reversed(list(PRUNE.values())) for name, param in method.parameters.items()}


def prunes(recipe: Recipe) -> Iterator[tuple[Loc, Prune]]:
    """Every `prune` of the recipe and its place, the recipe's own first."""
    if recipe.prune is not None:
        yield ("prune",), recipe.prune
    for i, model in enumerate(recipe.models):
        if model.prune is not None:
            yield ("models", i, "prune"), model.prune


Level = Literal["merge", "model"]


def levels(recipe: Recipe) -> Iterator[tuple[Loc, Level, Mapping[str, Value]]]:
    """Every `parameters` of the recipe: its place, and whether it is for one model or for the merge."""
    yield ("parameters",), "merge", recipe.parameters
    for name, module in recipe.modules.items():
        yield ("modules", name, "parameters"), "merge", module.parameters
    for part in recipe.parts:
        if part.ranges is not None:
            yield (*part.loc, "parameters"), "merge", part.levels[0]
    for i, model in enumerate(recipe.models):
        yield ("models", i, "parameters"), "model", model.parameters


def raw(recipe: Recipe, *loc: str | int) -> Any:
    """The value in the text at a place, valid or not; None if there is none."""
    value = recipe.source.data
    for part in written(recipe.parts, loc):
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def is_given(recipe: Recipe, *loc: str | int) -> bool:
    """Whether the text has a value at a place, valid or not; an invalid one has been reported and is not missing."""
    return raw(recipe, *loc) is not None


def known_method(recipe: Recipe) -> MergeMethod | None:
    """The recipe's merge method, or None if it is unknown."""
    return MOE if recipe.method_name == MOE.name else MERGE.get(recipe.method_name or "")


def out_of_range(recipe: Recipe, loc: Loc, param: Param, value: Value) -> Iterator[Problem]:
    """The problems of a parameter's value that lies outside its range."""
    if param.scalar and not isinstance(value, bool | int | float):
        yield recipe.problem(loc, f"must be {param.wanted()}, the same for every tensor, got {show(value)}")
        return
    for inner, scalar in leaves(value):
        in_gradient = bool(inner) and inner[-1] != "value"
        # mergekit reads 0 and 1 as booleans; in a gradient they would be ambiguous
        if not param.accepts(scalar) or (param.kind == "bool" and in_gradient and not isinstance(scalar, bool)):
            share = param.high == 1 and isinstance(scalar, int | float) and 5 <= scalar <= 100
            hint = f"{scalar:g} % is {scalar / 100:g}" if share else None
            yield recipe.problem((*loc, *inner), f"must be {param.wanted()}, got {show(scalar)}", hint)
