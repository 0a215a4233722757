"""What packed schemes share: codes taken out of words, columns of a stored matrix, and the checks of their parts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.weight import CHUNK, Array, Floats, bits, put
from deltamerge.tensors.dtypes import ITEMSIZE, PLAIN, bits_type, widen
from deltamerge.tensors.tensor import Read, TensorInfo

AGAIN = "download the model again"
SLAB = 1 << 24  # bytes of a stored matrix that is kept, as long as its columns are asked for
KEPT = 4 * SLAB
PANEL = 64  # columns that a slab has a multiple of: whole groups of MXFP4 at least
BAND = 1 << 20  # elements that kernels compute at once of a matrix that is stored transposed


def expect(info: TensorInfo, shape: tuple[int, ...], dtypes: Collection[str] = PLAIN) -> TensorInfo:
    """`info`, a part of a weight. InputError: another dtype or shape."""
    label = info.name.rpartition(".")[2]
    if info.dtype not in dtypes:
        raise InputError(f"its {label} is {info.dtype}, must be {' or '.join(sorted(dtypes))}")
    if info.shape != shape:
        raise InputError(f"its {label} has the shape {list(info.shape)}, must be {list(shape)}")
    return info


def whole(value: int, by: int, what: str) -> int:
    """value / by. InputError: it is no whole number, above 0."""
    if value <= 0 or by <= 0 or value % by:
        raise InputError(f"{what}: {by} does not divide {value}")
    return value // by


def floats(read: Read, info: TensorInfo, start: int, count: int) -> Floats:
    """Elements [start, start + count) of a part in float32. InputError: one is NaN or infinite."""
    return finite(widen(bits(read, info, start, count), info.dtype), info)


def finite(values: Floats, info: TensorInfo) -> Floats:
    """`values` of a part. InputError: one is NaN or infinite."""
    if not np.isfinite(values).all():
        raise damaged(info, "holds NaN or infinity")
    return values


def damaged(info: TensorInfo, what: str) -> InputError:
    """The error for a part whose values cannot be."""
    return InputError(f"{info.name}: {what}", hint=AGAIN, where=str(info.path))


def unpack(stored: Array, width: int) -> Array:
    """Codes of `width` bits, uint8 (…, 8 n / width), of bytes (…, n): code k is bits [k width, (k + 1) width) of its
    row, lowest first. `width` divides n or 8."""
    if width == 8:
        return stored
    step = 1 if 8 % width == 0 else width  # bytes that hold whole codes
    count = 8 * step // width
    groups = stored.reshape(*stored.shape[:-1], -1, step)
    codes = np.empty((*groups.shape[:-1], count), np.uint8)
    mask = np.uint8((1 << width) - 1)
    for k in range(count):
        byte, shift = divmod(k * width, 8)
        code = groups[..., byte] >> np.uint8(shift)
        if shift + width > 8:
            code |= groups[..., byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(code, mask, out=codes[..., k])
    return codes.reshape(*stored.shape[:-1], -1)


def fill_bands(
    height: int, columns: int, align: int, start: int, out: memoryview, band: Callable[[int, int, int, Floats], None]
) -> None:
    """Fill `out` with float32 elements from `start` on of matrices of `height` × `columns`, by bands of their rows.

    `band(matrix, top, bottom, values)` puts rows [top, bottom) of a matrix into `values`; they are asked for in
    multiples of `align`, more at once of kernels, which keep what they work on in cache themselves.
    """
    target = np.frombuffer(out, np.float32)
    chunk = CHUNK if kernels.native() is None else BAND
    most = max(1, chunk // (columns * align)) * align
    row, last = start // columns, -(-(start + len(target)) // columns)
    while row < last:
        matrix, inner = divmod(row, height)
        top = inner // align * align
        bottom = min(top + most, height, last - matrix * height)
        put(columns, target, row * columns - start, inner, bottom, partial(band, matrix))
        row = matrix * height + bottom


def columns_of(read: Read, info: TensorInfo, rows: int, width: int, first: int, last: int, matrix: int = 0) -> Array:
    """Columns [first, last) of the bit patterns of a stored matrix of `rows` × `width`, number `matrix` in `info`.

    They are cut out of a slab that is kept for the next ones: the matrix, or as many of its columns as `SLAB` bytes
    have.
    """
    found, begin = held_columns(read, info, rows, width, first, last, matrix)
    return found[:, first - begin : last - begin]


def held_columns(
    read: Read, info: TensorInfo, rows: int, width: int, first: int, last: int, matrix: int = 0
) -> tuple[Array, int]:
    """A contiguous array that has these columns, and the number of its first."""
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


def _columns(read: Read, info: TensorInfo, matrix: tuple[int, int, int], first: int, last: int) -> Array:
    """Columns [first, last) of a stored matrix: its first row, its rows and the columns of a row."""
    (top, rows, width), size = matrix, ITEMSIZE[info.dtype]
    found = np.empty((rows, last - first), bits_type(info.dtype))
    offsets = ((top + np.arange(rows)) * width + first) * size
    read.read_runs(info, offsets, np.arange(1, rows + 1) * (last - first) * size, found)
    return found


def kept_bytes(tensors: Iterable[TensorInfo]) -> int:
    """The memory that slabs of these tensors take while they are read: those whose `made` says that it `keeps` some."""
    return KEPT if any(getattr(info.made, "keeps", False) for info in tensors) else 0


def kept(read: Read, key: object, make: Callable[[], Array]) -> Array:
    """What `make` reads for `key`, which the next reads are likely to ask for again."""
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
