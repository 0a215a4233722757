"""An artifact's tensor applied to the base's in memory: in one compiled pass where kernels are there
(kernels/src/vector/positions.h), else by numpy."""

from __future__ import annotations

from collections import deque
from typing import Any, cast

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import Entry, damage_told
from deltamerge.formats.delta.manifest import STORED_VALUES, Record, groups
from deltamerge.formats.delta.positions import Array, Coding, index_itemsize, rice_offsets
from deltamerge.formats.delta.stored import PADDING, Scratch, StoredArray
from deltamerge.formats.delta.values import SCALED, VALUE_BITS, Values, ranked_scales, scale_values
from deltamerge.tensors.dtypes import NUMPY

LARGEST_K = 15  # the largest k of rice that the compiled pass decodes
LINE = 64

_DENSE, _INDICES, _GAPS, _ONES = range(4)
_NOTHING = np.empty(0, np.float32)


def apply_in_place(entry: Entry, bits: Array, scratch: Scratch) -> None:
    """Turn the base tensor's flat `bits` into the result's, of the same dtype and size, for an entry with stored
    values.

    Hashes are not checked. InputError: stored arrays are damaged, or the file has become shorter; `bits` may have
    changed.
    """
    record = entry.record
    if entry.index is None and record.values is None:
        bits[:] = entry.values[:]
    elif entry.has_steps:
        for positions, values in entry.pieces(lambda start, stop: bits[start:stop]):
            bits[positions] = values
    elif is_compiled(entry):
        with damage_told():
            _apply_compiled(entry, bits, scratch)
    else:
        for positions, values in entry.pieces():
            entry.put(bits, bits, positions, values)


def is_compiled(entry: Entry) -> bool:
    """Whether one compiled pass does it."""
    record = entry.record
    is_simple = (
        not (entry.has_steps or record.parts)
        and record.k <= LARGEST_K
        and (record.values is None or record.dtype in ("F32", "BF16"))
    )
    return is_simple and kernels.available()


def _apply_compiled(entry: Entry, bits: Array, scratch: Scratch) -> None:
    record, kind = entry.record, entry.record.values
    coding = cast(Coding, record.encoding)
    stored = cast("list[StoredArray | None]", [entry.values, entry.index, entry.scales])
    values, index, scales = scratch.read(stored)
    if kind is None:
        ok = put(coding, index, record.k, record.count, values.view(bits.dtype), bits)
    else:
        factors = _scales(record, scales)
        out = bits.view(np.float32) if record.dtype == "F32" else bits
        values, group = values.view(NUMPY[STORED_VALUES[kind]]), record.group
        ok = add(coding, index, record.k, record.count, values, kind, factors, group, out)
    if not ok:
        deque(entry.positions(), maxlen=0)  # raises the error that says what is wrong
        raise InputError("positions are damaged")


def _scales(record: Record, stored: Array) -> Array:
    if record.values not in SCALED:
        return np.empty(0, np.float32)
    if record.ranks is not None:
        out: Array = np.empty(groups(record), np.float32)
        if ranked(stored, ranked_scales(record.unit, record.ranks), out):
            return out
    return scale_values(stored[:-PADDING], groups(record), record.unit, record.ranks)


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
