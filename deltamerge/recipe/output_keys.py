"""Kinds of output by what a recipe may ask of them, and the keys of `output.quantization`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from deltamerge.recipe.prune_keys import Keys
from deltamerge.recipe.types import Positive
from deltamerge.recipe.values import Items


@dataclass(frozen=True, slots=True)
class OutputRules:
    """What a recipe may ask of a kind of output, and how its tensors are planned.

    form         the file of `outputs` that makes it
    standalone   it loads without its base: it may have another vocabulary and quantised weights, and be made in parts
    reusable     other documents may use it as a model
    patches      it stores changes of `base_model`
    adapts       PEFT loads it over `base_model`
    accumulates  it stores the sum of an average, in float32, that a later run adds to
    """

    form: str
    standalone: bool = False
    reusable: bool = False
    patches: bool = False
    adapts: bool = False
    accumulates: bool = False


KINDS: Mapping[str, OutputRules] = MappingProxyType(
    {
        "model": OutputRules("checkpoint", standalone=True, reusable=True),
        "delta": OutputRules("delta", patches=True),
        "peft": OutputRules("shira", adapts=True),
        "sum": OutputRules("running_sum", reusable=True, accumulates=True),
    }
)


def _block(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) != 2 or not all(1 <= size <= 1 << 20 for size in value):
        raise PydanticCustomError("block", "must be [rows, columns] of at least 1")
    return value


class Quantization(Keys):
    """The form in which weights of linear layers are written."""

    scheme: Literal["fp8", "int8", "int4"] = Field(description="The numbers that weights are stored as.")
    block: Annotated[Items[int], AfterValidator(_block)] | None = Field(
        None, description="fp8: [rows, columns] that share a scale, as DeepSeek-V3 stores them. Default: [128, 128]."
    )
    strategy: Literal["block", "channel", "group"] | None = Field(
        None,
        description="What has a scale: a block (fp8), an output channel (fp8, int8), or a group of columns of a "
        "channel (int4). Default: block for fp8.",
    )
    group: Positive | None = Field(None, le=1 << 20, description="int4: columns of a group. Default: 128.")

    @property
    def by(self) -> str:
        """What has a scale."""
        return self.strategy or {"fp8": "block", "int8": "channel", "int4": "group"}[self.scheme]


def _shape(value: Any) -> str:
    return "(scheme)" if isinstance(value, dict | Quantization) else "(name)"


Named = Literal["none", "keep", "fp8", "int8", "int4"]
Quantized = Annotated[
    Annotated[Named, Tag("(name)")] | Annotated[Quantization, Tag("(scheme)")],
    Discriminator(_shape),
]
