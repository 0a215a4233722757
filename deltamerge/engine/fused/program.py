"""A pass made ready for `stream_loop.run`: its operations as arrays, run on ranges of elements from file to memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import codes, native
from deltamerge.io.dtypes import ITEMSIZE
from deltamerge.io.files import Descriptor
from deltamerge.io.pieces import PIECE_BYTES, Pieces
from deltamerge.methods.prune.bits import SPARSE_BLOCK, Key
from deltamerge.methods.tiles import RUN

if TYPE_CHECKING:
    from deltamerge.engine.fused.stream import Assembly

# Values of a chunk in float32: a few of them fill a core's first cache. The runs of a sum are such chunks.
CHUNK = RUN


@dataclass(frozen=True, slots=True)
class Place:
    """An open file and its path, the byte in it of a tensor's first element, and the bytes of an element."""

    file: Descriptor
    path: Path
    begin: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One of `stream_loop`, and what does not fit in its numbers."""

    code: int
    to: int
    fields: tuple[int, int, int, int] = (-1, -1, -1, -1)
    key: Key = (0, 0)
    scalars: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, ...] = ()
    models: tuple[int, ...] = ()
    lists: tuple[int, ...] = ()


class Program:
    """A pass, ready to run on any range of elements, from any number of threads."""

    def __init__(self, assembly: Assembly, block: int, pieces: Pieces | None) -> None:
        """`pieces` are told the hashes of what is read."""
        done, self.pieces = assembly.operations, pieces
        self.loop = native.loop()
        self.block, self.sources, self.sparse = block, assembly.sources, assembly.sparse
        self.counters, self.sums, self.itemsize = assembly.counters, assembly.sums, ITEMSIZE[assembly.output]
        self.chunk = SPARSE_BLOCK if self.sparse else CHUNK
        self.listed, self.sampled = assembly.listed, assembly.sampled
        self.rows, self.lists, self.summed = assembly.count, len(assembly.lists), assembly.summed
        width = max([1, *(len(x.models) for x in done)])
        self.operations = np.array([(x.code, x.to, *x.fields) for x in done], np.int64)
        self.keys = np.array([x.key for x in done], np.uint64)
        self.scalars = np.array([x.scalars for x in done], np.float32)
        self.weights = np.array([_padded(x.weights, width) for x in done], np.float32)
        self.models = np.array([len(x.models) for x in done], np.int64)
        self.operands_of = np.array([_padded(x.models, width) for x in done], np.int64)
        self.lists_of = np.array([_padded(x.lists, width) for x in done], np.int64)
        self.tables, self.guides, self.bounds = _joined(assembly.tables)
        self.ranks = np.concatenate([np.empty(0, np.int64), *assembly.ranks])

    def run(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> dict[int, Any] | None:
        """`backends.Pass.run`; `start` lies on a block of the tensor."""
        operations, blocks = self.operations.copy(), -(-(stop - start) // self.block)
        counts = self._place_counters(operations, blocks)
        sums = np.empty((self.summed, blocks), np.float64)
        listed = np.empty((len(self.listed), stop - start + 2 * blocks + 1), np.uint32)
        used = np.zeros(len(self.listed), np.int64)
        files = [(place.file.fd, place.begin, place.itemsize) for place in self.sources]
        memory = np.empty(0, np.uint8) if out is None else out
        raw = np.empty((len(files), codes.MARGIN + 4 * max(codes.PIECE, self.chunk, self.sampled)), np.uint8)
        registers = np.empty((max(1, self.rows), self.chunk), np.float32)
        places = np.empty((self.lists, SPARSE_BLOCK + 1), np.int64)
        job = np.array([start, stop, self.block, self.sparse, self.sampled, self.itemsize], np.int64)
        first_pieces = np.array([-(-(x.begin + start * x.itemsize) // PIECE_BYTES) for x in self.sources], np.int64)
        hashed = first_pieces * PIECE_BYTES
        longest = (stop - start) * max((x.itemsize for x in self.sources), default=0)
        room = longest // PIECE_BYTES if self.pieces else 0
        digests = np.empty((len(files) * room, 2), np.uint64)
        width = max(len(operations), self.lists, self.weights.shape[1])
        went = self.loop([
            job, operations, self.keys, self.scalars, self.weights, self.models, self.operands_of, self.lists_of,
            self.tables, self.guides, self.bounds, self.ranks, np.array(files, np.int64).reshape(-1, 3), memory, raw,
            registers, places, counts, sums, listed, used,
            np.empty((self.summed, 1 << (-(-self.block // RUN) - 1).bit_length()), np.float64),
            np.zeros((6, width), np.int64), np.zeros(width, np.bool_), digests, hashed, first_pieces,
            np.empty((len(files), 8), np.uint64),
        ])  # fmt: skip
        if not went:
            return None
        if self.pieces:
            for source, place in enumerate(self.sources):
                mine = digests[room * source :][: hashed[source] // PIECE_BYTES - first_pieces[source]]
                self.pieces.give(place.path, int(first_pieces[source]), mine)
        found: dict[int, Any] = {}
        for node, (row, size) in self.counters.items():
            first = operations[row, 5]
            found[node] = counts[first : first + (size or blocks)]
        for node, (row, count) in self.sums.items():
            found[node] = sums[row : row + count].T
        for node, row in self.listed.items():
            found[node] = listed[row, : used[row]].copy()
        return found

    def _place_counters(self, operations: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
        total = 0
        for row, size in self.counters.values():
            operations[row, 5] = total
            total += size or blocks
        return np.zeros(total, np.int64)


def _padded(values: Sequence[Any], width: int) -> tuple[Any, ...]:
    return (*values, *[0] * (width - len(values)))


def _joined(
    parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.int64]]:
    """The gap tables end to end, their guides likewise, and where each begins and ends, with its shift."""
    tables, guides = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    bounds, at, of_guide = np.empty((len(parts), 5), np.int64), 0, 0
    for row, (table, guide, shift) in zip(bounds, parts, strict=True):
        row[:] = at, at + table.size, of_guide, of_guide + guide.size, shift
        at, of_guide = at + table.size, of_guide + guide.size
        tables.append(table)
        guides.append(guide)
    return np.concatenate(tables), np.concatenate(guides), bounds
