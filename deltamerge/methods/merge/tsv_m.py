"""TSV-M: the top singular triplets of every task, made orthonormal (Gargiulo et al., arXiv 2412.00081)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.methods.merge.matrices import always, each, needs, nodes, orthonormal, side_by_side, triplets
from deltamerge.methods.parameters import DeltaFactors, FallingLambda
from deltamerge.methods.registry import delta_method

if TYPE_CHECKING:
    import torch

    from deltamerge.methods.merge.matrices import Form, Matrices
    from deltamerge.tensors.tiles import Whole


def needs_of(*, form: Form, weights: tuple[float, ...], transposed: bool = False) -> tuple[int, float]:
    """Return (bytes, operations). In memory are a delta, and the triplets, twice while they are joined."""
    return needs(form, matrices=2.5, squares=10, grams=2 + len(weights), products=2)


@delta_method(
    "U⊥ diag(S) V⊥ᵀ: the top r / n singular triplets of each w_i Δ_i, their vectors made orthonormal",
    "arXiv 2412.00081",
    adds=True,
    matrices=True,
    in_core=always,
    nodes=nodes,
    needs=needs_of,
)
def tsv_m(
    *sources: Whole, form: Form, weights: DeltaFactors, lambda_: FallingLambda = 1.0, transposed: bool = False
) -> torch.Tensor:
    """Return U⊥ diag(S) V⊥ᵀ of the top r / n triplets of each of n w_i Δ_i, side by side (Algorithm 1).

    U⊥ and V⊥ are the nearest orthonormal matrices to their U and V. int(r / n) triplets are taken, but at least one.
    A matrix that is stored `transposed` has a transposed result. `matrices.nodes` takes `lambda_`.
    """

    def merge(matrices: Matrices, out: torch.Tensor) -> None:
        own = max(1, matrices.rank // len(weights))
        parts = [triplets(matrices.delta(i), own) for i in range(len(weights))]
        orthonormal(*side_by_side(parts), out)

    return each(sources, form, weights, merge)
