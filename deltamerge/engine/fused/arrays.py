"""What the kernels take: dtypes and tiles made ready for the loops."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import loops
from deltamerge.methods.tiles import Kept

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
