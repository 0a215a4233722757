"""Arrays that stay in their files until they are sliced: a file truncated meanwhile is an error, not a map's SIGBUS."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from deltamerge import errors
from deltamerge.io.encodings import Array
from deltamerge.io.files import Descriptors, flat, input_error, read_at

SMALL = 4 << 20


@dataclass(frozen=True, slots=True, eq=False)
class StoredFiles:
    """Files of known `sizes` in bytes. One of at most 4 MiB is read once, whole: hundreds of small reads cost more."""

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
    """`size` elements of `dtype` (numpy's) from byte `begin` of the file at `path`; sliced like a numpy array."""

    files: StoredFiles
    path: Path
    begin: int
    size: int
    dtype: str

    def __getitem__(self, part: slice) -> Array:
        """The elements of a contiguous slice, a copy. InputError: the file is gone, or has become too short."""
        start, stop, step = part.indices(self.size)
        assert step == 1
        out: Array = np.empty(max(0, stop - start), self.dtype)
        self.files.read(self.path, self.begin + start * out.itemsize, flat(out))
        return out
