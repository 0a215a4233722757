"""A recipe's numbers: a scalar, a gradient over layers, or a list of filters on tensor names (as in mergekit)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, PlainValidator, Strict, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

Scalar: TypeAlias = float | bool

T = TypeVar("T")
Items = Annotated[tuple[T, ...], Strict(False)]  # a YAML list, kept as a tuple so that a recipe cannot change

MOST = 1000  # numbers of a gradient, or filters; each filter is tried on each tensor

# Components that pydantic adds to an error's place: the branch of a union, or that a key is meant.
BRANCHES = frozenset(
    {
        "(scalar)", "(gradient)", "(filter)", "(filters)", "(value)", "(objective)", "(search)", "(text)", "(list)",
        "(zero)", "(model_token)", "(name)", "(scheme)", "[key]",
    }
)  # fmt: skip

# YAML 1.1 booleans, which mergekit accepts and our loader keeps as text.
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
_QUOTED = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})(\.[0-9]{0,18})?([eE][-+]?[0-9]{1,3})?")


def _scalar(value: Any) -> Scalar:
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    if isinstance(value, str) and _QUOTED.fullmatch(value):
        value = float(value)
    if not isinstance(value, bool | int | float):
        raise PydanticCustomError("scalar", "must be a number")
    if not math.isfinite(value):
        raise PydanticCustomError("scalar", "must be a finite number")
    return value


def _inner(value: Any) -> str:
    return "(gradient)" if isinstance(value, list | tuple) and value else "(scalar)"


def _outer(value: Any) -> str:
    if isinstance(value, dict | Filter):
        return "(filter)"
    if isinstance(value, list | tuple) and any(isinstance(item, dict | Filter) for item in value):
        return "(filters)"
    return _inner(value)


_Scalar = Annotated[Scalar, PlainValidator(_scalar), WithJsonSchema({"type": ["number", "boolean"]})]
_Gradient = Annotated[
    Items[_Scalar],
    Field(max_length=MOST),
    WithJsonSchema({"type": "array", "minItems": 1, "items": {"type": "number"}}),
]
_Plain = Annotated[Annotated[_Scalar, Tag("(scalar)")] | Annotated[_Gradient, Tag("(gradient)")], Discriminator(_inner)]


class Filter(BaseModel):
    """A value for the tensors whose name contains `filter`; for all of them without one, or with `*`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)

    filter: str | None = Field(None, description="A part of the tensor's name; none or * for every tensor.")
    value: _Plain = Field(description="A number, or a gradient over layers.")

    def matches(self, tensor: str) -> bool:
        """Whether the filter applies to a tensor of this name."""
        return self.filter in (None, "*") or str(self.filter) in tensor


Value = TypeAliasType(
    "Value",
    Annotated[
        Annotated[_Scalar, Tag("(scalar)")]
        | Annotated[_Gradient, Tag("(gradient)")]
        | Annotated[Items[Filter], Field(max_length=MOST), Tag("(filters)")]
        | Annotated[Filter, Tag("(filter)")],
        Discriminator(_outer),
        Field(description="A number, a list of numbers spread over the layers, or a list of {filter, value}."),
    ],
)


def filters(value: Value) -> tuple[Filter, ...]:
    """A value as filters; one without filters becomes a filter that matches every tensor."""
    if isinstance(value, Filter):
        return (value,)
    if isinstance(value, tuple):
        own = tuple(item for item in value if isinstance(item, Filter))
        return own or (Filter(filter=None, value=tuple(item for item in value if not isinstance(item, Filter))),)
    return (Filter(filter=None, value=value),)


def value_for(value: Value, tensor: str, t: float) -> Scalar | None:
    """The scalar for a tensor at `t` in [0, 1]; None if no filter matches its name.

    A gradient of n numbers has them at t = 0, 1/(n−1), …, 1 and is linear in between; of booleans it takes the one at
    or before t. The first filter that matches wins.
    """
    if not isinstance(value, tuple | Filter):
        return value
    for item in filters(value):
        if item.matches(tensor):
            return _interpolate(item.value, t) if isinstance(item.value, tuple) else item.value
    return None


def _interpolate(points: tuple[Scalar, ...], t: float) -> Scalar:
    scaled = t * (len(points) - 1)
    i = int(scaled)
    if any(isinstance(point, bool) for point in points):
        return points[i]
    fraction = scaled - i
    return (1 - fraction) * points[i] + fraction * points[min(i + 1, len(points) - 1)]


def lookup(
    key: str, tensor: str, t: float, *levels: Mapping[str, Value], default: Scalar | None = None
) -> Scalar | None:
    """The scalar of `key` at the first level (the most specific first) that has one for this tensor, else `default`."""
    for level in levels:
        if key in level and (found := value_for(level[key], tensor, t)) is not None:
            return found
    return default


def chain(*values: Value | None) -> Value | None:
    """One value that resolves as `lookup` over levels with these does: where one has no match the next is asked."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    if isinstance(given[0], Filter) or (isinstance(given[0], tuple) and isinstance(given[0][0], Filter)):
        return tuple(item for value in given for item in filters(value))
    return given[0]


def leaves(value: Value) -> Iterator[tuple[tuple[str | int, ...], Scalar]]:
    """Every scalar of a value, with its place in it: ((1, "value", 0), 0.5)."""
    match value:
        case Filter():
            yield from ((("value", *loc), scalar) for loc, scalar in leaves(value.value))
        case tuple():
            yield from (((i, *loc), scalar) for i, item in enumerate(value) for loc, scalar in leaves(item))
        case _:
            yield (), value
