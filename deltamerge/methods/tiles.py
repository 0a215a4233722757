"""Tiles of a tensor, and the forms that a tile's value takes; no torch is imported until a value is touched."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

BLOCK = 1 << 16
LONGEST_ROW = 1 << 20
# Long sums are sums of the sums of so many entries, which stay in a core's first cache. Bytes depend on it, and code
# that is kept has it compiled in: it never changes.
RUN = 1 << 11

# What makes a graph's node: (function, inputs, *, kind, shape, dtype, **parameters), as `graph.Graph.node`.
Make: TypeAlias = Callable[..., Any]

# safetensors dtypes whose elements share bytes -> bits per element
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# safetensors dtype -> bytes per element; a packed tensor is read and copied as bytes, so its element here is one
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C64": 8, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, **dict.fromkeys(PACKED_BITS, 1),
}  # fmt: skip
# values that a delta artifact adds -> bits of each
VALUE_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "sign": 1}
FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})
# numbers that are copied as they are and never computed with
COPIED = frozenset({"C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", *PACKED_BITS})


def bits_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bits that a tensor takes in a file."""
    return math.prod(shape) * PACKED_BITS.get(dtype, 8 * ITEMSIZE[dtype])


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file."""
    return -(-bits_of(dtype, shape) // 8)


def row_length(shape: tuple[int, ...]) -> int:
    """Elements of one output row: the last dimension of matrices (stacked too), all but the first of convolutions."""
    if len(shape) < 2:
        return 1
    return shape[-1] if len(shape) < 4 else math.prod(shape[1:])


def block_elements(shape: tuple[int, ...]) -> int:
    """Elements of one block: whole rows, about 2**16; a function of the shape alone.

    Tiles are whole blocks, and a floating reduction yields one partial per block, so neither tile size nor
    threads can change a sum. Rows of more than 2**20 elements are cut through.
    """
    n = max(1, row_length(shape))
    return BLOCK if n > LONGEST_ROW else max(1, BLOCK // n) * n


@dataclass(frozen=True, slots=True)
class Tile:
    """The flat element range [start, stop) of a tensor of `shape`."""

    start: int
    stop: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def columns(self) -> int:
        return max(1, row_length(self.shape))


@dataclass(frozen=True, slots=True)
class Kept:
    """A sparse delta of one tile: ascending int64 `positions` from the tile's start, float32 `values`."""

    positions: Any
    values: Any


@dataclass(frozen=True, slots=True)
class Patched:
    """A tile that equals `base` (stored dtype) except for float32 `values` at `positions`."""

    base: Any
    positions: Any
    values: Any
