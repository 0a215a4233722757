"""A weight as a scheme stores it: its parts, their checks, and the computation of any range of its float32 values.

A scheme is code layout × grid of scales × number type × zero point. Its file holds classes of `CodedWeight`: each gives
the codes and scales of a range (`rows`), and the way to write them (`coding`). The codes of `Scaled` are numbers
(float8, int8) or integers of 1 to 8 bits in words. `Tabled` has two codes a byte, which are places in a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import count
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import CHUNK, BlockCoder, Coding, StoredPart, by_rows
from deltamerge.formats.quantised.codes import (
    E4M3,
    E5M2,
    EXPONENTS,
    FORMS,
    NO_BYTES,
    PACKED,
    PAIRS,
    SWAPPED_PAIRS,
    WORD,
    CodedRows,
    CodeForm,
    Floats,
    Integers,
    Packing,
    Part,
    ScaleGrid,
    Shape,
    decode,
    scales_of,
    unpack,
    values_of,
    zero_scale,
)
from deltamerge.tensors.dtypes import ITEMSIZE, PLAIN, Array, bits_type, widen
from deltamerge.tensors.reader import RecentParts
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

AGAIN = "download the model again"
OR_QUANTISE = f"{AGAIN}, or quantise it again"
UNWRITABLE = "is in a form that cannot be written, only read"
BAND = 1 << 20  # elements that kernels compute at once; they keep their work in cache themselves
SLAB = 1 << 24  # bytes of a stored matrix that is held, as long as its columns are asked for
KEPT = 4 * SLAB  # bytes of all matrices that are held
PANEL = 64  # columns that a slab has a multiple of: whole groups of MXFP4 at least
SCALES = PLAIN | EXPONENTS
FLOATS = {"F8_E4M3": E4M3, "F8_E5M2": E5M2}
Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """The input of a scheme's `read`.

    name       the weight's plain name
    parts      the tensors that store it, codes first
    settings   of the config's key (`quantization_config`, …)
    """

    name: str
    parts: tuple[TensorInfo, ...]
    settings: Mapping[str, Any]

    @property
    def codes(self) -> TensorInfo:
        """Return the tensor of codes."""
        return self.parts[0]

    def part(self, *endings: str) -> TensorInfo | None:
        """Return the companion whose name ends in one of `endings`, or None."""
        return next((info for info in self.parts[1:] if info.name.endswith(endings)), None)

    def need(self, *endings: str) -> TensorInfo:
        """Return the same companion. InputError: it is missing."""
        found = self.part(*endings)
        if found is None:
            raise InputError(f"its {endings[0].strip('._')} is missing", hint=AGAIN)
        return found


class CodedWeight:
    """Computes the values of a weight from codes. Subclasses are plain data: stored parts and parameters.

    codes     the stored codes
    scales    the stored scales
    columns   of a row of the values
    keeps     whether slabs of stored matrices are held in memory while it is read
    """

    __slots__ = ()
    codes: Part
    scales: Part
    columns: int
    keeps: ClassVar[bool] = False

    @property
    def row(self) -> int:
        """Return the columns of a row of codes."""
        return self.columns

    @property
    def matrix(self) -> int:
        """Return the rows of a matrix, where a range of elements must be of one; 0: it may be any."""
        return 0

    @property
    def bits(self) -> int:
        """Return the bits of an element in the file; 0: elements do not follow each other there."""
        return 0

    def is_one(self, start: int, stop: int) -> bool:
        """Return whether `rows` can describe elements [start, stop)."""
        return start < stop and (
            not self.matrix or start // self.row // self.matrix == (stop - 1) // self.row // self.matrix
        )

    def rows(self, read: Read, start: int, stop: int) -> CodedRows:
        """Return the codes and scales that make elements [start, stop). InputError: parts are damaged."""
        raise NotImplementedError

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Return how a weight of `shape` is written in this form. InputError: it cannot be written."""
        raise InputError(UNWRITABLE)

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        """Fill `out` with the float32 values from element `start` on."""
        values, at = np.frombuffer(out, np.float32), start
        stop, step = start + len(values), max(1, (CHUNK if kernels.native() is None else BAND) // max(1, self.row))
        while at < stop:
            row = at // self.row
            end = row + step if not self.matrix else min(row + step, (row // self.matrix + 1) * self.matrix)
            end = min(stop, end * self.row)
            rows = self.rows(read, at, end)
            decode(rows, self.row_codes(read, rows, at, end), at, values[at - start : end - start])
            at = end

    def row_codes(self, read: Read, rows: CodedRows, start: int, stop: int) -> Array:
        """Return the stored bytes of the rows with elements [start, stop); empty if `rows` has codes."""
        if rows.stored is not None:
            return NO_BYTES
        columns, stride = rows.form.columns, rows.form.stride
        end = min(-(-stop // columns) * stride, self.codes.nbytes)
        return bytes_of(read, self.codes, start // columns * stride, end)

    def sound(
        self, read: Read, rows: CodedRows, start: int, stop: int, order: NDArray[np.int32] | None = None
    ) -> CodedRows:
        """Return `rows`. InputError: a scale is NaN or infinite, or zero where codes are not.

        order   the column of the grid of each column of the weight
        """
        scales, columns, stride = rows.scales, rows.form.columns, rows.form.stride
        found: tuple[int, int] | None = None
        value = np.float32(0)
        if not np.isfinite(scales).all():
            row, column = (int(x) for x in np.argwhere(~np.isfinite(scales))[0])
            found, value = (rows.line + row, column), scales[row, column]
        elif rows.biases is None and not scales.all():  # whole rows are looked at, where they are there
            start, whole = start // columns * columns, -(-stop // columns) * columns
            stop = min(whole, max(stop, self.codes.nbytes // stride * columns))
            found = zero_scale(rows, self.row_codes(read, rows, start, stop), start, stop - start)
        if found is not None:
            row, column = found
            column = column if order is None else int(order[column])
            raise damaged(self.scales, f"the scale at row {row}, column {column} is {value}", OR_QUANTISE)
        return rows


def weight(stored: StoredWeight, shape: Shape, made: CodedWeight) -> TensorInfo:
    """Return the float32 tensor of `shape` that `made` computes: a view of its stored parts, codes first."""
    values = {one.name: getattr(made, one.name) for one in fields(made)}  # type: ignore[arg-type]  # all are dataclasses
    parts = {name: value for name, value in values.items() if isinstance(value, Tensor | TensorInfo)}
    plain = tuple((name, value) for name, value in values.items() if name not in parts)
    tensor = viewed(decoded, parts.values(), shape, "F32", form=type(made), names=tuple(parts), plain=plain)
    return TensorInfo(stored.name, tensor)


def coded_weight(tensor: Tensor, infos: Mapping[Tensor, TensorInfo] | None = None) -> CodedWeight | None:
    """Return the coded weight of a view. None: the tensor has no codes. `infos` name its parts."""
    if tensor.function != decoded.__name__:
        return None
    own = dict(tensor.parameters)
    parts = (part if infos is None else infos[part] for part in tensor.inputs)
    made: CodedWeight = own["form"](**dict(zip(own["names"], parts, strict=True)), **dict(own["plain"]))
    return made


@view(coded=coded_weight)
def decoded(read: Read, tensor: Tensor, start: int, out: memoryview, **_: Any) -> None:
    """Compute a weight from its stored parts. Parameters: its class, the names of its parts, and its other fields."""
    made = coded_weight(tensor)
    assert made is not None
    made.fill(read, start, out)


def coding_like(weight: TensorInfo, stored: Sequence[TensorInfo], settings: Mapping[str, Any], name: str) -> Coding:
    """Return the coding of an output's weight, `name`, in the form of a checkpoint's `weight`, stored as `stored`.

    `settings` are the settings in the checkpoint's config. InputError: the form cannot be written.
    """
    made = coded_weight(weight.tensor, {info.tensor: info for info in stored})
    if made is None:
        raise InputError(UNWRITABLE)
    coding = made.coding(weight.shape, settings)
    by_name = {info.name: info for info in stored}
    likes = tuple(by_name[part.name] for part in coding.parts)
    old, new = _module(weight.name), _module(name)
    parts = tuple(replace(part, name=new + part.name.removeprefix(old)) for part in coding.parts)
    rest = (replace(info, name=new + info.name.removeprefix(old)) for info in stored if info not in likes)
    return replace(coding, parts=parts, copied=tuple(rest), like=weight, like_parts=likes)


def _module(name: str) -> str:
    """Return the module of a weight, with its dot."""
    stem, dot, _ = name.rpartition(".")
    return stem + dot


# Checks of parts.


def expect(info: TensorInfo, shape: Shape, dtypes: Collection[str] = PLAIN) -> TensorInfo:
    """Return `info`, a part of a weight. InputError: another dtype or shape."""
    label = info.name.rpartition(".")[2]
    if info.dtype not in dtypes:
        raise InputError(f"its {label} is {info.dtype}, must be {' or '.join(sorted(dtypes))}")
    if info.shape != shape:
        raise InputError(f"its {label} has the shape {list(info.shape)}, must be {list(shape)}")
    return info


def whole(value: int, by: int, what: str) -> int:
    """Return value / by. InputError: it is no whole number above 0."""
    if value <= 0 or by <= 0 or value % by:
        raise InputError(f"{what}: {by} does not divide {value}")
    return value // by


def finite(values: Floats, info: Part) -> Floats:
    """Return `values` of a part. InputError: one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise damaged(info, "holds NaN or infinity")
    return values


def damaged(info: Part, what: str, hint: str = AGAIN) -> InputError:
    """Return the error for a part with impossible values."""
    return InputError(f"{info.name}: {what}", hint=hint, where=str(info.path))


# Ranges of parts.


def bits(read: Read, info: Part, start: int, count: int) -> Array:
    """Return the bit patterns of elements [start, start + count)."""
    found = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, found)
    return found


def row_bytes(read: Read, info: Part, top: int, bottom: int) -> Array:
    """Return rows [top, bottom) as bytes (bottom − top, bytes of a row)."""
    columns = info.shape[-1] if info.shape else 1
    return bits(read, info, top * columns, (bottom - top) * columns).reshape(-1, columns).view(np.uint8)


def bytes_of(read: Read, info: Part, low: int, high: int) -> Array:
    """Return bytes [low, high) of a tensor of any dtype."""
    size = info.nbytes // max(1, math.prod(info.shape))
    first, last = low // size, -(-high // size)
    return bits(read, info, first, last - first).view(np.uint8)[low - first * size :][: high - low]


def floats(read: Read, info: Part, start: int, count: int) -> Floats:
    """Return elements [start, start + count) of a part in float32. InputError: one is NaN or infinite."""
    return finite(widen(bits(read, info, start, count), info.dtype), info)


# Columns of stored matrices.


def columns_of(read: Read, info: Part, rows: int, width: int, first: int, last: int, matrix: int = 0) -> Array:
    """Return columns [first, last) of the bit patterns of stored matrix `matrix` of `rows` × `width`.

    They are cut out of a slab that is held for the next call: the matrix, or the columns that fit in `SLAB` bytes.
    """
    found, begin = held_columns(read, info, rows, width, first, last, matrix)
    return found[:, first - begin : last - begin]


def held_columns(
    read: Read, info: Part, rows: int, width: int, first: int, last: int, matrix: int = 0
) -> tuple[Array, int]:
    """Return a contiguous array that has these columns, and the number of its first."""
    size = ITEMSIZE[info.dtype]
    if rows * width * size <= SLAB:
        slab = kept(read, (info, matrix), lambda: bits(read, info, matrix * rows * width, rows * width))
        return slab.reshape(rows, width), 0
    across = max(1, SLAB // (rows * size * PANEL)) * PANEL
    begin, slabs = first // across * across, []
    for low in range(begin, last, across):
        high = min(low + across, width)
        slabs.append(
            kept(read, (info, matrix, low), partial(_columns, read, info, (matrix * rows, rows, width), low, high))
        )
    if len(slabs) == 1:
        return slabs[0], begin
    parts = [slab[:, max(0, first - low) : last - low] for low, slab in zip(count(begin, across), slabs, strict=False)]
    return np.concatenate(parts, axis=1), first


def _columns(read: Read, info: Part, matrix: tuple[int, int, int], first: int, last: int) -> Array:
    """Return columns [first, last) of a stored matrix, given by its first row, its rows and the columns of a row."""
    (top, rows, width), size = matrix, ITEMSIZE[info.dtype]
    found = np.empty((rows, last - first), bits_type(info.dtype))
    offsets = ((top + np.arange(rows)) * width + first) * size
    read.read_runs(info, offsets, np.arange(1, rows + 1) * (last - first) * size, found)
    return found


def kept(read: Read, key: Hashable, make: Callable[[], Array]) -> Array:
    """Return the result of `make` for `key`, held for the next reads."""
    slabs: RecentParts = read.once("slabs of quantised matrices", lambda: RecentParts(KEPT, lambda slab: slab.nbytes))
    return slabs.get(key, make)


# Codes times scales on a grid.


def grid(shape: Shape, scales: Shape, said: Block | None = None, *, whole: bool = False) -> ScaleGrid:
    """Return the grid of a weight of `shape` whose scales have the shape `scales`.

    `said` is the block that config.json states; a single scale for the weight needs none. Without it the shapes decide,
    and blocks are equal. `whole`: blocks must divide the weight. InputError: no such grid.
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


def check_dtype(info: TensorInfo) -> None:
    """Raise InputError for a dtype that scales do not have."""
    if info.dtype not in SCALES:
        raise InputError(f"{info.name}: {info.dtype} is no dtype of scales")


@dataclass(frozen=True, slots=True)
class Scaled(CodedWeight):
    """The values of a weight of `columns`, made of codes, scales and perhaps zeros and biases.

    zeros    on the grid of the scales, as are `biases`
    order    the column of the grid of each column of the weight, where these are not in order (columns) int32
    grid     of the scales
    form     of the codes: a dtype of `FORMS`, "packed" (less half their range), or "unsigned"
    width    bits of a packed code, `dense` whether it may lie across two words
    zeros_packed   whether zeros are integers of `width` bits packed down the columns of the grid; else they are numbers
    """

    codes: Part
    scales: Part
    zeros: Part | None
    order: Part | None
    columns: int
    grid: ScaleGrid
    form: Literal["F8_E4M3", "F8_E5M2", "I8", "packed", "unsigned"]
    width: int = 8
    dense: bool = True
    zeros_packed: bool = False
    zeros_dense: bool = True
    biases: Part | None = None
    factor: float = 1.0

    @property
    def bits(self) -> int:
        return self.width if 8 * self._stride == self.columns * self.width else 0

    @property
    def _stride(self) -> int:
        """Return the bytes of a row of codes."""
        return ITEMSIZE[self.codes.dtype] * (self.codes.shape[-1] if self.codes.shape else 1)

    def rows(self, read: Read, start: int, stop: int) -> CodedRows:
        top, bottom, laid = start // self.columns, -(-stop // self.columns), self.grid
        first, last = (int(line) for line in laid.rows_of(np.array([top, bottom - 1])))
        stored = bits(read, self.scales, first * laid.across, (last + 1 - first) * laid.across)
        scales = scales_of(stored, self.scales.dtype).reshape(-1, laid.across)
        zeros, order, codes = self._zeros(read, first, last + 1), self._order(read), None
        form = CodeForm(FORMS.get(self.form, PACKED), self.width, self.columns, self._stride)
        if order is not None:
            scales = np.take(scales, order, axis=1)
            zeros = None if zeros is None else np.take(zeros, order, axis=1)
            laid = laid._replace(n=1, across=self.columns)
        if self.form == "packed" and not self.dense and WORD % self.width:
            words = row_bytes(read, self.codes, top, bottom).view("<u4")
            codes = unpack(words, self.width, dense=False)[:, : self.columns] - np.uint8(1 << self.width - 1)
            form = CodeForm(FORMS["I8"], 8, self.columns, self.columns)
        biases = None
        if self.form == "unsigned":
            zeros = np.full_like(scales, -(1 << self.width - 1))
        if self.biases is not None:
            biases = floats(read, self.biases, first * laid.across, scales.size).reshape(scales.shape)
        rows = CodedRows(form, laid, first, scales, zeros, biases, self.factor, stored=codes)
        return self.sound(read, rows, start, stop, order)

    def _zeros(self, read: Read, first: int, last: int) -> Floats | None:
        """Return the zeros of rows [first, last) of the grid in float32."""
        info, across = self.zeros, self.grid.across
        if info is None:
            return None
        if not self.zeros_packed:
            found = bits(read, info, first * across, (last - first) * across)
            return values_of(info.dtype)[found].reshape(-1, across)
        whole, size = (WORD, self.width) if self.zeros_dense else (WORD // self.width, 1)  # zeros, in so many words
        begin, end = first // whole * size, min(-(-last // whole) * size, info.shape[0])
        words = bits(read, info, begin * across, (end - begin) * across).reshape(-1, across)
        codes = unpack(words.T, self.width, self.zeros_dense)[:, first % whole :][:, : last - first]
        return np.ascontiguousarray(codes.T, np.float32) - np.float32(1 << self.width - 1)

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
        coding = by_rows((rows, columns), coder, *parts, multiple=multiple)
        return replace(coding, shape=shape)


class Tabled(CodedWeight):
    """Two codes of four bits a byte, places in a table of 16, times the scale of their block of the flat weight.

    group     elements of a block
    swapped   whether the upper half of a byte comes first
    """

    __slots__ = ()
    group: int
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
    def row(self) -> int:
        """Return the columns of the weight, or of a block if blocks continue from row to row."""
        return self.columns if self.columns % self.group == 0 else self.group

    @property
    def bits(self) -> int:
        return 4

    def rows(self, read: Read, start: int, stop: int) -> CodedRows:
        top, bottom, groups = start // self.row, -(-stop // self.row), self.row // self.group
        scales = self.scales_at(read, top * groups, (bottom - top) * groups).reshape(-1, groups)
        lines = math.prod(self.scales.shape) // groups
        form = CodeForm(SWAPPED_PAIRS if self.swapped else PAIRS, 4, self.row, self.row // 2)
        laid = ScaleGrid(lines, 1, self.group, lines, groups)
        rows = CodedRows(form, laid, top, np.ascontiguousarray(scales, np.float32), table=self.table_of(read))
        return self.sound(read, rows, start, stop) if self.refuses_zero else rows
