"""Weighted sums of tiles, in a fixed order, and the test whether such a merge returns a single model unchanged."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    import torch

SMALLEST_DIVISOR = 1e-8
# Least weight that the divisor cancels exactly: sums of weights near 0 are not used as divisors.
SMALLEST_WEIGHT = 1e-7


def divisor_of(weights: tuple[float, ...]) -> float:
    """Return Σ w in float32; 1 if it is too close to zero to divide by."""
    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + np.float32(weight))
    return 1.0 if abs(total) < SMALLEST_DIVISOR else float(total)


def weighted_sum(parts: list[torch.Tensor], weights: tuple[float, ...]) -> torch.Tensor:
    """Return w_0·x_0 + w_1·x_1 + … in this order; each product and each sum is rounded to float32."""
    total = parts[0] * float(np.float32(weights[0]))
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total += part * float(np.float32(weight))
    return total


def keeps_single(*, weights: tuple[float, ...], normalize: bool, lambda_: float) -> bool:
    """Tell whether a sum of weighted deltas returns a single model, base + Δ, unchanged."""
    (weight,) = weights
    return lambda_ == 1 and (weight == 1 or (normalize and abs(weight) >= SMALLEST_WEIGHT))
