"""Merges by singular vectors: isotropic merging (iso_c, iso_cts) and task singular vectors (tsv_m)."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from deltamerge.io.lazy import torch
from deltamerge.methods.merge.whole import (
    Form,
    Matrices,
    Tall,
    each,
    gram,
    inverse,
    largest,
    multiply,
    needs,
    polar,
    spectrum,
)
from deltamerge.methods.tiles import Whole

if TYPE_CHECKING:
    Tensor = torch.Tensor
    # vectors of the long side (ℓ, k), values (k), vectors of the short side (r, k)
    Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]


def iso_c(*sources: Whole, form: Form, weights: tuple[float, ...]) -> Tensor:
    """mean(S) · U Vᵀ, U S Vᵀ = Σ w_i Δ_i: all singular values of the sum are made equal (Marczak et al., "No task left
    behind", arXiv 2502.04959, Algorithm 1). Directions whose singular value is nothing but rounding are left out."""

    def merge(matrices: Matrices, out: Tensor) -> None:
        total = matrices.total()
        values, right = spectrum(total)
        multiply(total, (right * (inverse(values, values.max()) * values.mean())) @ right.T, out)

    return each(sources, form, weights, merge)


def iso_c_needs(*, form: Form, weights: tuple[float, ...]) -> tuple[int, float]:
    """The total is held."""
    return needs(form, matrices=1, squares=6, spectra=1, products=1)


def iso_cts(*sources: Whole, form: Form, weights: tuple[float, ...], common: float) -> Tensor:
    """iso_c with a part of the directions given to each task (arXiv 2502.04959, Algorithm 2).

    common   fraction of the r directions that stay those of Σ w_i Δ_i

    k = r − n · round((r − int(common · r)) / n), at least r mod n, directions are those of the sum of n models. Of each
    w_i Δ_i, projected off the k left vectors, the top (r − k) / n are added; U and V are replaced by the nearest
    orthonormal matrices, all singular values by their mean.
    """

    def merge(matrices: Matrices, out: Tensor) -> None:
        count, rank = len(weights), matrices.rank
        own = min(round((rank - int(rank * common)) / count), rank // count)
        parts = [_triplets(matrices.total(), rank - own * count)]
        left = parts[0][2 if matrices.is_wide else 0]
        for i in range(count if own else 0):
            parts.append(_apart(matrices.delta(i), left, own, short=matrices.is_wide))
        long, values, short = _joined(parts)
        _orthonormal(long, values.mean().expand_as(values), short, out)

    return each(sources, form, weights, merge)


def iso_cts_needs(*, form: Form, weights: tuple[float, ...], common: float) -> tuple[int, float]:
    """The total or a delta is held, and the triplets, twice while they are joined."""
    return needs(form, matrices=3.5, squares=10, grams=3 + len(weights), products=3 + 2 * len(weights))


def tsv_m(*sources: Whole, form: Form, weights: tuple[float, ...]) -> Tensor:
    """U⊥ diag(S) V⊥ᵀ of the top r / n triplets of each of n w_i Δ_i, side by side; U⊥ and V⊥ are the nearest
    orthonormal matrices to their U and V (Gargiulo et al., "Task singular vectors", arXiv 2412.00081, Algorithm 1).

    int(r / n) triplets, but at least one.
    """

    def merge(matrices: Matrices, out: Tensor) -> None:
        own = max(1, matrices.rank // len(weights))
        parts = [_triplets(matrices.delta(i), own) for i in range(len(weights))]
        _orthonormal(*_joined(parts), out)

    return each(sources, form, weights, merge)


def tsv_m_needs(*, form: Form, weights: tuple[float, ...]) -> tuple[int, float]:
    """A delta is held, and the triplets, twice while they are joined."""
    return needs(form, matrices=2.5, squares=10, grams=2 + len(weights), products=2)


def _triplets(matrix: Tall, count: int) -> Triplets:
    """The top `count` triplets of a matrix."""
    squares = gram(matrix)
    values, right, scaled = _directions(squares, count, squares.diagonal().sum().sqrt())
    return torch.cat([block @ scaled for _, block in matrix.blocks()]), values, right


def _directions(squares: Tensor, count: int, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """S, V and V S⁻¹ of AᵀA's `count` largest, for an A of norm `size` or a part of it; what is no direction is 0."""
    values, right = largest(squares, count)
    scale = inverse(values, size)
    return values, right * (scale != 0), right * scale


def _apart(matrix: Tall, directions: Tensor, count: int, *, short: bool) -> Triplets:
    """The top `count` triplets of a matrix less its projection onto orthonormal directions of its short side, (r, k),
    or of its long one, (ℓ, k)."""
    squares = gram(matrix)
    size = squares.diagonal().sum().sqrt()
    if short:
        off = torch.eye(len(squares), dtype=squares.dtype, device=squares.device) - directions @ directions.T
        values, right, scaled = _directions(off @ squares @ off, count, size)
        return torch.cat([block @ (off @ scaled) for _, block in matrix.blocks()]), values, right
    along = torch.zeros(directions.shape[1], len(squares), dtype=squares.dtype, device=squares.device)
    for part, block in matrix.blocks():
        along.addmm_(directions[part].T, block)
    values, right, scaled = _directions(squares - along.T @ along, count, size)
    long = torch.cat([block @ scaled for _, block in matrix.blocks()])
    return long.addmm_(directions, along @ scaled, alpha=-1), values, right


def _joined(parts: list[Triplets]) -> Triplets:
    """Triplets side by side."""
    long, values, short = (torch.cat(list(several), -1) for several in zip(*parts, strict=True))
    return long, values, short


def _orthonormal(long: Tensor, values: Tensor, short: Tensor, out: Tensor) -> None:
    """out = L⊥ diag(values) R⊥ᵀ of vectors of the long and of the short side."""
    matrix = Tall(long)
    multiply(matrix, polar(matrix) @ (values[:, None] * (short @ polar(Tall(short))).T), out)
