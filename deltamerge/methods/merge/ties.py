"""TIES consensus: only the entries that agree with the weighted majority's sign are added."""

from __future__ import annotations

import numpy as np

from deltamerge.io.lazy import torch
from deltamerge.methods.merge.arithmetic import SMALLEST_DIVISOR, weighted_sum
from deltamerge.methods.ops import onto
from deltamerge.methods.tiles import Kept, Patched, Tile


def ties(
    base: torch.Tensor,
    *deltas: torch.Tensor | Kept,
    tile: Tile,
    weights: tuple[float, ...],
    normalize: bool,
    lambda_: float,
) -> torch.Tensor | Patched:
    """base + λ · consensus(Δ_i), Δ_i already trimmed; float32 (Yadav et al., arXiv 2306.01708).

        base        tile in its stored dtype
        deltas      Δ_i: float32 tiles or `Kept`
        weights     w_i
        normalize   whether to divide by the sum of the agreeing w_i (a sum near 0 divides by 1)
        lambda_     λ

    With e_i = w_i Δ_i the sign of Σ e_i (0 counts as +) is elected; the e_i of that sign are added.
    """

    def consensus(deltas: list[torch.Tensor]) -> torch.Tensor:
        positive = weighted_sum(deltas, weights) >= 0
        mixed = torch.zeros_like(deltas[0])
        divisor = torch.zeros_like(deltas[0])
        for delta, weight in zip(deltas, weights, strict=True):
            entry = delta * float(np.float32(weight))
            agrees = torch.where(positive, entry > 0, entry < 0)
            mixed += torch.where(agrees, entry, 0.0)
            if normalize:
                divisor += torch.where(agrees, float(np.float32(weight)), 0.0)
        if normalize:
            mixed = mixed / torch.where(divisor.abs() < SMALLEST_DIVISOR, 1.0, divisor)
        return mixed if lambda_ == 1 else mixed * float(np.float32(lambda_))

    return onto(base, deltas, tile, consensus)
