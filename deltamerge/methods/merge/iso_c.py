"""Iso-C: base + λ · mean(S) · U Vᵀ of U S Vᵀ = Σ w_i Δ_i (Marczak et al., "No task left behind", arXiv 2502.04959)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.methods.merge.matrices import always, each, inverse, multiply, needs, nodes, spectrum
from deltamerge.methods.parameters import DeltaFactors, LargeLambda
from deltamerge.methods.registry import delta_method

if TYPE_CHECKING:
    import torch

    from deltamerge.methods.merge.matrices import Form, Matrices
    from deltamerge.tensors.tiles import Whole


def needs_of(*, form: Form, weights: tuple[float, ...], transposed: bool = False) -> tuple[int, float]:
    """Return (bytes, operations). The sum of the deltas is in memory."""
    return needs(form, matrices=1, squares=6, spectra=1, products=1)


@delta_method(
    "mean(S) · U Vᵀ of U S Vᵀ = Σ w_i Δ_i: all its singular values made equal",
    "arXiv 2502.04959",
    adds=True,
    matrices=True,
    in_core=always,
    nodes=nodes,
    needs=needs_of,
)
def iso_c(
    *sources: Whole, form: Form, weights: DeltaFactors, lambda_: LargeLambda = 1.0, transposed: bool = False
) -> torch.Tensor:
    """Return the mean (S) · U Vᵀ, U S Vᵀ = Σ w_i Δ_i: all singular values of the sum are made equal (Algorithm 1).

    Directions whose singular value is only rounding are left out. A matrix that is stored `transposed` has a transposed
    result. `matrices.nodes` takes `lambda_`.
    """

    def merge(matrices: Matrices, out: torch.Tensor) -> None:
        total = matrices.total()
        values, right = spectrum(total)
        multiply(total, (right * (inverse(values, values.max()) * (values.sum() / matrices.rank))) @ right.T, out)

    return each(sources, form, weights, merge)
