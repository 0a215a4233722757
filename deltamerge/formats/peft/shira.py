"""SHiRA, PEFT's sparse high-rank adapter: the changed entries of a linear weight as `shira_weight` and `shira_indices`.

Bhardwaj et al., arXiv 2406.13175, as peft 0.16 and later store it. For a weight (out, in) an adapter of rank r holds
exactly r · (in + out) entries, with one r for all layers: float32 values and (2, entries) int32 rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from deltamerge.tensors.dtypes import FLOATING, ITEMSIZE, cast, widen

if TYPE_CHECKING:
    from deltamerge.tensors.reader import Reader
    from deltamerge.tensors.tensor import TensorInfo

Array = npt.NDArray[Any]

CHUNK = 1 << 20
ENTRY_BYTES = 12  # a float32 and two int32


class Candidate(NamedTuple):
    """A linear weight: its shape (out, in), how many entries differ from the base, and its bytes if stored whole."""

    shape: tuple[int, int]
    changed: int
    nbytes: int

    def holds(self, r: int) -> bool:
        """Tell whether an adapter of rank `r` has room for the changed entries, and the weight has as many entries as
        the adapter."""
        out, columns = self.shape
        return self.changed <= r * (out + columns) <= out * columns

    @property
    def needed(self) -> int:
        """The least rank whose entries hold the changes."""
        return math.ceil(self.changed / sum(self.shape))


def choose_rank(candidates: Mapping[str, Candidate]) -> tuple[int, tuple[str, ...]]:
    """Return the rank that takes the fewest bytes, and the weights that are stored sparse at that rank; others are
    stored whole."""

    def total(r: int) -> int:
        return sum(r * sum(c.shape) * ENTRY_BYTES if c.holds(r) else c.nbytes for c in candidates.values())

    ranks = sorted({c.needed for c in candidates.values()} - {0})
    if not ranks:
        return 1, ()
    rank = min(ranks, key=total)
    return rank, tuple(name for name, c in candidates.items() if c.holds(rank))


def count_changed(reader: Reader, base: TensorInfo, result: TensorInfo) -> int:
    """Return how many entries of `result` differ from the base in the result's dtype; all of them if a dtype is
    not floating."""
    if base.dtype != result.dtype and not {base.dtype, result.dtype} <= FLOATING:
        return math.prod(result.shape)
    return sum(int(np.count_nonzero(old != new)) for _, old, new in _pairs(reader, base, result))


def entries(reader: Reader, base: TensorInfo, result: TensorInfo, size: int) -> tuple[Array, Array]:
    """`size` entries that turn `base` into `result`: (2, size) int32 indices, ascending, and (size) float32 values.

    A value v satisfies fl(W + v) = result if one of the three floats around result − W does; otherwise it is the
    nearest. If fewer than `size` entries differ, zeros at the first other places fill up.
    """
    positions: list[Array] = []
    values: list[Array] = []
    for start, old, new in _pairs(reader, base, result):
        found = np.flatnonzero(old != new)
        positions.append(found + start)
        values.append(difference(widen(old[found], result.dtype), widen(new[found], result.dtype)))
    places = np.concatenate(positions)
    free = np.setdiff1d(np.arange(size), places, assume_unique=True)[: size - len(places)]
    places = np.concatenate([places, free])
    order = np.argsort(places)
    padded = np.concatenate([*values, np.zeros(len(free), np.float32)])
    indices = np.stack(np.divmod(places[order], base.shape[1])).astype(np.int32)
    return indices, padded[order].astype(np.float32)


def difference(old: Array, new: Array) -> Array:
    """v with fl(old + v) = new in float32, or as near as possible."""
    with np.errstate(over="ignore", invalid="ignore"):
        best = new - old
        for direction in (np.float32(-np.inf), np.float32(np.inf)):
            other = np.nextafter(new - old, direction)
            best = np.where((old + best != new) & (old + other == new), other, best)
    return best


def _pairs(reader: Reader, base: TensorInfo, result: TensorInfo) -> Iterator[tuple[int, Array, Array]]:
    """(start, base's bits in the result's dtype, result's bits), chunk by chunk."""
    total = math.prod(result.shape)
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        bits = []
        for info in (base, result):
            raw = np.empty(count, f"<u{ITEMSIZE[info.dtype]}")
            reader.read_into(info, start, raw)
            bits.append(cast(raw, info.dtype, result.dtype))
        yield start, bits[0], bits[1]
