"""The types of a recipe's single values: text, patterns, sizes, dtypes, ranges."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StringConstraints, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from deltamerge.recipe.values import Items
from deltamerge.tensors import patterns

DTYPES = ("bfloat16", "float16", "float32", "float64")
_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
LAYERS = 10_000  # the most layers of a model
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_size(value: Any) -> int:
    """Bytes: a number, or text such as 5GB (10⁹) or 512MiB (2²⁰). Raises ValueError."""
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
    if len(value) != 2 or not 0 <= value[0] < value[1]:
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
    """mergekit's long form of a reference, {model, lora, override_architecture}, as text; the last is not
    needed here."""
    if not isinstance(value, dict):
        return value
    model, lora = value.get("model"), value.get("lora")
    if not model or value.keys() - {"model", "lora", "override_architecture"}:
        raise PydanticCustomError("reference", "must be text, or {model: …, lora: …}")
    return "+".join(map(_place, (model, lora) if lora else (model,)))


def _place(value: Any) -> str:
    """A path or hub id, as text or {path, revision}."""
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
