"""More loops: ranks in rows, variances, votes, lists of magnitudes.

As `loops`, and apart from it by length alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from deltamerge.engine.fused.instructions import GROUP, compared, ones, pointer, trailing_zeros, wide
from deltamerge.engine.fused.loops import CHUNK, philox
from deltamerge.io.jit import compiled
from deltamerge.methods.merge.sce import SMALLEST_WEIGHT
from deltamerge.methods.prune.bits import HIGH, LOW

_HIGH, _LOW, _ZERO = np.uint64(HIGH), np.uint64(LOW), np.uint64(0)
_SMALLEST = np.float32(SMALLEST_WEIGHT)
_SIGNLESS = np.uint32(0x7FFFFFFF)
_ONE = np.uint64(1)


@compiled
def keep_by_rank(
    values: Any, start: Any, columns: Any, key0: Any, key1: Any, limits: Any, ratios: Any, weighted: Any, out: Any
) -> None:
    """Rows of `columns`: the entry of rank r by magnitude, equals from the left, where its word is below limits[r].

    The word is that of the position (`start` + index); `weighted` divides by ratios[r]. Radix sort by bytes.
    """
    words = np.empty(4 * (columns // 16 + 2), np.uint64)
    halves = words.view(np.uint16)
    this, other = np.empty(columns, np.uint64), np.empty(columns, np.uint64)
    counts = np.empty((4, 256), np.int64)
    for first in range(0, values.size, columns):
        row, kept = values[first : first + columns], out[first : first + columns]
        bits = row.view(np.uint32)
        skip = (start + first) % 16
        lowest = np.uint64((start + first) // 16)
        for i in range((skip + columns + 15) // 16):
            w0, w1, w2, w3 = philox(lowest + np.uint64(i), _ZERO, _HIGH, key0, key1)
            words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = w0, w1, w2, w3
        half = halves[skip:]
        counts[:] = 0
        for i in range(columns):
            x = bits[i] & _SIGNLESS
            this[i] = (np.uint64(x) << np.uint64(32)) | np.uint64(i)
            counts[0, x & np.uint32(255)] += 1
            counts[1, (x >> np.uint32(8)) & np.uint32(255)] += 1
            counts[2, (x >> np.uint32(16)) & np.uint32(255)] += 1
            counts[3, x >> np.uint32(24)] += 1
        for digit in range(4):
            shift, places = np.uint64(32 + 8 * digit), counts[digit]
            if places[(this[0] >> shift) & np.uint64(255)] == columns:
                continue
            before = 0
            for byte in range(256):
                count = places[byte]
                places[byte] = before
                before += count
            for i in range(columns):
                at = (this[i] >> shift) & np.uint64(255)
                other[places[at]] = this[i]
                places[at] += 1
            this, other = other, this
        for rank in range(columns):
            place, limit = this[rank] & np.uint64(0xFFFFFFFF), limits[rank]
            upper, bound = np.int64(half[place]), limit >> 16
            stays = upper < bound
            if upper == bound:
                position = start + first + np.int64(place)
                word = philox(np.uint64(position // 16), _ZERO, _LOW, key0, key1)[position // 4 % 4]
                lower = np.int64((word >> np.uint64(16 * (position % 4))) & np.uint64(0xFFFF))
                stays = lower < (limit & 0xFFFF)
            entry = row[place] / ratios[rank] if weighted else row[place]
            kept[place] = entry if stays else np.float32(0)


@compiled
def variance(addresses: Any, out: Any) -> None:
    """The variance over float32 models of each entry: of their differences to the first."""
    mean = np.empty(CHUNK, np.float32)
    count = np.float32(addresses.size)
    for start in range(0, out.size, CHUNK):
        total = out[start : start + CHUNK]
        n = total.size
        first = carray(pointer(addresses[0] + 4 * start), n, np.float32)
        mean[:n] = np.float32(0)
        for k in range(1, addresses.size):
            x = carray(pointer(addresses[k] + 4 * start), n, np.float32)
            for i in range(n):
                mean[i] += x[i] - first[i]
        for i in range(n):
            mean[i] /= count
            apart = np.float32(0) - mean[i]
            total[i] = apart * apart
        for k in range(1, addresses.size):
            x = carray(pointer(addresses[k] + 4 * start), n, np.float32)
            for i in range(n):
                apart = (x[i] - first[i]) - mean[i]
                total[i] += apart * apart
        for i in range(n):
            total[i] /= count


@compiled
def add_elected(base: Any, addresses: Any, weights: Any, out: Any) -> None:
    """out = base + Σ w_i Δ_i ÷ Σ w_i of the Δ_i of the sign of Σ Δ_i (0 counts as +); smallest divisor 1e-6."""
    sums, divisors = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for first in range(0, out.size, CHUNK):
        mixed, start = out[first : first + CHUNK], base[first : first + CHUNK]
        n = mixed.size
        for i in range(n):
            mixed[i] = divisors[i] = np.float32(0)
        for k in range(weights.size):
            delta = carray(pointer(addresses[k] + 4 * first), n, np.float32)
            if k == 0:
                for i in range(n):
                    sums[i] = delta[i]
            else:
                for i in range(n):
                    sums[i] += delta[i]
        for k in range(weights.size):
            delta, w = carray(pointer(addresses[k] + 4 * first), n, np.float32), weights[k]
            for i in range(n):
                x = delta[i]
                agrees = x > 0 if sums[i] >= 0 else x < 0
                mixed[i] += x * w if agrees else np.float32(0)
                divisors[i] += w if agrees else np.float32(0)
        for i in range(n):
            divisor = divisors[i]
            mixed[i] /= _SMALLEST if divisor < _SMALLEST else divisor
            mixed[i] = wide(start[i]) + mixed[i]


@compiled
def keep_scored(bits: Any, scores: Any, least: Any, out: Any) -> None:
    """The bits where the magnitude of the score is at least `least`, else 0."""
    for i in range(bits.size):
        x = bits[i]
        out[i] = x if (scores[i] & _SIGNLESS) >= least else np.uint32(0)


@compiled
def append_between(bits: Any, low: Any, high: Any, out: Any) -> Any:
    """The magnitudes from `low` to `high` to the front of `out`, which is longer than all, unless they are one value;
    how many, and how many are above them."""
    count, above, listed = np.int64(0), np.int64(0), high > low
    whole = bits.size // GROUP * GROUP
    for first in range(0, whole, GROUP):
        group = bits[first : first + GROUP]
        inside, over = compared(group.ctypes.data, low, high)
        above += np.int64(ones(over))
        if listed:
            while inside:
                out[count] = group[np.int64(trailing_zeros(inside))] & _SIGNLESS
                inside &= inside - _ONE
                count += 1
        else:
            count += np.int64(ones(inside))
    for i in range(whole, bits.size):
        x = bits[i] & _SIGNLESS
        if low <= x <= high:
            if listed:
                out[count] = x
            count += 1
        above += x > high
    return count, above


@compiled
def list_between(bits: Any, low: Any, high: Any, step: Any, out: Any) -> Any:
    """`append_between` block by block, after how many are above and inside; how much of `out` is used."""
    used = 0
    for first in range(0, bits.size, step):
        count, above = append_between(bits[first : first + step], low, high, out[used + 2 :])
        out[used], out[used + 1] = np.uint32(above), np.uint32(count)
        used += 2 + (count if high > low else 0)
    return used


@compiled
def copy_magnitudes(bits: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = bits[i] & _SIGNLESS
