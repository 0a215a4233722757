"""Merges that are weighted sums: linear, task_arithmetic, passthrough."""

from __future__ import annotations

import numpy as np

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import onto, over
from deltamerge.methods.tiles import Kept, Patched, Tile

SMALLEST_DIVISOR = 1e-8
# A weight that is surely divided by itself: a sum of weights near 0 is not divided by.
SMALLEST_WEIGHT = 1e-7


def divisor_of(weights: tuple[float, ...]) -> float:
    """Σ w in float32; 1 if it is too close to zero to divide by."""
    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + np.float32(weight))
    return 1.0 if abs(total) < SMALLEST_DIVISOR else float(total)


def weighted_sum(parts: list[torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    """w_0·x_0 + w_1·x_1 + … in this order; each product and each sum is rounded to float32."""
    total = parts[0] * float(np.float32(weights[0]))
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * float(np.float32(weight))
    return total


def linear(
    *tensors: torch.Tensor,
    tile: Tile,
    weights: tuple[float, ...],
    normalize: bool,
    counts: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """Σ w_i x_i, divided by Σ w_i if `normalize`; float32 (Wortsman et al., "Model soups", arXiv 2203.05482).

    `counts` are what tensors count in the divisor, where some are running sums: a sum counts its own Σ w.
    """
    total = weighted_sum([x.to(torch.float32) for x in tensors], weights)
    return over(total, divisor_of(weights if counts is None else counts)) if normalize else total


def task_arithmetic(
    base: torch.Tensor,
    *deltas: torch.Tensor | Kept,
    tile: Tile,
    weights: tuple[float, ...],
    normalize: bool,
    lambda_: float,
) -> torch.Tensor | Patched:
    """base + λ Σ w_i Δ_i in float32 (Ilharco et al., arXiv 2212.04089).

    base        tile in its stored dtype
    deltas      Δ_i: float32 tiles or `Kept`
    weights     w_i
    normalize   whether to divide the sum by Σ w_i
    lambda_     λ
    """

    def mixed(deltas: list[torch.Tensor]) -> torch.Tensor:
        total = weighted_sum(deltas, weights)
        if normalize:
            total = over(total, divisor_of(weights))
        return total if lambda_ == 1 else total * float(np.float32(lambda_))

    return onto(base, deltas, tile, mixed)


def keeps_single(*, weights: tuple[float, ...], normalize: bool, lambda_: float) -> bool:
    """Whether task arithmetic and ties give back a single model, base + Δ, exactly as it is."""
    (weight,) = weights
    return lambda_ == 1 and (weight == 1 or (normalize and abs(weight) >= SMALLEST_WEIGHT))


def passthrough(x: torch.Tensor, *, tile: Tile, scales: tuple[float, ...]) -> torch.Tensor:
    """scale · x in float32."""
    return x.to(torch.float32) * float(np.float32(scales[0]))


def keeps_unscaled(*, scales: tuple[float, ...]) -> bool:
    """Whether passthrough gives back its model as it is."""
    return scales == (1.0,)
