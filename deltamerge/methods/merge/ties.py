"""TIES: trim deltas, elect a sign for every entry, add the entries that have it (Yadav et al., arXiv 2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.engine.fused.operations import Assembly, agreeing
from deltamerge.methods.merge.sums import SMALLEST_DIVISOR, keeps_single, weighted_sum
from deltamerge.methods.ops import onto
from deltamerge.methods.parameters import DeltaWeights, Density, Lambda, MatchSum, Normalize
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Kept, Patched, Tile


def loop(assembly: Assembly, node: Node, weights: tuple[float, ...], normalize: bool, lambda_: float) -> None:
    """Add this merge to the compiled loop as an operation."""
    base, *deltas = node.inputs
    agreeing(assembly, node, weights, lambda_, normalize=normalize, models=deltas, base=base)


@delta_method(
    "keep the top int(density · n) of abs(Δ_i), elect a sign per entry, add the w_i Δ_i of that sign",
    "arXiv 2306.01708",
    adds=True,
    keeps_single=keeps_single,
    loop=loop,
    patches=True,
)
def ties(
    base: torch.Tensor,
    *deltas: torch.Tensor | Kept,
    tile: Tile,
    weights: DeltaWeights,
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    rescale: MatchSum = False,
) -> torch.Tensor | Patched:
    """Return base + λ · consensus(Δ_i) in float32.

    base               tile in its stored dtype
    deltas             Δ_i: float32 tiles or `Kept`, already trimmed
    weights            w_i
    normalize          whether to divide by the sum of the agreeing w_i (a sum near 0 divides by 1)
    lambda_            λ
    density, rescale   used by the trimming, which runs first

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
