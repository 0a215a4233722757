"""TALL masks: the sum of deltas where one task's mask keeps it (Wang et al., arXiv 2405.07813, eq. 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.methods.merge.task_masks import is_tall, nodes, onto_base, summed
from deltamerge.methods.parameters import Lambda, TaskNumber, Threshold
from deltamerge.methods.registry import delta_method

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.tensors.tiles import Kept, Tile


@delta_method(
    "Σ Δ_i where the TALL mask of one task keeps it: that task's model",
    "arXiv 2405.07813",
    adds=True,
    nodes=nodes,
)
def tall_masks(
    base: Tensor,
    *deltas: Tensor | Kept,
    tile: Tile,
    task: TaskNumber,
    threshold: Threshold = 0.4,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Return base + λ Σ Δ_i where abs(Δ_t) ≥ threshold · abs(Σ Δ − Δ_t); float32. `task` t counts from 1."""
    dense, total = summed(deltas, tile)
    return onto_base(base, total.where(is_tall(dense[task - 1], total, threshold), 0.0), lambda_)
