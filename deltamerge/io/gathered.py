"""Tensors whose rows are picked from stored tensors: what an embedding is under another vocabulary."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.io.safetensors_file import TensorInfo

if TYPE_CHECKING:
    from deltamerge.io.checkpoint import Reader

NUMPY: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Gathered(TensorInfo):
    """Row r is the mean in float32 of row `picks[r, s]` of every `sources[s]` where that is not −1; zeros without any.

    Then come `padding` rows, each the mean of all rows before. `picks` is (rows, sources) int32, known to comparisons
    by its `digest`. `dtype` is the sources' own where no arithmetic is done, else F32. Path and begin are those of the
    model's own tensor.
    """

    sources: tuple[TensorInfo, ...] = field(kw_only=True)
    padding: int = field(kw_only=True)
    digest: str = field(kw_only=True)
    picks: NDArray[np.int32] = field(compare=False, repr=False, kw_only=True)

    @property
    def width(self) -> int:
        return math.prod(self.shape[1:])

    def read_into(self, reader: Reader, start: int, out: NDArray[np.uint8]) -> None:
        """Fill `out` with the bytes from element `start`."""
        if not len(out):
            return
        dtype = NUMPY[self.dtype]
        stop = start + len(out) // dtype.itemsize
        width = self.width
        first, last = start // width, -(-stop // width)
        rows = self._rows(reader, first, min(last, len(self.picks)))
        if last > len(self.picks):
            mean = reader.once(self, lambda: self._mean(reader))
            rows = np.concatenate([rows, np.broadcast_to(mean, (last - max(first, len(self.picks)), width))])
        out[:] = rows.reshape(-1)[start - first * width : stop - first * width].view(np.uint8)

    def _rows(self, reader: Reader, first: int, last: int) -> NDArray[Any]:
        picks = self.picks[first : max(first, last)]
        result: NDArray[Any] = np.zeros((len(picks), self.width), NUMPY[self.dtype])
        begun = np.zeros(len(picks), bool)
        for column, source in zip(picks.T, self.sources, strict=True):
            at = np.flatnonzero(column >= 0)
            if at.size:
                values = _stored(reader, source, column[at], self.width)
                values = values if source.dtype == self.dtype else _wide(values, source.dtype)
                more = begun[at]
                result[at[~more]] = values[~more]
                result[at[more]] += values[more]
                begun[at] = True
        counts = (picks >= 0).sum(1)
        several = counts > 1
        if several.any():
            result[several] /= counts[several, None].astype(np.float32)
        return result

    def _mean(self, reader: Reader) -> NDArray[np.float32]:
        """(width) the mean of all rows, summed in float64 in their order."""
        total = np.zeros(self.width, np.float64)
        step = max(1, CHUNK_ELEMENTS // self.width)
        for first in range(0, len(self.picks), step):
            rows = self._rows(reader, first, min(first + step, len(self.picks)))
            total += rows.astype(np.float64).sum(0)
        return (total / len(self.picks)).astype(np.float32)


def gather(own: TensorInfo, sources: Sequence[TensorInfo], picks: NDArray[np.int32], padding: int) -> TensorInfo:
    """`own` with the rows that `picks` takes from `sources`, and `padding` rows more; cut, where it only gets shorter.

    InputError: a dtype whose rows cannot be read as numbers (float8, integers).
    """
    used = [s for s in range(len(sources)) if (picks[:, s] >= 0).any()]
    alone = not padding and [sources[s] for s in used] == [own]
    if alone and np.array_equal(picks[:, used[0]], np.arange(len(picks), dtype=np.int32)):
        return cut(own, 0, len(picks))
    taken = [sources[s] for s in used] or [own]
    picks = np.ascontiguousarray(picks[:, used] if used else np.full((len(picks), 1), -1, np.int32))
    dtypes = {source.dtype for source in taken}
    if unreadable := sorted(dtypes - NUMPY.keys()):
        raise InputError(f"rows of {unreadable[0]} cannot be moved to another vocabulary")
    plain = len(dtypes) == 1 and not padding and int((picks >= 0).sum(1).max(initial=0)) <= 1
    dtype = dtypes.pop() if plain else "F32"
    shape = (len(picks) + padding, *own.shape[1:])
    return Gathered(
        own.name,
        dtype,
        shape,
        own.path,
        own.begin,
        math.prod(shape) * NUMPY[dtype].itemsize,
        sources=tuple(taken),
        padding=padding,
        digest=blake2b(picks.tobytes(), digest_size=16).hexdigest(),
        picks=picks,
    )


def cut(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Rows [start, stop) of a stored tensor."""
    row = tensor.nbytes // tensor.shape[0]
    return replace(
        tensor,
        shape=(stop - start, *tensor.shape[1:]),
        begin=tensor.begin + start * row,
        nbytes=(stop - start) * row,
    )


def _stored(reader: Reader, source: TensorInfo, rows: NDArray[np.int32], width: int) -> NDArray[Any]:
    """Rows of a stored tensor, in the order asked for."""
    out: NDArray[Any] = np.empty((len(rows), width), NUMPY[source.dtype])
    ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, len(rows))
    firsts = np.concatenate([rows[:1], rows[ends[:-1]]]).astype(np.int64)
    reader.read_runs(source, firsts * (width * out.itemsize), ends * (width * out.itemsize), out)
    return out


def _wide(values: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        bits: NDArray[np.uint32] = values.astype(np.uint32) << np.uint32(16)
        return bits.view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float32)
