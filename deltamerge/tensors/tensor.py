"""A tensor as plans know it: name, dtype, shape, and where its bytes lie or how they are computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


class Read(Protocol):
    """The interface by which a computed tensor reads other tensors; `tensors.reader.Reader` implements it."""

    def read_into(self, info: TensorInfo, start_elem: int, out: Any) -> None:
        """Fill the contiguous buffer `out` with the tensor's bytes from element `start_elem`."""

    def read_runs(self, info: TensorInfo, offsets: NDArray[np.int64], ends: NDArray[np.int64], out: Any) -> None:
        """Fill `out` with runs of the tensor's bytes: run i begins at byte `offsets[i]` and ends at
        `ends[i]` of `out`."""

    def once(self, key: Any, compute: Callable[[], Any]) -> Any:
        """The value of `compute` for `key`, computed by the first thread that asks."""


class Made(Protocol):
    """Computes the bytes of a tensor that is not stored as it is. Implementations are plain data, as plans are."""

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        """Fill `out` with the tensor's bytes from element `start` on."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor and where its bytes lie.

    dtype   safetensors' code ("BF16")
    begin   offset of the first byte from the start of the file, or from the first computed byte
    made    computes the bytes (an adapter's, a delta's, a quantised weight's); None: they are stored
    saved_as   the dtype that outputs take from it, where that is not `dtype`: a quantised weight is computed in float32
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    begin: int
    nbytes: int
    made: Made | None = None
    saved_as: str | None = None

    @property
    def output_dtype(self) -> str:
        """The dtype of an output that is like this tensor."""
        return self.saved_as or self.dtype

    @property
    def read_nbytes(self) -> int:
        """The bytes of files that are read for its elements: of a quantised weight its codes."""
        codes = getattr(self.made, "codes", None)
        return codes.nbytes if isinstance(codes, TensorInfo) else self.nbytes

    def is_same(self, other: TensorInfo) -> bool:
        """Whether both are the same bytes of the same file, whatever their names."""
        ours = (self.dtype, self.shape, self.path, self.begin, self.made)
        return ours == (other.dtype, other.shape, other.path, other.begin, other.made)
