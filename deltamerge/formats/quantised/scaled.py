"""Weights that are codes times scales: W = (code − zero) · scale in float32, each difference and product rounded.

Codes are float8 (E4M3, E5M2), int8, or unsigned integers of 1 to 8 bits packed into 32-bit words along a row. Scales
and zeros lie on a grid over the weight (`grid`). The compiled kernels compute, else numpy; the bits are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.grid import Grid, Scales
from deltamerge.formats.quantised.weight import Array, Floats, bits, fill_rows, row_bits
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, decoded

# How the kernels number codes (kernels/src/loops.h).
FORMS = {"F8_E4M3": 0, "F8_E5M2": 1, "I8": 2}
PACKED = 3
TURNED_PAIRS, TURNED_ALONG, TURNED_ACROSS = 6, 7, 8
WORD = 32
NO_ARRAY = -1  # for the number of an array where there is none


@dataclass(frozen=True, slots=True)
class Zeros:
    """The zeros of a weight on the grid of its scales, in `info`.

    packed   unsigned integers of `width` bits, packed down the columns of (rows, across); else numbers as they are
    dense    whether packed integers may lie across two words
    """

    info: TensorInfo
    width: int = 8
    packed: bool = False
    dense: bool = True

    def read(self, read: Read, first: int, last: int, across: int) -> Floats:
        """Rows [first, last) of the grid in float32."""
        if not self.packed:
            found = bits(read, self.info, first * across, (last - first) * across)
            return values_of(self.info.dtype)[found].reshape(-1, across)
        begin, end = word_of(first, self.width, self.dense), word_of(last - 1, self.width, self.dense) + 1
        end = min(end + self.dense, self.info.shape[0])
        words = bits(read, self.info, begin * across, (end - begin) * across).reshape(-1, across)
        found = unpacked(words.T, self.width, self.dense, first, last, begin).T
        return np.ascontiguousarray(found, np.float32)


@runtime_checkable
class Streamed(Protocol):
    """A weight whose codes the compiled loop may read and make numbers of itself."""

    @property
    def codes(self) -> TensorInfo:
        """The stored codes."""

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes."""

    @property
    def bits(self) -> int:
        """The bits of an element in the file; 0 where rows end within a word."""

    def part(self, read: Read, start: int, stop: int) -> Part | TurnedPart | None:
        """What the compiled loop needs for elements [start, stop); None: `fill` computes them."""


def streamed(source: Tensor) -> Streamed | None:
    """Return the codes of a weight that the compiled loop may read itself; None for other tensors."""
    made = source.parameter("made") if source.function == decoded.__name__ else None
    return made if isinstance(made, Streamed) and made.is_plain else None


@dataclass(frozen=True, slots=True)
class TurnedPart:
    """A range of a weight that is stored transposed: `stored` (rows, …) in memory, in which the range begins with row
    `line` of the weight; scales and zeros of its rows, and the group of each column."""

    form: Form
    stored: Array
    scales: Floats
    line: int
    zeros: Floats | None = None
    groups: NDArray[np.int32] | None = None
    table: Floats | None = None

    def numbers(self, hashed: bool, arrays: list[Array]) -> tuple[int, ...]:
        """The fields of `CodedSource`, as `Part` has them; nothing of it is hashed."""
        stored, scales, zeros, groups, table = (
            _numbered(array, arrays) for array in (self.stored, self.scales, self.zeros, self.groups, self.table)
        )
        across = 1 if self.zeros is None else self.zeros.shape[1]
        return (*self.form, scales, zeros, 0, 0, 0, 0, across, self.line, 0, table, stored, groups)


def table_part(
    codes: tuple[int, int], group: int, scales: Floats, line: int, table: Floats, *, swapped: bool = False
) -> Part:
    """Rows of two codes of `table` (16) a byte, the upper half first where `swapped`, and a scale a group of columns.

    `codes` is the rows and columns of the weight; scales are those of rows `line` and on.
    """
    rows, columns = codes
    laid = Grid(rows, 1, group, rows, columns // group)
    form = Form(PACKED + 1 + swapped, 4, columns, columns // 2)
    return Part(form, laid, np.ascontiguousarray(scales, np.float32), None, line, table)


@dataclass(frozen=True, slots=True)
class Scaled:
    """The values of a weight of `columns`, made of codes, scales and perhaps zeros.

    form     of the codes: a dtype of `FORMS`, or "packed"
    width    bits of a packed code, `dense` whether it may lie across two words
    order    which column of the grid each column of the weight belongs to, where these are not in order (columns) int32
    """

    codes: TensorInfo
    columns: int
    scales: Scales
    form: Literal["F8_E4M3", "F8_E5M2", "I8", "packed"]
    width: int = 8
    dense: bool = True
    zeros: Zeros | None = None
    order: TensorInfo | None = None

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        if self.columns:
            fill_rows(self.columns, start, out, lambda top, bottom: self._rows(read, top, bottom))

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes."""
        return bool(self.columns) and self.order is None and (self.dense or WORD % self.width == 0)

    @property
    def bits(self) -> int:
        """The bits of an element in the file; 0 where rows end within a word."""
        width = self.width if self.form == "packed" else 8
        stride = 8 * ITEMSIZE[self.codes.dtype] * (self.codes.shape[-1] if self.codes.shape else 1)
        return width if stride == self.columns * width else 0

    def part(self, read: Read, start: int, stop: int) -> Part | None:
        """What the compiled loop needs for elements [start, stop); None: a scale there is 0; `fill` looks into it."""
        blocks = self.scales.grid.rows_of(start // self.columns, -(-stop // self.columns))
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        scales = self.scales.read(read, first, last)
        if not scales.all():
            return None
        zeros = None if self.zeros is None else self.zeros.read(read, first, last, self.scales.grid.across)
        width = self.width if self.form == "packed" else 8
        stride = self.codes.shape[-1] * ITEMSIZE[self.codes.dtype] if self.codes.shape else 1
        form = Form(FORMS.get(self.form, PACKED), width, self.columns, stride)
        return Part(form, self.scales.grid, self.scales.checked(scales, first), zeros, first)

    def _rows(self, read: Read, top: int, bottom: int) -> Floats:
        """Rows [top, bottom) of the weight."""
        grid = self.scales.grid
        blocks = grid.rows_of(top, bottom)
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        codes, scales = row_bits(read, self.codes, top, bottom), self.scales.read(read, first, last)
        zeros = None if self.zeros is None else self.zeros.read(read, first, last, grid.across)
        used = None
        if not scales.all():  # a scale of zero is damage, but where a block is zeros anyway
            used = self._used(codes, blocks - first, len(scales))
        self.scales.checked(scales, first, used)
        order = self._order(read)
        native = kernels.native() if self.is_plain else None
        if native is None:
            values = self._numbers(codes)
            if zeros is not None:
                values -= self._spread(zeros, order)[blocks - first]
            values *= self._spread(scales, order)[blocks - first]
            return values
        out = np.empty((bottom - top, self.columns), np.float32)
        form = FORMS.get(self.form, PACKED)
        shift = np.zeros(0, np.float32) if zeros is None else zeros
        native.scaled(
            codes, scales, shift, blocks - first, out, form, self.width, self.columns, codes.strides[0], grid.n
        )
        return out

    def _numbers(self, codes: Array) -> Floats:
        """The codes of whole rows as numbers: of packed ones, as if their zero were in the middle of the range."""
        if self.form != "packed":
            return values_of(self.form)[codes]
        found = unpacked(codes, self.width, self.dense, 0, self.columns)
        return found.astype(np.float32)

    def _spread(self, values: Floats, order: NDArray[np.int32] | None) -> Floats:
        if order is not None:
            return values[:, order]
        return self.scales.grid.spread(values, self.columns)

    def _used(self, codes: Array, blocks: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
        """Which of `count` rows of blocks have codes that are not zero."""
        numbers, grid = self._numbers(codes) != 0, self.scales.grid
        starts = np.arange(grid.across) * grid.n
        inside = np.logical_or.reduceat(numbers, starts, axis=1) if self.order is None else numbers.any(1)[:, None]
        used = np.zeros((count, grid.across), bool)
        np.logical_or.at(used, blocks, inside)
        return used

    def _order(self, read: Read) -> NDArray[np.int32] | None:
        """The column of the grid of each column. InputError: columns that the grid does not have."""
        if self.order is None:
            return None
        info, across = self.order, self.scales.grid.across
        found: NDArray[np.int32] = read.once((info.path, info.begin), lambda: bits(read, info, 0, self.columns)).view(
            np.int32
        )
        if (found == -1).all():  # written where columns are in order
            return (np.arange(self.columns) // self.scales.grid.n).astype(np.int32)
        if found.min() < 0 or found.max() >= across:
            wrong = int(found[(found < 0) | (found >= across)][0])
            raise InputError(f"{info.name}: has group {wrong}, of {across}", hint="download the model again")
        return found


class Form(NamedTuple):
    """How the kernels know codes: their number there, the bits of one, and the columns and bytes of a row."""

    number: int
    width: int
    columns: int
    stride: int


@dataclass(frozen=True, slots=True)
class Part:
    """A range of a weight as the compiled loop is given it: scales, zeros, the first row of the grid, and the table
    that its codes are places in."""

    form: Form
    grid: Grid
    scales: Floats
    zeros: Floats | None
    line: int
    table: Floats | None = None

    def numbers(self, hashed: bool, arrays: list[Array]) -> tuple[int, ...]:
        """The fields of `CodedSource` (kernels/src/program.h), which names arrays by their numbers in `arrays`."""
        grid = self.grid
        scales, zeros, table = (_numbered(array, arrays) for array in (self.scales, self.zeros, self.table))
        return (
            *self.form, scales, zeros, grid.height, grid.m, grid.n, grid.down, grid.across, self.line, hashed, table,
            NO_ARRAY, NO_ARRAY,
        )  # fmt: skip


def _numbered(array: Array | None, arrays: list[Array]) -> int:
    """The number of an array in a list that it is put at the end of."""
    if array is None:
        return NO_ARRAY
    arrays.append(array)
    return len(arrays) - 1


def word_of(element: int, width: int, dense: bool) -> int:
    """The 32-bit word in which packed integer number `element` begins."""
    return element * width // WORD if dense else element // (WORD // width)


def words_of(elements: int, width: int, dense: bool) -> int:
    """The 32-bit words that `elements` packed integers take."""
    return -(-elements * width // WORD) if dense else -(-elements // (WORD // width))


def unpacked(words: Array, width: int, dense: bool, start: int, stop: int, begin: int = 0) -> NDArray[np.int32]:
    """Integers [start, stop) of each row of 32-bit `words`, of which the first is number `begin`; less half their
    range."""
    at = np.arange(start, stop)
    if dense:
        place, shift = at * width // WORD - begin, at * width % WORD
    else:
        place, shift = at // (WORD // width) - begin, at % (WORD // width) * width
    wide = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], axis=1).astype(np.uint64)
    pairs = wide[:, place] | wide[:, place + 1] << np.uint64(WORD)
    found = pairs >> shift.astype(np.uint64) & np.uint64((1 << width) - 1)
    return found.astype(np.int32) - (1 << width - 1)


@cache
def values_of(dtype: str) -> Floats:
    """The float32 value of each of the 256 codes of a dtype of 8 bits."""
    codes = np.arange(256)
    if dtype in ("I8", "U8"):
        values = codes.astype(np.uint8).view(np.int8 if dtype == "I8" else np.uint8).astype(np.float64)
    else:
        exponent, mantissa, bias = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}[dtype]
        power, fraction = codes >> mantissa & (1 << exponent) - 1, (codes & (1 << mantissa) - 1) / (1 << mantissa)
        values = np.where(power == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, power - bias))
        if dtype == "F8_E4M3":
            values[codes & 0x7F == 0x7F] = np.nan
        else:
            values[codes & 0x7F == 0x7C] = np.inf
            values[codes & 0x7F > 0x7C] = np.nan
        values = np.where(codes & 0x80, -values, values)
    found = values.astype(np.float32)
    found.flags.writeable = False
    return found
