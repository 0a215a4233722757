"""Fisher merging: base + λ Σ w_i F_i Δ_i / Σ w_i F_i (Matena & Raffel, arXiv 2111.09832).

F_i is the mean squared gradient of fine-tune i's log-likelihood on its own rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Protocol

from deltamerge.methods.parameters import Lambda, RowWeights
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import densify

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Tile

    Tensor = torch.Tensor

Floor = Annotated[float, Param("added to each F_i, whose mean over the model is 1", low=0)]


class Squares(Protocol):
    """The mean squared gradients of one tensor, float32, as a share of the mean over the model.

    `part` is None if no row reached the tensor.
    """

    def part(self, model: int, start: int, stop: int) -> Any: ...


@delta_method(
    "Σ w_i F_i Δ_i / Σ w_i F_i, F_i the mean squared gradient of fine-tune i's log-likelihood on its own rows",
    "arXiv 2111.09832",
    adds=True,
    rows="gradients",
)
def fisher(
    base: Tensor, *inputs: Any, tile: Tile, weights: RowWeights, floor: Floor = 1e-6, lambda_: Lambda = 1.0
) -> Tensor:
    """Return base + λ Σ w_i F_i Δ_i / Σ w_i F_i, in float64, rounded once to float32.

    inputs   tiles of the Δ_i, then their `Squares`
    weights  w_i
    floor    added to each F_i, whose mean over model i is 1; entries without influence get the weighted mean
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
