"""An array that stays in its file until it is sliced: a file truncated meanwhile is an error, not a SIGBUS of a map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from deltamerge import errors
from deltamerge.io.encodings import Array
from deltamerge.io.files import Descriptors, flat, read_at


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """`size` elements of `dtype` (numpy's) from byte `begin` of the file at `path`; sliced like a numpy array."""

    files: Descriptors
    path: Path
    begin: int
    size: int
    dtype: str

    def __getitem__(self, part: slice) -> Array:
        """The elements of a contiguous slice, read now. InputError: the file is gone, or has become too short."""
        start, stop, step = part.indices(self.size)
        assert step == 1
        out: Array = np.empty(max(0, stop - start), self.dtype)
        with errors.context(self.path.name):
            file = self.files.get(self.path)
            read_at(file.fd, self.begin + start * out.itemsize, flat(out))
        return out
