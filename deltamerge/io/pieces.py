"""The hash of a file from the hashes of its pieces, which may be known from whoever read them for something else.

XXH3-128 of the XXH3-128 digests, in canonical form, of pieces of 64 KiB, of which the last may be shorter.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PIECE_BYTES = 1 << 16
DIGEST_BYTES = 16
# Pieces that are read at once where they are not known.
AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Known:
    """Of a file of `size` bytes the digests of its pieces (pieces, 16), and which of them are known."""

    size: int
    digests: NDArray[np.uint8]
    there: NDArray[np.bool_]


class Pieces:
    """What is known of files so far; any thread may give, of pieces of its own."""

    def __init__(self) -> None:
        self._known: dict[Path, Known] = {}
        self._changed = threading.Lock()

    def of(self, path: Path) -> Known:
        """What is known of a file. OSError: it cannot be looked at."""
        with self._changed:
            if path not in self._known:
                size = path.stat().st_size
                count = -(-size // PIECE_BYTES)
                self._known[path] = Known(size, np.empty((count, DIGEST_BYTES), np.uint8), np.zeros(count, np.bool_))
            return self._known[path]

    def give(self, path: Path, first: int, halves: NDArray[np.uint64]) -> None:
        """The digests (pieces, 2: high and low half) of whole pieces of a file, from number `first` on."""
        known, stop = self.of(path), first + len(halves)
        known.digests[first:stop] = halves.astype(">u8").view(np.uint8).reshape(-1, DIGEST_BYTES)
        known.there[first:stop] = True


def learn(known: Known, wanted: NDArray[np.bool_], read: Callable[[int, Any], None]) -> None:
    """Hash the `wanted` pieces of a file; read(offset, buffer) fills a buffer from a place in it."""
    from xxhash import xxh3_128_digest

    buffer = np.empty(min(AT_ONCE * PIECE_BYTES, known.size), np.uint8)
    for first, stop in _runs(wanted):
        begin = first * PIECE_BYTES
        part = buffer[: min(stop * PIECE_BYTES, known.size) - begin]
        read(begin, part)
        digests = [xxh3_128_digest(part[at : at + PIECE_BYTES].data) for at in range(0, len(part), PIECE_BYTES)]
        known.digests[first:stop] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, DIGEST_BYTES)
        known.there[first:stop] = True


def inside(known: Known, ranges: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
    """Which pieces of a file lie within one of the ranges [begin, end) of its bytes."""
    found = np.zeros(len(known.there), np.bool_)
    for begin, end in ranges:
        found[-(-begin // PIECE_BYTES) : end // PIECE_BYTES] = True
    return found


def _runs(wanted: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Where runs of at most `AT_ONCE` wanted pieces begin and end."""
    edges = np.flatnonzero(np.diff(wanted, prepend=False, append=False)).tolist()
    for begin, end in zip(edges[::2], edges[1::2], strict=True):
        for first in range(begin, end, AT_ONCE):
            yield first, min(end, first + AT_ONCE)


def hash_whole(known: Known) -> str:
    """The hash of a file of which every piece is known, in hex."""
    from xxhash import xxh3_128_hexdigest

    assert known.there.all()
    return str(xxh3_128_hexdigest(known.digests.data))
