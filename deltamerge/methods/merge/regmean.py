"""RegMean: the weights whose outputs are nearest to every fine-tune's own (Jin et al., arXiv 2212.09849).

base + λ (Σ w_i Δ_i G_i)(Σ w_i G_i)⁻¹, G_i = E[x xᵀ] of a layer's inputs in fine-tune i on its own rows.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any, Protocol

from deltamerge.errors import InputError
from deltamerge.methods.merge.matrices import each
from deltamerge.methods.merge.matrices import nodes as matrix_nodes
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.methods.parameters import Lambda, RowWeights
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.methods.merge.matrices import Form, Matrices
    from deltamerge.tensors.tiles import Make

    Tensor = torch.Tensor

OffDiagonal = Annotated[float, Param("factor of the products of two inputs; below 1 it is stabler", low=0, high=1)]


class Moments(Protocol):
    """Second moments of one layer's inputs on rows: (in, in) float64 E[x xᵀ] of model i. None: no row reached it."""

    def read(self, model: int) -> Any: ...


def nodes(
    make: Make,
    function: str,
    inputs: list[Any],
    shape: tuple[int, ...],
    *,
    form: Form | None,
    lambda_: float,
    weights: tuple[float, ...],
    **parameters: Any,
) -> Any:
    """Make the node of base + λ · `function` of the whole Δ_i, then the moments of their inputs.

    Without a `form`, or with several matrices, it is base + λ Σ w_i Δ_i / Σ w_i.
    """
    if form is None or form[0] > 1:
        mean = {"weights": weights, "normalize": True, "lambda_": lambda_}
        return make(task_arithmetic, inputs[:-1], shape=shape, **mean)
    return matrix_nodes(make, function, inputs, shape, form=form, lambda_=lambda_, weights=weights, **parameters)


def needs_of(
    *, form: Form, weights: tuple[float, ...], off_diagonal: float, transposed: bool = False
) -> tuple[int, float]:
    """Return (bytes, operations).

    In memory are every model's Gram matrix, their sum and its factor. So are a delta in float32 and float64, its
    product, their sum and the solution.
    """
    count, rows, columns = form
    inputs = rows if transposed else columns
    held = 4 * count * rows * columns + 8 * ((len(weights) + 3) * inputs**2 + 5 * rows * columns)
    product = 2.0 * rows * columns * inputs
    return math.ceil(held), count * ((len(weights) + 1) * product + inputs**3 / 3)


def _placed(gram: Any, size: int, like: Tensor) -> Tensor | None:
    if gram is None:
        return None
    found = torch.as_tensor(gram, dtype=torch.float64).to(like.device)
    if found.shape != (size, size):
        raise InputError(f"a layer of {size} inputs was given {found.shape[0]}", hint="use a method without data")
    return found


def _shrunk(gram: Tensor, off_diagonal: float) -> Tensor:
    diagonal = gram.diagonal().clone()
    gram = gram * off_diagonal
    gram.diagonal().copy_(diagonal)
    return gram


def _solved(total: Tensor, pulled: Tensor) -> Tensor:
    """Return C G⁻¹ by Cholesky's factor; NaN where G is not finite."""
    if not bool(total.isfinite().all()):
        return torch.full_like(pulled, torch.nan)
    factor, failed = torch.linalg.cholesky_ex(total)
    if int(failed):
        raise InputError(
            "regmean: the inputs of a layer do not determine its weights",
            hint="parameters: {off_diagonal: 0.9}, or more calibration rows",
        )
    return torch.cholesky_solve(pulled.T, factor).T


@delta_method(
    "(Σ w_i Δ_i G_i)(Σ w_i G_i)⁻¹, G_i = E[x xᵀ] of a layer's inputs in fine-tune i on its own rows",
    "arXiv 2212.09849",
    adds=True,
    matrices=True,
    nodes=nodes,
    rows="inputs",
    needs=needs_of,
)
def regmean(
    *inputs: Any,
    form: Form,
    weights: RowWeights,
    off_diagonal: OffDiagonal = 0.9,
    lambda_: Lambda = 1.0,
    transposed: bool = False,
) -> Tensor:
    """Return (Σ w_i Δ_i G_i)(Σ w_i G_i)⁻¹, the least Σ w_i E‖(Δ − Δ_i) x_i‖².

    inputs        the Δ_i, of (out, in), then their `Moments`: G_i = E[x_i x_iᵀ] over the tokens of rows of model i
    weights       w_i
    off_diagonal  factor of the entries of G_i off its diagonal
    transposed    whether matrices are stored (in, out)
    lambda_       used by `nodes`

    A feature that is 0 in all rows, and a layer that no row of some model reaches, gets the weighted mean of the Δ_i.
    InputError: Σ w_i G_i is singular.
    """
    moments: Moments
    *sources, moments = inputs
    alike = (1.0,) * len(sources)

    def merge(matrices: Matrices, out: Tensor) -> None:
        size = matrices.rows if transposed else matrices.columns
        found = [_placed(moments.read(i), size, out) for i in range(len(sources))]
        grams = [_shrunk(one, off_diagonal) for one in found if one is not None]
        if len(grams) < len(sources):
            grams = [torch.eye(size, dtype=torch.float64, device=out.device) for _ in sources]
        idle = sum(gram.diagonal() for gram in grams) == 0
        total, pulled = torch.zeros_like(grams[0]), torch.zeros((), device=out.device)
        for i, weight in enumerate(weights):
            delta = matrices.linear(i, transposed=transposed)
            grams[i].diagonal()[idle] = 1.0
            total.add_(grams[i], alpha=weight)
            pulled = pulled + (delta @ grams[i]) * weight
        solved = _solved(total, pulled)
        out.copy_(solved.T if transposed else solved)

    return each(tuple(sources), form, alike, merge)
