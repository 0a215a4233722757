"""Scales on a grid over a weight: which scale belongs to which element, read row by row and checked.

A weight (…, rows, columns) is cut into blocks of m × n elements; the scales are (…, ⌈rows/m⌉, ⌈columns/n⌉). One scale
for the tensor, one a matrix of a stack, one a row, one a column and groups of a row are such grids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.formats.quantised.weight import Array, Floats, bits
from deltamerge.tensors.dtypes import PLAIN, widen
from deltamerge.tensors.tensor import Read, TensorInfo

# Exponents: 2^(code − 127). transformers and compressed-tensors write them in either dtype.
EXPONENTS = frozenset({"F8_E8M0", "U8"})
SCALES = PLAIN | EXPONENTS
Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Grid:
    """`height` rows of each matrix of a weight, in blocks of `m` rows and `n` columns: `down` × `across` blocks."""

    height: int
    m: int
    n: int
    down: int
    across: int

    def rows_of(self, top: int, bottom: int) -> NDArray[np.int64]:
        """The row of blocks of each of the weight's rows [top, bottom), the matrices of a stack one below the other."""
        numbers = np.arange(top, bottom)
        return numbers // self.height * self.down + numbers % self.height // self.m

    def spread(self, values: Floats, columns: int) -> Floats:
        """Values (…, across) for each of `columns` columns; one column where they are the same."""
        return values if self.across == 1 else np.repeat(values, self.n, axis=-1)[..., :columns]


def grid(shape: tuple[int, ...], scales: tuple[int, ...], said: Block | None = None, *, whole: bool = False) -> Grid:
    """The grid of a weight of `shape` whose scales have the shape `scales`.

    `said` is the block that config.json states; one scale for all of the weight needs none. Without it the shapes tell:
    blocks are then equal.
    `whole`: blocks must divide the weight.
    InputError: no such grid.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if math.prod(scales) == 1:
        return Grid(max(1, rows), max(1, rows), max(1, columns), 1, 1)
    stack, height = shape[:-2], shape[-2] if len(shape) > 1 else 1
    if stack and scales == stack:
        scales = (*scales, 1, 1)
    elif len(shape) > 1 and scales == (height,) and not stack:
        scales = (*scales, 1)
    if len(scales) == len(shape) > 1 and scales[:-2] == stack:
        m, n = said or (0, 0)
        high, wide = _side(height, scales[-2], m, whole), _side(columns, scales[-1], n, whole)
        if high and wide:
            return Grid(height, high, wide, scales[-2], scales[-1])
    expected = ""
    if said and len(shape) > 1:
        expected = (
            f": in blocks of {said[0]}×{said[1]} it has {[*stack, -(-height // said[0]), -(-columns // said[1])]}"
        )
    what = f"its scales have the shape {list(scales)}, which does not fit a weight of {list(shape)}{expected}"
    raise InputError(what, hint="download the model again, or ask who quantised it")


def _side(length: int, count: int, said: int, whole: bool) -> int:
    """The elements of a block in one direction, in which `length` elements have `count` scales; 0: none fits."""
    if said and -(-length // said) != count:
        return 0
    if count in (1, length):
        return max(1, length if count == 1 else 1)
    if said:
        return 0 if whole and length % said else said
    return length // count if count and length % count == 0 else 0


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a weight, stored in `info`, on a grid."""

    info: TensorInfo
    grid: Grid

    def read(self, read: Read, first: int, last: int) -> Floats:
        """Rows [first, last) of the grid in float32, as they are stored; `checked` finds those that are none."""
        across = self.grid.across
        stored = bits(read, self.info, first * across, (last - first) * across)
        return scales_of(stored, self.info.dtype).reshape(-1, across)

    def checked(self, scales: Floats, first: int, used: NDArray[np.bool_] | None = None) -> Floats:
        """`scales`, rows of the grid from `first` on. InputError, naming the first that is NaN, infinite, or zero where
        codes are `used`."""
        wrong = ~np.isfinite(scales)
        wrong |= scales == 0 if used is None else (scales == 0) & used
        if wrong.any():
            row, column = (int(x) for x in np.argwhere(wrong)[0])
            value = scales[row, column]
            what = f"{self.info.name}: the scale at row {first + row}, column {column} is {value}"
            hint = "the file is damaged: download the model again, or quantise it again"
            raise InputError(what, hint=hint, where=str(self.info.path))
        return scales


def check_dtype(info: TensorInfo) -> None:
    """InputError: a dtype that scales do not have."""
    if info.dtype not in SCALES:
        raise InputError(f"{info.name}: {info.dtype} is no dtype of scales")


def scales_of(stored: Array, dtype: str) -> Floats:
    """Scales in float32: floats, or exponents (2^(code − 127); 255 is NaN)."""
    if dtype not in EXPONENTS:
        return widen(stored, dtype)
    values = np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    return np.where(stored == 255, np.float32(np.nan), values).astype(np.float32)
