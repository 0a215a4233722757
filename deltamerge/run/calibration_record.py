"""The calibration in a lock, as figures for reports: the search of q, and the q of every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeGuard

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deltamerge.errors import InputError

Points = list[tuple[float, float]]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
EXTREME = 1e100  # larger figures come from no real model
NAMES = {
    "q": "q: kept entries are divided by it",
    "eta": "η: the layers' q follow from it",
    "kappa": "κ: factor of the layers' closed-form q",
    "factor of lambda": "factor of the recipe's λ",
    "step": "step of learning",
}


def _drawable(value: object) -> TypeGuard[float]:
    return isinstance(value, float | int) and abs(value) < EXTREME


class _Figures(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class ChosenQ(_Figures):
    """The q of one fine-tune, or of the merge: the search, the best point, and the choice."""

    model: str
    method: str
    mask: Literal["random", "importance"]
    density: Positive | list[Positive] = Field(
        description="Of the pruned tensors; smallest and largest where they differ."
    )
    objective: str
    scope: str
    search: str
    chosen: Literal["calibrated", "plain"] = Field(description="plain: the method without calibration was no worse.")
    why: str
    value: float = Field(description="The objective at the best point.")
    plain: float = Field(description="The objective without calibration.")
    searched: dict[str, float | str] = Field(
        description="The best point: the variable, and its family if there are several."
    )
    path: list[list[float | str]] = Field(
        description="Every point: family if there are several, variable, value, objective."
    )
    q: dict[str, Finite] = Field(
        description="The q's of tensors other than 1; the mean if rows have their own. Or the coefficients of each "
        "delta's tensors, which may be negative, by delta:tensor."
    )
    rows: dict[str, tuple[Finite, Finite]] = Field(
        description="Smallest and largest q of rows, where they have theirs."
    )

    @property
    def panels(self) -> Iterator[tuple[str, dict[str, Points]]]:
        """Each searched variable, and its points by family."""
        found: dict[str, dict[str, Points]] = {}
        for *names, x, value in self.path:
            if names and _drawable(x) and _drawable(value):
                family = str(names[0]) if len(names) > 1 else ""
                found.setdefault(str(names[-1]), {}).setdefault(family, []).append((float(x), float(value)))
        yield from found.items()

    @staticmethod
    def axis(variable: str) -> str:
        """Return a searched variable in words."""
        return NAMES.get(variable, variable)

    def measure(self, variable: str) -> str:
        """Return the text above the curve of a searched variable."""
        return "loss on the rows that stop" if variable == "step" else self.objective

    def reference(self, variable: str) -> tuple[float, str] | None:
        """Return the point of the method without calibration on the axis of a searched variable, and its name."""
        if variable == "q" and self.mask == "random":
            density = self.density if isinstance(self.density, float) else self.density[0]
            return density, f"vanilla DARE: q = density, 1/q = {1 / density:.4g}"
        if variable == "q":
            return 1.0, "without calibration: q = 1"
        return (1.0, "the recipe's λ") if variable == "factor of lambda" else None

    def best(self, variable: str) -> tuple[float, float, str] | None:
        """Return the best point of a searched variable, its objective, and whether it was chosen."""
        x = self.searched.get(variable)
        if not _drawable(x):
            return None
        series = dict(self.panels).get(variable, {})
        values = dict(series.get(str(self.searched.get("family", ""))) or next(iter(series.values()), []))
        value = values.get(float(x), self.value)
        word = "chosen" if self.chosen == "calibrated" else "best, not taken"
        return (float(x), value, f"{word}: {x:.4g}") if _drawable(value) else None


class Run(_Figures):
    """The contents of the recipe.lock beside a model that a run made."""

    deltamerge: str = Field(description="The version of deltamerge that made it.")
    seed: int
    choices: list[ChosenQ] = Field(description="The calibrated q's.")
    densities: dict[str, Positive] = Field(description="Density of every tensor, if a budget chose them.")


def choices(calibration: Mapping[str, Any], rows: Mapping[str, Any], where: str) -> list[ChosenQ]:
    """Return a lock's `calibration` in the order of names. `rows` are the q's of rows by "model:tensor".

    InputError: it does not have the form that a run writes.
    """
    try:
        return [_choice(model, record, rows) for model, record in sorted(calibration.items())]
    except (KeyError, TypeError, ValueError, ValidationError) as error:
        lines = str(error).splitlines()
        raise InputError(f"{where}: calibration: {' '.join(line.strip() for line in lines[1:3]) or lines[0]}") from None


def _choice(model: str, record: Mapping[str, Any], rows: Mapping[str, Any]) -> ChosenQ:
    prefix = f"{model}:"
    own = {name.removeprefix(prefix): np.asarray(v) for name, v in rows.items() if name.startswith(prefix) and v.size}
    q = {
        **dict(sorted({**record["q"]}.items())),
        **{name: float(value.mean(dtype=np.float64)) for name, value in own.items()},
    }
    ranges = {name: (float(value.min()), float(value.max())) for name, value in own.items()}
    return ChosenQ.model_validate({**record, "model": model, "plain": record["plain"]["value"], "q": q, "rows": ranges})
