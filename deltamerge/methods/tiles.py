"""Tiles of a tensor, and the forms of a tile's value; torch is imported only when a value is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

BLOCK = 1 << 16
LONGEST_ROW = 1 << 20
# Long sums are sums of sums over so many entries, which fit in a core's first cache. Results depend on it, and compiled
# code contains it: it never changes.
RUN = 1 << 11

# Makes a graph's node: (function, inputs, *, kind, shape, dtype, **parameters), like `graph.Graph.node`.
Make: TypeAlias = Callable[..., Any]


class Whole(Protocol):
    """A tensor that is computed as it is read: what a `whole` function is given for its inputs that have tiles."""

    @property
    def device(self) -> Any:
        """torch's device of its values."""

    def fill(self, start: int, out: Any) -> None:
        """Write the elements from `start` on into `out`, a flat float32 tensor on the device."""


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of one output row: the last dimension of matrices (stacked ones too), all but the first of
    convolutions."""
    if len(shape) < 2:
        return 1
    return shape[-1] if len(shape) < 4 else math.prod(shape[1:])


def block_elements(shape: tuple[int, ...]) -> int:
    """Elements of one block: whole rows, about 2**16; a function of the shape alone.

    Tiles are whole blocks, and a floating reduction yields one partial per block, so neither tile size nor
    threads can change a sum. Rows of more than 2**20 elements are cut through.
    """
    n = max(1, row_length(shape))
    return BLOCK if n > LONGEST_ROW else max(1, BLOCK // n) * n


@dataclass(frozen=True, slots=True)
class Tile:
    """The flat element range [start, stop) of a tensor of `shape`."""

    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the tile."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Elements of a row of the tensor."""
        return max(1, row_length(self.shape))


@dataclass(frozen=True, slots=True)
class Kept:
    """A sparse delta of one tile: ascending int64 `positions` from the tile's start, float32 `values`."""

    positions: Any
    values: Any


@dataclass(frozen=True, slots=True)
class Patched:
    """A tile that equals `base` (stored dtype) except for float32 `values` at `positions`."""

    base: Any
    positions: Any
    values: Any
