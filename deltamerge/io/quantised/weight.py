"""A quantised weight: the tensors that store it, and how its float32 values are computed row by row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deltamerge.errors import InputError
from deltamerge.io.dtypes import bits_type
from deltamerge.io.tensor import Made, Read, TensorInfo

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

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


@dataclass(frozen=True, slots=True)
class Constant:
    """A small tensor whose bytes are known, of elements of `size` bytes."""

    data: bytes
    size: int

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        out[:] = self.data[start * self.size :][: len(out)]


def weight(stored: Stored, shape: tuple[int, ...], made: Made) -> TensorInfo:
    """The float32 tensor of `shape` that `made` computes from the stored parts."""
    return TensorInfo(stored.name, "F32", shape, stored.codes.path, 0, 4 * math.prod(shape), made)


def fill_rows(columns: int, start: int, out: memoryview, rows: Callable[[int, int], Floats]) -> None:
    """Fill `out` with float32 elements from `start` on of a matrix of `columns`, a few of its rows at a time.

    `rows(top, bottom)` computes rows [top, bottom), of shape (bottom − top, columns).
    """
    target = np.frombuffer(out, np.float32)
    stop = start + len(target)
    step = max(1, CHUNK // columns)
    last = -(-stop // columns)
    for top in range(start // columns, last, step):
        bottom = min(top + step, last)
        values = rows(top, bottom).reshape(-1)
        low, high = max(start, top * columns), min(stop, bottom * columns)
        target[low - start : high - start] = values[low - top * columns : high - top * columns]


def bits(read: Read, info: TensorInfo, start: int, count: int) -> Array:
    """The bit patterns of elements [start, start + count)."""
    found = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, found)
    return found


def row_bits(read: Read, info: TensorInfo, top: int, bottom: int) -> Array:
    """The bit patterns of rows [top, bottom), of shape (bottom − top, columns)."""
    columns = info.shape[-1]
    return bits(read, info, top * columns, (bottom - top) * columns).reshape(-1, columns)
