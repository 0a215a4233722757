"""A weight as a scheme stores it: its parts, their checks, and how any range of its float32 values is computed.

A scheme is code layout × grid of scales × number type × zero point. Its file holds classes of `CodedWeight`: each
reads its values from the stored parts and says how they are written (`coding`).
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import count
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import ITEMSIZE, PLAIN, bits_type, nbytes_of, widen
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Shape = tuple[int, ...]
Rows = Callable[[int, int, Floats], None]
Part: TypeAlias = Tensor | TensorInfo
"""A stored tensor, as formats name it or as the graph has it."""

AGAIN = "download the model again"
OR_QUANTISE = f"{AGAIN}, or quantise it again"
UNWRITABLE = "is in a form that cannot be written, only read"
EXPONENTS = frozenset({"F8_E8M0", "U8"})  # dtypes of scales 2^(code − 127)
CHUNK = 1 << 18  # elements computed at once, in whole rows: they stay in cache
BAND = 1 << 20  # elements that kernels compute at once of a matrix that is stored transposed
SLAB = 1 << 24  # bytes of a stored matrix that is held, as long as its columns are asked for
KEPT = 4 * SLAB
PANEL = 64  # columns that a slab has a multiple of: whole groups of MXFP4 at least


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
    columns   of the weight
    keeps     whether slabs of stored matrices are held in memory while it is read
    """

    __slots__ = ()
    codes: Part
    columns: int
    keeps: ClassVar[bool] = False

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        """Fill `out` with the float32 values from element `start` on."""
        if self.columns:
            put_rows(self.columns, start, out, partial(self.put, read))

    def put(self, read: Read, top: int, bottom: int, out: Floats) -> None:
        """Write rows [top, bottom) of the values into `out`."""
        raise NotImplementedError

    @property
    def is_plain(self) -> bool:
        """Return whether the compiled loop can make numbers of the codes."""
        return False

    @property
    def bits(self) -> int:
        """Return the bits of an element in the file; 0: elements do not follow each other there."""
        return 0

    def part(self, read: Read, start: int, stop: int) -> CodedRows | None:
        """Return the compiled loop's arguments for elements [start, stop); None: `fill` has to compute them."""
        raise NotImplementedError

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Return how a weight of `shape` is written in this form. InputError: it cannot be written."""
        raise InputError(UNWRITABLE)


def weight(stored: StoredWeight, shape: Shape, made: CodedWeight) -> TensorInfo:
    """Return the float32 tensor of `shape` that `made` computes: a view of its stored parts, codes first."""
    values = {one.name: getattr(made, one.name) for one in fields(made)}  # type: ignore[arg-type]  # all are dataclasses
    parts = {name: value for name, value in values.items() if isinstance(value, Tensor | TensorInfo)}
    plain = tuple((name, value) for name, value in values.items() if name not in parts)
    tensor = viewed(decode, parts.values(), shape, "F32", form=type(made), names=tuple(parts), plain=plain)
    return TensorInfo(stored.name, tensor)


def _codes_of(tensor: Tensor) -> Tensor:
    return tensor.inputs[0]


def _streamed(tensor: Tensor) -> CodedWeight | None:
    made = coded_weight(tensor)
    return made if made is not None and made.is_plain else None


def _keeps(tensor: Tensor) -> bool:
    return bool(tensor.parameter("form").keeps)


@view(codes=_codes_of, streamed=_streamed, keeps=_keeps)
def decode(read: Read, tensor: Tensor, start: int, out: memoryview, **_: Any) -> None:
    """Compute a weight from its stored parts. Parameters: its class, the names of its parts, and its other fields."""
    made = coded_weight(tensor)
    assert made is not None
    made.fill(read, start, out)


def coded_weight(tensor: Tensor, infos: Mapping[Tensor, TensorInfo] | None = None) -> CodedWeight | None:
    """Return what computes a weight from codes; None for other tensors. `infos` name its parts."""
    if tensor.function != decode.__name__:
        return None
    own = dict(tensor.parameters)
    parts = (part if infos is None else infos[part] for part in tensor.inputs)
    made: CodedWeight = own["form"](**dict(zip(own["names"], parts, strict=True)), **dict(own["plain"]))
    return made


# Weights as they are written.


class CodedParts(NamedTuple):
    """Rows as they are stored: a contiguous array for each stored tensor, codes first, and Σ (x − stored)²."""

    arrays: tuple[Array, ...]
    lost: float


class Coder(Protocol):
    """Codes rows of a weight. Implementations are plain data.

    An `Adjustable` one lets a `Rounding` choose the codes.
    """

    def encode(self, values: Floats, read: Read) -> CodedParts:
        """Return finite `values` (rows, columns) as they are stored."""


class Adjustable:
    """A coder whose `encode` takes a third argument, a `Rounding` (codes.py).

    turned   whether the columns of the values are coded as rows
    """

    __slots__ = ()
    turned: ClassVar[bool] = False

    def encode(self, values: Floats, read: Read, rounding: Any = None) -> CodedParts:
        """Return finite `values` (rows, columns) as they are stored."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A stored tensor of a coded weight; `rows` rows of a matrix of the weight make one of its own."""

    name: str
    dtype: str
    shape: Shape
    rows: int = 1

    @classmethod
    def like(cls, info: Part, rows: int = 1) -> StoredPart:
        """Return the part that is stored like `info`."""
        return cls(info.name, info.dtype, info.shape, rows)

    @property
    def nbytes(self) -> int:
        """Return its bytes in a file."""
        return nbytes_of(self.dtype, self.shape)


class Unit(NamedTuple):
    """Rows of a weight that are coded together: elements [start, stop), from row `top` of matrix `matrix` on."""

    start: int
    stop: int
    matrix: int
    top: int


@dataclass(frozen=True, slots=True)
class Coding:
    """How a float32 weight of `shape` is stored.

    matrix      rows and columns of what is coded as a matrix by itself: of each expert, or of the whole tensor
    unit        rows coded together
    parts       the coder's results, codes first
    copied      further tensors that belong to it and are copied
    like        the weight as another model has it, in the same form: a unit that equals it gets its bytes, which are
                in `like_parts`
    rounding    how codes are chosen, and what they keep of the difference from `base` is measured; None: the nearest
    base        the weight of the base model
    """

    shape: Shape
    coder: Coder
    matrix: tuple[int, int]
    unit: int
    parts: tuple[StoredPart, ...]
    copied: tuple[TensorInfo, ...] = ()
    like: TensorInfo | None = None
    like_parts: tuple[TensorInfo, ...] = ()
    rounding: Literal["nearest", "inputs"] | None = None
    base: TensorInfo | None = None

    def rounded(self, rounding: Literal["nearest", "inputs"], base: TensorInfo | None) -> Coding:
        """Return the coding with another choice of codes, for all rows with the same inputs together.

        InputError: its coder cannot choose.
        """
        if not isinstance(self.coder, Adjustable):
            raise InputError("output.rounding: is not for its form", hint="leave output.rounding out")
        unit, own = self.matrix[0], self.shape[-2]  # of all experts, or of one
        if self.unit < unit and not any(own % part.rows for part in self.parts):
            unit = own
        return replace(self, unit=unit, rounding=rounding, base=base)

    @property
    def inputs(self) -> int:
        """Return the inputs of the layer, where codes may be chosen by them."""
        return self.shape[-2] if isinstance(self.coder, Adjustable) and self.coder.turned else self.shape[-1]

    @property
    def matrices(self) -> int:
        """Return the number of matrices."""
        return math.prod(self.shape) // max(1, math.prod(self.matrix))

    @property
    def unit_bytes(self) -> int:
        """Return the bytes of the largest unit in float32."""
        return 4 * min(self.unit, self.matrix[0]) * self.matrix[1]

    def units(self, start: int, stop: int) -> Iterator[Unit]:
        """Yield the units that elements [start, stop) belong to, in order."""
        rows, columns = self.matrix
        while start < stop:
            row = start // columns
            matrix, top = row // rows, row % rows // self.unit * self.unit
            end = matrix * rows + min(rows, top + self.unit)
            unit = Unit((matrix * rows + top) * columns, end * columns, matrix, top)
            yield unit
            start = unit.stop

    def places(self, unit: Unit) -> Iterator[tuple[StoredPart, int, int]]:
        """Yield each part with the bytes [begin, end) of it that a unit makes."""
        rows = self.matrix[0]
        bottom = unit.top + (unit.stop - unit.start) // self.matrix[1]
        for part in self.parts:
            own = -(-rows // part.rows)
            size = part.nbytes // (own * self.matrices)
            first = unit.matrix * own
            yield part, (first + unit.top // part.rows) * size, (first + -(-bottom // part.rows)) * size


def unit_rows(rows: int, columns: int, multiple: int) -> int:
    """Return the rows of a matrix that are coded together: a multiple of `multiple`, some 2**18 elements."""
    return max(1, CHUNK // max(1, multiple * columns)) * multiple if multiple < rows else rows


def by_rows(shape: Shape, coder: Coder, *parts: Part) -> Coding:
    """Return the coding of a weight each of whose rows is stored by itself."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), tuple(map(StoredPart.like, parts)))


def as_one(shape: Shape, coder: Coder, *parts: Part, matrix: tuple[int, int] | None = None) -> Coding:
    """Return the coding of a weight, or of each of its matrices, that is coded at once."""
    rows, columns = matrix or (math.prod(shape[:-1]), shape[-1])
    return Coding(shape, coder, (rows, columns), rows, tuple(StoredPart.like(part, rows) for part in parts))


def coding_like(weight: TensorInfo, stored: Sequence[TensorInfo], settings: Mapping[str, Any], name: str) -> Coding:
    """Return the coding of an output's weight, `name`, in the form of a checkpoint's `weight`, stored as `stored`.

    `settings` are those of the checkpoint's config. InputError: the form cannot be written.
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


# Codes as the compiled loop takes them.

# How the kernels number codes (kernels/src/loops.h).
FORMS = {"F8_E4M3": 0, "F8_E5M2": 1, "I8": 2}
PACKED = 3
PAIRS = PACKED + 1  # 1 more: the upper half first
TURNED_PAIRS, TURNED_ALONG, TURNED_ACROSS = 6, 7, 8
NO_ARRAY = -1  # for the number of an array where there is none


class CodeForm(NamedTuple):
    """How the kernels know codes: their number there, the bits of one, and the columns and bytes of a row."""

    number: int
    width: int
    columns: int
    stride: int


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of a weight for the compiled loop.

    line     the row of the grid that `scales` and `zeros` begin with; of `stored`, the row that the range begins with
    blocks   the grid of its scales: height, m, n, down, across
    table    the numbers of codes that are places in a table
    stored   codes (rows, …) in memory, of a weight that is stored transposed; their bytes are not hashed
    groups   the group of each column of such a weight
    """

    form: CodeForm
    scales: Floats
    line: int
    blocks: tuple[int, int, int, int, int] = (0, 0, 0, 0, 1)
    zeros: Floats | None = None
    table: Floats | None = None
    stored: Array | None = None
    groups: npt.NDArray[np.int32] | None = None

    def numbers(self, hashed: bool, arrays: list[Array]) -> tuple[int, ...]:
        """Return the fields of `CodedSource` (kernels/src/program.h). Arrays are put into `arrays` and numbered."""
        scales, zeros, table, stored, groups = (
            _numbered(array, arrays) for array in (self.scales, self.zeros, self.table, self.stored, self.groups)
        )
        hashed = hashed and self.stored is None
        return (*self.form, scales, zeros, *self.blocks, self.line, hashed, table, stored, groups)


def _numbered(array: Array | None, arrays: list[Array]) -> int:
    """Append an array to a list and return its number there."""
    if array is None:
        return NO_ARRAY
    arrays.append(array)
    return len(arrays) - 1


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


def damaged(info: Part, what: str) -> InputError:
    """Return the error for a part whose values cannot be."""
    return InputError(f"{info.name}: {what}", hint=AGAIN, where=str(info.path))


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


# Values, a few rows at a time.


def put_rows(columns: int, start: int, out: memoryview, rows: Rows) -> None:
    """Fill `out` with float32 elements from `start` on of a matrix of `columns`.

    `rows(top, bottom, values)` writes rows [top, bottom) into `values`.
    """
    target = np.frombuffer(out, np.float32)
    step = max(1, CHUNK // columns)
    last = -(-(start + len(target)) // columns)
    for top in range(start // columns, last, step):
        _put(columns, target, top * columns - start, top, min(top + step, last), rows)


def fill_bands(
    height: int, columns: int, align: int, start: int, out: memoryview, band: Callable[[int, int, int, Floats], None]
) -> None:
    """Fill `out` with float32 elements from `start` on of matrices of `height` × `columns`.

    `band(matrix, top, bottom, values)` writes rows [top, bottom) of a matrix into `values`. Bands begin at multiples
    of `align`. The kernels get larger bands: they keep their work in cache themselves.
    """
    target = np.frombuffer(out, np.float32)
    chunk = CHUNK if kernels.native() is None else BAND
    most = max(1, chunk // (columns * align)) * align
    row, last = start // columns, -(-(start + len(target)) // columns)
    while row < last:
        matrix, inner = divmod(row, height)
        top = inner // align * align
        bottom = min(top + most, height, last - matrix * height)
        _put(columns, target, row * columns - start, inner, bottom, partial(band, matrix))
        row = matrix * height + bottom


def _put(columns: int, target: Floats, at: int, top: int, bottom: int, rows: Rows) -> None:
    """Write rows [top, bottom) as far as they lie in `target`; the first begins at its element `at`."""
    low, high = max(0, at), min(len(target), at + (bottom - top) * columns)
    if high - low == (bottom - top) * columns:
        rows(top, bottom, target[low:high].reshape(-1, columns))
        return
    values = np.empty((bottom - top, columns), np.float32)
    rows(top, bottom, values)
    target[low:high] = values.reshape(-1)[low - at : high - at]


# Columns of stored matrices.


def columns_of(read: Read, info: Part, rows: int, width: int, first: int, last: int, matrix: int = 0) -> Array:
    """Return columns [first, last) of the bit patterns of stored matrix `matrix` of `rows` × `width`.

    They are cut out of a slab that is held for the next ones: the matrix, or the columns that fit in `SLAB` bytes.
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


def kept(read: Read, key: object, make: Callable[[], Array]) -> Array:
    """Return the result of `make` for `key`, held for the next reads."""
    slabs: _Slabs = read.once("slabs of quantised matrices", _Slabs)
    return slabs.get(key, make)


@dataclass(slots=True)
class _Slabs:
    """The stored matrices read last, up to `KEPT` bytes."""

    kept: OrderedDict[object, Array] = field(default_factory=OrderedDict)
    lock: threading.RLock = field(default_factory=threading.RLock)  # a slab may be made of another

    def get(self, key: object, make: Callable[[], Array]) -> Array:
        with self.lock:
            if key in self.kept:
                self.kept.move_to_end(key)
                return self.kept[key]
            made = make()
            self.kept[key] = made
            while sum(slab.nbytes for slab in self.kept.values()) > KEPT and len(self.kept) > 1:
                self.kept.popitem(last=False)
            return made
