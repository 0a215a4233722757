"""What a compiled pass is made of: the tensors that it reads and the operations on their pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltamerge.io.dtypes import ITEMSIZE
from deltamerge.io.files import Descriptor
from deltamerge.io.tensor import TensorInfo
from deltamerge.methods.prune.bits import Key


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A stored tensor: its open file, or None where its bytes are made when they are read."""

    info: TensorInfo
    file: Descriptor | None

    @property
    def path(self) -> Path:
        return self.info.path

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.info.dtype]


@dataclass(frozen=True, slots=True)
class Operation:
    """One of `codes`, and what does not fit in its numbers."""

    code: int
    to: int
    fields: tuple[int, int, int, int] = (-1, -1, -1, -1)
    key: Key = (0, 0)
    scalars: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, ...] = ()
    models: tuple[int, ...] = ()
    lists: tuple[int, ...] = ()
    count: int = 0

    @property
    def width(self) -> int:
        return max(len(self.weights), len(self.models), len(self.lists))
