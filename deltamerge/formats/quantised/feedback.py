"""Codes chosen by a layer's inputs: later columns make up for the rounding errors of earlier columns.

The loss of a weight W (rows, n), stored as Q, is tr(δ C δᵀ) = Σ over rows of E(δ x)², with δ = W − Q and the second
moments C = E[x xᵀ] of the layer's inputs. With H = C + λI = R Rᵀ, R upper triangular, and d_k = R_kk²,

    tr(δ H δᵀ) = Σ_k d_k ‖w_k − q_k‖²,    w_k = W_k + Σ_{j<k} δ_j R_jk / R_kk

so that column k is rounded from w_k, which includes the errors of the columns before it. These are the codes of GPTQ
(Frantar et al., arXiv 2210.17323), which factors H⁻¹ instead: U = R⁻¹ (Chee et al., arXiv 2307.13304, theorem 6).
Columns are taken by falling C_kk, and scales minimise Σ d_k (W_k − q_k)². A row keeps the nearest codes if they lose
less.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import fsum
from typing import NamedTuple

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import CodedMatrix, Lattice
from deltamerge.formats.quantised.codes import Doubles, Floats
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.lazy import torch

DAMPING = 0.01  # λ, as a share of the mean of C's diagonal
PANEL = 64  # columns whose errors reach the columns after them at once
ROOM = 1 << 21  # elements of the rows that are coded together, in float64
OTHER_ROWS = "give other rows (calibration), or rounding: nearest"


class SquareSums(NamedTuple):
    """Squares of a weight and its delta Δ = W − base, as norms and as the squares E‖· x‖² of the layer's outputs.

    lost      of W − Q;  norm  of W;  delta  of Δ;  written  of Q − base
    nearest   of W − Q, were Q the nearest codes
    """

    lost: float
    norm: float
    delta: float = 0.0
    written: float = 0.0
    lost_outputs: float = 0.0
    norm_outputs: float = 0.0
    delta_outputs: float = 0.0
    written_outputs: float = 0.0
    nearest_outputs: float = 0.0


def total(sums: Sequence[Sequence[float]]) -> SquareSums:
    """Return the sums of several parts."""
    return SquareSums(*(fsum(own) for own in zip(*sums, strict=True))) if sums else SquareSums(0.0, 0.0)


class Factor(NamedTuple):
    """Columns in the order of their rounding, their d, and the rows R_jk / R_kk of errors that reach column k."""

    order: Array
    weights: Doubles
    reach: Doubles


def factor(moments: Doubles) -> Factor | None:
    """Return the factor of C (n, n); None: C is 0. InputError: C is not finite."""
    diagonal = np.diagonal(moments)
    mean = float(diagonal.mean())
    if not np.isfinite(mean):
        raise InputError("its inputs on the calibration rows are not finite", hint=OTHER_ROWS)
    if mean <= 0:
        return None
    order = np.argsort(-diagonal, kind="stable")
    backward = order[::-1]
    turned = moments[np.ix_(backward, backward)]
    turned[np.diag_indices_from(turned)] += DAMPING * mean
    upper = torch.linalg.cholesky(torch.from_numpy(turned)).numpy()[::-1, ::-1]
    roots = np.diagonal(upper).copy()
    return Factor(order, np.square(roots), np.ascontiguousarray((upper / roots).T))


@dataclass(frozen=True, slots=True, eq=False)
class Feedback:
    """Chooses the codes of a weight, or measures the nearest ones.

    moments   returns C of a matrix of the weight by its number; None: no row has reached it
    height    rows of a matrix
    delta     Δ of the same shape as the weight; None: there is no base
    feeds     whether codes are chosen by inputs
    sums      gets the sums of each matrix
    """

    moments: Callable[[int], Doubles | None]
    height: int
    delta: Floats | None
    feeds: bool
    sums: list[SquareSums] = field(default_factory=list)

    def turned(self) -> Feedback:
        """Return this feedback for the transpose of its single matrix."""
        delta = None if self.delta is None else np.ascontiguousarray(self.delta.T)
        return replace(self, delta=delta, height=sys.maxsize)

    def of_columns(self, order: Array) -> Feedback:
        """Return the same for the weight with its columns in another order."""
        if (order == np.arange(len(order))).all():
            return self

        def moments(number: int) -> Doubles | None:
            found = self.moments(number)
            return None if found is None else found[np.ix_(order, order)]

        delta = None if self.delta is None else np.ascontiguousarray(self.delta[:, order])
        return replace(self, delta=delta, moments=moments)

    def code(self, values: Floats, lattice: Lattice) -> CodedMatrix:
        """Return `values` coded with numbers of `lattice`."""
        m, rows = lattice.block[0], len(values)
        if rows > self.height and self.height % m:
            raise InputError("some of its scales are of two experts", hint="leave output.rounding out")
        made = lattice.nearest(values)
        for number, own in self._matrices(rows):
            part = _of_rows(made, own, slice(own.start // m, -(-own.stop // m)))
            delta = None if self.delta is None else self.delta[own]
            _matrix(values[own], lattice, self.moments(number), delta, part, self)
        return made

    def keep(self, values: Floats) -> None:
        """Add the sums of a weight that is stored exactly."""
        for number, own in self._matrices(len(values)):
            nothing, delta = np.zeros(values[own].shape), None if self.delta is None else self.delta[own]
            seen = np.zeros(len(nothing))
            self.sums.append(_sums(values[own], nothing, seen, seen, delta, self.moments(number)))

    def _matrices(self, rows: int) -> Iterator[tuple[int, slice]]:
        for number, top in enumerate(range(0, rows, self.height)):
            yield number, slice(top, min(rows, top + self.height))


def _of_rows(made: CodedMatrix, rows: slice, blocks: slice) -> CodedMatrix:
    """Return views of the rows of a matrix."""
    scales, zeros, biases = (None if part is None else part[blocks] for part in made[1:4])
    assert scales is not None
    return CodedMatrix(made.codes[rows], scales, zeros, biases, 0.0)


def _matrix(
    values: Floats, lattice: Lattice, moments: Doubles | None, delta: Floats | None, made: CodedMatrix, asked: Feedback
) -> None:
    """Choose the codes of one matrix, and add its sums. `made` has the nearest codes."""
    found = None if moments is None else factor(moments)
    moments = moments if found is not None else None
    other: CodedMatrix | None = None
    if found is not None and asked.feeds:
        weights = np.empty_like(found.weights)
        weights[found.order] = found.weights
        other = lattice.nearest(values, weights)
    for rows, blocks in _pieces(values.shape, lattice.block[0]):
        piece = _of_rows(made, rows, blocks)
        exact = values[rows].astype(np.float64)
        lost = exact - _decoded(piece, lattice)
        seen = _outputs(lost, moments)
        nearest = seen
        if other is not None and found is not None:
            fed = _of_rows(other, rows, blocks)
            fed.codes[...] = _fed(exact, lattice, fed, found)
            apart = exact - _decoded(fed, lattice)
            seen_apart = _outputs(apart, moments)
            better = _by_block(seen_apart, lattice.block[0]) < _by_block(seen, lattice.block[0])
            of_rows = np.repeat(better, lattice.block[0])[: len(seen)]
            piece.codes[of_rows] = fed.codes[of_rows]
            for old, new in zip(piece[1:4], fed[1:4], strict=True):
                if old is not None and new is not None:
                    old[better] = new[better]
            lost[of_rows] = apart[of_rows]
            seen = np.where(of_rows, seen_apart, seen)
        asked.sums.append(_sums(values[rows], lost, seen, nearest, None if delta is None else delta[rows], moments))


def _pieces(shape: tuple[int, ...], m: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows that are coded together, and the rows of their scales."""
    rows, columns = shape
    step = max(1, ROOM // max(1, columns * m)) * m
    for top in range(0, rows, step):
        bottom = min(rows, top + step)
        yield slice(top, bottom), slice(top // m, -(-bottom // m))


def _spread(values: Array, lattice: Lattice, rows: int) -> Array:
    """Return the numbers of blocks (a, b) as (b, rows)."""
    return np.ascontiguousarray(np.repeat(values, lattice.block[0], axis=0)[:rows].T)


def _decoded(made: CodedMatrix, lattice: Lattice) -> Floats:
    """Return the float32 values of coded rows."""
    rows, columns = made.codes.shape
    of_columns = np.arange(columns) // lattice.block[1]
    found = lattice.numbers.values(made.codes)
    if made.zeros is not None:
        found = found - _spread(made.zeros.astype(np.float32), lattice, rows)[of_columns].T
    found = found * _spread(lattice.scales(made.scales), lattice, rows)[of_columns].T
    return np.asarray(found, np.float32)


def _fed(exact: Doubles, lattice: Lattice, made: CodedMatrix, found: Factor) -> Array:
    """Return the codes of rows on the scales of `made`, with the errors fed forward."""
    rows, columns = exact.shape
    order, reach = found.order, found.reach
    wanted = np.ascontiguousarray(exact.T[order])
    lost, codes = np.empty_like(wanted), np.empty((columns, rows), np.uint8)
    reached, errors = torch.from_numpy(reach), torch.from_numpy(lost)
    scales = _spread(lattice.scales(made.scales), lattice, rows)
    zeros = None if made.zeros is None else _spread(made.zeros.astype(np.float32), lattice, rows)
    numbers, of_columns = lattice.numbers, order // lattice.block[1]
    for left in range(0, columns, PANEL):
        right = min(columns, left + PANEL)
        targets = torch.from_numpy(wanted[left:right]).addmm(reached[left:right, :left], errors[:left])
        for k in range(left, right):
            scale = scales[of_columns[k]]
            target = targets[k - left].addmv(errors[left:k].T, reached[k, left:k]).numpy()
            quotient = (target / scale).astype(np.float32)
            if zeros is None:
                codes[k] = numbers.codes(quotient)
                back = numbers.values(codes[k]) * scale
            else:
                zero = zeros[of_columns[k]]
                codes[k] = numbers.codes(np.rint(quotient) + zero)
                back = (numbers.values(codes[k]) - zero) * scale
            np.subtract(wanted[k], back, out=lost[k])
    placed = np.empty((rows, columns), np.uint8)
    placed[:, order] = codes.T
    return placed


def _outputs(rows: Array, moments: Doubles | None) -> Doubles:
    """Return r C rᵀ of each row r; 0 without C."""
    if moments is None:
        return np.zeros(len(rows))
    own = moments if rows.dtype == np.float64 else moments.astype(np.float32)
    seen = (torch.from_numpy(rows) @ torch.from_numpy(own)).numpy()
    found: Doubles = np.einsum("ij,ij->i", seen, rows, dtype=np.float64, casting="safe")
    return np.maximum(found, 0.0)


def _by_block(values: Doubles, m: int) -> Doubles:
    """Return the sums of values of rows that share scales."""
    found: Doubles = np.add.reduceat(values, np.arange(0, len(values), m))
    return found


def _sums(
    values: Floats, lost: Doubles, seen: Doubles, nearest: Doubles, delta: Floats | None, moments: Doubles | None
) -> SquareSums:
    """Return the sums of rows. `seen` and `nearest` are the losses of their outputs."""
    of_values = float(_outputs(values, moments).sum())
    found = SquareSums(
        _square(lost), _square(values), 0.0, 0.0, float(seen.sum()), of_values, 0.0, 0.0, float(nearest.sum())
    )
    if delta is None:
        return found
    written = (delta - lost).astype(np.float32)
    return found._replace(
        delta=_square(delta),
        written=_square(written),
        delta_outputs=float(_outputs(delta, moments).sum()),
        written_outputs=float(_outputs(written, moments).sum()),
    )


def _square(values: Array) -> float:
    return float(np.einsum("ij,ij->", values, values, dtype=np.float64, casting="safe"))
