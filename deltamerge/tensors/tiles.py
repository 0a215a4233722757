"""Tiles of a tensor, the forms of a tile's value, and blocks and rows inside a tile."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    Tensor = torch.Tensor

BLOCK = 1 << 16
LONGEST_ROW = 1 << 20
# Long sums are sums of partial sums over so many entries, which fit in a core's first cache. Results depend on the
# number, and compiled code contains it: it never changes.
RUN = 1 << 11
# Entries of a sparse mask that share one stream of random words. Compiled code contains the number.
SPARSE_BLOCK = 1 << 16

# Makes a graph's node: (function, inputs, *, kind, shape, dtype, **parameters), like `graph.Graph.node`.
Make: TypeAlias = Callable[..., Any]


class Whole(Protocol):
    """A tensor that is computed as it is read: an input with tiles of a `whole` function."""

    @property
    def device(self) -> Any:
        """Return torch's device of its values."""

    def fill(self, start: int, out: Any) -> None:
        """Write the elements from `start` on into `out`, a flat float32 tensor on the device."""


def row_length(shape: tuple[int, ...]) -> int:
    """Return the elements of one output row: the last dimension of a matrix, also of stacked matrices, and all
    dimensions but the first of a convolution."""
    if len(shape) < 2:
        return 1
    return shape[-1] if len(shape) < 4 else math.prod(shape[1:])


def block_elements(shape: tuple[int, ...]) -> int:
    """Return the elements of one block: whole rows, about 2**16; a function of the shape alone.

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
        """Return the elements of the tile."""
        return self.stop - self.start

    @property
    def columns(self) -> int:
        """Return the elements of a row of the tensor."""
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


def densify(delta: Any, size: int) -> Tensor:
    """Return a delta as a flat float32 tensor, zero where `Kept` has no entry."""
    if not isinstance(delta, Kept):
        return delta  # type: ignore[no-any-return]  # a dense tile already
    dense = torch.zeros(size, dtype=torch.float32, device=delta.values.device)
    dense[delta.positions] = delta.values
    return dense


def block_rows(values: Tensor, tile: Tile) -> Tensor:
    """Return the blocks (blocks, width) of a flat tile, each padded with zeros to a power of two."""
    step = block_elements(tile.shape)
    blocks = -(-tile.size // step)
    rows = torch.nn.functional.pad(values, (0, blocks * step - tile.size)).view(blocks, step)
    return torch.nn.functional.pad(rows, (0, (1 << max(0, (step - 1).bit_length())) - step))


def halved(rows: Tensor) -> Tensor:
    """Return the sum of each row by halving, padded with zeros to a power of two: every device adds in one order.

    Rows of more than `RUN` entries are cut into runs; the sums of the runs, each padded to full length, are added
    likewise.
    """
    size = rows.shape[-1]
    if size > RUN:
        runs = -(-size // RUN)
        padded = torch.nn.functional.pad(rows, (0, runs * RUN - size))
        return halved(halved(padded.view(*rows.shape[:-1], runs, RUN)))
    width = 1 << max(0, (size - 1).bit_length())
    rows = torch.nn.functional.pad(rows, (0, width - size))
    while width > 1:
        width //= 2
        rows = rows[..., :width] + rows[..., width:]
    return rows[..., 0]


def alike(values: Tensor, tile: Tile) -> Iterator[Tensor]:
    """Yield the blocks of a flat tile as rows (blocks, size): all whole blocks at once, then a shorter one, if any."""
    step = block_elements(tile.shape)
    whole = tile.size // step * step
    if whole:
        yield values[:whole].view(-1, step)
    if whole < tile.size:
        yield values[whole:].view(1, -1)


def row_length_of(tile: Tile, size: int) -> int:
    """Return the length of the rows inside a block of `size` entries: the last dimension.

    A vector, or a part of one with more than 2**16 elements, is one row, as is a part of a row of more than 2**20.
    """
    columns = tile.shape[-1] if len(tile.shape) > 1 else 0
    return columns if 0 < columns <= size and size % columns == 0 else size
