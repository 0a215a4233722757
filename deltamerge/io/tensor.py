"""A tensor as plans know it: its name, dtype, shape, and where its bytes lie or what makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Read(Protocol):
    """What makes a tensor's bytes reads other tensors by this; `io.reader.Reader` is one."""

    def read_into(self, info: TensorInfo, start_elem: int, out: Any) -> None:
        """Fill the contiguous buffer `out` with the tensor's bytes from element `start_elem`."""

    def read_runs(self, info: TensorInfo, offsets: NDArray[np.int64], ends: NDArray[np.int64], out: Any) -> None:
        """Fill `out` with runs of the tensor's bytes: run i is from `offsets[i]` on, and ends at `ends[i]` of `out`."""

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value of `compute` for `key`, computed by the first thread that asks."""


class Made(Protocol):
    """What makes the bytes of a tensor that is not stored as it is; plain data, so that a plan stays plain."""

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes from element `start` of what is made."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: `dtype` is safetensors' code ("BF16"), `begin` counts from the start of the file.

    Where the bytes are `made` as they are read (an adapter's, a delta's), `begin` counts from the first that is made.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int
    made: Made | None = None

    def is_same(self, other: TensorInfo) -> bool:
        """Whether both are the same bytes, as their places tell, whatever they are called."""
        ours = (self.dtype, self.shape, self.path, self.begin, self.made)
        return ours == (other.dtype, other.shape, other.path, other.begin, other.made)
