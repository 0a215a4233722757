"""The loop that runs a whole job: read a piece of every source, run the operations on it, put the result in place.

One call of C speed in place of a call of Python for each step of each tile; values never leave the cache. The work
is done by the loops of `loops` and `method_loops`, chunk by chunk, so its bits are theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from deltamerge.fused.instructions import pointer, wide
from deltamerge.fused.loops import (
    add_agreeing,
    add_weighted,
    align,
    compiled,
    count_high,
    count_low,
    draw_positions,
    drop_at_random,
    keep_from,
    narrow,
    subtract,
    subtract_at,
    widen,
)
from deltamerge.fused.method_loops import append_between, copy_magnitudes, dots_of_blocks
from deltamerge.pruners.bits import SPARSE_BLOCK
from deltamerge.pruners.select import GOLDEN

# Elements read and written at once: in bfloat16 small enough for a core's cache beside the registers.
PIECE = 1 << 16

# What an operation does; its fields are (code, to, a, b, c, d), registers unless told otherwise.
LOAD = 0  # to = source a
SUBTRACT = 1  # to = a - b
DROP = 2  # to = a - b where the word of the entry is below c · 2**16 + d, else 0
DIVIDE = 3  # to = a / scalar; of a list, as many as there are places b (-1: a whole chunk)
KEEP = 4  # to = a above the threshold b, and the first c of its equals; d: where their ranks are (-1: all are kept)
ADD = 5  # to = base a + scaled weighted sum of the models (a = -1: no base); b: places, or -1
AGREE = 6  # the same of the entries that agree on a sign; c: normalize
STORE = 7  # the output = a
HIGH, LOW, EQUAL = 8, 9, 10  # counts from d on: of a's high bits; low bits inside bin b; equals of b, per block
DOTS = 11  # row c of sums: per block the dot product of a and b
DRAW = 12  # places to = kept by gaps, with table a
DIFFER_AT = 13  # to = source a - source b at places c
ALIGN = 14  # places to = union of the lists of the models; a: register of the first of their rows
BASE_AT = 15  # to = source a at places b
PATCH = 16  # the output = source a, but register b at places c
LIST = 17  # row c of listed: per block what a has from b to d, after how many are above and inside
SAMPLE = 18  # row c of listed: the magnitudes of a

_pread: Any = types.ExternalFunction("pread", types.intp(types.intc, types.voidptr, types.uintp, types.int64))


@compiled
def read_piece(fd: Any, address: Any, nbytes: Any, offset: Any) -> bool:
    done = 0
    while done < nbytes:
        count = _pread(np.int32(fd), pointer(address + done), np.uint64(nbytes - done), offset + done)
        if count <= 0:
            return False
        done += count
    return True


@compiled
def divide(x: Any, divisor: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = x[i] / divisor


@compiled
def keep_first_equals(bits: Any, threshold: Any, left: Any, out: Any) -> Any:
    """Magnitudes above the threshold and the first `left` equal to it; how many more may be kept."""
    for i in range(bits.size):
        magnitude = bits[i] & np.uint32(0x7FFFFFFF)
        equal = magnitude == threshold and left > 0
        left -= equal
        out[i] = bits[i] if magnitude > threshold or equal else np.uint32(0)
    return left


@compiled
def widen_at(x: Any, positions: Any, out: Any) -> None:
    for i in range(out.size):
        out[i] = wide(x[positions[i]])


@compiled
def copy(x: Any, out: Any) -> None:
    """As `out[:] = x`, which takes seconds longer to compile: it can say which shapes do not fit."""
    for i in range(out.size):
        out[i] = x[i]


@compiled
def patch(base: Any, values: Any, positions: Any, out: Any) -> None:
    copy(base, out)
    one = np.empty(1, np.uint16)
    bits = values.view(np.uint32)
    for i in range(positions.size):
        narrow(bits[i : i + 1], one)
        out[positions[i]] = one[0]


@compiled
def run(
    operations: Any,
    keys: Any,
    scalars: Any,
    weights: Any,
    models: Any,
    addresses: Any,
    places_of: Any,
    tables: Any,
    guides: Any,
    bounds: Any,
    ranks: Any,
    sources: Any,
    out: Any,
    size_of_out: Any,
    start: Any,
    stop: Any,
    block: Any,
    aligned: Any,
    sampled: Any,
    raw: Any,
    raw_at: Any,
    registers: Any,
    places: Any,
    places_at: Any,
    counts: Any,
    sums: Any,
    listed: Any,
    used: Any,
) -> bool:
    """Elements [start, stop) of a tensor; whether everything could be read.

    sources (fd, byte of the tensor's start, bytes per element); `out` takes the bytes of the output, `size_of_out` per
    element, or is empty; `raw` has a row of bytes for each source. Reductions go to `counts`, `sums` and `listed`, a
    row of which is used as far as `used` says. `block`: elements of the tensor's blocks, on which start lies;
    `aligned`: pieces end where the generator's blocks do instead; `sampled`: only a run of so many entries of each
    block is looked at (0: all), as `select.run_start` says.
    """
    chunk = registers.shape[1]
    sizes = np.zeros(places.shape[0], np.int64)
    left, header = np.full(operations.shape[0], -1), np.zeros(operations.shape[0], np.int64)
    wholes = np.zeros(weights.shape[1], np.bool_)
    marks = np.zeros(SPARSE_BLOCK // 64, np.uint64)
    lengths = np.empty(weights.shape[1], np.int64)
    after = start
    while after < stop:
        at = after
        if sampled:
            here = min(stop - at, block)
            piece, after = min(sampled, here), at + here
            at += (((at // block) * GOLDEN) & 0xFFFFFFFF) * (here - piece + 1 if sampled <= here else 0) >> 32
        elif aligned:
            piece = min(stop - at, SPARSE_BLOCK - at % SPARSE_BLOCK)
            after = at + piece
        else:
            piece = min(min(stop - at, block - at % block), max(PIECE, chunk))
            after = at + piece
        number, inside = at // block, at % block
        for s in range(sources.shape[0]):
            fd, begin, size = sources[s, 0], sources[s, 1], sources[s, 2]
            if not read_piece(fd, raw_at[s], piece * size, begin + at * size):
                return False
        for first in range(0, piece, chunk):
            n = min(chunk, piece - first)
            for k in range(operations.shape[0]):
                code, to = operations[k, 0], operations[k, 1]
                a, b, c, d = operations[k, 2], operations[k, 3], operations[k, 4], operations[k, 5]
                if code == LOAD:
                    if sources[a, 2] == 2:
                        widen(raw[a, 2 * first : 2 * (first + n)].view(np.uint16), registers[to, :n])
                    else:
                        copy(raw[a, 4 * first : 4 * (first + n)].view(np.float32), registers[to, :n])
                elif code == SUBTRACT:
                    subtract(registers[a, :n], registers[b, :n], registers[to, :n])
                elif code == DROP:
                    high, low = np.uint16(c), np.uint16(d)
                    x, y, kept = registers[a, :n], registers[b, :n], registers[to, :n]
                    drop_at_random(x, y, keys[k, 0], keys[k, 1], at + first, high, low, kept)
                elif code == DIVIDE:
                    size = n if b < 0 else sizes[b]
                    divide(registers[a, :size], scalars[k, 0], registers[to, :size])
                elif code == KEEP:
                    bits, kept_bits = registers[a, :n].view(np.uint32), registers[to, :n].view(np.uint32)
                    threshold = np.uint32(b)
                    if d >= 0 and inside == 0 and first == 0:
                        before, equal = ranks[d + number], ranks[d + number + 1] - ranks[d + number]
                        left[k] = -1 if c - before >= equal else max(0, c - before)
                    if left[k] < 0:
                        keep_from(bits, threshold, kept_bits)
                    elif left[k] > 0:
                        left[k] = keep_first_equals(bits, threshold, left[k], kept_bits)
                    else:
                        keep_from(bits, threshold + np.uint32(1), kept_bits)
                elif code in (ADD, AGREE):
                    size, m = n if b < 0 else sizes[b], models[k]
                    base, merged = registers[max(a, 0), : size if a >= 0 else 0], registers[to, :size]
                    if code == ADD:
                        divisor, scale = scalars[k, 0], scalars[k, 1]
                        add_weighted(base, addresses[k, :m], wholes[:m], weights[k, :m], divisor, scale, merged)
                    else:
                        add_agreeing(base, addresses[k, :m], weights[k, :m], c != 0, scalars[k, 1], merged)
                elif code == STORE:
                    done = at + first - start
                    if size_of_out == 2:
                        narrow(registers[a, :n].view(np.uint32), out[2 * done : 2 * (done + n)].view(np.uint16))
                    else:
                        copy(registers[a, :n], out[4 * done : 4 * (done + n)].view(np.float32))
                elif code == HIGH:
                    count_high(registers[a, :n].view(np.uint32), counts[d:])
                elif code == LOW:
                    count_low(registers[a, :n].view(np.uint32), np.uint32(b), counts[d:])
                elif code == EQUAL:
                    equal, threshold = 0, np.uint32(b)
                    entries = registers[a, :n].view(np.uint32)
                    for i in range(n):
                        equal += (entries[i] & np.uint32(0x7FFFFFFF)) == threshold
                    counts[d + number - start // block] += equal
                elif code == DOTS:
                    here = number - start // block
                    dots_of_blocks(registers[a, :n], registers[b, :n], n, sums[c, here : here + 1])
                elif code == DRAW:
                    table = tables[bounds[a, 0] : bounds[a, 1]]
                    guide, shift = guides[bounds[a, 2] : bounds[a, 3]], np.uint64(bounds[a, 4])
                    sizes[to] = draw_positions(
                        table, guide, shift, keys[k, 0], keys[k, 1], at, at + n, SPARSE_BLOCK, places[to]
                    )
                elif code == DIFFER_AT:
                    where = places[c, : sizes[c]]
                    tune, start_row = raw[a, : 2 * n].view(np.uint16), raw[b, : 2 * n].view(np.uint16)
                    subtract_at(tune, start_row, where, registers[to, : where.size])
                elif code == ALIGN:
                    m = models[k]
                    for j in range(m):
                        lengths[j] = sizes[places_of[k, j]]
                    marks[:] = np.uint64(0)
                    rows = registers[a : a + m]
                    sizes[to] = align(places_at[k, :m], addresses[k, :m], lengths[:m], marks, places[to], rows)
                elif code == BASE_AT:
                    where = places[b, : sizes[b]]
                    widen_at(raw[a, : 2 * n].view(np.uint16), where, registers[to, : where.size])
                elif code == LIST:
                    if inside == 0 and first == 0:
                        header[k] = used[c]
                        listed[c, used[c]] = listed[c, used[c] + 1] = np.uint32(0)
                        used[c] += 2
                    entries = registers[a, :n].view(np.uint32)
                    count, above = append_between(entries, np.uint32(b), np.uint32(d), listed[c, used[c] :])
                    listed[c, header[k]] += np.uint32(above)
                    listed[c, header[k] + 1] += np.uint32(count)
                    used[c] += count if d > b else 0
                elif code == SAMPLE:
                    copy_magnitudes(registers[a, :n].view(np.uint32), listed[c, used[c] : used[c] + n])
                    used[c] += n
                else:
                    where = places[c, : sizes[c]]
                    done = at + first - start
                    short = out[2 * done : 2 * (done + n)].view(np.uint16)
                    patch(raw[a, : 2 * n].view(np.uint16), registers[b, : where.size], where, short)
    return True
