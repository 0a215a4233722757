"""What a compiled pass is made of: the tensors that it reads and the operations on their pieces."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deltamerge.io.dtypes import ITEMSIZE
from deltamerge.io.files import Descriptor
from deltamerge.io.quantised.scaled import Scaled
from deltamerge.io.reader import Reader
from deltamerge.io.tensor import TensorInfo
from deltamerge.methods.prune.bits import Key


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A stored tensor: its open file, or None where its bytes are made when they are read.

    `coded`: the file holds its codes, which the loop itself makes numbers of.
    """

    info: TensorInfo
    file: Descriptor | None
    coded: Scaled | None = None

    @classmethod
    def of(cls, info: TensorInfo, reader: Reader) -> StoredSource:
        coded = info.made if isinstance(info.made, Scaled) and info.made.is_plain and not info.begin else None
        return cls(info, reader.stored(info if coded is None else coded.codes), coded)

    @property
    def path(self) -> Path:
        return self.info.path

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.info.dtype]

    @property
    def begin(self) -> int:
        """The byte of its file where its elements, or its codes, begin."""
        return self.info.begin if self.coded is None else self.coded.codes.begin

    @property
    def hashed_itemsize(self) -> int:
        """The bytes of an element in the file; 0 where codes are smaller than bytes and are not hashed as they are
        read."""
        return self.itemsize if self.coded is None else int(self.coded.form != "packed")


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
