"""Whole deltas, collected from the engine's tiles: in memory, the largest in files of the spool."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge.files.descriptors import flat, writing
from deltamerge.methods.rate import HELD
from deltamerge.tensors.dtypes import Array

FIRST = 2 * 10**6  # the number of the first file


@dataclass(slots=True)
class _Collection:
    matrix: Array
    missing: int


@dataclass(eq=False)
class Collector:
    """Passes each whole float32 delta, in its shape, to `use`, in the thread that completed it.

    `folder` has the files.
    """

    shapes: Mapping[str, tuple[int, ...]]
    folder: Path
    use: Callable[[str, Array], None]
    open: dict[str, _Collection] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def write(self, name: str, offset: int, data: Any) -> None:
        """Take the values from byte `offset` on."""
        values = np.frombuffer(flat(data), np.float32)
        with self.lock:
            collected = self.open.get(name)
            if collected is None:
                collected = self.open[name] = self._begun(name)
        collected.matrix.reshape(-1)[offset // 4 : offset // 4 + values.size] = values
        with self.lock:
            collected.missing -= values.size
            complete = not collected.missing
        if complete:
            del self.open[name]
            self.use(name, collected.matrix)
            del collected
            self._path(name).unlink(missing_ok=True)

    def _begun(self, name: str) -> _Collection:
        shape = self.shapes[name]
        size = math.prod(shape)
        if 4 * size <= HELD:
            return _Collection(np.empty(shape, np.float32), size)
        with writing():
            held = np.memmap(self._path(name), np.float32, "w+", shape=shape)
        return _Collection(held, size)

    def _path(self, name: str) -> Path:
        return self.folder / f"{FIRST + list(self.shapes).index(name):07d}"
