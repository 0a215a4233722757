"""TALL masks: the sum of deltas where one task's mask keeps it (Wang et al., arXiv 2405.07813, eq. 5).

`consensus` and `emr` take their common steps from here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError
from deltamerge.methods.merge.sums import weighted_sum
from deltamerge.methods.parameters import Lambda, TaskNumber, Threshold
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.tiles import densify

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.tensors.tiles import Kept, Make, Tile


def nodes(
    make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool, task: int, **parameters: Any
) -> Any:
    """Make the node of a method of one task. InputError: there is no such task."""
    models = sum(node.kind not in ("small", "stage") for node in inputs) - based
    if task > models:
        raise InputError(f"task {task}: the recipe merges {models} models", hint=f"a number from 1 to {models}")
    return make(function, inputs, shape=shape, task=task, **parameters)


def summed(deltas: tuple[Tensor | Kept, ...], tile: Tile) -> tuple[list[Tensor], Tensor]:
    """Return the deltas and their sum."""
    dense = [densify(delta, tile.size) for delta in deltas]
    return dense, weighted_sum(dense, (1.0,) * len(dense))


def is_tall(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    """Return the TALL mask abs(Δ_i) ≥ threshold · abs(Σ Δ − Δ_i)."""
    return delta.abs() >= (total - delta).abs() * threshold


def onto_base(base: Tensor, delta: Tensor, factor: float) -> Tensor:
    """Return base + factor · Δ in float32."""
    return base.float() + (delta if factor == 1 else delta * factor)


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
