"""Fisher merging: every entry's mean, weighed by how much each fine-tune's answers depend on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import densify
from deltamerge.methods.tiles import Tile

if TYPE_CHECKING:
    Tensor = torch.Tensor


class Squares(Protocol):
    """The mean squared gradients of one tensor, float32, as a share of the mean over the model; None: no row reached
    it."""

    def part(self, model: int, start: int, stop: int) -> Any: ...


def fisher(base: Tensor, *inputs: Any, tile: Tile, weights: tuple[float, ...], floor: float, lambda_: float) -> Tensor:
    """base + λ Σ w_i F_i Δ_i / Σ w_i F_i, in float64, rounded once (Matena & Raffel, "Merging models with
    Fisher-weighted averaging", arXiv 2111.09832).

    inputs   tiles of the Δ_i, then their `Squares`
    weights  w_i
    floor    what is added to each F_i, whose mean over model i is 1: entries that nothing depends on have the mean
    """
    squares: Squares
    *deltas, squares = inputs
    total = torch.zeros(tile.size, dtype=torch.float64, device=base.device)
    weighed = torch.zeros_like(total)
    for i, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        found = squares.part(i, tile.start, tile.stop)
        share = torch.full_like(total, floor)
        if found is not None:
            share += torch.from_numpy(found).to(total.device, torch.float64)
        share *= weight
        weighed += share
        total += share * densify(delta, tile.size).to(torch.float64)
    mean = torch.where(weighed > 0, total / weighed, 0.0)
    return (base.to(torch.float64) + lambda_ * mean).to(torch.float32)
