"""Parts of a tensor's delta: quantised factors, and quantised entries; their sum is added to the base.

A tensor is a matrix (m, n): n is its last dimension, m the product of the others; a vector is (1, n). A value is a
*level* of a table of small integers times a scale, itself a small integer, times 2**unit. A sum of such products is an
integer below 2**53, exact in float64 in any order, so that a part is the same on every machine. Parts are added in
float64 in the order of the record, and rounded to float32 once.

    scale(code) = (16 + code % 16) * 2**(code // 16) - 16

A tensor is stored as its parts, one after another:

    factors   Σ_k scale_k u_k v_kᵀ, u_k of m levels, v_k of n: a byte of scale for every component; then for each
              component the codes of u_k and of v_k
    entries   a level at each of some flat positions, times the scale of its row, its column, or of all: a byte for
              each scale; the codes of all entries; then rice's positions, if they are not all

A list of codes is packed from the lowest bit of each byte: 1, 2, 3, 4 or 8 bits a code, and zeros to the end of the
last byte. Codes of three levels are five a byte, the first in the lowest digit to base 3. Factors of "257 levels" have
trellis codes of one bit, of "258 levels" of two bits (`trellis`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Literal, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from deltamerge.errors import InputError
from deltamerge.formats.delta import trellis
from deltamerge.formats.delta.positions import LARGEST_K, Array, Positions, Sliced, choose, decode, encode

PARTS = "parts"  # the array of an artifact that has the parts of all its tensors, in their order
TABLE = "tensors"  # the array of an artifact with parts that has its tensors' records
# Levels of a unit Gaussian's Lloyd-Max quantisers, as integers: a row of levels by the number of them.
LEVELS: dict[int, Array] = {
    2: np.array([-1, 1]),
    3: np.array([-1, 0, 1]),
    4: np.array([-10, -3, 3, 10]),
    8: np.array([-105, -66, -37, -12, 12, 37, 66, 105]),
    16: np.array([-126, -95, -74, -58, -43, -30, -18, -6, 6, 18, 30, 43, 58, 74, 95, 126]),
    255: np.arange(-127, 128),
}
BITS = {2: 1, 4: 2, 8: 3, 16: 4, 255: 8, **trellis.BITS}
TRITS = 5  # codes of three levels in a byte
SCALES = ((16.0 + np.arange(256) % 16) * 2.0 ** (np.arange(256) // 16)) - 16
MOST_RANK = 1 << 18  # so that sums of levels times levels times scales stay below 2**53
PART_UNITS = (-200, 100)
ROWS = 1 << 20  # elements that are computed at once

Number: TypeAlias = Annotated[int, Field(ge=0, lt=1 << 61)]
Unit: TypeAlias = Annotated[int, Field(ge=PART_UNITS[0], le=PART_UNITS[1])]
LevelCount: TypeAlias = Literal[2, 3, 4, 8, 16, 255]
Along: TypeAlias = Literal["row", "column", "all"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, defer_build=True)


class FactorsPart(_Strict):
    """Factors; `ranks` says how many components have so many levels, in the order in which they are stored."""

    ranks: dict[Literal["2", "3", "4", "8", "16", "255", "257", "258"], Annotated[int, Field(ge=1, le=MOST_RANK)]]
    unit: Unit

    @property
    def groups(self) -> list[tuple[int, int]]:
        """The number of levels, and that of the components that have them."""
        return [(int(levels), rank) for levels, rank in self.ranks.items()]

    @property
    def rank(self) -> int:
        """Components of all levels together."""
        return sum(self.ranks.values())

    def nbytes(self, m: int, n: int) -> int:
        """Stored bytes of a matrix (m, n)."""
        sides = sum(rank * (packed_bytes(m, levels) + packed_bytes(n, levels)) for levels, rank in self.groups)
        return self.rank + sides

    def decoded_bytes(self, m: int, n: int) -> int:
        """Return the bytes of the levels of a matrix (m, n) in memory."""
        return self.rank * (m + n)

    @property
    def has_trellis(self) -> bool:
        """Whether some of its codes are trellis codes."""
        return any(levels in trellis.BITS for levels, _ in self.groups)


class EntriesPart(_Strict):
    """Entries; `positions` are the bytes of their positions by rice(k). None: all entries."""

    levels: LevelCount
    scale: Along = "row"
    unit: Unit
    count: Number | None = None
    k: Annotated[int, Field(ge=0, le=LARGEST_K)] = 0
    positions: Number = 0

    def nbytes(self, m: int, n: int) -> int:
        """Stored bytes of a matrix (m, n)."""
        count = m * n if self.count is None else self.count
        return scales_of(self.scale, m, n) + packed_bytes(count, self.levels) + self.positions

    def decoded_bytes(self, m: int, n: int) -> int:
        """Return the bytes of the levels and positions of a matrix (m, n) in memory."""
        return m * n if self.count is None else 9 * self.count


Part: TypeAlias = FactorsPart | EntriesPart


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Return the matrix (m, n) that a tensor is to its parts."""
    n = shape[-1] if shape else 1
    return (math.prod(shape[:-1]) if n else 0), n


def scales_of(along: Along, m: int, n: int) -> int:
    """Return the number of scales."""
    return {"row": m, "column": n, "all": 1}[along]


def packed_bytes(count: int, levels: int) -> int:
    """Return the bytes of `count` codes."""
    return -(-count // TRITS) if levels == 3 else -(-count * BITS[levels] // 8)


def pack(codes: Array, levels: int) -> Array:
    """Return codes below `levels`, packed along the last axis."""
    codes = codes.astype(np.uint8)
    count = codes.shape[-1]
    group = TRITS if levels == 3 else 8
    padded = np.zeros((*codes.shape[:-1], -(-count // group) * group), np.uint8)
    padded[..., :count] = codes
    if levels == 3:
        digits = padded.reshape(*codes.shape[:-1], -1, TRITS)
        packed: Array = (digits * 3 ** np.arange(TRITS)).sum(-1).astype(np.uint8)
        return packed
    bits = BITS[levels]
    spread = padded[..., None] >> np.arange(bits, dtype=np.uint8) & 1
    stored = np.packbits(spread.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    cut: Array = stored[..., : packed_bytes(count, levels)]
    return cut


def levels_of(codes: Array, levels: int) -> Array:
    """Return the levels (int8) of codes along the last axis."""
    found: Array = trellis.levels_of(codes, levels) if levels in trellis.BITS else LEVELS[levels].astype(np.int8)[codes]
    return found


def codes_of(found: Array, levels: int) -> Array:
    """The codes of levels that some codes have, along the last axis."""
    if levels in trellis.BITS:
        return trellis.nearest(found, levels)
    return np.searchsorted(LEVELS[levels], found).astype(np.uint8)


def unpack(stored: Array, count: int, levels: int) -> Array:
    """Return the levels (int8) of `count` codes, packed along the last axis.

    InputError: no code of that many levels.
    """
    if levels in trellis.BITS:
        bits = BITS[levels]
        spread = np.unpackbits(stored, axis=-1, bitorder="little", count=bits * count)
        spread = spread.reshape(*stored.shape[:-1], count, bits)
        return trellis.levels_of((spread << np.arange(bits, dtype=np.uint8)).sum(-1, dtype=np.uint8), levels)
    if levels == 8:
        spread = np.unpackbits(stored, axis=-1, bitorder="little", count=3 * count)
        codes = (spread.reshape(*stored.shape[:-1], count, 3) << np.arange(3, dtype=np.uint8)).sum(-1, dtype=np.uint8)
        eight: Array = LEVELS[8].astype(np.int8)[codes]
        return eight
    if stored.size and int(stored.max()) >= (most := {3: 3**TRITS, 255: 255}.get(levels, 256)):
        raise InputError(f"codes of {levels} levels have a byte {int(stored.max())}, {most - 1} is the largest")
    out: Array = _bytes_of(levels)[stored].reshape(*stored.shape[:-1], -1)[..., :count]
    return out


@cache
def _bytes_of(levels: int) -> Array:
    """Return the levels (int8) that each byte stands for, but of 8 levels."""
    table = LEVELS[levels].astype(np.int8)
    base, digits = (3, TRITS) if levels == 3 else (1 << BITS[levels], 8 // BITS[levels])
    codes = np.arange(256)[:, None] // base ** np.arange(digits) % base
    bytes_: Array = table[np.minimum(codes, table.size - 1)]
    return bytes_


@dataclass(frozen=True, slots=True, eq=False)
class Factored:
    """Components as numbers.

    levels   (R) how many levels each has, in ascending order; of trellis codes their kind
    left     (R, m) its levels u, int8
    right    (R, n) its levels v, int8
    scales   (R) of the products, float64, as `coded_scales` gives them
    """

    levels: Array
    left: Array
    right: Array
    scales: Array

    @property
    def nbytes(self) -> int:
        return self.left.nbytes + self.right.nbytes

    def add(self, out: Array, first: int) -> None:
        """Add rows from `first` on to `out` (rows, n) float64."""
        left = self.left[:, first : first + len(out)] * self.scales[:, None]
        out += left.T @ self.right.astype(np.float64)

    def store(self) -> tuple[FactorsPart, Array]:
        """Return them as a part, and its bytes."""
        groups = []
        for count in np.unique(self.levels).tolist():
            rows = self.levels == count
            u, v = (codes_of(side[rows], count) for side in (self.left, self.right))
            groups.append((count, u, v, self.scales[rows]))
        return store_factors(groups)


@dataclass(frozen=True, slots=True, eq=False)
class _Entries:
    """Levels (int8) at ascending flat positions, None: at all, with the scales of the rows or columns."""

    levels: Array
    positions: Array | None
    scales: Array
    along: Along
    unit: int

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + (0 if self.positions is None else self.positions.nbytes)

    def add(self, out: Array, first: int) -> None:
        """Add rows from `first` on to `out` (rows, n) float64."""
        rows, n = out.shape
        if self.positions is None:
            levels = self.levels[first * n : (first + rows) * n].reshape(rows, n).astype(np.float64)
            scales = self.scales
            scaled = levels * (scales[first : first + rows, None] if self.along == "row" else scales)
            out += np.ldexp(scaled, self.unit)
            return
        start, stop = np.searchsorted(self.positions, [first * n, (first + rows) * n])
        where = self.positions[start:stop] - first * n
        row, column = where // n, where % n
        scales = self.scales[{"row": row + first, "column": column, "all": 0}[self.along]]
        out[row, column] += np.ldexp(self.levels[start:stop] * scales, self.unit)


@dataclass(frozen=True, slots=True, eq=False)
class PartSum:
    """The parts of a tensor in memory, from which any range of its values is computed."""

    parts: tuple[Factored | _Entries, ...]
    m: int
    n: int
    nbytes: int

    @property
    def factors(self) -> Factored | None:
        """The components, of a tensor whose only part they are."""
        return self.parts[0] if len(self.parts) == 1 and isinstance(self.parts[0], Factored) else None

    def values(self, start: int, stop: int) -> Array:
        """Return the float32 values to add to the flat elements [start, stop)."""
        out: Array = np.empty(max(0, stop - start), np.float32)
        step = max(1, ROWS // max(1, self.n))
        for first in range(start // max(1, self.n), -(-stop // max(1, self.n)), step):
            rows = min(step, -(-stop // self.n) - first)
            block = np.zeros((rows, self.n))
            for part in self.parts:
                part.add(block, first)
            begin, end = max(start, first * self.n), min(stop, (first + rows) * self.n)
            with np.errstate(over="ignore"):
                out[begin - start : end - start] = block.reshape(-1)[begin - first * self.n : end - first * self.n]
        return out


def sum_of(parts: Sequence[Part], stored: Sliced, m: int, n: int) -> PartSum:
    """Decode the parts of a matrix (m, n) from their stored bytes. InputError: they are damaged."""
    decoded: list[Factored | _Entries] = []
    at = 0
    for part in parts:
        nbytes = part.nbytes(m, n)
        data: Array = np.asarray(stored[at : at + nbytes], np.uint8)
        if data.size != nbytes:
            raise InputError(f"parts take {at + nbytes} bytes, {at + data.size} are stored")
        decoded.append(_factors(part, data, m, n) if isinstance(part, FactorsPart) else _entries(part, data, m, n))
        at += nbytes
    return PartSum(tuple(decoded), m, n, sum(one.nbytes for one in decoded))


def _factors(part: FactorsPart, data: Array, m: int, n: int) -> Factored:
    left, right, at = [], [], part.rank
    for levels, rank in part.groups:
        long, wide = packed_bytes(m, levels), packed_bytes(n, levels)
        stored = data[at : at + rank * (long + wide)].reshape(rank, long + wide)
        left.append(unpack(stored[:, :long], m, levels))
        right.append(unpack(stored[:, long:], n, levels))
        at += rank * (long + wide)
    u = np.concatenate(left) if left else np.zeros((0, m), np.int8)
    v = np.concatenate(right) if right else np.zeros((0, n), np.int8)
    kinds: Array = np.repeat(*np.array(part.groups, np.int64).reshape(-1, 2).T)
    return Factored(kinds, u, v, np.ldexp(SCALES[data[: part.rank]], part.unit))


def _entries(part: EntriesPart, data: Array, m: int, n: int) -> _Entries:
    scales = scales_of(part.scale, m, n)
    count = m * n if part.count is None else part.count
    end = scales + packed_bytes(count, part.levels)
    levels = unpack(data[scales:end], count, part.levels)
    positions: Array | None = None
    if part.count is not None:
        pieces = list(decode("rice", data[end:], count, m * n, part.k)) if count else []
        positions = np.concatenate(pieces) if pieces else np.empty(0, np.int64)
    return _Entries(levels, positions, SCALES[data[:scales]], part.scale, part.unit)


def scale_codes(scales: Array) -> tuple[Array, int]:
    """Return the codes (uint8) nearest to scales of at least zero, and their unit, the least that holds the largest."""
    largest = float(scales.max(initial=0.0))
    unit = PART_UNITS[0] if not largest else math.ceil(math.log2(largest / SCALES[-1]) - 1e-9)
    unit = min(max(unit, PART_UNITS[0]), PART_UNITS[1])
    codes = np.searchsorted((SCALES[1:] + SCALES[:-1]) / 2, np.ldexp(scales, -unit))
    return codes.astype(np.uint8), unit


def coded_scales(scales: Array) -> Array:
    """Return scales of at least zero as they are stored: the nearest that have codes."""
    codes, unit = scale_codes(scales)
    found: Array = np.ldexp(SCALES[codes], unit)
    return found


def store_factors(groups: Sequence[tuple[int, Array, Array, Array]]) -> tuple[FactorsPart, Array]:
    """Return a part, and its bytes, of groups of components: levels, codes (r, m) and (r, n), scales (r) of their
    products."""
    codes, unit = scale_codes(np.concatenate([scales for *_, scales in groups]))
    stored = [codes]
    for levels, u, v, _ in groups:
        stored.append(np.concatenate([pack(u, levels), pack(v, levels)], axis=1).reshape(-1))
    ranks = {str(levels): len(u) for levels, u, _, _ in groups}
    return FactorsPart.model_validate({"ranks": ranks, "unit": unit}), np.concatenate(stored)


def store_entries(
    levels: int, codes: Array, scales: Array, along: Along, positions: Array | None, size: int
) -> tuple[EntriesPart, Array]:
    """Return a part, and its bytes, of codes at ascending flat positions (None: at all), with their scales."""
    stored_scales, unit = scale_codes(scales)
    stored = [stored_scales, pack(codes, levels)]
    listed: dict[str, int] = {}
    if positions is not None:
        kept = Positions()
        kept.add(positions)
        choice = choose(kept.gaps, size, 0, fill=False, allowed=("rice",))
        rice = encode(choice, [positions], positions.size, size) if positions.size else np.empty(0, np.uint8)
        listed = {"count": positions.size, "k": choice.k, "positions": rice.size}
        stored.append(rice)
    fields = {"levels": levels, "scale": along, "unit": unit, **listed}
    return EntriesPart.model_validate(fields), np.concatenate(stored)
