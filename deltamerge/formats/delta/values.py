"""The codings of the values that an additive delta stores; torch only for float8.

An array of *bits* is flat and unsigned (uint8 … uint64): the stored bytes of a safetensors dtype.

Values of an additive delta are float32, bfloat16, or codes with one scale per group (a row): int8, or 1-bit
signs. Scales are floats of 4 bits without a sign, two a byte, with one unit per tensor:

    scale(code) = 0 if code == 0 else (2 + code % 2) * 2**(code // 2) * 2**unit

A scale times a code is exact in float32, so a decoded value is the same everywhere. Where that takes fewer bytes,
scales are stored as unary bits. A tensor's codes, from the most common to the rarest, are its *ranks*. A scale is a
zero for each rank before its own, and a one. Rows of one tensor are alike: about 2 bits each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np

from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import Array, narrow, widen
from deltamerge.tensors.tiles import LONGEST_ROW, block_elements, row_length

Values = Literal["float32", "bfloat16", "int8", "sign"]

SCALED = frozenset({"int8", "sign"})
SCALE_BITS = 4
ARRAY_BYTES = 128  # bytes in a header for one more stored array
RANKS_BYTES = 20  # bytes of ranks in the manifest
UNITS = (-149, 119)  # the range in which all scales are float32 numbers


def scale_group(shape: tuple[int, ...]) -> int:
    """Flat elements that share a scale: one row, or about 2**16 where rows have fewer than 64 or over 2**20."""
    n = row_length(shape)
    return n if 64 <= n <= LONGEST_ROW else block_elements(shape)


@dataclass(frozen=True, slots=True)
class Coded:
    """Stored values (uint32, uint16, int8, packed uint8) and scales, their unit and ranks; Σ(v − decoded)² and Σv²."""

    values: Array
    scales: Array
    unit: int
    ranks: str | None
    squared_error: float
    squared: float


def encode_values(values: Array, positions: Array, groups: int, group: int, coding: Values) -> Coded:
    """Encode float32 values to add.

        values      float32
        positions   of them, flat and ascending
        groups      number of groups of the tensor
        group       elements of a group
        coding      "float32", "bfloat16", "int8" or "sign"

    A sign's scale is the nearest to its group's mean abs(v), the least-squares level. An int8's scale is the least not
    below max abs(v) / 127. InputError: values that are not finite, in every coding but float32.
    """
    nothing = np.empty(0, np.uint8)
    if coding == "float32":
        return Coded(values.view(np.uint32), nothing, 0, None, 0.0, _squares(values))
    bits = narrow(values, "BF16")
    if not np.isfinite(widen(bits, "BF16")).all():
        raise InputError(f"values are not all finite, which {coding} needs", hint="store final values, or float32")
    if coding == "bfloat16":
        return Coded(bits, nothing, 0, None, _squares(values - widen(bits, "BF16")), _squares(values))
    ids = positions // group
    scales = _sign_scales(values, ids, groups) if coding == "sign" else _int8_scales(values, ids, groups)
    unit = _unit(float(scales.max(initial=0)))
    table = _table(unit).astype(np.float64)
    codes = np.searchsorted((table[1:] + table[:-1]) / 2 if coding == "sign" else table, scales)
    scale = table.astype(np.float32)[codes][ids]
    if coding == "sign":
        negative = np.signbit(values)
        stored: Array = np.packbits(negative, bitorder="little")
        decoded = np.where(negative, -scale, scale)
    else:
        quotients = np.divide(values, scale, out=np.zeros_like(values), where=scale > 0)
        stored = np.clip(np.rint(quotients), -127, 127).astype(np.int8)
        decoded = stored * scale
    packed, ranks = _pack_scales(codes)
    return Coded(stored, packed, unit, ranks, _squares(values - decoded), _squares(values))


def cheapest(coding: Values, count: int, groups: int) -> Values:
    """`coding`, or bfloat16 if that takes no more bytes: with few entries per group, or few in all."""
    if coding not in SCALED:
        return coding
    scaled = count * VALUE_BITS[coding] // 8 + groups * SCALE_BITS // 8 + ARRAY_BYTES
    return coding if scaled < 2 * count else "bfloat16"


def _pack_scales(codes: Array) -> tuple[Array, str | None]:
    """Scale codes as stored, and their ranks (a hex digit each); ranks of None: four bits each take no more bytes."""
    counts = np.bincount(codes, minlength=1 << SCALE_BITS)
    order = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)]
    lengths = np.zeros_like(counts)  # bits of each code
    lengths[order] = np.arange(1, order.size + 1)
    bits = int(counts @ lengths)
    if -(-bits // 8) + RANKS_BYTES < -(-codes.size // 2):
        ones = np.zeros(bits, bool)
        ones[np.cumsum(lengths[codes]) - 1] = True
        return np.packbits(ones, bitorder="little"), "".join(f"{code:x}" for code in order)
    codes = np.append(codes, 0)[: -(-codes.size // 2) * 2]
    return (codes[::2] | codes[1::2] << 4).astype(np.uint8), None


def scale_values(stored: Array, groups: int, unit: int, ranks: str | None) -> Array:
    """Stored scales as float32, one per group. InputError: ranked scales that are not `groups`, or of an
    unknown rank."""
    if ranks is None:
        codes = np.empty(2 * stored.size, np.uint8)
        codes[::2], codes[1::2] = stored & 0xF, stored >> 4
        return _table(unit)[codes[:groups]]
    places = np.flatnonzero(np.unpackbits(stored, bitorder="little").view(bool))
    own = places.copy()
    own[1:] -= places[:-1] + 1
    if places.size != groups or own.max(initial=0) >= len(ranks) or 8 * stored.size - int(places[-1]) > 8:
        raise InputError(f"scales are damaged: they are not {groups} of {len(ranks)} ranks")
    return ranked_scales(unit, ranks)[own]


def ranked_scales(unit: int, ranks: str) -> Array:
    """Return the float32 scale of every rank."""
    return _table(unit)[np.frombuffer(bytes.fromhex("0".join(("", *ranks))), np.uint8)]


def relative_error(squared_error: float, squared: float) -> float:
    """Return the root of the quotient, to three digits."""
    return float(f"{math.sqrt(squared_error / squared):.3g}") if squared_error else 0.0


def _squares(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _sign_scales(values: Array, ids: Array, groups: int) -> Array:
    counts = np.bincount(ids, minlength=groups)
    return np.bincount(ids, np.abs(values), groups) / np.maximum(counts, 1)


def _int8_scales(values: Array, ids: Array, groups: int) -> Array:
    scales = np.zeros(groups)
    if ids.size:
        starts = np.flatnonzero(np.diff(ids, prepend=-1))
        scales[ids[starts]] = np.maximum.reduceat(np.abs(values), starts) / 127.0
    return scales


def _unit(largest: float) -> int:
    """Return the least unit whose largest scale is not below `largest`, within float32."""
    fraction, exponent = math.frexp(largest)
    exponent -= 2 - (fraction * 4 > 3)
    lowest, highest = UNITS
    return min(max(exponent - 7, lowest), highest)


@cache
def _table(unit: int) -> Array:
    """Return the float32 scale of every code, ascending."""
    return (_UNIT_SCALES * 2.0**unit).astype(np.float32)


_UNIT_SCALES = np.array([0.0, *((2 + code % 2) * 2.0 ** (code // 2) for code in range(1, 1 << SCALE_BITS))])


# coding of added values -> bits of a value
VALUE_BITS = {"float32": 32, "bfloat16": 16, "int8": 8, "sign": 1}
