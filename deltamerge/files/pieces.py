"""The hash of a file, computed from the hashes of its pieces, which a merge computes while it reads the file anyway.

It is XXH3-128 over the XXH3-128 digests (in canonical form) of pieces of 64 KiB; the last piece may be shorter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from deltamerge.engine import kernels
from deltamerge.files import progress

PIECE_BYTES = 1 << 16
DIGEST_BYTES = 16
# Pieces per read, of those that must still be read.
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests (pieces, 16) of a file of `size` bytes, and which of them are known."""

    size: int
    digests: NDArray[np.uint8]
    there: NDArray[np.bool_]


class Pieces:
    """The digests known of files so far. Thread-safe; a thread adds the digests of the pieces that it reads."""

    def __init__(self) -> None:
        self._known: dict[Path, Digests] = {}
        self._changed = threading.Lock()

    def of(self, path: Path) -> Digests:
        """Return the digests that are known of the file `path`. OSError: it cannot be examined."""
        with self._changed:
            if path not in self._known:
                size = path.stat().st_size
                count = -(-size // PIECE_BYTES)
                self._known[path] = Digests(size, np.empty((count, DIGEST_BYTES), np.uint8), np.zeros(count, np.bool_))
            return self._known[path]

    def hash(self, path: Path, begin: int, data: NDArray[np.uint8]) -> None:
        """Hash the whole pieces among bytes `data` of a file from byte `begin` on, but no known ones."""
        first, skipped = -(-begin // PIECE_BYTES), -begin % PIECE_BYTES
        count = (len(data) - skipped) // PIECE_BYTES
        if count > 0 and not self.of(path).there[first : first + count].all():
            self.give(path, first, digests(data[skipped : skipped + count * PIECE_BYTES]))

    def give(self, path: Path, first: int, halves: NDArray[np.uint64]) -> None:
        """Add the digests of whole pieces of a file, from number `first` on: `halves` (pieces, 2) has their high and
        low words."""
        known, stop = self.of(path), first + len(halves)
        known.digests[first:stop] = _as_bytes(halves)
        known.there[first:stop] = True


def digests(data: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return (pieces, 2) the high and low words of the digests of whole pieces. The compiled loop drops the GIL."""
    made = np.empty((len(data) // PIECE_BYTES, 2), np.uint64)
    if (native := kernels.native()) is not None:
        native.digests(data, made)
    else:
        for row, at in zip(made, range(0, len(data), PIECE_BYTES), strict=True):
            row[:] = np.frombuffer(xxh3_128_digest(data[at : at + PIECE_BYTES].data), ">u8")
    return made


def _as_bytes(halves: NDArray[np.uint64]) -> NDArray[np.uint8]:
    return halves.astype(">u8").view(np.uint8).reshape(-1, DIGEST_BYTES)


def learn(known: Digests, wanted: NDArray[np.bool_], read: Callable[[int, Any], None]) -> None:
    """Hash the `wanted` pieces of a file; read(offset, buffer) fills a buffer from an offset of it."""
    buffer = np.empty(min(AT_ONCE * PIECE_BYTES, known.size), np.uint8)
    for first, stop in _runs(wanted):
        begin = first * PIECE_BYTES
        part = buffer[: min(stop * PIECE_BYTES, known.size) - begin]
        read(begin, part)
        whole = len(part) // PIECE_BYTES
        known.digests[first : first + whole] = _as_bytes(digests(part[: whole * PIECE_BYTES]))
        if rest := part[whole * PIECE_BYTES :].data:
            known.digests[stop - 1] = np.frombuffer(xxh3_128_digest(rest), np.uint8)
        known.there[first:stop] = True
        progress.here().step(len(part))


def size_of(known: Digests, wanted: NDArray[np.bool_]) -> int:
    """Return bytes of the `wanted` pieces of a file, whose last may be shorter."""
    short = -known.size % PIECE_BYTES if len(wanted) and wanted[-1] else 0
    return int(wanted.sum()) * PIECE_BYTES - short


def inside(known: Digests, ranges: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
    """Return which pieces of a file lie within one of the byte ranges [begin, end)."""
    found = np.zeros(len(known.there), np.bool_)
    for begin, end in ranges:
        found[-(-begin // PIECE_BYTES) : end // PIECE_BYTES] = True
    return found


def _runs(wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Begin and end of runs of at most `AT_ONCE` wanted pieces."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        for first in range(begin, end, AT_ONCE):
            yield first, min(end, first + AT_ONCE)


def hash_whole(known: Digests) -> str:
    """Return the hash, in hex, of a file whose pieces are all known."""
    assert known.there.all()
    return str(xxh3_128_hexdigest(known.digests.data))
