"""Stored positions decoded and put to use in one compiled pass (kernels/src/vector/positions.h)."""

from __future__ import annotations

from typing import Any

import numpy as np

from deltamerge.delta.positions import Array, Coding, index_itemsize, rice_offsets
from deltamerge.delta.stored import PADDING
from deltamerge.delta.values import VALUE_BITS, Values
from deltamerge.errors import InputError
from deltamerge.io import kernels

LINE = 64

_DENSE, _INDICES, _GAPS, _ONES = range(4)
_NOTHING = np.empty(0, np.float32)


def put(coding: Coding, stored: Array, k: int, count: int, values: Array, out: Array) -> bool:
    """Put `values` at the `count` stored positions of `out`, both unsigned. False: positions are damaged.

    stored   bytes of the positions and PADDING zeros; k of rice is at most 15
    Positions that are damaged, or outside of `out`, may be found only when others were changed. InputError: rice codes
    are too short, or too long.
    """
    numbers = _positions(coding, stored, k, count, out)
    return bool(_native().put(stored, values, _NOTHING, out, *numbers, out.itemsize))


def add(
    coding: Coding,
    stored: Array,
    k: int,
    count: int,
    values: Array,
    kind: Values,
    scales: Array,
    group: int,
    out: Array,
) -> bool:
    """Add values to `out`, float32 or (uint16) bfloat16, at the stored positions, rounded once; else as `put`.

    values   float32; bfloat16 (uint16); int8 codes or packed sign bits (uint8), times the scale of their group of
             `group` elements
    """
    numbers, number = _positions(coding, stored, k, count, out), list(VALUE_BITS).index(kind)
    return bool(_native().add(stored, values, scales, out, *numbers, number, group, out.itemsize == 2))


def ranked(stored: Array, scales: Array, out: Array) -> bool:
    """Fill `out` with the scales whose ranks are stored (bytes and PADDING zeros). False: they are damaged."""
    return bool(stored[-PADDING - 1]) and bool(_native().ranked(stored, scales, _NOTHING, out))


def _native() -> Any:
    module = kernels.native()
    assert module is not None
    return module


def _positions(coding: Coding, stored: Array, k: int, count: int, out: Array) -> tuple[int, ...]:
    """(way, k, count, first, second, dense) of kernels/src/delta.cpp; dense: about every line of `out` is touched."""
    way, first, second = _DENSE, 0, 0
    if coding == "rice":
        way, (first, second) = _ONES, rice_offsets(stored.size - PADDING, count, k)
        if not stored[-PADDING - 1]:
            raise InputError("rice codes end in padding")
    elif coding != "dense":
        way = {"bitmask": _ONES, "gaps": _GAPS, "indices": _INDICES}[coding]
        first = index_itemsize(out.size)
    return way, k, count, first, second, count * LINE >= out.nbytes
