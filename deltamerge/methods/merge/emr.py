"""EMR: elect a delta, mask one task's signs in it, rescale it to the task's size (Huang et al., arXiv 2405.17461).

base + ρ_t · τ where it has the sign of Δ_t. τ has the sign of Σ Δ_i, and the largest abs(Δ_i) of that sign.
ρ_t = Σ abs(Δ_t) / Σ abs(τ), where τ has the sign of Δ_t, over all tensors of the model (Algorithm 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.methods.merge.tall_masks import nodes, onto_base, summed
from deltamerge.methods.parameters import TaskNumber
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import block_rows, halved

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Kept, Tile

    Tensor = torch.Tensor


def elected(dense: list[Tensor], total: Tensor, task: int) -> Tensor:
    """Return τ where it has the sign of Δ_t, 0 elsewhere."""
    sign = total.sign()
    largest = torch.zeros_like(total)
    for delta in dense:
        largest = torch.maximum(largest, delta * sign)
    return (largest * sign).where(dense[task - 1] * sign > 0, 0.0)


def totals(base: Tensor, *deltas: Tensor | Kept, tile: Tile, task: int) -> Any:
    """Return the two sums of ρ_t for each block, (blocks, 2) float64."""
    dense, total = summed(deltas, tile)
    parts = (dense[task - 1], elected(dense, total, task))
    sums = [halved(block_rows(part.abs().to(torch.float64), tile)) for part in parts]
    return torch.stack(sums, -1).cpu().numpy()


@delta_method(
    "elect a delta of the largest entries, keep entries of one task's sign, rescale to its size: that task's model",
    "arXiv 2405.17461",
    adds=True,
    nodes=nodes,
    totals=totals,
)
def emr(base: Tensor, *inputs: Any, tile: Tile, task: TaskNumber) -> Tensor:
    """Return base + ρ_t · τ where it has the sign of Δ_t; float32.

    inputs   the deltas, then Σ abs(Δ_t) and Σ abs(τ) over all tensors
    task     t, which counts from 1
    """
    *deltas, (own, kept) = inputs
    dense, total = summed(tuple(deltas), tile)
    return onto_base(base, elected(dense, total, task), float(own / kept) if kept else 0.0)
