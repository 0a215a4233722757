"""Tensors whose bytes are in memory already."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Read, TensorInfo


@dataclass(frozen=True, slots=True, eq=False)
class InMemory:
    """A tensor that is there already: its bytes, of elements of `size` bytes."""

    data: memoryview
    size: int

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        out[:] = self.data[start * self.size :][: len(out)]


def in_memory(name: str, dtype: str, shape: tuple[int, ...], data: memoryview, path: Path = Path()) -> TensorInfo:
    """The tensor of those bytes; `dtype` is safetensors' code."""
    return TensorInfo(name, dtype, shape, path, 0, len(data), InMemory(data, ITEMSIZE[dtype]))
