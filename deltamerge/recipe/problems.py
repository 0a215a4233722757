"""Problems of a recipe in the recipe's terms: pydantic's errors at their places, unknown words, shared lookups."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, Literal, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from deltamerge.errors import Problem
from deltamerge.methods.registry import MERGE, MOE, PRUNE, MergeMethod, Param
from deltamerge.recipe.schema import Prune, Recipe
from deltamerge.recipe.values import BRANCHES, Value, show
from deltamerge.recipe.yaml_source import Loc, YamlSource

_WANTED = {
    "string_type": "text", "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values", "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
}  # fmt: skip
_FEWER_BITS = re.compile(
    r"(torch\.)?(u?int[48]|float[48]|[fm]x?fp?[48]|fp[48]|nf4|nvfp4|mxfp4|e[45]m[23])", re.IGNORECASE
)
_OF_MODELS = ("models", "sources")  # lists whose items name a model


def place_of(error: ErrorDetails) -> Loc:
    """Return the place of an error in the YAML, without pydantic's union branches."""
    return tuple(part for part in error["loc"] if part not in BRANCHES)


def problem_of(error: ErrorDetails, source: YamlSource, root: type[BaseModel]) -> Problem:
    """Return the problem for an error of validating `source.data` as `root`."""
    loc, kind, value, context = place_of(error), error["type"], error["input"], error.get("ctx", {})
    at_key = error["loc"][-1] == "[key]"
    got, hint = f", got {show(value)}", None
    if kind == "missing":
        return source.problem(loc[:-1], f"needs {loc[-1]}")
    if kind == "extra_forbidden":
        return source.problem(loc, "unknown key", _home(loc) or suggest(str(loc[-1]), _keys(root, loc[:-1])), key=True)
    if kind in _WANTED:
        message = f"must be {_WANTED[kind]}"
        if isinstance(value, str) and len(loc) > 1 and loc[-2] in _OF_MODELS:
            hint = f"{{model: {value}}}"
        if kind == "string_type" and isinstance(value, bool | int | float):
            hint = "put it in quotes"
    elif kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        message = f"must be {'one of ' if len(choices) > 1 else ''}{', '.join(choices)}"
        close = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"did you mean {close[0]!r}?" if close else None
        if loc[-1] in ("dtype", "out_dtype") and _FEWER_BITS.match(str(value)):
            hint = "fewer bits are a quantization: fp8, int8 or int4 (output.quantization, or convert --quantization)"
    elif kind == "string_too_short":
        message, got = "must not be empty", ""
    elif kind == "too_short":
        message, got = f"needs at least {context['min_length']} item{'s' * (context['min_length'] > 1)}", ""
    elif kind == "too_long":
        message, got = f"has more than {context['max_length']} items", ""
    elif kind == "less_than_equal":
        message = f"must be at most {context['le']:,}"
    elif kind == "greater_than":
        message = f"must be greater than {context['gt']:g}"
    elif kind in ("greater_than_equal", "less_than"):
        message = f"must be {'at least' if 'ge' in context else 'less than'} {context.get('ge', context.get('lt'))}"
    else:
        message = error["msg"]
        got = "" if isinstance(value, dict) else got
    return source.problem(loc, message + got, hint, key=at_key)


def _home(loc: Loc) -> str | None:
    """Return a hint for a key beside `model` that belongs into a mapping below it. None: it belongs nowhere."""
    if len(loc) < 3 or loc[-3] not in _OF_MODELS:
        return None
    if any(loc[-1] in method.parameters for method in MERGE.values()):
        return f"it belongs under parameters: {{{loc[-1]}: …}}"
    of_prune = loc[-1] == "method" or any(loc[-1] in method.parameters for method in PRUNE.values())
    return f"it belongs under prune: {{{loc[-1]}: …}}" if of_prune else None


def without(data: Any, places: Iterable[Loc]) -> Any:
    """Return a copy of the data without the values at `places`, so that the rest can still be checked."""
    rest = copy.deepcopy(data)
    for loc in places:
        holders: list[tuple[dict[str, Any], str]] = []
        value = rest
        for part in loc:
            if isinstance(value, dict) and part in value:
                holders.append((value, str(part)))
            elif not (isinstance(value, list) and isinstance(part, int) and part < len(value)):
                break
            value = value[part]
        if holders:
            holder, key = holders[-1]
            del holder[key]
    return rest


def suggest(word: str, known: Iterable[str]) -> str:
    """Return a hint for an unknown word: the most similar known word, or all known words."""
    return _suggest(word.lower(), tuple(sorted(known)))


@lru_cache
def _suggest(word: str, options: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(options)}"


def _keys(root: type[BaseModel], loc: Loc) -> set[str]:
    """Return the keys that the mapping at `loc` may have."""
    models = [root]
    for part in loc:
        inner = [found for model in models if part in model.model_fields
                 for found in _models(model.model_fields[str(part)].annotation)]  # fmt: skip
        models = inner or models  # a list index, or a key chosen by the user
    return {key for model in models for key in model.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models inside a type such as tuple[Model, ...] | None."""
    annotation = getattr(annotation, "__value__", annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


@cache
def prune_params() -> Mapping[str, Param]:
    """Return the parameters of all pruning methods. Imports all methods.

    If several have the same name, a method of this package wins.
    """
    return {name: param for method in reversed(list(PRUNE.values())) for name, param in method.parameters.items()}


def prunes(recipe: Recipe) -> Iterator[tuple[Loc, Prune]]:
    """Yield every `prune` of the recipe and its place, the recipe's own first."""
    if recipe.prune is not None:
        yield ("prune",), recipe.prune
    for i, model in enumerate(recipe.models):
        if model.prune is not None:
            yield ("models", i, "prune"), model.prune


Level = Literal["merge", "model"]


def levels(recipe: Recipe) -> Iterator[tuple[Loc, Level, Mapping[str, Value]]]:
    """Yield every `parameters` of the recipe: its place, and whether it is for one model or for the merge."""
    yield ("parameters",), "merge", recipe.parameters
    for name, module in recipe.modules.items():
        yield ("modules", name, "parameters"), "merge", module.parameters
    for part in recipe.parts:
        if part.is_slice:
            yield (*part.loc, "parameters"), "merge", part.levels[0]
    for i, model in enumerate(recipe.models):
        yield ("models", i, "parameters"), "model", model.parameters


def raw(recipe: Recipe, *loc: str | int) -> Any:
    """Return the value in the text at a place, valid or not. None: there is none."""
    value = recipe.source.data
    for part in recipe.place(loc):
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value


def is_given(recipe: Recipe, *loc: str | int) -> bool:
    """Return whether the text has a value at a place. An invalid value counts, because it is already reported."""
    return raw(recipe, *loc) is not None


def known_method(recipe: Recipe) -> MergeMethod | None:
    """Return the recipe's merge method, or None if it is unknown."""
    return MOE if recipe.method_name == MOE.name else MERGE.get(recipe.method_name or "")
