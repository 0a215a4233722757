"""Codes times scales on a grid: W = (code − zero) · scale in float32, each difference and product rounded.

A weight (…, rows, columns) is cut into blocks of m × n elements; the scales are (…, ⌈rows/m⌉, ⌈columns/n⌉). One scale
for the tensor, one a matrix of a stack, one a row, one a column and groups of a row are such grids.

`Scaled` has codes that are numbers (float8, int8) or integers of 1 to 8 bits in words. `Tabled` has two codes a byte
that are places in a table. The compiled kernels compute, else numpy; the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.codes import (
    E4M3,
    E5M2,
    WORD,
    BlockCoder,
    Integers,
    Packing,
    scales_of,
    unpacked,
    values_of,
    word_of,
)
from deltamerge.formats.quantised.scheme import (
    AGAIN,
    EXPONENTS,
    FORMS,
    OR_QUANTISE,
    PACKED,
    PAIRS,
    Array,
    CodedRows,
    CodedWeight,
    CodeForm,
    Coding,
    Floats,
    Part,
    Shape,
    StoredPart,
    StoredWeight,
    bits,
    bytes_of,
    damaged,
    row_bytes,
    unit_rows,
    weight,
)
from deltamerge.tensors.dtypes import ITEMSIZE, PLAIN
from deltamerge.tensors.tensor import Read, TensorInfo

SCALES = PLAIN | EXPONENTS
FLOATS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
Block = tuple[int, int]


class ScaleGrid(NamedTuple):
    """`height` rows of each matrix of a weight, in blocks of `m` rows and `n` columns: `down` × `across` blocks."""

    height: int
    m: int
    n: int
    down: int
    across: int

    def rows_of(self, top: int, bottom: int) -> NDArray[np.int64]:
        """Return the row of blocks of each of the weight's rows [top, bottom), matrices one below the other."""
        numbers = np.arange(top, bottom)
        return numbers // self.height * self.down + numbers % self.height // self.m

    def spread(self, values: Floats, columns: int) -> Floats:
        """Return values (…, across) for each of `columns` columns; one column where they are the same."""
        return values if self.across == 1 else np.repeat(values, self.n, axis=-1)[..., :columns]


def grid(shape: Shape, scales: Shape, said: Block | None = None, *, whole: bool = False) -> ScaleGrid:
    """Return the grid of a weight of `shape` whose scales have the shape `scales`.

    `said` is the block that config.json states; one scale for all of the weight needs none. Without it the shapes tell:
    blocks are then equal.
    `whole`: blocks must divide the weight.
    InputError: no such grid.
    """
    rows, columns = math.prod(shape[:-1]), shape[-1] if shape else 1
    if math.prod(scales) == 1:
        return ScaleGrid(max(1, rows), max(1, rows), max(1, columns), 1, 1)
    stack, height = shape[:-2], shape[-2] if len(shape) > 1 else 1
    if stack and scales == stack:
        scales = (*scales, 1, 1)
    elif len(shape) > 1 and scales == (height,) and not stack:
        scales = (*scales, 1)
    if len(scales) == len(shape) > 1 and scales[:-2] == stack:
        m, n = said or (0, 0)
        high, wide = _side(height, scales[-2], m, whole), _side(columns, scales[-1], n, whole)
        if high and wide:
            return ScaleGrid(height, high, wide, scales[-2], scales[-1])
    expected = ""
    if said and len(shape) > 1:
        expected = (
            f": in blocks of {said[0]}×{said[1]} it has {[*stack, -(-height // said[0]), -(-columns // said[1])]}"
        )
    what = f"its scales have the shape {list(scales)}, which does not fit a weight of {list(shape)}{expected}"
    raise InputError(what, hint="download the model again, or ask who quantised it")


def _side(length: int, count: int, said: int, whole: bool) -> int:
    """Return the elements of a block in one direction, in which `length` elements have `count` scales; 0: none fits."""
    if said and -(-length // said) != count:
        return 0
    if count in (1, length):
        return max(1, length if count == 1 else 1)
    if said:
        return 0 if whole and length % said else said
    return length // count if count and length % count == 0 else 0


def checked(scales: Floats, info: Part, first: int, used: NDArray[np.bool_] | None = None) -> Floats:
    """Return `scales` of `info`, rows of the grid from `first` on.

    InputError, naming the first that is NaN, infinite, or zero where codes are `used`.
    """
    wrong = ~np.isfinite(scales)
    wrong |= scales == 0 if used is None else (scales == 0) & used
    if wrong.any():
        row, column = (int(x) for x in np.argwhere(wrong)[0])
        value = scales[row, column]
        what = f"{info.name}: the scale at row {first + row}, column {column} is {value}"
        hint = "the file is damaged: download the model again, or quantise it again"
        raise InputError(what, hint=hint, where=str(info.path))
    return scales


def check_dtype(info: TensorInfo) -> None:
    """Raise InputError for a dtype that scales do not have."""
    if info.dtype not in SCALES:
        raise InputError(f"{info.name}: {info.dtype} is no dtype of scales")


@dataclass(frozen=True, slots=True)
class Scaled(CodedWeight):
    """The values of a weight of `columns`, made of codes, scales and perhaps zeros.

    zeros    on the grid of the scales
    order    the column of the grid of each column of the weight, where these are not in order (columns) int32
    grid     of the scales
    form     of the codes: a dtype of `FORMS`, or "packed"
    width    bits of a packed code, `dense` whether it may lie across two words
    zeros_packed   whether zeros are integers of `width` bits packed down the columns of the grid; else they are numbers
    """

    codes: Part
    scales: Part
    zeros: Part | None
    order: Part | None
    columns: int
    grid: ScaleGrid
    form: Literal["F8_E4M3", "F8_E5M2", "I8", "packed"]
    width: int = 8
    dense: bool = True
    zeros_packed: bool = False
    zeros_dense: bool = True

    @property
    def is_plain(self) -> bool:
        return bool(self.columns) and self.order is None and (self.dense or WORD % self.width == 0)

    @property
    def bits(self) -> int:
        return self.width if 8 * self._stride == self.columns * self.width else 0

    @property
    def _stride(self) -> int:
        """Return the bytes of a row of codes."""
        return ITEMSIZE[self.codes.dtype] * (self.codes.shape[-1] if self.codes.shape else 1)

    def part(self, read: Read, start: int, stop: int) -> CodedRows | None:
        """Return None where a scale is 0, which `fill` looks into."""
        blocks = self.grid.rows_of(start // self.columns, -(-stop // self.columns))
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        scales = self._scales(read, first, last)
        if not scales.all():
            return None
        zeros = self._zeros(read, first, last)
        form = CodeForm(FORMS.get(self.form, PACKED), self.width, self.columns, self._stride)
        return CodedRows(form, checked(scales, self.scales, first), first, self.grid, zeros)

    def put(self, read: Read, top: int, bottom: int, out: Floats) -> None:
        blocks = self.grid.rows_of(top, bottom)
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        codes, scales = row_bytes(read, self.codes, top, bottom), self._scales(read, first, last)
        zeros = self._zeros(read, first, last)
        used = None
        if not scales.all():  # a scale of zero is damage, but where a block is zeros anyway
            used = self._used(codes, blocks - first, len(scales))
        checked(scales, self.scales, first, used)
        order = self._order(read)
        native = kernels.native() if self.is_plain else None
        if native is None:
            values = self._numbers(codes)
            if zeros is not None:
                values -= self._spread(zeros, order)[blocks - first]
            np.multiply(values, self._spread(scales, order)[blocks - first], out=out)
            return
        form = FORMS.get(self.form, PACKED)
        shift = np.zeros(0, np.float32) if zeros is None else zeros
        native.scaled(
            codes, scales, shift, blocks - first, out, form, self.width, self.columns, codes.strides[0], self.grid.n
        )

    def _scales(self, read: Read, first: int, last: int) -> Floats:
        """Return rows [first, last) of the grid in float32, as they are stored and not yet checked."""
        across = self.grid.across
        stored = bits(read, self.scales, first * across, (last - first) * across)
        return scales_of(stored, self.scales.dtype).reshape(-1, across)

    def _zeros(self, read: Read, first: int, last: int) -> Floats | None:
        """Return the zeros of rows [first, last) of the grid in float32."""
        info, across = self.zeros, self.grid.across
        if info is None:
            return None
        if not self.zeros_packed:
            found = bits(read, info, first * across, (last - first) * across)
            return values_of(info.dtype)[found].reshape(-1, across)
        begin, end = (word_of(row, self.width, self.zeros_dense) for row in (first, last - 1))
        end = min(end + 1 + self.zeros_dense, info.shape[0])
        words = bits(read, info, begin * across, (end - begin) * across).reshape(-1, across)
        found = unpacked(words.T, self.width, self.zeros_dense, first, last, begin).T
        return np.ascontiguousarray(found, np.float32)

    def _numbers(self, codes: Array) -> Floats:
        """Return the codes of whole rows as numbers: of packed ones, as if their zero were mid-range."""
        if self.form != "packed":
            return values_of(self.form)[codes]
        return unpacked(codes.view("<u4"), self.width, self.dense, 0, self.columns).astype(np.float32)

    def _spread(self, values: Floats, order: NDArray[np.int32] | None) -> Floats:
        return values[:, order] if order is not None else self.grid.spread(values, self.columns)

    def _used(self, codes: Array, blocks: NDArray[np.int64], count: int) -> NDArray[np.bool_]:
        """Return which of `count` rows of blocks have codes that are not zero."""
        numbers, grid = self._numbers(codes) != 0, self.grid
        starts = np.arange(grid.across) * grid.n
        inside = np.logical_or.reduceat(numbers, starts, axis=1) if self.order is None else numbers.any(1)[:, None]
        used = np.zeros((count, grid.across), bool)
        np.logical_or.at(used, blocks, inside)
        return used

    def _order(self, read: Read) -> NDArray[np.int32] | None:
        """Return the column of the grid of each column. InputError: columns that the grid does not have."""
        if self.order is None:
            return None
        info, across = self.order, self.grid.across
        found: NDArray[np.int32] = read.once((info.path, info.begin), lambda: bits(read, info, 0, self.columns)).view(
            np.int32
        )
        if (found == -1).all():  # written where columns are in order
            return (np.arange(self.columns) // self.grid.n).astype(np.int32)
        if found.min() < 0 or found.max() >= across:
            wrong = int(found[(found < 0) | (found >= across)][0])
            raise InputError(f"{info.name}: has group {wrong}, of {across}", hint=AGAIN)
        return found

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Divide each block by its scale; scales and zeros lie as they do here."""
        grid, packed = self.grid, self.form == "packed"
        if self.order is not None:
            raise InputError(f"has columns in the order of {self.order.name}, which cannot be written")
        if packed and not self.dense and WORD % self.width:
            raise InputError(f"has words with gaps, of {self.width} bits a code, which cannot be written")
        rows, columns = grid.height, shape[-1] if shape else 1
        numbers = FLOATS.get(self.form) or Integers(self.width)
        parts = [StoredPart.like(self.codes), StoredPart.like(self.scales, grid.m)]
        multiple = grid.m
        how: Literal["bytes", "words"] | None = None
        if self.zeros is not None:
            if not isinstance(numbers, Integers) or (not self.zeros_packed and self.zeros.dtype != "I8"):
                raise InputError(f"has zeros of {self.zeros.dtype}, which cannot be written")
            inside = self.zeros_packed and grid.m == 1 and WORD % self.width == 0
            per = WORD // self.width if inside else rows if self.zeros_packed else grid.m
            multiple, how = math.lcm(grid.m, per), "words" if self.zeros_packed else "bytes"
            parts.append(StoredPart.like(self.zeros, per))
        packing: Packing = "words" if packed else "bytes"
        coder = BlockCoder(numbers, (grid.m, grid.n), self.scales.dtype, how, packed and self.width < 8, packing)
        return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, multiple), tuple(parts))


def scaled_by(stored: StoredWeight, block: Block | None, *, whole: bool = False) -> TensorInfo:
    """Return the weight of codes that are stored one by one. InputError: scales, zeros or an order do not fit."""
    codes, scales = stored.codes, stored.need("_scale_inv", "_scale", ".scale")
    check_dtype(scales)
    laid = grid(codes.shape, scales.shape, block, whole=whole)
    zeros = stored.part("weight_zero_point")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in ("I8", "U8", "F8_E4M3", "F8_E5M2")):
        raise unfit(zeros, f"{list(scales.shape)} of 8 bits")
    columns = codes.shape[-1] if codes.shape else 1
    form: Any = codes.dtype
    return weight(stored, codes.shape, Scaled(codes, scales, zeros, order_of(stored, columns), columns, laid, form))


def order_of(stored: StoredWeight, columns: int) -> TensorInfo | None:
    """Return the tensor that says which group each column is in. InputError: it does not fit."""
    order = stored.part("weight_g_idx")
    if order is not None and (order.dtype not in ("I32", "U32") or order.shape != (columns,)):
        raise unfit(order, f"I32 {[columns]}")
    return order


def unfit(info: TensorInfo, expected: str) -> InputError:
    """Return the error for a part of another dtype or shape."""
    return InputError(f"{info.name} is {info.dtype} {list(info.shape)}, must be {expected}", hint=OR_QUANTISE)


def channels(name: str, shape: Shape, dtype: str, scale: str) -> Coding:
    """Return the coding of a matrix with a scale a row, as compressed-tensors' float- and int-quantized store it.

    Scales have the dtype of the model, which is what transformers reads them in.
    """
    rows, columns = shape
    coder = BlockCoder(FLOATS.get(dtype) or Integers(), (1, columns), scale)
    parts = (StoredPart(name, dtype, shape), StoredPart(f"{name}_scale", scale, (rows, 1)))
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), parts)


class Tabled(CodedWeight):
    """Two codes of four bits a byte, places in a table of 16, times the scale of their block of the flat weight.

    group     elements of a block
    swapped   whether the upper half of a byte comes first
    """

    __slots__ = ()
    group: int
    scales: Part
    swapped: ClassVar[bool] = False

    @property
    def refuses_zero(self) -> bool:
        """Return whether a scale of 0 is damage, but where its block is zeros anyway."""
        return False

    def table_of(self, read: Read) -> Floats:
        """Return the numbers of the 16 codes."""
        raise NotImplementedError

    def scales_at(self, read: Read, start: int, count: int) -> Floats:
        """Return the scales of blocks [start, start + count), checked."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        return self.columns % self.group == 0

    @property
    def bits(self) -> int:
        return 4

    def part(self, read: Read, start: int, stop: int) -> CodedRows | None:
        top, bottom, groups = start // self.columns, -(-stop // self.columns), self.columns // self.group
        scales = self.scales_at(read, top * groups, (bottom - top) * groups)
        if self.refuses_zero and not scales.all():
            return None
        rows = math.prod(self.scales.shape) // groups
        form = CodeForm(PAIRS + self.swapped, 4, self.columns, self.columns // 2)
        laid = ScaleGrid(rows, 1, self.group, rows, groups)
        return CodedRows(form, np.ascontiguousarray(scales, np.float32), top, laid, table=self.table_of(read))

    def put(self, read: Read, top: int, bottom: int, out: Floats) -> None:
        """Compute the blocks that the rows lie in."""
        begin, end = top * self.columns, bottom * self.columns
        first, last = begin // self.group, -(-end // self.group)
        table = self.table_of(read)
        stored = bytes_of(read, self.codes, first * self.group // 2, min(last * self.group // 2, self.codes.nbytes))
        scales, skip, native = self.scales_at(read, first, last - first), begin - first * self.group, kernels.native()
        if native is not None and (scales.all() or not self.refuses_zero):
            flat = out.reshape(-1) if not skip else np.empty(skip + end - begin, np.float32)
            native.tabled(stored, scales, table, flat, self.group, self.swapped)
            if skip:
                out[:] = flat[skip:].reshape(out.shape)
            return
        halves = [table[np.arange(256) & 15], table[np.arange(256) >> 4]]
        pairs = np.stack(halves[::-1] if self.swapped else halves, 1).view(np.complex64)[:, 0]  # both values of a byte
        flat = np.zeros((last - first) * self.group, np.float32)
        flat[: 2 * len(stored)] = np.take(pairs, stored).view(np.float32)
        values = flat.reshape(-1, self.group)
        if self.refuses_zero:
            check_zeros(scales, values, self.scales)
        values *= scales[:, None]
        out[:] = values.reshape(-1)[skip : skip + end - begin].reshape(out.shape)


def check_zeros(scales: Floats, values: Floats, info: Part) -> None:
    """Raise InputError where the scale of a row of `values` is stored as 0, and the row is not."""
    if not scales.all() and values[scales == 0].any():
        raise damaged(info, "is 0 where the weight is not")
