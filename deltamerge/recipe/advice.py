"""Which pruning keeps a fine-tune at a density, with and without calibration rows.

`extract`, `recommend`, `init` and the warnings of a recipe ask here. Measured in docs/measurements/pruning.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from deltamerge.methods.registry import PRUNE
from deltamerge.recipe.problems import is_given
from deltamerge.recipe.prune import Pruning, effective_prune
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import Loc, place

SAMPLED = {"method": "dare", "sampling": "magnitude"}
CALIBRATED = {"method": "magnitude", "q": "output_change"}
ROWS = "`calibration: {data: rows.jsonl}`"
BY_COMMAND = "--calibration rows.jsonl with extract"
# Densities below which q decides where the table of methods has no number of its own: of importance sampling, and of
# ties, which trims by magnitude with q = 1: a merge of two real encoders keeps 100, 97, 95, 87 and 76 % of what it has
# untrimmed at 0.2, 0.1, 0.05, 0.02 and 0.01, and a decoder's own delta 79, 38 and 0 of 98 % at 0.1, 0.05 and 0.01.
SAMPLED_BELOW, TRIMMED_BELOW = 0.02, 0.1
SHOWN = 3  # models that a warning names


@dataclass(frozen=True, slots=True)
class Advice:
    """A pruning at a density, as keys of `prune`, and why it is the one to take."""

    prune: dict[str, Any]
    why: str

    def __str__(self) -> str:
        keys = ", ".join(f"{key}: {value}" for key, value in self.prune.items())
        return f"prune: {{{keys}}}: {self.why}"


def choose(density: float, *, rows: bool) -> Advice:
    """Choose what keeps most of a fine-tune at `density`; `rows`: whether there is calibration data."""
    if rows:
        keys = {"method": CALIBRATED["method"], "density": density, "q": CALIBRATED["q"]}
        return Advice(keys, "with rows, magnitude with a calibrated q keeps most")
    return Advice(
        {**SAMPLED, "density": density}, "of what needs no rows, importance sampling keeps most of a fine-tune"
    )


def q_decides(pruning: Pruning, density: float) -> bool:
    """Return whether a calibrated q keeps much more of a fine-tune at this density than the pruning's own q.

    A pruning whose method is "none" is what ties does to deltas of itself.
    """
    if pruning.method == "none":
        return 0 < density < TRIMMED_BELOW
    if pruning.sampling == "magnitude":
        return 0 < density < SAMPLED_BELOW
    return pruning.method in PRUNE and 0 < density < PRUNE[pruning.method].q_decides_below


def warnings(recipe: Recipe, kept: Mapping[int, Mapping[float, int]], *, factors: bool = False) -> Iterator[str]:
    """Warn of prunings that leave q to its default at densities where q decides.

        kept      the place of a model in the recipe -> a density -> how many entries of its delta have it
        factors   an adapter's A and B are pruned, so that their product has the square of the density

    A model is warned of if most entries of its delta have such a density.
    """
    found: dict[str, list[str]] = {}
    for i, entries in kept.items():
        pruning = effective_prune(recipe, i)
        if _is_divided(recipe, i):
            continue
        weak = {d: n for d, n in entries.items() if q_decides(pruning, d * d if factors else d)}
        if (count := sum(weak.values())) and 2 * count > sum(entries.values()):
            density = sum(d * n for d, n in weak.items()) / count
            found.setdefault(_said(recipe, i, pruning, density, factors=factors), []).append(recipe.names[i])
    for text, names in found.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{', '.join(names[:SHOWN])}{more}: {text}"


def _said(recipe: Recipe, i: int, pruning: Pruning, density: float, *, factors: bool) -> str:
    """Return the fault of a model's pruning, and the keys that mend it."""
    method = "magnitude" if pruning.method == "none" else pruning.method
    q = "q = density" if PRUNE[method].random else "q = 1"
    name = "importance sampling" if pruning.sampling == "magnitude" else method
    name = str(recipe.method_name) if pruning.method == "none" else name
    text = f"{name} at density {density:.3g} with {q} loses much of a fine-tune that a calibrated q keeps"
    if factors:
        text += " (the product of two pruned factors has the square of the density)"
    if pruning.method == "none":
        mend = f"`prune: {{method: magnitude, density: {density:.3g}, q: output_change}}` in the place of `density`"
    else:
        at: Loc = ("models", i, "prune") if is_given(recipe, "models", i, "prune", "method") else ("prune",)
        mend = f"`q: output_change` in {place(at)}"
    own = is_given(recipe, "models", i, "calibration", "data") or is_given(recipe, "calibration", "data")
    text += f": give {mend}" + ("" if own else f" and {ROWS}; {BY_COMMAND}")
    if pruning.method in ("none", "magnitude", "dare", "breadcrumbs", "magnitude_outliers") and not own:
        without = "`sampling: magnitude`" if method == "dare" else "`prune: {method: dare, sampling: magnitude}`"
        text += "" if pruning.sampling == "magnitude" else f"; without rows, {without} keeps more"
    return text


def _is_divided(recipe: Recipe, i: int) -> bool:
    """Return whether the recipe itself has the divisor of a model's entries."""
    calibration = recipe.calibration
    if calibration is not None and calibration.per == "merge":
        return True  # its λ is calibrated
    model, part = recipe.models[i], recipe.part_of[i]
    prunes = [prune for prune in (model.prune, recipe.prune) if prune is not None]
    if any(prune.q is not None or prune.rescale is not None for prune in prunes):
        return True
    return any("rescale" in level for level in (model.parameters, *part.levels))
