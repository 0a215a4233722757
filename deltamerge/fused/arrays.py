"""What the kernels take: dtypes, tiles and tables made ready for the loops."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.fused import loops
from deltamerge.pruners.bits import gap_table
from deltamerge.tensors import Kept

Array = NDArray[Any]
Floats = NDArray[np.float32]
Delta = Floats | Kept

NARROW, WIDE = np.dtype(np.uint16), np.dtype(np.float32)


def widened(x: Array) -> Floats:
    """Any tile in float32."""
    if x.dtype == WIDE:
        return x
    if x.dtype != NARROW:
        with np.errstate(all="ignore"):
            return x.astype(WIDE)
    out = np.empty(x.size, WIDE)
    loops.widen(x, out)
    return out


def loadable(x: Array) -> Array:
    """A tile that the loops can read: float32, or bfloat16 bits."""
    return x if x.dtype == NARROW else widened(x)


def addresses(arrays: list[Array]) -> NDArray[np.int64]:
    return np.array([x.__array_interface__["data"][0] for x in arrays], np.int64)


def densified(delta: Array | Kept, size: int) -> Array:
    """A delta, or a stored tile, with zeros where `Kept` has no entry."""
    if not isinstance(delta, Kept):
        return delta
    out = np.zeros(size, WIDE)
    out[delta.positions] = delta.values
    return out


@lru_cache(maxsize=64)
def guided(density: float) -> tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]:
    """The gap table with a sentinel, and for each value of a draw's leading bits the least gap it can give."""
    table = gap_table(density)
    leading = min(len(table).bit_length() + 2, 14)
    starts = np.arange(1 << leading, dtype=np.uint64) << np.uint64(63 - leading)
    guide = np.searchsorted(table, starts, side="right").astype(np.uint32)
    return np.append(table, np.uint64(2**64 - 1)), guide, np.uint64(63 - leading)
