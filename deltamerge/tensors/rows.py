"""Tensors whose rows are gathered from stored tensors: embeddings under another vocabulary."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import ITEMSIZE, NUMPY, PLAIN, bits_type, widen
from deltamerge.tensors.tensor import Read, TensorInfo

CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Gathered:
    """A tensor (rows, width) gathered from `sources`.

    picks     (rows, sources) int32; row r is the float32 mean of row `picks[r, s]` of every source s, without those
              where that is −1; zeros if all are −1
    padding   rows that follow, each the mean of all rows before
    width     elements of a row
    digest    of `picks`, by which two such tensors are compared
    dtype     the sources' own where each row has one source, else F32
    """

    dtype: str
    width: int
    sources: tuple[TensorInfo, ...]
    padding: int
    digest: str
    picks: NDArray[np.int32] = field(compare=False, repr=False)

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        stop = start + len(out) // ITEMSIZE[self.dtype]
        width = self.width
        first, last = start // width, -(-stop // width)
        rows = self._rows(read, first, min(last, len(self.picks)))
        if last > len(self.picks):
            mean = read.once(self, lambda: mean_row(partial(self._rows, read), len(self.picks), width))
            rows = np.concatenate([rows, np.broadcast_to(mean, (last - max(first, len(self.picks)), width))])
        np.frombuffer(out, rows.dtype)[:] = rows.reshape(-1)[start - first * width : stop - first * width]

    def _rows(self, read: Read, first: int, last: int) -> NDArray[Any]:
        picks = self.picks[first : max(first, last)]
        result: NDArray[Any] = np.zeros((len(picks), self.width), NUMPY[self.dtype])
        begun = np.zeros(len(picks), bool)
        for column, source in zip(picks.T, self.sources, strict=True):
            at = np.flatnonzero(column >= 0)
            if at.size:
                values = stored_rows(read, source, column[at], self.width)
                values = (
                    values if source.dtype == self.dtype else widen(values.view(bits_type(source.dtype)), source.dtype)
                )
                more = begun[at]
                result[at[~more]] = values[~more]
                result[at[more]] += values[more]
                begun[at] = True
        counts = (picks >= 0).sum(1)
        several = counts > 1
        if several.any():
            result[several] /= counts[several, None].astype(np.float32)
        return result


def gather(own: TensorInfo, sources: Sequence[TensorInfo], picks: NDArray[np.int32], padding: int) -> TensorInfo:
    """`own` with the rows that `picks` takes from `sources`, and `padding` more rows; a plain cut if it only gets
    shorter.

    InputError: a dtype whose rows cannot be averaged (float8, integers).
    """
    used = [s for s in range(len(sources)) if (picks[:, s] >= 0).any()]
    alone = not padding and [sources[s] for s in used] == [own]
    if alone and np.array_equal(picks[:, used[0]], np.arange(len(picks), dtype=np.int32)):
        return cut(own, 0, len(picks))
    taken = [sources[s] for s in used] or [own]
    picks = np.ascontiguousarray(picks[:, used] if used else np.full((len(picks), 1), -1, np.int32))
    dtypes = {source.dtype for source in taken}
    if unreadable := sorted(dtypes - PLAIN):
        raise InputError(f"rows of {unreadable[0]} cannot be moved to another vocabulary")
    plain = len(dtypes) == 1 and not padding and int((picks >= 0).sum(1).max(initial=0)) <= 1
    dtype = dtypes.pop() if plain else "F32"
    shape = (len(picks) + padding, *own.shape[1:])
    digest = blake2b(picks.tobytes(), digest_size=16).hexdigest()
    made = Gathered(dtype, math.prod(own.shape[1:]), tuple(taken), padding, digest, picks)
    nbytes = math.prod(shape) * ITEMSIZE[dtype]
    return TensorInfo(own.name, dtype, shape, own.path, 0, nbytes, made)


def cut(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows [start, stop) of a stored tensor."""
    row = tensor.nbytes // tensor.shape[0]
    return replace(
        tensor, shape=(stop - start, *tensor.shape[1:]), begin=tensor.begin + start * row, nbytes=(stop - start) * row
    )


def mean_row(rows: Callable[[int, int], NDArray[Any]], count: int, width: int) -> NDArray[np.float32]:
    """(width) the mean of `count` rows, of which rows(first, last) has some, summed in float64 in their order."""
    total, step = np.zeros(width, np.float64), max(1, CHUNK_ELEMENTS // width)
    for first in range(0, count, step):
        total += rows(first, min(first + step, count)).astype(np.float64).sum(0)
    return (total / count).astype(np.float32)


def stored_rows(read: Read, source: TensorInfo, rows: NDArray[np.int32], width: int) -> NDArray[Any]:
    """Rows of a stored tensor, in the given order."""
    out: NDArray[Any] = np.empty((len(rows), width), NUMPY[source.dtype])
    ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, len(rows))
    firsts = np.concatenate([rows[:1], rows[ends[:-1]]]).astype(np.int64)
    read.read_runs(source, firsts * (width * out.itemsize), ends * (width * out.itemsize), out)
    return out
