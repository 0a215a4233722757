"""Iso-CTS: `iso_c` with a part of the directions given to each task (Marczak et al., arXiv 2502.04959, Algorithm 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.merge.matrices import each, needs, nodes, orthonormal, side_by_side, triplets, triplets_apart
from deltamerge.methods.parameters import DeltaFactors, Lambda
from deltamerge.methods.registry import Param, delta_method

if TYPE_CHECKING:
    import torch

    from deltamerge.methods.merge.matrices import Form, Matrices
    from deltamerge.tensors.tiles import Whole

Common = Annotated[float, Param("fraction of the directions taken from the sum", low=0, high=1)]


def needs_of(
    *, form: Form, weights: tuple[float, ...], common: float = 0.8, transposed: bool = False
) -> tuple[int, float]:
    """Return (bytes, operations). In memory are the sum or a delta, and the triplets, twice while they are joined."""
    return needs(form, matrices=3.5, squares=10, grams=3 + len(weights), products=3 + 2 * len(weights))


@delta_method(
    "iso_c with 1 − common of the directions taken from each w_i Δ_i apart from the sum's",
    "arXiv 2502.04959",
    adds=True,
    matrices=True,
    nodes=nodes,
    needs=needs_of,
)
def iso_cts(
    *sources: Whole,
    form: Form,
    weights: DeltaFactors,
    lambda_: Lambda = 1.0,
    common: Common = 0.8,
    transposed: bool = False,
) -> torch.Tensor:
    """Return `iso_c` with a part of the directions given to each task (Algorithm 2).

    common       fraction of the r directions that come from Σ w_i Δ_i
    lambda_      used by `matrices.nodes`
    transposed   whether matrices are stored (in, out)

    The sum of n models gives k = r − n · round((r − int(common · r)) / n) directions, at least r mod n. Each w_i Δ_i is
    projected off the k left vectors and adds its top (r − k) / n directions. U and V are replaced by the nearest
    orthonormal matrices, all singular values by their mean.
    """

    def merge(matrices: Matrices, out: torch.Tensor) -> None:
        count, rank = len(weights), matrices.rank
        own = min(round((rank - int(rank * common)) / count), rank // count)
        parts = [triplets(matrices.total(), rank - own * count)]
        short = matrices.is_wide != transposed  # whether left vectors, of the outputs, lie on the short side
        left = parts[0][2 if short else 0]
        for i in range(count if own else 0):
            parts.append(triplets_apart(matrices.delta(i), left, own, short=short))
        long, values, other = side_by_side(parts)
        orthonormal(long, values.mean().expand_as(values), other, out)

    return each(sources, form, weights, merge)
