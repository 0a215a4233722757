"""SVC: `tsv_m` with its singular values calibrated by the deltas (Singular Value Calibration, arXiv 2602.05536)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.methods.merge.matrices import (
    Tall,
    always,
    each,
    multiply,
    needs,
    nodes,
    orthonormal,
    side_by_side,
    triplets,
)
from deltamerge.methods.parameters import CalibratedLambda, DeltaFactors
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.methods.merge.matrices import Form, Matrices
    from deltamerge.tensors.tiles import Whole

LEAST = 0.1  # α of the paper: smaller shares count as this


def needs_of(*, form: Form, weights: tuple[float, ...], transposed: bool = False) -> tuple[int, float]:
    """Return (bytes, operations): as `tsv_m`, plus the triplets of its result and a product with every delta."""
    return needs(form, matrices=4.5, squares=10, grams=3 + len(weights), products=4 + len(weights))


@delta_method(
    "tsv_m, each singular value σ_r times n / Σ_i max(0.1, s_ri), s_ri = ⟨u_rᵀΔ, u_rᵀΔ_i⟩ / ‖u_rᵀΔ_i‖²",
    "arXiv 2602.05536",
    adds=True,
    matrices=True,
    in_core=always,
    nodes=nodes,
    needs=needs_of,
)
def svc(
    *sources: Whole, form: Form, weights: DeltaFactors, lambda_: CalibratedLambda = 1.0, transposed: bool = False
) -> torch.Tensor:
    """Return the result Δ of `tsv_m` with singular values σ_r n / Σ_i max(0.1, s_ri), of n deltas w_i Δ_i.

    s_ri = ⟨u_rᵀΔ, u_rᵀ w_i Δ_i⟩ / ‖u_rᵀ w_i Δ_i‖², u_r the left singular vectors of Δ, (out,). A direction that several
    deltas share is not counted several times: n equal deltas give one. A matrix that is stored `transposed` has a
    transposed result. `matrices.nodes` takes `lambda_`.
    """

    def merge(matrices: Matrices, out: torch.Tensor) -> None:
        count = len(weights)
        own = max(1, matrices.rank // count)
        whole = torch.empty_like(out, dtype=torch.float64)
        orthonormal(*side_by_side([triplets(matrices.delta(i), own) for i in range(count)]), whole)
        merged = Tall(whole.T if matrices.is_wide else whole)
        long, values, short = triplets(merged, matrices.rank)
        outputs_are_short = matrices.is_wide != transposed
        total = torch.zeros_like(values)
        for i in range(count):
            delta = matrices.delta(i)
            if outputs_are_short:  # Δ_i u_r, (ℓ, k)
                along = torch.cat([block @ short for _, block in delta.blocks()])
                shared, squares = (along * long).sum(0), (along * along).sum(0)
            else:  # u_rᵀ Δ_i, (k, r)
                along = torch.zeros(len(values), merged.values.shape[1], dtype=torch.float64, device=out.device)
                for part, block in delta.blocks():
                    along.addmm_(long[part].T, block)
                shared, squares = (along * short.T).sum(1), (along * along).sum(1)
            share = torch.where(squares > 0, values * shared / squares, 0.0)
            total += share.clamp(min=LEAST)
        multiply(Tall(long), (values * count / total)[:, None] * short.T, out)

    return each(sources, form, weights, merge)
