"""Masks of tasks: the entries of a sum of deltas that a task agrees with (Wang et al., arXiv 2405.07813)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError
from deltamerge.methods.merge.sums import weighted_sum
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
