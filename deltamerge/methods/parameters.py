"""Parameters of methods: the allowed values, and types of parameters that several methods share.

A method's parameters are the arguments of its function whose type is an `Annotated` with a `Param`. `Density = 1.0` in
a signature gives summary, bounds and default.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple


class UsualValue(NamedTuple):
    """A default that depends on the number of models. `text` is the rule for people."""

    text: str
    value: Callable[[int], float]


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a method: its allowed values and its default.

    `default` None: it must be given. `alone` is the default for a single fine-tune, `rule` a default by the number of
    models. `per_model` parameters may be set beside a model or for all models, other parameters only for the whole
    merge or slice. `scalar`: no gradient or filters. `prunes`: it is for the pruning that runs first, and not passed to
    the function that merges.
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
        """Return the default for people: its value, or its rule by the number of models."""
        return self.default if self.rule is None else self.rule.text

    def argument(self, key: str) -> str:
        """Return the argument of a merge method's function for the parameter `key`, such as `weights` or `lambda_`."""
        return f"{key}s" if self.per_model else "lambda_" if key == "lambda" else key

    def default_for(self, models: int) -> float | bool | None:
        """Return the default for a number of models. None: it must be given."""
        if self.rule is not None:
            return self.rule.value(models)
        return self.alone if self.default is None and models == 1 else self.default

    def wanted(self) -> str:
        """Return the range of values as text, such as "in (0, 1]"."""
        if self.kind == "bool":
            return "true or false"
        if self.low is not None and self.high is not None:
            return f"in {'(' if self.low_open else '['}{self.low:g}, {self.high:g}]"
        if self.low is not None:
            whole = "a whole number, " if self.kind == "integer" else ""
            return f"{whole}{'more than' if self.low_open else 'at least'} {self.low:g}"
        return "a whole number" if self.kind == "integer" else "a number"

    def typed(self, value: float | bool) -> float | bool:
        """Convert the value to the number that is passed to the function."""
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
    """Read a method's parameters from its signature, by their names in recipes.

    `weights` is `weight`, `lambda_` is `lambda`. A default in the signature wins over the type's.
    """
    found: dict[str, Param] = {}
    for name, given in inspect.signature(function).parameters.items():
        # annotations are postponed; only names of parameter types are looked up, so that nothing imports torch
        kind = function.__globals__.get(given.annotation) if isinstance(given.annotation, str) else given.annotation
        param = next((x for x in getattr(kind, "__metadata__", ()) if isinstance(x, Param)), None)
        if param is not None:
            key = name.removesuffix("s") if param.per_model else name.removesuffix("_")
            found[key] = param if given.default is given.empty else replace(param, default=given.default)
    return found


# Parameters of the merged models: one number each.
Weights = Annotated[tuple[float, ...], Param("factor of the model", per_model=True, alone=1.0)]
Shares = Annotated[tuple[float, ...], Param("share of the model", per_model=True, alone=1.0)]
DeltaWeights = Annotated[tuple[float, ...], Param("factor of the model's delta", per_model=True, alone=1.0)]
DeltaFactors = Annotated[tuple[float, ...], Param("factor of the model's delta", 1.0, per_model=True)]
RowWeights = Annotated[tuple[float, ...], Param("weight of the model's rows", 1.0, low=0, per_model=True)]

# Parameters of the merge.
Normalize = Annotated[bool, Param("divide by the sum of the weights", kind="bool")]
Lambda = Annotated[float, Param("factor of the merged delta")]
# λ of merges that do not fix the length of the merged delta, for n models: see docs/measurements/merging.md, "Words".
LargeLambda = Annotated[
    float,
    Param(
        "factor of the merged delta, of vectors and tables 1 at most",
        rule=UsualValue("2.25 for n > 1", lambda n: 2.25 if n > 1 else 1.0),
    ),
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
    int, Param("number of the model whose task to keep, from 1", None, "integer", low=1, scalar=True)
]
Change = Annotated[float, Param("abs(Δ) above this is a change", low=0)]
Threshold = Annotated[float, Param("least abs(Δ_i) as a multiple of abs(Σ Δ − Δ_i)", low=0)]

# Parameters of the pruning before a merge.
Density = Annotated[float, Param("fraction of the delta's entries kept", low=0, high=1, per_model=True, prunes=True)]
Rescale = Annotated[
    bool,
    Param("divide kept entries by the density; false: random drop", kind="bool", scalar=True, prunes=True),
]
MatchSum = Annotated[
    bool,
    Param("scale kept entries to the whole delta's sum of magnitudes", kind="bool", scalar=True, prunes=True),
]
Epsilon = Annotated[
    float, Param("half the spread of the keep probabilities", low=0, high=1, per_model=True, prunes=True)
]
Gamma = Annotated[
    float, Param("fraction of entries to drop as the largest", low=0, high=1, per_model=True, prunes=True)
]

# Parameters of every pruning method.
KEPT = Param("fraction kept", low=0, high=1, low_open=True)
Q = Param("kept entries are divided by q", low=0, high=1, low_open=True)
