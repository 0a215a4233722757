"""Merges by singular vectors: isotropic merging (iso_c, iso_cts) and task singular vectors (tsv_m)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.io.lazy import torch
from deltamerge.methods.merge.whole import (
    Form,
    Matrices,
    Projected,
    Tall,
    bytes_of,
    each,
    inverse,
    multiply,
    polar,
    spectrum,
)
from deltamerge.methods.tiles import Whole

if TYPE_CHECKING:
    Tensor = torch.Tensor


def iso_c(*sources: Whole, form: Form, weights: tuple[float, ...]) -> Tensor:
    """mean(S) · U Vᵀ, U S Vᵀ = Σ w_i Δ_i: all singular values of the sum are made equal (Marczak et al., "No task left
    behind", arXiv 2502.04959, Algorithm 1). Directions whose singular value is nothing but rounding are left out."""

    def merge(matrices: Matrices, out: Tensor) -> None:
        total = matrices.total()
        values, right = spectrum(total)
        multiply(total, (right * (inverse(values) * values.mean())) @ right.T, out)

    return each(sources, form, weights, merge)


def iso_c_bytes(*, elements: int, form: Form, weights: tuple[float, ...]) -> int:
    """The total."""
    return bytes_of(form, float64=1, square=6)


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
        shared = rank - own * count
        total = matrices.total()
        parts = [_triplets(total, shared)]
        del total
        left = parts[0][2 if matrices.is_wide else 0]
        for i in range(count if own else 0):
            delta = matrices.delta(i)
            apart = Projected.off(delta, left, short=matrices.is_wide) if shared else delta
            parts.append(_triplets(apart, own))
        long, values, short = _joined(parts)
        _isotropic(long, torch.full_like(values, 1.0) * values.mean(), short, out)

    return each(sources, form, weights, merge)


def iso_cts_bytes(*, elements: int, form: Form, weights: tuple[float, ...], common: float) -> int:
    """The total or a delta, the triplets, twice while they are joined."""
    return bytes_of(form, float64=3.5, square=10)


def tsv_m(*sources: Whole, form: Form, weights: tuple[float, ...]) -> Tensor:
    """U⊥ diag(S) V⊥ᵀ of the top r / n triplets of each of n w_i Δ_i, side by side; U⊥ and V⊥ are the nearest
    orthonormal matrices to their U and V (Gargiulo et al., "Task singular vectors", arXiv 2412.00081, Algorithm 1).

    int(r / n) triplets, but at least one.
    """

    def merge(matrices: Matrices, out: Tensor) -> None:
        own = max(1, matrices.rank // len(weights))
        parts = [_triplets(matrices.delta(i), own) for i in range(len(weights))]
        _isotropic(*_joined(parts), out)

    return each(sources, form, weights, merge)


def tsv_m_bytes(*, elements: int, form: Form, weights: tuple[float, ...]) -> int:
    """A delta, the triplets, twice while they are joined."""
    return bytes_of(form, float64=2.5, square=10)


def _triplets(matrix: Tall | Projected, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The top `count` triplets: vectors of the long side (ℓ, count), values, vectors of the short side (r, count)."""
    values, right = spectrum(matrix)
    values, right = values[:count], right[:, :count]
    scaled = right * inverse(values) if count else right
    return torch.cat([block @ scaled for _, block in matrix.blocks()]), values, right


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets side by side."""
    long, values, short = (torch.cat(list(several), -1) for several in zip(*parts, strict=True))
    return long, values, short


def _isotropic(long: Tensor, values: Tensor, short: Tensor, out: Tensor) -> None:
    """out = L⊥ diag(values) R⊥ᵀ of vectors of the long and of the short side."""
    matrix = Tall(long)
    multiply(matrix, polar(matrix) @ (values[:, None] * (short @ polar(Tall(short))).T), out)
