"""How a weight of the output is stored coded: its stored tensors, which rows are coded together, and where they go."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from deltamerge.formats.quantised.coder import Coder
from deltamerge.formats.quantised.weight import CHUNK
from deltamerge.tensors.dtypes import nbytes_of
from deltamerge.tensors.tensor import TensorInfo


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor of a coded weight; `rows` rows of a matrix of the weight make one of its own."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    rows: int = 1

    @property
    def nbytes(self) -> int:
        return nbytes_of(self.dtype, self.shape)


class Unit(NamedTuple):
    """Rows of a weight that are coded together: elements [start, stop) of it, from row `top` of matrix `matrix` on."""

    start: int
    stop: int
    matrix: int
    top: int


@dataclass(frozen=True, slots=True)
class Coding:
    """How a float32 weight of `shape` is stored.

    matrix      rows and columns of what is coded as a matrix by itself: of each expert, or of the whole tensor
    unit        rows coded together
    parts       what the coder makes, codes first
    copied      further tensors that belong to it and are copied
    like        the weight as another model has it, in the same form: a unit that equals it gets its bytes, which are
                in `like_parts`
    """

    shape: tuple[int, ...]
    coder: Coder
    matrix: tuple[int, int]
    unit: int
    parts: tuple[Part, ...]
    copied: tuple[TensorInfo, ...] = ()
    like: TensorInfo | None = None
    like_parts: tuple[TensorInfo, ...] = ()

    @property
    def matrices(self) -> int:
        return math.prod(self.shape) // max(1, math.prod(self.matrix))

    @property
    def unit_bytes(self) -> int:
        """Bytes of the largest unit in float32."""
        return 4 * min(self.unit, self.matrix[0]) * self.matrix[1]

    def units(self, start: int, stop: int) -> Iterator[Unit]:
        """The units that elements [start, stop) belong to, in order."""
        rows, columns = self.matrix
        while start < stop:
            row = start // columns
            matrix, top = row // rows, row % rows // self.unit * self.unit
            end = matrix * rows + min(rows, top + self.unit)
            unit = Unit((matrix * rows + top) * columns, end * columns, matrix, top)
            yield unit
            start = unit.stop

    def places(self, unit: Unit) -> Iterator[tuple[Part, int, int]]:
        """Each part with the bytes [begin, end) of it that a unit makes."""
        rows = self.matrix[0]
        bottom = unit.top + (unit.stop - unit.start) // self.matrix[1]
        for part in self.parts:
            own = -(-rows // part.rows)
            size = part.nbytes // (own * self.matrices)
            first = unit.matrix * own
            yield part, (first + unit.top // part.rows) * size, (first + -(-bottom // part.rows)) * size


def unit_rows(rows: int, columns: int, multiple: int) -> int:
    """Rows coded together of a matrix: a multiple of `multiple`, some 2**18 elements."""
    return max(1, CHUNK // max(1, multiple * columns)) * multiple if multiple < rows else rows
