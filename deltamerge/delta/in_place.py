"""An artifact's tensor applied to the base's in memory: in one compiled pass where kernels are there, else by numpy."""

from __future__ import annotations

from collections import deque
from typing import cast

import numpy as np

from deltamerge.delta import compiled
from deltamerge.delta.entry import Entry, damage_told
from deltamerge.delta.manifest import STORED_VALUES, Record, groups
from deltamerge.delta.positions import Array
from deltamerge.delta.stored import PADDING, Scratch, StoredArray
from deltamerge.delta.values import SCALED, ranked_scales, scale_values
from deltamerge.errors import InputError
from deltamerge.io import kernels
from deltamerge.io.dtypes import NUMPY

LARGEST_K = 15  # the largest k of rice that the compiled pass decodes


def apply_in_place(entry: Entry, bits: Array, scratch: Scratch) -> None:
    """Turn the base tensor's flat `bits` into the result's, of the same dtype and size, for an entry with stored
    values.

    Hashes are not checked. InputError: stored arrays are damaged, or the file has become shorter; `bits` may have
    changed.
    """
    record = entry.record
    if entry.index is None and record.values is None:
        bits[:] = entry.values[:]
    elif is_compiled(entry):
        with damage_told():
            _apply_compiled(entry, bits, scratch)
    else:
        for positions, values in entry.pieces():
            entry.put(bits, bits, positions, values)


def is_compiled(entry: Entry) -> bool:
    """Whether one compiled pass does it."""
    record = entry.record
    is_simple = record.k <= LARGEST_K and (record.values is None or record.dtype in ("F32", "BF16"))
    return is_simple and kernels.available()


def _apply_compiled(entry: Entry, bits: Array, scratch: Scratch) -> None:
    record, kind = entry.record, entry.record.values
    stored = cast("list[StoredArray | None]", [entry.values, entry.index, entry.scales])
    values, index, scales = scratch.read(stored)
    if kind is None:
        ok = compiled.put(record.encoding, index, record.k, record.count, values.view(bits.dtype), bits)
    else:
        factors = _scales(record, scales)
        out = bits.view(np.float32) if record.dtype == "F32" else bits
        values, group = values.view(NUMPY[STORED_VALUES[kind]]), record.group
        ok = compiled.add(record.encoding, index, record.k, record.count, values, kind, factors, group, out)
    if not ok:
        deque(entry.positions(), maxlen=0)  # raises the error that says what is wrong
        raise InputError("positions are damaged")


def _scales(record: Record, stored: Array) -> Array:
    if record.values not in SCALED:
        return np.empty(0, np.float32)
    if record.ranks is not None:
        out: Array = np.empty(groups(record), np.float32)
        if compiled.ranked(stored, ranked_scales(record.unit, record.ranks), out):
            return out
    return scale_values(stored[:-PADDING], groups(record), record.unit, record.ranks)
