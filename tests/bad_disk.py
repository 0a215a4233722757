"""A bad disk for one process: reads, writes and syncs that fail, fall short or are slow; reads of compiled loops too.

The compiled loop reads through a pointer to pread, which it lets be replaced: the code that meets the faults is what
every run has.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import time
from collections.abc import Callable
from typing import Any

from deltamerge.engine import kernels

SIGNATURE = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64)
CODES = {
    "read": (errno.EIO, errno.ESTALE),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "copy": (errno.EXDEV, errno.EIO),
    "sync": (errno.EIO,),
    "rename": (errno.EIO,),
}


class BadDisk:
    """Every call, or only those of compiled `loops`, fails with `chance`; if that is `lasting`, so do all later ones of
    its kind. A share of reads and writes falls `short`. `pace`: seconds that a byte takes more to be written.
    `compiled` counts the reads of compiled loops, `faults` those of them that failed."""

    def __init__(
        self, *, chance: float = 0.0, lasting: bool = False, short: float = 0.0, pace: float = 0.0, seed: int = 0
    ) -> None:
        self.pace = pace
        self.compiled = self.faults = 0
        self.turn(chance, lasting, short, seed)
        some = self._some
        self._patch("pwrite", "write", lambda call, fd, data, at: call(fd, data[: some(len(data))], at))
        self._patch("preadv", "read", lambda call, fd, views, at: call(fd, [views[0][: some(len(views[0]))]], at))
        self._patch("copy_file_range", "copy", lambda call, a, b, n, *places: call(a, b, some(n), *places))
        self._patch("fdatasync", "sync", lambda call, fd: call(fd))
        self._patch("rename", "rename", lambda call, a, b: call(a, b))
        self._kept: list[Any] = []  # functions whose addresses are in use
        self._bind("pread", "read")

    def turn(
        self, chance: float = 0.0, lasting: bool = False, short: float = 0.0, seed: int = 0, loops: bool = False
    ) -> None:
        """From now on it is as bad as this."""
        self.chance, self.lasting, self.short, self.loops = chance, lasting, short, loops
        self.draw, self.broken = random.Random(seed), set[str]()

    def _fails(self, kind: str, loop: bool = False) -> bool:
        if self.loops and not loop:
            return False
        failed = kind in self.broken or self.draw.random() < self.chance
        if failed and self.lasting:
            self.broken.add(kind)
        return failed

    def _some(self, count: int) -> int:
        return max(1, count // 2) if count and self.draw.random() < self.short else count

    def _slow(self, kind: str, count: int) -> None:
        if self.pace and kind in ("write", "copy"):
            time.sleep(self.pace * count)

    def _patch(self, name: str, kind: str, do: Callable[..., Any]) -> None:
        call = getattr(os, name)

        def patched(*arguments: Any) -> Any:
            if self._fails(kind):
                code = self.draw.choice(CODES[kind])
                raise OSError(code, os.strerror(code))
            if kind in ("write", "copy"):
                self._slow(kind, len(arguments[1]) if kind == "write" else arguments[2])
            return do(call, *arguments)

        setattr(os, name, patched)

    def _bind(self, name: str, kind: str) -> None:
        native = kernels.native()
        if native is None:
            return
        if not hasattr(native, "replace_read"):
            raise RuntimeError(
                "these kernels are a wheel's, which have no hook: install from a checkout (pip install -e)"
            )
        call = SIGNATURE((name, ctypes.CDLL(None)))

        def bound(fd: int, address: int, count: int, at: int) -> int:
            self.compiled += 1
            if self._fails(kind, loop=True):
                self.faults += 1
                return -1
            return int(call(fd, address, self._some(count), at))

        self._kept.append(SIGNATURE(bound))
        native.replace_read(ctypes.cast(self._kept[-1], ctypes.c_void_p).value)
