"""The loops of the fused backend, compiled by numba: they hold no GIL, allocate no result and round like torch.

No fast math and no contraction, so every product, sum and quotient is rounded to float32 by itself. A float32 array
is taken as it is, a uint16 one as the bits of bfloat16. Values of several models come as addresses (`narrow` where the
elements are bfloat16): one compiled loop serves any number of models. The cache of compiled code looks for changes
in this folder only: what the files of loops import from elsewhere never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numba.np.numpy_support import carray

from deltamerge.engine.fused.instructions import ones, pointer, product, stack, trailing_zeros, wide
from deltamerge.engine.fused.vectors import BLOCKS, VECTORS, philox_blocks
from deltamerge.io.jit import compiled as compiled
from deltamerge.methods.merge.arithmetic import SMALLEST_DIVISOR
from deltamerge.methods.prune.bits import GAPS, HIGH, LOW, MULTIPLIERS, ROUNDS, WEYL

Function = TypeVar("Function", bound=Callable[..., Any])

CHUNK = 1 << 12

_M0, _M1 = map(np.uint64, MULTIPLIERS)
_W0, _W1 = map(np.uint64, WEYL)
_HIGH, _LOW, _GAPS = map(np.uint64, (HIGH, LOW, GAPS))
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_SMALLEST = np.float32(SMALLEST_DIVISOR)
_OF_HALVES, _OF_FLOATS = 2 * CHUNK, 4 * CHUNK


def _inlined(function: Function) -> Function:
    return cast(Function, njit(nogil=True, error_model="numpy", inline="always")(function))


@_inlined
def philox(index: Any, block: Any, lane: Any, key0: Any, key1: Any) -> Any:
    """Philox4x64-10 of the counter (index, block, lane, 0), as in `pruners.bits`."""
    c0, c1, c2, c3 = index, block, lane, _ZERO
    for _ in range(ROUNDS):
        high0, low0 = product(_M0, c0)
        high1, low1 = product(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0 += _W0
        key1 += _W1
    return c0, c1, c2, c3


@compiled
def widen(x: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = wide(x[i])


@compiled
def narrow(x_bits: Any, out: Any) -> None:
    """The uint32 bits of float32 rounded to bfloat16: nearest, ties to even, NaN to 0x7FC0."""
    for i in range(out.size):
        x = x_bits[i]
        rounded = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
        nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
        out[i] = np.uint16(0x7FC0) if nan else np.uint16(rounded)


@compiled
def subtract(tune: Any, base: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = wide(tune[i]) - wide(base[i])


@compiled
def subtract_at(tune: Any, base: Any, positions: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = wide(tune[positions[i]]) - wide(base[positions[i]])


@compiled
def draw_halves(key0: Any, key1: Any, start: Any, count: Any, high: Any, low: Any, words: Any) -> Any:
    """The high halves of the words of positions [start, start + count) into `words`, as 16-bit numbers after so many as
    is returned; of a half that ties with `high` a lesser one if the low half is below `low`."""
    halves = words.view(np.uint16)
    skip = start % 16
    first = np.uint64(start // 16)
    blocks = (skip + count + 15) // 16
    whole = blocks // BLOCKS * BLOCKS if VECTORS else 0
    for i in range(0, whole, BLOCKS):
        philox_blocks(words[4 * i :].ctypes.data, first + np.uint64(i), key0, key1)
    for i in range(whole, blocks):
        w0, w1, w2, w3 = philox(first + np.uint64(i), _ZERO, _HIGH, key0, key1)
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = w0, w1, w2, w3
    if low:
        tied = False
        for i in range(16 * blocks):
            tied |= halves[i] == high
        if tied:
            for i in range(skip, skip + count):
                if halves[i] == high:
                    at = start - skip + i
                    word = philox(np.uint64(at // 16), _ZERO, _LOW, key0, key1)[at // 4 % 4]
                    if np.uint16(word >> np.uint64(16 * (at % 4))) < low:
                        halves[i] = np.uint16(high - 1)
    return skip


@compiled
def drop_at_random(
    tune: Any, base: Any, key0: Any, key1: Any, start: Any, high: Any, low: Any, q: Any, out: Any
) -> None:
    """(tune - base) / q where the word of the position (`start` + index) is below high · 2**16 + low, else 0; a q of 1
    does not divide."""
    words = carray(stack(_OF_HALVES), CHUNK // 4, np.uint64)
    halves = words.view(np.uint16)
    done = 0
    while done < out.size:
        count = min(CHUNK - 16, out.size - done)
        # slices spare the inner loop numpy's negative indices, which would keep it scalar
        half = halves[draw_halves(key0, key1, start + done, count, high, low, words) :]
        t, b, kept = tune[done:], base[done:], out[done:]
        if q == np.float32(1):
            for i in range(count):
                kept[i] = wide(t[i]) - wide(b[i]) if half[i] < high else np.float32(0)
        else:
            for i in range(count):
                kept[i] = (wide(t[i]) - wide(b[i])) / q if half[i] < high else np.float32(0)
        done += count


@_inlined
def _step(draw: Any, table: Any, guide: Any, shift: Any, place: Any) -> Any:
    """The next kept place, and the place after it; a gap off the table gives a place that is not kept (-1)."""
    u = draw >> _ONE
    gap = np.int64(guide[u >> shift])
    while table[gap] <= u:
        gap += 1
    after = place + gap
    return (after, after + 1) if gap < table.size - 1 else (-1, after)


@compiled
def draw_positions(
    table: Any, guide: Any, shift: Any, key0: Any, key1: Any, start: Any, stop: Any, block_size: Any, out: Any
) -> int:
    """The kept of positions [start, stop) by gaps, relative to start, into `out` (one longer than the range); how many.

    `table` is the gap table and 2**64 - 1 at its end; guide[u >> shift] is at most the gap of u.
    """
    count = 0
    block = start // block_size
    while block * block_size < stop:
        origin = block * block_size - start
        until = min(stop - block * block_size, block_size)
        since = max(0, -origin)
        place, index = 0, _ZERO
        while place < until:
            for draw in philox(index, np.uint64(block), _GAPS, key0, key1):
                found, place = _step(draw, table, guide, shift, place)
                out[count] = origin + found
                count += since <= found < until
            index += _ONE
        block += 1
    return count


@compiled
def _add_two(base: Any, x: Any, w: Any, y: Any, v: Any, out: Any) -> None:
    """`add_weighted` of two models, in one go."""
    if base.size:
        for i in range(out.size):
            out[i] = wide(base[i]) + (w * wide(x[i]) + v * wide(y[i]))
    else:
        for i in range(out.size):
            out[i] = w * wide(x[i]) + v * wide(y[i])


@compiled
def add_weighted(base: Any, addresses: Any, narrow: Any, weights: Any, divisor: Any, scale: Any, out: Any) -> None:
    """out = base + scale · (Σ w_i x_i) / divisor; an empty base adds nothing. By chunks that stay in cache."""
    plain = divisor == np.float32(1) and scale == np.float32(1)
    if weights.size == 2 and plain and narrow[0] == narrow[1]:
        if narrow[0]:
            short_x = carray(pointer(addresses[0]), out.size, np.uint16)
            short_y = carray(pointer(addresses[1]), out.size, np.uint16)
            _add_two(base, short_x, weights[0], short_y, weights[1], out)
        else:
            x = carray(pointer(addresses[0]), out.size, np.float32)
            y = carray(pointer(addresses[1]), out.size, np.float32)
            _add_two(base, x, weights[0], y, weights[1], out)
        return
    for first in range(0, out.size, CHUNK):
        total = out[first : first + CHUNK]
        n = total.size
        for k in range(weights.size):
            w = weights[k]
            if narrow[k]:
                short = carray(pointer(addresses[k] + 2 * first), n, np.uint16)
                if k == 0:
                    for i in range(n):
                        total[i] = w * wide(short[i])
                else:
                    for i in range(n):
                        total[i] += w * wide(short[i])
            else:
                x = carray(pointer(addresses[k] + 4 * first), n, np.float32)
                if k == 0:
                    for i in range(n):
                        total[i] = w * x[i]
                else:
                    for i in range(n):
                        total[i] += w * x[i]
        if divisor != np.float32(1):
            for i in range(n):
                total[i] /= divisor
        if scale != np.float32(1):
            for i in range(n):
                total[i] *= scale
        if base.size:
            start = base[first : first + CHUNK]
            for i in range(n):
                total[i] = wide(start[i]) + total[i]


@_inlined
def _agreeing(entry: Any, total: Any, value: Any) -> Any:
    """A value of an entry that has the sign of the total, else 0."""
    return value if (entry > 0 if total >= 0 else entry < 0) else np.float32(0)


@compiled
def _add_two_agreeing(base: Any, x: Any, w: Any, y: Any, v: Any, normalize: Any, scale: Any, out: Any) -> None:
    """`add_agreeing` of two models, in one go."""
    if not normalize:
        for i in range(out.size):
            a, b = w * x[i], v * y[i]
            mixed = _agreeing(a, a + b, a) + _agreeing(b, a + b, b)
            out[i] = wide(base[i]) + mixed * scale
        return
    for i in range(out.size):
        a, b = w * x[i], v * y[i]
        divisor = _agreeing(a, a + b, w) + _agreeing(b, a + b, v)
        mixed = _agreeing(a, a + b, a) + _agreeing(b, a + b, b)
        mixed /= np.float32(1) if abs(divisor) < _SMALLEST else divisor
        out[i] = wide(base[i]) + mixed * scale


@compiled
def add_agreeing(base: Any, addresses: Any, weights: Any, normalize: Any, scale: Any, out: Any) -> None:
    """out = base + scale · Σ of the e_i = w_i Δ_i of the sign of Σ e_i (÷ the sum of their w_i if `normalize`)."""
    if weights.size == 2:
        x = carray(pointer(addresses[0]), out.size, np.float32)
        y = carray(pointer(addresses[1]), out.size, np.float32)
        _add_two_agreeing(base, x, weights[0], y, weights[1], normalize, scale, out)
        return
    sums, divisors = carray(stack(_OF_FLOATS), CHUNK, np.float32), carray(stack(_OF_FLOATS), CHUNK, np.float32)
    for first in range(0, out.size, CHUNK):
        mixed, start = out[first : first + CHUNK], base[first : first + CHUNK]
        n = mixed.size
        for k in range(weights.size):
            delta, w = carray(pointer(addresses[k] + 4 * first), n, np.float32), weights[k]
            if k == 0:
                for i in range(n):
                    sums[i] = w * delta[i]
            else:
                for i in range(n):
                    sums[i] += w * delta[i]
        for i in range(n):
            mixed[i] = divisors[i] = np.float32(0)
        for k in range(weights.size):
            delta, w = carray(pointer(addresses[k] + 4 * first), n, np.float32), weights[k]
            for i in range(n):
                entry = w * delta[i]
                agrees = entry > 0 if sums[i] >= 0 else entry < 0
                mixed[i] += entry if agrees else np.float32(0)
                divisors[i] += w if agrees else np.float32(0)
        if normalize:
            for i in range(n):
                divisor = divisors[i]
                mixed[i] /= np.float32(1) if abs(divisor) < _SMALLEST else divisor
        if scale != np.float32(1):
            for i in range(n):
                mixed[i] *= scale
        for i in range(n):
            mixed[i] = wide(start[i]) + mixed[i]


@compiled
def keep_largest_of_rows(bits: Any, scores: Any, k: Any, out: Any) -> None:
    """`bits` where the magnitudes of `scores` (rows, n) are among the k largest of a row; equals from the left."""
    counts = np.empty(1 << 11, np.int64)
    for row in range(scores.shape[0]):
        score, source, kept = scores[row], bits[row], out[row]
        threshold, wanted = np.uint32(0), k
        for step in range(3):  # 11, 10 and 10 bits of the threshold, from the top
            width = np.uint32(11 if step == 0 else 10)
            shift = np.uint32(20 - 10 * step)
            counts[:] = 0
            for i in range(score.size):
                magnitude = score[i] & np.uint32(0x7FFFFFFF)
                if step == 0 or magnitude >> (shift + width) == threshold:
                    counts[(magnitude >> shift) & np.uint32((1 << width) - 1)] += 1
            found = np.int64((1 << width) - 1)
            while counts[found] < wanted:
                wanted -= counts[found]
                found -= 1
            threshold = (threshold << width) | np.uint32(found)
        for i in range(score.size):
            magnitude = score[i] & np.uint32(0x7FFFFFFF)
            equal = magnitude == threshold and wanted > 0
            wanted -= equal
            kept[i] = source[i] if magnitude > threshold or equal else np.uint32(0)


@compiled
def align(positions_at: Any, values_at: Any, sizes: Any, marks: Any, before: Any, positions: Any, rows: Any) -> int:
    """The ascending union of lists into `positions`, the values of each, 0 where absent, into its row; how many.

    `marks` holds a zero bit for each element of the tile, `before` has room for as many numbers as it has words.
    """
    for k in range(sizes.size):
        for p in carray(pointer(positions_at[k]), sizes[k], np.int64):
            marks[p >> 6] |= _ONE << np.uint64(p & 63)
    count = 0
    for word in range(marks.size):
        before[word] = count
        rest = marks[word]
        while rest:
            positions[count] = 64 * word + np.int64(trailing_zeros(rest))
            rest &= rest - _ONE
            count += 1
    for k in range(sizes.size):
        row = rows[k]
        row[:count] = np.float32(0)
        values = carray(pointer(values_at[k]), sizes[k], np.float32)
        for i, p in enumerate(carray(pointer(positions_at[k]), sizes[k], np.int64)):
            lower = marks[p >> 6] & ((_ONE << np.uint64(p & 63)) - _ONE)
            row[before[p >> 6] + np.int64(ones(lower))] = values[i]
    return count


@compiled
def count_high(bits: Any, counts: Any) -> None:
    for i in range(bits.size):
        counts[(bits[i] & np.uint32(0x7FFFFFFF)) >> np.uint32(16)] += 1


@compiled
def count_low(bits: Any, high: Any, counts: Any) -> None:
    for i in range(bits.size):
        x = bits[i]
        if (x & np.uint32(0x7FFFFFFF)) >> np.uint32(16) == high:
            counts[x & np.uint32(0xFFFF)] += 1


@compiled
def count_equal(bits: Any, threshold: Any, step: Any, counts: Any) -> None:
    for block in range(counts.size):
        part, equal = bits[block * step : (block + 1) * step], 0
        for i in range(part.size):
            equal += (part[i] & np.uint32(0x7FFFFFFF)) == threshold
        counts[block] = equal


@compiled
def keep_from(bits: Any, least: Any, out: Any) -> None:
    """The bits where the magnitude is at least `least`, else 0."""
    for i in range(bits.size):
        x = bits[i]
        out[i] = x if (x & np.uint32(0x7FFFFFFF)) >= least else np.uint32(0)
