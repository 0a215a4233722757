"""Arrays that are read from their files when sliced: a truncated file is an error, where a memory map would SIGBUS."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np

from deltamerge import errors
from deltamerge.files.descriptors import Descriptors, flat, input_error, read_at
from deltamerge.formats.delta.positions import Array

SMALL = 4 << 20
PADDING = 16
ALIGNMENT = 64


@dataclass(frozen=True, slots=True, eq=False)
class StoredFiles:
    """Files of known `sizes` in bytes. A file of at most 4 MiB is read at once, since hundreds of small reads cost
    more."""

    sizes: dict[Path, int]
    _opened: Descriptors = field(default_factory=lambda: Descriptors(os.O_RDONLY, input_error))
    _whole: dict[Path, memoryview] = field(default_factory=dict)

    def read(self, path: Path, begin: int, out: memoryview) -> None:
        """Fill `out` from byte `begin`. InputError: the file is gone, or has become too short."""
        whole = self._whole.get(path)
        if whole is None:
            with errors.context(path.name):
                file = self._opened.get(path)
                if self.sizes[path] > SMALL:
                    read_at(file.fd, begin, out)
                    return
                whole = memoryview(bytearray(self.sizes[path]))
                read_at(file.fd, 0, whole)
                self._whole[path] = whole
        if out:
            out[:] = whole[begin : begin + len(out)]


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """`size` elements of a numpy `dtype` from byte `begin` of the file at `path`; sliced like a numpy array."""

    files: StoredFiles
    path: Path
    begin: int
    size: int
    dtype: str

    @property
    def nbytes(self) -> int:
        return self.size * np.dtype(self.dtype).itemsize

    def read_into(self, out: Array) -> None:
        """Read its bytes into `out`. InputError: the file is gone, or has become too short."""
        self.files.read(self.path, self.begin, flat(out))

    def __getitem__(self, part: slice) -> Array:
        """The elements of a contiguous slice, a copy. InputError: the file is gone, or has become too short."""
        start, stop, step = part.indices(self.size)
        assert step == 1
        out: Array = np.empty(max(0, stop - start), self.dtype)
        self.files.read(self.path, self.begin + start * out.itemsize, flat(out))
        return out


class Scratch:
    """Memory that is reused for the arrays of one tensor after another: fresh memory costs more than the reading."""

    def __init__(self) -> None:
        self._bytes: Array = np.empty(0, np.uint8)

    def read(self, arrays: Sequence[StoredArray | None]) -> list[Array]:
        """The bytes of the arrays (None: no bytes), each followed by PADDING zeros; valid until the next call."""
        sizes = [0 if array is None else array.nbytes for array in arrays]
        ends = list(accumulate(-(-(size + PADDING) // ALIGNMENT) * ALIGNMENT for size in sizes))
        if self._bytes.size < ends[-1]:
            self._bytes = np.empty(ends[-1], np.uint8)
        views = []
        for array, size, begin in zip(arrays, sizes, [0, *ends], strict=False):
            view = self._bytes[begin : begin + size + PADDING]
            view[size:] = 0
            if array is not None:
                array.read_into(view[:size])
            views.append(view)
        return views
