"""pydantic's errors in the terms of the recipe: one problem per fault, with its place and a hint."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from deltamerge.errors import Problem
from deltamerge.methods.registry import MERGE, PRUNE
from deltamerge.recipe.values import BRANCHES
from deltamerge.recipe.yaml_source import Loc, YamlSource

_WANTED = {
    "string_type": "text", "int_type": "an integer", "int_from_float": "an integer", "float_type": "a number",
    "finite_number": "a finite number", "bool_type": "true or false", "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values", "dict_type": "a mapping of keys to values",
    "tuple_type": "a list",
}  # fmt: skip
_OF_MODELS = ("models", "sources")  # lists whose items name a model


def place_of(error: ErrorDetails) -> Loc:
    """The place of an error in the YAML, without the union branches that pydantic adds."""
    return tuple(part for part in error["loc"] if part not in BRANCHES)


def problem_of(error: ErrorDetails, source: YamlSource, root: type[BaseModel]) -> Problem:
    """The problem for an error of validating `source.data` as `root`."""
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
    elif kind == "string_too_short":
        message, got = "must not be empty", ""
    elif kind == "too_short":
        message, got = f"needs at least {context['min_length']} item{'s' * (context['min_length'] > 1)}", ""
    elif kind == "too_long":
        message, got = f"has more than {context['max_length']} items", ""
    elif kind == "less_than_equal":
        message = f"must be at most {context['le']:,}"
    elif kind in ("greater_than_equal", "less_than"):
        message = f"must be {'at least' if 'ge' in context else 'less than'} {context.get('ge', context.get('lt'))}"
    else:
        message = error["msg"]
        got = "" if isinstance(value, dict) else got
    return source.problem(loc, message + got, hint, key=at_key)


def _home(loc: Loc) -> str | None:
    """A hint for a key beside `model` that belongs under it, or None."""
    if len(loc) < 3 or loc[-3] not in _OF_MODELS:
        return None
    if any(loc[-1] in method.parameters for method in MERGE.values()):
        return f"it belongs under parameters: {{{loc[-1]}: …}}"
    of_prune = loc[-1] == "method" or any(loc[-1] in method.parameters for method in PRUNE.values())
    return f"it belongs under prune: {{{loc[-1]}: …}}" if of_prune else None


def without(data: Any, places: Iterable[Loc]) -> Any:
    """A copy of the data without the values at `places`, so that the rest can still be checked."""
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
    """A hint for an unknown word: the most similar known one, or the known ones."""
    return _suggest(word.lower(), tuple(sorted(known)))


@lru_cache
def _suggest(word: str, options: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(options)}"


def show(value: Any) -> str:
    """A value of the recipe as messages quote it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case str():
            return repr(value if len(value) <= 40 else value[:37] + "...")
        case dict():
            return "a mapping"
        case list() | tuple():
            return "a list" if value else "an empty list"
    return repr(value)


def _keys(root: type[BaseModel], loc: Loc) -> set[str]:
    """The keys that the mapping at `loc` may have."""
    models = [root]
    for part in loc:
        inner = [found for model in models if part in model.model_fields
                 for found in _models(model.model_fields[str(part)].annotation)]  # fmt: skip
        models = inner or models  # a list index, or a key chosen by the user
    return {key for model in models for key in model.model_fields}


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """The models inside a type such as tuple[Model, ...] | None."""
    annotation = getattr(annotation, "__value__", annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
