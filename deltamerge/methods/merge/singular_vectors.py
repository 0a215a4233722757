"""Singular triplets of tall matrices, and matrices made from triplets with orthonormal vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from deltamerge.methods.merge.matrices import Tall, gram, inverse, largest, multiply, polar
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    Tensor = torch.Tensor
    # vectors of the long side (ℓ, k), values (k), vectors of the short side (r, k)
    Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]


def triplets(matrix: Tall, count: int) -> Triplets:
    """Return the top `count` triplets of a matrix."""
    squares = gram(matrix)
    values, right, scaled = _directions(squares, count, squares.diagonal().sum().sqrt())
    return torch.cat([block @ scaled for _, block in matrix.blocks()]), values, right


def _directions(squares: Tensor, count: int, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return S, V and V S⁻¹ of the `count` largest of AᵀA; 0 for directions of rounding beside the norm `size`."""
    values, right = largest(squares, count)
    scale = inverse(values, size)
    return values, right * (scale != 0), right * scale


def triplets_apart(matrix: Tall, directions: Tensor, count: int, *, short: bool) -> Triplets:
    """Return the top `count` triplets of a matrix minus its projection onto orthonormal directions.

    directions   on its short side, (r, k), or on its long side, (ℓ, k)
    """
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


def side_by_side(parts: list[Triplets]) -> Triplets:
    """Put triplets side by side."""
    long, values, short = (torch.cat(list(several), -1) for several in zip(*parts, strict=True))
    return long, values, short


def orthonormal(long: Tensor, values: Tensor, short: Tensor, out: Tensor) -> None:
    """Set out = L⊥ diag(values) R⊥ᵀ, with vectors of the long and of the short side made orthonormal."""
    matrix = Tall(long)
    multiply(matrix, polar(matrix) @ (values[:, None] * (short @ polar(Tall(short))).T), out)
