"""Merges of whole matrices: the parts that they share, from the graph's nodes to factors in float64.

A tensor is a batch of matrices: one for a linear layer, an expert each for stacked experts, (out, in · kernel) for a
convolution. The matrices are merged one after another. Their deltas are read in float32 and computed with in float64;
the merged delta is rounded to float32 once. All work that is cubic is on a matrix's smaller side r: a matrix A of ℓ × r
is only multiplied from the right. If all directions count alike, singular values and right vectors come from A's R
factor (r × r), which is made from blocks of rows and has A's condition number. If only large directions count, or A has
nearly orthonormal columns, they come from AᵀA. It has the square of the condition number and takes half the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from deltamerge.errors import InputError
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Make, Tile, Whole

    Tensor = torch.Tensor
    # vectors of the long side (ℓ, k), values (k), vectors of the short side (r, k)
    Triplets: TypeAlias = tuple[Tensor, Tensor, Tensor]

# Singular values up to this share of the largest have no direction: they are rounding errors of float32.
TINY = 2.0**-20
BLOCK = 1 << 20  # least elements of a block of rows; results depend on it

Form = tuple[int, ...]
"""The number of matrices in a tensor, and the rows and columns of each. A core also has its whole matrix's."""


def nodes(
    make: Make,
    function: str,
    inputs: list[Any],
    shape: tuple[int, ...],
    *,
    based: bool,
    form: Form | None,
    transposed: bool,
    lambda_: float,
    weights: tuple[float, ...],
    **parameters: Any,
) -> Any:
    """Make the node of base + λ · `function` of the whole w_i Δ_i; without a `form`, of the mean in its place.

    λ of the mean is 1 at most. A larger λ is for methods that shorten matrices, and the mean is not shortened.
    `transposed`: matrices are stored (in, out).
    """
    base, *deltas = inputs
    if form is None:
        mean = {"weights": weights, "normalize": False, "lambda_": min(1.0, lambda_) / len(weights)}
        return make(task_arithmetic, inputs, shape=shape, **mean)
    if transposed:
        parameters["transposed"] = True
    merged = make(function, deltas, kind="whole", shape=shape, form=form, weights=weights, **parameters)
    return make(add, [base, merged], shape=shape, lambda_=lambda_)


def add(base: Tensor, merged: Tensor, *, tile: Tile, lambda_: float) -> Tensor:
    """Return base + λ · merged in float32, of a tile and the merged delta of the whole tensor."""
    part = merged[tile.start : tile.stop]
    return base.to(torch.float32) + (part if lambda_ == 1 else part * lambda_)


def always(**parameters: Any) -> bool:
    """Return True, as `MergeMethod.in_core` of a method that never depends on the orthonormal basis."""
    return True


@dataclass(frozen=True, slots=True)
class Matrices:
    """The deltas w_i Δ_i of one matrix of a tensor, (rows, columns) each; `full` are the whole matrix's sides."""

    sources: tuple[Whole, ...]
    weights: tuple[float, ...]
    index: int
    rows: int
    columns: int
    full: tuple[int, ...]

    @property
    def rank(self) -> int:
        """Return the smaller side of the whole matrix: its number of directions, including those outside a core."""
        return min(self.full)

    @property
    def is_wide(self) -> bool:
        return self.rows < self.columns

    def delta(self, i: int) -> Tall:
        """Return w_i Δ_i."""
        return self._tall(self._read(i), self.weights[i])

    def linear(self, i: int, *, transposed: bool) -> Tensor:
        """Return w_i Δ_i in float64 as (out, in). `transposed`: it is stored (in, out)."""
        values = self._read(i)
        return (values.T if transposed else values).to(torch.float64) * self.weights[i]

    def total(self) -> Tall:
        """Return Σ w_i Δ_i in float64."""
        size, step = self.rows * self.columns, max(1, BLOCK // self.columns) * self.columns
        values = torch.zeros(size, dtype=torch.float64, device=self.sources[0].device)
        part = torch.empty(min(step, size), dtype=torch.float32, device=values.device)
        for start in range(0, size, step):
            into = values[start : start + step]
            for source, weight in zip(self.sources, self.weights, strict=True):
                source.fill(self.index * size + start, part[: len(into)])
                into += part[: len(into)].to(torch.float64) * weight
        return self._tall(values.view(self.rows, self.columns), 1.0)

    def _read(self, i: int) -> Tensor:
        values = torch.empty(self.rows * self.columns, dtype=torch.float32, device=self.sources[i].device)
        self.sources[i].fill(self.index * len(values), values)
        return values.view(self.rows, self.columns)

    def _tall(self, values: Tensor, factor: float) -> Tall:
        return Tall(values.T if self.is_wide else values, factor)


@dataclass(frozen=True, slots=True)
class Tall:
    """factor · values, a matrix of ℓ × r with ℓ ≥ r, read by blocks of rows in float64."""

    values: Tensor
    factor: float = 1.0

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Return rows and their values."""
        rows, columns = self.values.shape
        step = max(2 * columns, BLOCK // columns)
        for start in range(0, rows, step):
            part = slice(start, min(rows, start + step))
            values = self.values[part].to(torch.float64)
            yield part, values if self.factor == 1 else values * self.factor


def spectrum(matrix: Tall) -> tuple[Tensor, Tensor]:
    """Return (S, V) from R: all singular values (r), descending, and right vectors (r, r). NaN if A is not finite."""
    found: Tensor | None = None
    for _, block in matrix.blocks():
        found = torch.linalg.qr(block if found is None else torch.cat([found, block]), mode="r").R
    assert found is not None
    if not bool(found.isfinite().all()):
        return torch.full_like(found[0], torch.nan), torch.full_like(found, torch.nan)
    with solved_by("svd"):
        _, values, right = torch.linalg.svd(found)
    return values, positive(right.T)


def gram(matrix: Tall) -> Tensor:
    """Return AᵀA (r, r)."""
    size = matrix.values.shape[1]
    total = matrix.values.new_zeros(size, size, dtype=torch.float64)
    for _, block in matrix.blocks():
        total.addmm_(block.T, block)
    return total


def largest(gram: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return (S, V) from AᵀA: the largest singular values (count), descending, and right vectors (r, count).

    NaN if A is not finite.
    """
    if not bool(gram.isfinite().all()):
        return gram.new_full((count,), torch.nan), gram.new_full((len(gram), count), torch.nan)
    with solved_by("eigh"):
        squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0)[:count].clamp(min=0).sqrt(), positive(vectors.flip(1)[:, :count])


@contextmanager
def solved_by(name: str) -> Iterator[None]:
    """Raise InputError in place of LAPACK's error: a decomposition did not converge."""
    try:
        yield
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # torch has it
        raise InputError(f"{name} failed: {error}", hint="merge these models with another method") from error


def positive(vectors: Tensor) -> Tensor:
    """Give each column the sign that makes its largest entry positive, the first if several are largest."""
    return vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()


def inverse(values: Tensor, largest: Tensor) -> Tensor:
    """Return 1 / σ; 0 if σ is too small beside the largest to have a direction."""
    return torch.where(values <= TINY * largest, 0.0, 1.0 / values)


def polar(matrix: Tall) -> Tensor:
    """Return P = V S⁻¹ Vᵀ (r, r): A P is the nearest matrix of orthonormal columns to A, U Vᵀ."""
    values, right = largest(gram(matrix), matrix.values.shape[1])
    return (right * inverse(values, values.max())) @ right.T


def each(
    sources: tuple[Whole, ...], form: Form, weights: tuple[float, ...], merge: Callable[[Matrices, Tensor], None]
) -> Tensor:
    """Return the merged delta of a tensor, flat float32. `merge` writes the delta of one matrix, (rows, columns)."""
    count, rows, columns = form[:3]
    out = torch.empty(count, rows, columns, dtype=torch.float32, device=sources[0].device)
    for i in range(count):
        merge(Matrices(sources, weights, i, rows, columns, form[-2:]), out[i])
    return out.view(-1)


def multiply(matrix: Tall, right: Tensor, out: Tensor) -> None:
    """Set out = A · right in the dtype of `out`. Like A, `out` is transposed if it has fewer rows than columns."""
    out = out.T if out.shape[0] < out.shape[1] else out
    for part, block in matrix.blocks():
        out[part] = (block @ right).to(out.dtype)


def needs(
    form: Form, *, matrices: float, squares: float, spectra: float = 0, grams: float = 0, products: float = 0
) -> tuple[int, float]:
    """Return (bytes, operations) of a merge.

    matrices, squares   matrices in memory at once in float64, of ℓ × r and of r × r
    spectra, grams      decompositions for each matrix, by R and by AᵀA
    products            of ℓ × r by r × r for each matrix
    """
    count, rows, columns = form[:3]
    small, long = min(rows, columns), max(rows, columns)
    block = max(2 * small, BLOCK // small) * small
    held = 4 * count * rows * columns + 8 * (matrices * rows * columns + squares * small**2 + 3 * block)
    product, cube = 2.0 * long * small**2, 1.0 * small**3
    work = spectra * (1.4 * product + 20 * cube) + grams * (product + 9 * cube) + products * product
    return math.ceil(held), count * work


# ---- singular triplets of tall matrices


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
