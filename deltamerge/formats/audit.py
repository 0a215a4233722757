"""Hashes weight files and counts their NaNs and infinities while they are written."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from blake3 import blake3

from deltamerge import errors
from deltamerge.files.descriptors import flat, opened, read_at, reading
from deltamerge.files.outbox import Outbox
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np

PIECE = 1 << 20  # bytes; a piece stays in a core's cache between reading and hashing

# The bits of +inf; larger magnitudes are NaN. F8_E4M3 has no infinity: its one NaN follows 0x7E.
INFINITY = {
    "F64": 0x7FF0_0000_0000_0000, "F32": 0x7F80_0000, "F16": 0x7C00, "BF16": 0x7F80,
    "F8_E5M2": 0x7C, "F8_E4M3": 0x7F,
}  # fmt: skip


class NonFinite(NamedTuple):
    """Numbers of NaNs and of infinities."""

    nan: int
    inf: int


def count_nonfinite(raw: NDArray[np.uint8], dtype: str) -> NonFinite:
    """NaNs and infinities among the elements whose bytes are `raw`, of the safetensors dtype `dtype`.

    Two integer maxima settle the usual case: the bits of positive values sort as signed integers, the bits of negative
    values as unsigned integers.
    """
    if dtype not in INFINITY or not raw.size:
        return NonFinite(0, 0)
    size, infinity = ITEMSIZE[dtype], INFINITY[dtype]
    sign = 1 << (8 * size - 1)
    unsigned = raw.view(f"<u{size}")
    if raw.view(f"<i{size}").max() < infinity and unsigned.max() < infinity | sign:
        return NonFinite(0, 0)
    magnitude = unsigned & unsigned.dtype.type(sign - 1)
    beyond, infinite = int((magnitude >= infinity).sum()), int((magnitude == infinity).sum())
    return NonFinite(beyond, 0) if dtype == "F8_E4M3" else NonFinite(beyond - infinite, infinite)


class TensorSpan(NamedTuple):
    """A tensor's place in a file: bytes [begin, begin + nbytes)."""

    name: str
    dtype: str
    begin: int
    nbytes: int


@dataclass
class Findings:
    """The hash of every file ("blake3:<hex>"), and the counts of the tensors that are not finite."""

    hashes: dict[str, str] = field(default_factory=dict)
    nonfinite: dict[str, NonFinite] = field(default_factory=dict)


class Audit:
    """A thread that hashes `files` of `folder` as they are written; a file is (name, size, its tensors in order of
    place).

    It reads the memory that is on its way through `outbox`. Bytes of an earlier run, or bytes written long before their
    turn, are read from the file.
    """

    def __init__(
        self, folder: Path, files: Iterable[tuple[str, int, Sequence[TensorSpan]]], outbox: Outbox, threads: int = 1
    ) -> None:
        """`threads`: the threads that hash a piece together."""
        self._threads = threads
        self._folder, self._files, self._outbox = folder, list(files), outbox
        self._found = Findings()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._go, daemon=True)
        self._thread.start()

    def result(self) -> Findings:
        """Wait until every file is read to its end, or the outbox is closed."""
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._found

    def _go(self) -> None:
        try:
            buffer = np.empty(min(PIECE, max((size for _, size, _ in self._files), default=0)), np.uint8)
            for name, size, tensors in self._files:
                with errors.context(name):
                    self._follow(name, size, tensors, buffer)
        except BaseException as failure:
            self._failure = failure
            self._outbox.fail(failure)

    def _follow(self, name: str, size: int, tensors: Sequence[TensorSpan], buffer: NDArray[np.uint8]) -> None:
        hasher: Any = blake3(max_threads=self._threads)
        index = position = 0
        with reading(), opened(self._folder / name) as fd:
            while position < size:
                found = self._outbox.follow(name, position, size)
                if found is None:
                    return
                begin, stop = position, found if isinstance(found, int) else position + len(found)
                while position < stop:
                    count = min(PIECE, stop - position)
                    if isinstance(found, int):
                        piece = buffer[:count]
                        read_at(fd, position, flat(piece))
                    else:
                        piece = found[position - begin : position - begin + count]
                    hasher.update(piece)
                    index = self._count(tensors, index, position, piece)
                    position += count
                if not isinstance(found, int):
                    self._outbox.finished(name, begin)
        self._found.hashes[name] = f"blake3:{hasher.hexdigest()}"

    def _count(self, tensors: Sequence[TensorSpan], index: int, position: int, piece: NDArray[np.uint8]) -> int:
        """Count in a piece of a file; returns the index of the first tensor that continues behind the piece."""
        stop = position + len(piece)
        while index < len(tensors) and tensors[index].begin < stop:
            name, dtype, begin, nbytes = tensors[index]
            part = piece[max(begin - position, 0) : begin + nbytes - position]
            nan, inf = count_nonfinite(part, dtype)
            if nan or inf:
                before = self._found.nonfinite.get(name, NonFinite(0, 0))
                self._found.nonfinite[name] = NonFinite(before.nan + nan, before.inf + inf)
            if begin + nbytes > stop:
                break
            index += 1
        return index
