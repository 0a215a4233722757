"""A fine-tune's activations and delta, layer by layer.

They are influence, coherence, and the bound of Theorem 3.1 (DAREx, arXiv 2410.09344).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deltamerge.calibrate.q import closed_forms as S
from deltamerge.calibrate.q.closed_forms import LayerStatistics

GAMMA = 0.05
SHOWN = 3


class Figures(BaseModel):
    """Figures that are printed as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Massive(Figures):
    """An input feature of large activations."""

    feature: int
    mean_abs: float = Field(description="Mean of |x_j| over the tokens.")
    ratio: float | None = Field(description="mean_abs over the median of all features; null where that is 0.")


class Influence(Figures):
    """Of one linear layer y = W x + b over the calibration tokens; c_ij = Δ_ij x_j, d the density, p = 1 − d."""

    mean_abs_delta: float = Field(description="Mean of |Δ_ij|.")
    mean_abs_influence: float = Field(description="Mean of |c_ij| over outputs, inputs and tokens.")
    influence: float = Field(description="c̄: mean over outputs of |c̄_i|, c̄_i the mean of c_ij over inputs and tokens.")
    influence_variance: float = Field(description="σ²: mean over outputs of the variance of c_ij.")
    change: float = Field(description="Root mean square of Δx over outputs and tokens.")
    coherence: float = Field(description="D/A = Σ Δ_ij² E[x_j²] / E‖Δx‖²: near 0 DARE is right, near 1 q should be 1.")
    bound: float = Field(
        description="Theorem 3.1 for DARE: sqrt(φ(p) log(2/γ) D_i)/d, γ = 0.05, root mean square over outputs."
    )
    typical: float = Field(description="The paper's tightened form of it, no guarantee.")
    dare_error: float = Field(description="Expected E‖Δx − DARE‖²/E‖Δx‖² = (p/d) D/A.")
    least_squares_q: float = Field(description="q* = d + p D/A, of least expected error.")
    least_squares_error: float = Field(description="The expected relative error at q*: 1 − d/q*.")
    dare_measured: float | None = Field(description="dare_error of the drawn mask on the same rows; null without one.")
    least_squares_measured: float | None = Field(description="least_squares_error of the drawn mask, likewise.")


class LayerInfluence(Influence):
    """One layer, by the fine-tune's name of its weight."""

    name: str
    tokens: int
    massive: list[Massive] = Field(description="The input features of largest mean |x_j|, ascending by number.")


class Activations(Figures):
    """What `inspect --calibration` adds."""

    density: float
    gamma: float
    sequences: int
    total: Influence = Field(description="Means over entries (the first two) and over layers.")
    layers: list[LayerInfluence]


def activations(found: Mapping[str, LayerStatistics], density: float, sequences: int) -> Activations:
    """Return the figures of every layer at a density."""
    layers = [_layer(name, layer, density) for name, layer in found.items()]
    entries = np.array([len(layer.energy) * len(layer.mean) for layer in found.values()], dtype=np.float64)

    def mean(field: str) -> float:
        weights = entries if field.startswith("mean_abs") else None
        return float(np.average([getattr(layer, field) for layer in layers], weights=weights))

    drawn = all(layer.dare_measured is not None for layer in layers)
    means: dict[str, Any] = {
        field: mean(field) if drawn or not field.endswith("_measured") else None for field in Influence.model_fields
    }
    total = Influence(**means)
    return Activations(density=density, gamma=GAMMA, sequences=sequences, total=total, layers=layers)


def _layer(name: str, layer: LayerStatistics, density: float) -> LayerInfluence:
    median, best = float(np.median(layer.mean_abs)), S.least_squares(layer, density)
    drawn = layer.power is not None
    return LayerInfluence(
        name=name,
        tokens=layer.tokens,
        mean_abs_delta=layer.mean_delta,
        mean_abs_influence=layer.mean_influence,
        influence=float(np.abs(layer.influence).mean()),
        influence_variance=float(layer.variance.mean()),
        change=float(np.sqrt(layer.energy.mean())),
        coherence=layer.coherence,
        bound=_rms(S.guaranteed(layer, density, GAMMA)),
        typical=_rms(S.typical(layer, density, GAMMA)),
        dare_error=S.dare_error(layer, density),
        least_squares_q=best,
        least_squares_error=S.least_squares_error(layer, density),
        dare_measured=S.drawn_error(layer, density) if drawn else None,
        least_squares_measured=S.drawn_error(layer, best) if drawn else None,
        massive=[
            Massive(
                feature=j,
                mean_abs=float(layer.mean_abs[j]),
                ratio=float(layer.mean_abs[j]) / median if median else None,
            )
            for j in layer.massive(SHOWN)
        ],
    )


def _rms(values: S.Vector) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
