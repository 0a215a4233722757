"""Codes one tensor's steps tile by tile as its pieces arrive, and keeps them until the last is there."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from deltamerge.files.descriptors import flat, write_at, writing
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.steps import STEP_TILE, encode_tile, most_step_bytes, table_bytes

IN_MEMORY = 1 << 20


class StepSpool:
    """The steps of a tensor of `size` elements of `dtype`. OutputError: the disk.

    Memory holds a tile of the base, one of the result, and up to a megabyte of steps; more are in the file at `path`.
    What gets larger than the tensor itself is given up.
    """

    def __init__(self, path: Path, size: int, dtype: str) -> None:
        self.path = path
        self.nbytes = table_bytes(size)
        self._size, self._dtype = size, dtype
        self._lengths: list[int] = []
        self._done = self._filled = 0
        self._held = np.empty((2, 0), np.uint16)
        self._parts: list[Array] = []
        self._written = self.nbytes
        self._fd = -1

    def add(self, old: Array, new: Array) -> None:
        """The next bits (uint16) of the base, in the result's dtype, and of the result."""
        at = 0
        while at < new.size:
            tile = min(STEP_TILE, self._size - self._done)
            part = slice(at, at + min(tile - self._filled, new.size - at))
            at = part.stop
            if part.stop - part.start == tile:
                self._tile(old[part], new[part])
                continue
            if not self._held.size:
                self._held = np.empty((2, tile), np.uint16)
            filled = slice(self._filled, self._filled + part.stop - part.start)
            self._held[0, filled], self._held[1, filled] = old[part], new[part]
            self._filled = filled.stop
            if self._filled == tile:
                self._tile(self._held[0, :tile], self._held[1, :tile])
                self._filled = 0

    def finish(self, target: Path, fd: int) -> None:
        """Leave the steps as the file at `target`, which is open as `fd`, once all elements are there."""
        table = np.array(self._lengths, "<u4").view(np.uint8)
        if self._fd < 0:  # in memory: a file of its own would cost more than writing them
            with writing():
                os.ftruncate(fd, 0)
            write_at(fd, 0, flat(np.concatenate([table, *self._parts])))
            return
        self._spill()
        write_at(self._fd, 0, flat(table))
        with writing():
            self.path.replace(target)

    def close(self) -> None:
        """Close and remove the file, unless it was left as another."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.path.unlink(missing_ok=True)

    def _spill(self) -> None:
        if self._fd < 0:
            with writing():
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        if self._parts:
            parts = np.concatenate(self._parts)
            write_at(self._fd, self._written, flat(parts))
            self._written += parts.size
            self._parts.clear()

    def _tile(self, old: Array, new: Array) -> None:
        self._done += new.size
        if self.nbytes >= most_step_bytes(self._size):
            return
        positions = np.flatnonzero(old != new)
        stored = encode_tile(np.ascontiguousarray(old), positions, new[positions], self._dtype)
        self._lengths.append(stored.size)
        if stored.size:
            self._parts.append(stored)
            self.nbytes += stored.size
            if self.nbytes - self._written > IN_MEMORY:
                self._spill()
