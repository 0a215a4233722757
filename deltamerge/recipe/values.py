"""The types of a recipe's single values: text, sizes, patterns, ranges, and numbers that may vary over tensors.

A number is a scalar, a gradient over layers, or a list of filters on tensor names (as in mergekit).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Strict,
    StringConstraints,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from deltamerge.tensors import patterns

Scalar: TypeAlias = float | bool

T = TypeVar("T")
Items = Annotated[tuple[T, ...], Strict(False)]  # a YAML list, kept as a tuple so that a recipe cannot change

MOST = 1000  # numbers of a gradient, or filters; each filter is tried on each tensor

# Components that pydantic adds to an error's place: the branch of a union, or a mark for a key.
BRANCHES = frozenset(
    {
        "(scalar)", "(gradient)", "(filter)", "(filters)", "(value)", "(objective)", "(search)", "(text)", "(list)",
        "(zero)", "(model_token)", "(name)", "(scheme)", "[key]",
    }
)  # fmt: skip

# YAML 1.1 booleans: mergekit accepts them, our loader keeps them as text.
_WORDS = {"yes": True, "on": True, "no": False, "off": False}
_QUOTED = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})(\.[0-9]{0,18})?([eE][-+]?[0-9]{1,3})?")

DTYPES = ("bfloat16", "float16", "float32", "float64")
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
LAYERS = 10_000  # most layers of a model
NO_LAYERS = (0, 0)  # mergekit's range for a whole module whose layers it does not know
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class Keys(BaseModel):
    """A mapping of known keys; a key without a value counts as not given."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {key: value for key, value in data.items() if value is not None or key not in cls.model_fields}


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

    filter: str | None = Field(None, description="Part of the tensor's name; none or * for every tensor.")
    value: _Plain = Field(description="A number, or a gradient over layers.")

    def matches(self, tensor: str) -> bool:
        """Return whether the filter applies to a tensor of this name."""
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
    """Return a value as filters. A value without filters becomes a filter that matches every tensor."""
    if isinstance(value, Filter):
        return (value,)
    if isinstance(value, tuple):
        own = tuple(item for item in value if isinstance(item, Filter))
        return own or (Filter(filter=None, value=tuple(item for item in value if not isinstance(item, Filter))),)
    return (Filter(filter=None, value=value),)


def value_for(value: Value, tensor: str, t: float) -> Scalar | None:
    """Return the scalar for a tensor at `t` in [0, 1]; None if no filter matches its name.

    A gradient of n numbers has them at t = 0, 1/(n−1), …, 1 and is linear in between. A gradient of booleans takes the
    boolean at or before t. The first filter that matches wins.
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
    """Return the scalar of `key` at the first level that has one, from the most specific on; otherwise `default`."""
    for level in levels:
        if key in level and (found := value_for(level[key], tensor, t)) is not None:
            return found
    return default


def chain(*values: Value | None) -> Value | None:
    """Join values into one: if the first has no match for a tensor, the next is used, as in `lookup`."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    if isinstance(given[0], Filter) or (isinstance(given[0], tuple) and isinstance(given[0][0], Filter)):
        return tuple(item for value in given for item in filters(value))
    return given[0]


def leaves(value: Value) -> Iterator[tuple[tuple[str | int, ...], Scalar]]:
    """Yield every scalar of a value, with its place in it: ((1, "value", 0), 0.5)."""
    match value:
        case Filter():
            yield from ((("value", *loc), scalar) for loc, scalar in leaves(value.value))
        case tuple():
            yield from (((i, *loc), scalar) for i, item in enumerate(value) for loc, scalar in leaves(item))
        case _:
            yield (), value


def parse_size(value: Any) -> int:
    """Return bytes: a number, or text such as 5GB (10⁹) or 512MiB (2²⁰). Raises ValueError."""
    text = value if isinstance(value, str) else f"{value}"
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([KMGT]?I?)B?", text.strip().upper())
    if found is None or found[2] not in _UNITS or isinstance(value, bool):
        raise ValueError("must be a size such as 5GB or 512MiB")
    size = round(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ValueError("must be at least one byte")
    return size


def _size(value: Any) -> int:
    try:
        return parse_size(value)
    except ValueError as error:
        raise PydanticCustomError("size", "{why}", {"why": str(error)}) from None


def _dtype(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    name = value.removeprefix("torch.")
    return _DTYPE_ALIASES.get(name, name)


def _pattern(value: str) -> str:
    try:
        patterns.check(value)
    except ValueError as error:
        raise PydanticCustomError("pattern", "not a regular expression ({why})", {"why": str(error)}) from None
    return value


def _layers(value: tuple[int, ...]) -> tuple[int, ...]:
    if value != NO_LAYERS and (len(value) != 2 or not 0 <= value[0] < value[1]):
        raise PydanticCustomError("layers", "must be [first, end] with 0 <= first < end")
    if value[1] > LAYERS:
        raise PydanticCustomError("layers", "ends after {most} layers", {"most": LAYERS})
    return value


def _bounds(value: tuple[float, ...]) -> tuple[float, ...]:
    if len(value) != 2 or not 0 < value[0] < value[1]:
        raise PydanticCustomError("bounds", "must be [low, high] with 0 < low < high")
    return value


def _columns(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    if isinstance(value, tuple) and len(value) not in (1, 2):
        raise PydanticCustomError("columns", "must be one field name, or two for sentence pairs")
    return value


def _reference(value: Any) -> Any:
    """Return mergekit's long form of a reference, {model, lora, override_architecture}, as text.

    The last key has no effect here.
    """
    if not isinstance(value, dict):
        return value
    model, lora = value.get("model"), value.get("lora")
    if not model or value.keys() - {"model", "lora", "override_architecture"}:
        raise PydanticCustomError("reference", "must be text, or {model: …, lora: …}")
    return "+".join(map(_place, (model, lora) if lora else (model,)))


def _place(value: Any) -> str:
    """Return a path or hub id, as text or {path, revision}."""
    if isinstance(value, dict) and isinstance(value.get("path"), str) and not value.keys() - {"path", "revision"}:
        return f"{value['path']}@{value['revision']}" if value.get("revision") else str(value["path"])
    if not isinstance(value, str):
        raise PydanticCustomError("reference", "must be text, or {path: …, revision: …}")
    return value


def _one_or_many(value: Any) -> str:
    return "(list)" if isinstance(value, list | tuple) else "(text)"


Text = Annotated[str, StringConstraints(min_length=1)]
Reference = Annotated[
    Text,
    BeforeValidator(_reference),
    WithJsonSchema({"anyOf": [{"type": "string", "minLength": 1}, {"type": "object", "required": ["model"]}]}),
]
Pattern = Annotated[Text, AfterValidator(_pattern), WithJsonSchema({"type": "string", "format": "regex"})]
Size = Annotated[
    int, BeforeValidator(_size), WithJsonSchema({"type": ["string", "integer"], "examples": ["5GB", "512MiB"]})
]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32", "float64"],
    BeforeValidator(_dtype),
    WithJsonSchema({"enum": [*DTYPES, *_DTYPE_ALIASES]}),
]
LayerRange = Annotated[Items[int], AfterValidator(_layers)]
Bounds = Annotated[Items[float], AfterValidator(_bounds)]
Columns = Annotated[
    Annotated[Text, Tag("(text)")] | Annotated[Items[Text], AfterValidator(_columns), Tag("(list)")],
    Discriminator(_one_or_many),
]
Share = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0, lt=2**63)]


def show(value: Any) -> str:
    """Return a value of the recipe as messages quote it."""
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
