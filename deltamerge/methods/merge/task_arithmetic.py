"""Task arithmetic: base + λ Σ w_i Δ_i, ÷ Σ w_i if normalised (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.engine.fused.operations import Assembly, weighted
from deltamerge.methods.merge.sums import divisor_of, keeps_single, weighted_sum
from deltamerge.methods.ops import onto, over
from deltamerge.methods.parameters import DeltaWeights, Lambda, Normalize
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    import torch

    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Kept, Patched, Tile


def loop(assembly: Assembly, node: Node, weights: tuple[float, ...], normalize: bool, lambda_: float) -> None:
    """Add this merge to the compiled loop as an operation."""
    base, *deltas = node.inputs
    weighted(assembly, node, weights, divisor_of(weights) if normalize else 1.0, lambda_, models=deltas, base=base)


@delta_method(
    "base + λ Σ w_i Δ_i, ÷ Σ w_i if normalize",
    "arXiv 2212.04089",
    adds=True,
    keeps_single=keeps_single,
    loop=loop,
    patches=True,
)
def task_arithmetic(
    base: torch.Tensor,
    *deltas: torch.Tensor | Kept,
    tile: Tile,
    weights: DeltaWeights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
) -> torch.Tensor | Patched:
    """Return base + λ Σ w_i Δ_i in float32.

    base        tile in its stored dtype
    deltas      Δ_i: float32 tiles or `Kept`
    weights     w_i
    normalize   whether to divide the sum by Σ w_i
    lambda_     λ
    """

    def mixed(deltas: list[torch.Tensor]) -> torch.Tensor:
        total = weighted_sum(deltas, weights)
        if normalize:
            total = over(total, divisor_of(weights))
        return total if lambda_ == 1 else total * float(np.float32(lambda_))

    return onto(base, deltas, tile, mixed)
