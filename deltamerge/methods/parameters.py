"""Parameters of methods: what a value may be, and the types of those that several methods have.

A method's parameters are those of its function whose type is an `Annotated` with a `Param`: `Density = 1.0` in a
signature says summary, bounds and default.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple


class UsualValue(NamedTuple):
    """A default by the number of models, as `text` says it."""

    text: str
    value: Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method: what it may be and what it is when not given.

    `default` None: it must be given (`alone`: what a single fine-tune has instead); `rule` says it by the number of
    models. `per_model` parameters may be set
    beside a model or for all of them, the others only for the whole merge or slice. `scalar`: no gradient or filters.
    `prunes`: it is for the pruning that comes first, and not handed to the function that combines.
    """

    summary: str
    default: float | bool | None = None
    kind: Literal["number", "integer", "bool"] = "number"
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    per_model: bool = False
    alone: float | None = None
    scalar: bool = False
    prunes: bool = False
    rule: UsualValue | None = None

    @property
    def shown_default(self) -> float | bool | str | None:
        """Return the default for people: its value, or how it follows from the number of models."""
        return self.default if self.rule is None else self.rule.text

    def argument(self, key: str) -> str:
        """Return the name by which a merge method's function is given the parameter `key`: `weights`, `lambda_`."""
        return f"{key}s" if self.per_model else "lambda_" if key == "lambda" else key

    def default_for(self, models: int) -> float | bool | None:
        """Return the value when not given, with that many models to combine; None: it must be given."""
        if self.rule is not None:
            return self.rule.value(models)
        return self.alone if self.default is None and models == 1 else self.default

    def wanted(self) -> str:
        """Say what a value must be: "in (0, 1]"."""
        if self.kind == "bool":
            return "true or false"
        if self.low is not None and self.high is not None:
            return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"
        if self.low is not None:
            whole = "a whole number, " if self.kind == "integer" else ""
            return f"{whole}{'more than' if self.low_open else 'at least'} {self.low:g}"
        return "a whole number" if self.kind == "integer" else "a number"

    def typed(self, value: float | bool) -> float | bool:
        """Convert the value to the number that a function is given."""
        return bool(value) if self.kind == "bool" else int(value) if self.kind == "integer" else float(value)

    def accepts(self, value: float | bool) -> bool:
        """Tell whether the value is in range."""
        if self.kind == "bool":
            return value in (0, 1)
        if isinstance(value, bool) or (self.kind == "integer" and value != int(value)):
            return False
        if self.low is not None and (value < self.low or (self.low_open and value == self.low)):
            return False
        return self.high is None or value <= self.high


def parameters_of(function: Callable[..., Any]) -> Mapping[str, Param]:
    """Read a method's parameters from its signature, by the names that recipes have: `weights` is `weight`, `lambda_`
    is `lambda`. A default in the signature comes before the type's."""
    found: dict[str, Param] = {}
    for name, given in inspect.signature(function).parameters.items():
        # modules have postponed annotations; of these the names alone are looked up, so that none imports torch
        kind = function.__globals__.get(given.annotation) if isinstance(given.annotation, str) else given.annotation
        param = next((x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Param)), None)
        if param is not None:
            key = name.removesuffix("s") if param.per_model else name.removesuffix("_")
            found[key] = param if given.default is given.empty else replace(param, default=given.default)
    return found


# Of the models that are combined: one number each.
Weights = Annotated[tuple[float, ...], Param("factor of the model", per_model=True, alone=1.0)]
Shares = Annotated[tuple[float, ...], Param("share of the model", per_model=True, alone=1.0)]
DeltaWeights = Annotated[tuple[float, ...], Param("factor of the model's delta", per_model=True, alone=1.0)]
DeltaFactors = Annotated[tuple[float, ...], Param("factor of the model's delta", 1.0, per_model=True)]
RowWeights = Annotated[tuple[float, ...], Param("weight of the model's rows", 1.0, low=0, per_model=True)]

# Of the merge.
Normalize = Annotated[bool, Param("divide by the sum of the weights", kind="bool")]
Lambda = Annotated[float, Param("factor of the merged delta")]
# Of merges that leave the length of what they make open, n models: see docs/measurements/merging.md, "Words".
LargeLambda = Annotated[
    float, Param("factor of the merged delta", rule=UsualValue("2.25 of n > 1", lambda n: 2.25 if n > 1 else 1.0))
]
FallingLambda = Annotated[
    float,
    Param("factor of the merged delta", rule=UsualValue("min(1, 2 / sqrt(n))", lambda n: min(1.0, 2.0 / math.sqrt(n)))),
]
CalibratedLambda = Annotated[
    float,
    Param(
        "factor of the merged delta", rule=UsualValue("min(1, 1.2 / sqrt(n))", lambda n: min(1.0, 1.2 / math.sqrt(n)))
    ),
]
TaskNumber = Annotated[
    int, Param("number of the model whose task is kept, from 1", None, "integer", low=1, scalar=True)
]
Change = Annotated[float, Param("abs(Δ) above this is a change", low=0)]
Threshold = Annotated[float, Param("abs(Δ_i) is at least this much of abs(Σ Δ − Δ_i)", low=0)]

# Of the pruning that comes before a merge.
Density = Annotated[float, Param("fraction of the delta's entries kept", low=0, high=1, per_model=True, prunes=True)]
Rescale = Annotated[
    bool,
    Param("divide what is kept by the density; false is random drop", kind="bool", scalar=True, prunes=True),
]
MatchSum = Annotated[
    bool,
    Param("give what is kept the sum of magnitudes of the whole", kind="bool", scalar=True, prunes=True),
]
Epsilon = Annotated[
    float, Param("half the spread of the keep probabilities", low=0, high=1, per_model=True, prunes=True)
]
Gamma = Annotated[
    float, Param("fraction of the entries dropped as the largest", low=0, high=1, per_model=True, prunes=True)
]

# Of every pruning method.
KEPT = Param("fraction kept", low=0, high=1, low_open=True)
Q = Param("kept entries are divided by q", low=0, high=1, low_open=True)
