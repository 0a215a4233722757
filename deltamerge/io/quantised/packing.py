"""What packed schemes share: codes taken out of words, columns of a stored matrix, and the checks of their parts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

import numpy as np

from deltamerge.errors import InputError
from deltamerge.io.dtypes import ITEMSIZE, PLAIN, bits_type, widen
from deltamerge.io.quantised.weight import CHUNK, Array, Floats, bits
from deltamerge.io.tensor import Read, TensorInfo

AGAIN = "download the model again"
SLAB = 1 << 24  # bytes of a stored matrix that is kept, as long as its columns are asked for
KEPT = 4 * SLAB


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
    height: int, columns: int, align: int, start: int, out: memoryview, band: Callable[[int, int, int], Floats]
) -> None:
    """Fill `out` with float32 elements from `start` on of matrices of `height` × `columns`, by bands of their rows.

    `band(matrix, top, bottom)` computes rows [top, bottom) of a matrix; they are asked for in multiples of `align`.
    """
    target = np.frombuffer(out, np.float32)
    stop = start + len(target)
    most = max(1, CHUNK // (columns * align)) * align
    row, last = start // columns, -(-stop // columns)
    while row < last:
        matrix, inner = divmod(row, height)
        top = inner // align * align
        bottom = min(top + most, height, last - matrix * height)
        flat = band(matrix, inner, bottom).reshape(-1)
        begin = row * columns
        low, high = max(start, begin), min(stop, (matrix * height + bottom) * columns)
        target[low - start : high - start] = flat[low - begin : high - begin]
        row = matrix * height + bottom


def columns_of(read: Read, info: TensorInfo, rows: int, width: int, first: int, last: int, matrix: int = 0) -> Array:
    """Columns [first, last) of the bit patterns of a stored matrix of `rows` × `width`, number `matrix` in `info`.

    A matrix of up to `SLAB` bytes is read once and kept for the next columns; of a larger one only they are read.
    """
    size = ITEMSIZE[info.dtype]
    if rows * width * size <= SLAB:
        slab = kept(read, (info, matrix), lambda: bits(read, info, matrix * rows * width, rows * width))
        return slab.reshape(rows, width)[:, first:last]
    found = np.empty((rows, last - first), bits_type(info.dtype))
    offsets = ((matrix * rows + np.arange(rows)) * width + first) * size
    ends = np.arange(1, rows + 1) * (last - first) * size
    read.read_runs(info, offsets, ends, found)
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
