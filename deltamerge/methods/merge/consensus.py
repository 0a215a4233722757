"""Masks of tasks: the entries of a merged delta that several tasks agree on, or that one task keeps as its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.errors import InputError
from deltamerge.io.lazy import torch
from deltamerge.methods.merge.arithmetic import weighted_sum
from deltamerge.methods.ops import block_rows, densify, halved
from deltamerge.methods.tiles import Kept, Make, Tile

if TYPE_CHECKING:
    Tensor = torch.Tensor


def consensus(
    base: Tensor, *deltas: Tensor | Kept, tile: Tile, threshold: float, agreement: int, lambda_: float
) -> Tensor:
    """base + λ Σ Δ_i where at least `agreement` of the TALL masks abs(Δ_i) ≥ threshold · abs(Σ Δ − Δ_i) say so; float32
    (Wang et al., "Localizing task information", arXiv 2405.07813, Consensus TA)."""
    dense, total = _summed(deltas, tile)
    votes = sum(_tall(delta, total, threshold).to(torch.int32) for delta in dense)
    return _added(base, total.where(torch.as_tensor(votes >= agreement), 0.0), lambda_)


def tall_masks(base: Tensor, *deltas: Tensor | Kept, tile: Tile, threshold: float, task: int, lambda_: float) -> Tensor:
    """base + λ Σ Δ_i where the TALL mask of one task keeps it: abs(Δ_t) ≥ threshold · abs(Σ Δ − Δ_t); float32 (arXiv
    2405.07813, eq. 5). `task` t counts from 1."""
    dense, total = _summed(deltas, tile)
    return _added(base, total.where(_tall(dense[task - 1], total, threshold), 0.0), lambda_)


def emr(base: Tensor, *inputs: Any, tile: Tile, task: int) -> Tensor:
    """base + ρ_t · τ where it has the sign of Δ_t, τ the elected delta; float32 (Huang et al., "EMR-merging", arXiv
    2405.17461, Algorithm 1).

    The last input is Σ abs(Δ_t) and Σ abs(τ) where it has the sign of Δ_t, over all tensors of the model; ρ_t is their
    quotient. τ has the sign of Σ Δ_i, and the largest abs(Δ_i) of that sign. `task` t counts from 1.
    """
    *deltas, (own, kept) = inputs
    dense, total = _summed(tuple(deltas), tile)
    return _added(base, _elected(dense, total, task), float(own / kept) if kept else 0.0)


def emr_totals(base: Tensor, *deltas: Tensor | Kept, tile: Tile, task: int) -> Any:
    """Of each block the two sums of `emr`, (blocks, 2) float64."""
    dense, total = _summed(deltas, tile)
    parts = (dense[task - 1], _elected(dense, total, task))
    sums = [halved(block_rows(part.abs().to(torch.float64), tile)) for part in parts]
    return torch.stack(sums, -1).cpu().numpy()


def nodes(
    make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool, task: int, **parameters: Any
) -> Any:
    """The node of a method of one task. InputError: there is no such task."""
    models = sum(node.kind != "small" for node in inputs) - based
    if task > models:
        raise InputError(f"task {task}: the recipe merges {models} models", hint=f"a number from 1 to {models}")
    return make(function, inputs, shape=shape, task=task, **parameters)


def _summed(deltas: tuple[Tensor | Kept, ...], tile: Tile) -> tuple[list[Tensor], Tensor]:
    """The deltas and their sum."""
    dense = [densify(delta, tile.size) for delta in deltas]
    return dense, weighted_sum(dense, (1.0,) * len(dense))


def _tall(delta: Tensor, total: Tensor, threshold: float) -> Tensor:
    return delta.abs() >= (total - delta).abs() * threshold


def _elected(dense: list[Tensor], total: Tensor, task: int) -> Tensor:
    """τ where it has the sign of Δ_t, 0 elsewhere."""
    sign = total.sign()
    largest = torch.zeros_like(total)
    for delta in dense:
        largest = torch.maximum(largest, delta * sign)
    return (largest * sign).where(dense[task - 1] * sign > 0, 0.0)


def _added(base: Tensor, delta: Tensor, factor: float) -> Tensor:
    return base.to(torch.float32) + (delta if factor == 1 else delta * factor)
