"""WUDI: the Δ of least Σ ‖(Δ − w_i Δ_i) Δ_iᵀ‖² / ‖Δ_i‖² (Cheng et al., arXiv 2503.08099).

It interferes least with every task's own subspace.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from deltamerge.methods.merge.matrices import each, nodes
from deltamerge.methods.parameters import DeltaFactors, FallingLambda
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.methods.merge.matrices import Form, Matrices
    from deltamerge.tensors.tiles import Whole

    Tensor = torch.Tensor

Steps = Annotated[
    int, Param("steps of Adam from Σ w_i Δ_i, 300 as published; 0: the exact minimum", None, "integer", low=0)
]
Rho = Annotated[float, Param("for the exact minimum: ridge as a fraction of the mean eigenvalue", low=0, low_open=True)]

RATE, FIRST, SECOND, EPSILON = 1e-5, 0.9, 0.999, 1e-8  # settings of Adam, as published


def needs_of(
    *, form: Form, weights: tuple[float, ...], steps: int = 0, rho: float = 1.0, transposed: bool = False
) -> tuple[int, float]:
    """Return (bytes, operations).

    In memory are Gram matrices of the inputs, a delta in float32 and float64, its product, their sum and the solution.
    With steps, Adam's state is added.
    """
    count, rows, columns = form
    inputs = rows if transposed else columns
    product = 2.0 * rows * columns * inputs
    held = 4 * count * rows * columns + 8 * (3 * inputs**2 + (8 if steps else 5) * rows * columns)
    return math.ceil(held), count * (3.0 * len(weights) * product + inputs**3 / 3 + max(1, steps) * product)


def _pulled(delta: Tensor) -> Tensor:
    """Return Δ Δᵀ Δ, by the smaller product."""
    out, inputs = delta.shape
    return (delta @ delta.T) @ delta if out < inputs else delta @ (delta.T @ delta)


def is_closed(*, steps: int = 0, **parameters: Any) -> bool:
    """Tell whether the exact minimum is asked for. It does not depend on the orthonormal basis; Adam's steps do."""
    return steps == 0


def _solved(gram: Tensor, pulled: Tensor, rho: float, inputs: int) -> Tensor:
    """Return C (G + ρ tr(G) / in · 1)⁻¹; 0 where all deltas are 0."""
    ridge = rho * gram.diagonal().sum() / inputs
    if not bool(ridge > 0):
        return pulled
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return torch.full_like(pulled, torch.nan)
    return torch.cholesky_solve(pulled.T, factor).T


def _descended(start: Tensor, gram: Tensor, pulled: Tensor, steps: int) -> Tensor:
    """Run Adam on half the gradient's square form: ∇ = 2 (Δ G − C)."""
    found, mean, square = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for step in range(1, steps + 1):
        slope = (found @ gram - pulled) * 2.0
        mean.lerp_(slope, 1 - FIRST)
        square.mul_(SECOND).addcmul_(slope, slope, value=1 - SECOND)
        size = RATE / (1 - FIRST**step)
        found.addcdiv_(mean, (square / (1 - SECOND**step)).sqrt_().add_(EPSILON), value=-size)
    return found


@delta_method(
    "the Δ of least Σ ‖(Δ − w_i Δ_i) Δ_iᵀ‖² / ‖Δ_i‖²",
    "arXiv 2503.08099",
    adds=True,
    matrices=True,
    in_core=is_closed,
    nodes=nodes,
    needs=needs_of,
)
def wudi(
    *sources: Whole,
    form: Form,
    weights: DeltaFactors,
    lambda_: FallingLambda = 1.0,
    steps: Steps = 0,
    rho: Rho = 1.0,
    transposed: bool = False,
) -> Tensor:
    """Return argmin over Δ of Σ ‖(Δ − Δ_i) Δ_iᵀ‖² / ‖Δ_i‖², Δ_i of (out, in), Frobenius norms.

    steps        0: the minimum itself, Δ = (Σ Δ_i G_i)(Σ G_i + ρ tr(Σ G_i) / in · 1)⁻¹ with G_i = Δ_iᵀΔ_i / ‖Δ_i‖²;
                 else so many steps of Adam from Σ Δ_i, at the published 1e-5
    rho          ρ
    transposed   whether matrices are stored (in, out)
    lambda_      used by `matrices.nodes`

    The Δ_i are weighted: each is w_i times the model's own delta.
    """

    def merge(matrices: Matrices, out: Tensor) -> None:
        inputs = matrices.rows if transposed else matrices.columns
        gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=out.device)
        pulled, start = torch.zeros((), device=out.device), torch.zeros((), device=out.device)
        for i in range(len(weights)):
            delta = matrices.linear(i, transposed=transposed)
            square = (delta * delta).sum()
            share = 1.0 / square if bool(square != 0) else torch.zeros_like(square)
            gram += (delta.T @ delta) * share
            pulled = pulled + _pulled(delta) * share
            start = start + delta if steps else start
        full = matrices.full[0 if transposed else 1]
        merged = _descended(start, gram, pulled, steps) if steps else _solved(gram, pulled, rho, full)
        out.copy_(merged.T if transposed else merged)

    return each(sources, form, weights, merge)
