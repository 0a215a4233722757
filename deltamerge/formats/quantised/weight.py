"""A quantised weight: the tensors that store it, and how its float32 values are computed row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import bits_type
from deltamerge.tensors.tensor import Made, Read, TensorInfo, decoded, viewed

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]
Rows = Callable[[int, int, Floats], None]

CHUNK = 1 << 18  # elements computed at once, in whole rows: they stay in cache


@dataclass(frozen=True, slots=True)
class Stored:
    """What a decoder is given: a weight's plain name, the tensors that store it (codes first), and the settings of the
    config's key (`quantization_config`, …)."""

    name: str
    parts: tuple[TensorInfo, ...]
    settings: Mapping[str, Any]

    @property
    def codes(self) -> TensorInfo:
        return self.parts[0]

    def part(self, *endings: str) -> TensorInfo | None:
        """The companion whose name ends in one of `endings`, or None."""
        return next((info for info in self.parts[1:] if info.name.endswith(endings)), None)

    def need(self, *endings: str) -> TensorInfo:
        """The same; InputError where it is missing."""
        found = self.part(*endings)
        if found is None:
            raise InputError(f"its {endings[0].strip('._')} is missing", hint="download the model again")
        return found


def weight(stored: Stored, shape: tuple[int, ...], made: Made) -> TensorInfo:
    """The float32 tensor of `shape` that `made` computes from the stored parts."""
    tensor = viewed(decoded, (), shape, "F32", made=made, name=stored.name, path=stored.codes.path)
    return TensorInfo(stored.name, tensor)


def fill_rows(columns: int, start: int, out: memoryview, rows: Callable[[int, int], Floats]) -> None:
    """Fill `out` with float32 elements from `start` on of a matrix of `columns`, a few of its rows at a time.

    `rows(top, bottom)` computes rows [top, bottom), of shape (bottom − top, columns).
    """

    def into(top: int, bottom: int, values: Floats) -> None:
        values[:] = rows(top, bottom)

    put_rows(columns, start, out, into)


def put_rows(columns: int, start: int, out: memoryview, rows: Rows) -> None:
    """The same by `rows(top, bottom, values)`, which puts rows [top, bottom) into `values`, that is `out` itself if it
    has all of them."""
    target = np.frombuffer(out, np.float32)
    step = max(1, CHUNK // columns)
    last = -(-(start + len(target)) // columns)
    for top in range(start // columns, last, step):
        put(columns, target, top * columns - start, top, min(top + step, last), rows)


def put(columns: int, target: Floats, at: int, top: int, bottom: int, rows: Rows) -> None:
    """Rows [top, bottom), of which the first begins at element `at` of `target`, as far as they lie in it."""
    low, high = max(0, at), min(len(target), at + (bottom - top) * columns)
    if high - low == (bottom - top) * columns:
        rows(top, bottom, target[low:high].reshape(-1, columns))
        return
    values = np.empty((bottom - top, columns), np.float32)
    rows(top, bottom, values)
    target[low:high] = values.reshape(-1)[low - at : high - at]


def bits(read: Read, info: TensorInfo, start: int, count: int) -> Array:
    """The bit patterns of elements [start, start + count)."""
    found = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, found)
    return found


def row_bits(read: Read, info: TensorInfo, top: int, bottom: int) -> Array:
    """The bit patterns of rows [top, bottom), of shape (bottom − top, columns)."""
    columns = info.shape[-1]
    return bits(read, info, top * columns, (bottom - top) * columns).reshape(-1, columns)
