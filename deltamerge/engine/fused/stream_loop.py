"""The loop that runs a whole job: read a piece of every source, run the operations on it, put the result in place.

One call of C speed in place of a call of Python for each step of each tile; values never leave the cache. The work
is done by the loops of `loops` and `method_loops`, chunk by chunk, so its bits are theirs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import carray

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.instructions import pointer, stack, wide
from deltamerge.engine.fused.loops import (
    add_agreeing,
    add_weighted,
    align,
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
from deltamerge.engine.fused.method_loops import append_between, copy_magnitudes
from deltamerge.engine.fused.sums import add_by_halving, dot_of_run
from deltamerge.engine.fused.xxh3 import mix_pieces
from deltamerge.io.jit import compiled, uncalled
from deltamerge.methods.prune.bits import SPARSE_BLOCK
from deltamerge.methods.prune.select import GOLDEN
from deltamerge.methods.tiles import RUN

_MARKS = SPARSE_BLOCK // 64
_OF_MARKS = 8 * _MARKS

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
    one = carray(stack(2), 1, np.uint16)
    bits = values.view(np.uint32)
    for i in range(positions.size):
        narrow(bits[i : i + 1], one)
        out[positions[i]] = one[0]


@uncalled
def run(table: Any) -> int:
    """Elements [start, stop) of a tensor; whether everything could be read.

    `table` is the address of a row for each array of `program.Program.run`: its address, rows and columns.

    sources (fd, byte of the tensor's start, bytes per element); `out` takes the bytes of the output, `size_of_out` per
    element, or is empty; `raw` has a row of bytes for each source. Reductions go to `counts`, `sums` and `listed`, a
    row of which is used as far as `used` says. `block`: elements of the tensor's blocks, on which start lies;
    `aligned`: pieces end where the generator's blocks do instead; `sampled`: only a run of so many entries of each
    block is looked at (0: all), as `select.run_start` says. `digests` has room for those of the pieces of files
    (io.pieces) that lie within what is read of each source, one source after the other, or is empty: they are hashed
    from `hashed` on, where piece number `first_pieces` begins, and `hashed` tells up to where.
    """
    t = carray(pointer(table), (codes.ARRAYS, 3), np.int64)
    job = carray(pointer(t[0, 0]), t[0, 1], np.int64)
    start, stop, block, aligned, sampled, size_of_out = job[0], job[1], job[2], job[3] != 0, job[4], job[5]
    operations = carray(pointer(t[1, 0]), (t[1, 1], t[1, 2]), np.int64)
    keys = carray(pointer(t[2, 0]), (t[2, 1], t[2, 2]), np.uint64)
    scalars = carray(pointer(t[3, 0]), (t[3, 1], t[3, 2]), np.float32)
    weights = carray(pointer(t[4, 0]), (t[4, 1], t[4, 2]), np.float32)
    models = carray(pointer(t[5, 0]), t[5, 1], np.int64)
    operands_of = carray(pointer(t[6, 0]), (t[6, 1], t[6, 2]), np.int64)
    places_of = carray(pointer(t[7, 0]), (t[7, 1], t[7, 2]), np.int64)
    tables = carray(pointer(t[8, 0]), t[8, 1], np.uint64)
    guides = carray(pointer(t[9, 0]), t[9, 1], np.uint32)
    bounds = carray(pointer(t[10, 0]), (t[10, 1], t[10, 2]), np.int64)
    ranks = carray(pointer(t[11, 0]), t[11, 1], np.int64)
    sources = carray(pointer(t[12, 0]), (t[12, 1], t[12, 2]), np.int64)
    out = carray(pointer(t[13, 0]), t[13, 1], np.uint8)
    raw = carray(pointer(t[14, 0]), (t[14, 1], t[14, 2]), np.uint8)
    registers = carray(pointer(t[15, 0]), (t[15, 1], t[15, 2]), np.float32)
    places = carray(pointer(t[16, 0]), (t[16, 1], t[16, 2]), np.int64)
    counts = carray(pointer(t[17, 0]), t[17, 1], np.int64)
    sums = carray(pointer(t[18, 0]), (t[18, 1], t[18, 2]), np.float64)
    listed = carray(pointer(t[19, 0]), (t[19, 1], t[19, 2]), np.uint32)
    used = carray(pointer(t[20, 0]), t[20, 1], np.int64)
    part = carray(pointer(t[21, 0]), (t[21, 1], t[21, 2]), np.float64)
    state = carray(pointer(t[22, 0]), (t[22, 1], t[22, 2]), np.int64)
    wholes = carray(pointer(t[23, 0]), t[23, 1], np.bool_)
    sizes, left, header = state[0], state[1], state[2]
    lengths, addresses, found_at = state[3], state[4], state[5]
    digests = carray(pointer(t[24, 0]), (t[24, 1], t[24, 2]), np.uint64)
    hashed = carray(pointer(t[25, 0]), t[25, 1], np.int64)
    first_pieces = carray(pointer(t[26, 0]), t[26, 1], np.int64)
    accumulators = carray(pointer(t[27, 0]), (t[27, 1], t[27, 2]), np.uint64)
    marks, numbers = carray(stack(_OF_MARKS), _MARKS, np.uint64), carray(stack(_OF_MARKS), _MARKS, np.int64)
    raw_at, raw_row = raw.ctypes.data + codes.MARGIN, raw.shape[1]
    room = digests.shape[0] // max(1, sources.shape[0])
    registers_at, register_row = registers.ctypes.data, 4 * registers.shape[1]
    places_at, places_row = places.ctypes.data, 8 * places.shape[1]
    left[:] = -1
    chunk = registers.shape[1]
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
            piece = min(min(stop - at, block - at % block), max(codes.PIECE, chunk))
            after = at + piece
        number, inside = at // block, at % block
        for s in range(sources.shape[0]):
            fd, begin, size = sources[s, 0], sources[s, 1], sources[s, 2]
            if not read_piece(fd, raw_at + raw_row * s, piece * size, begin + at * size):
                return 0
            if room:
                behind = begin + (at + piece) * size
                if hashed[s] < behind:
                    unhashed = raw_at + raw_row * s + hashed[s] - (begin + at * size)
                    mine = digests[s * room : (s + 1) * room]
                    hashed[s] = mix_pieces(unhashed, hashed[s], behind, first_pieces[s], accumulators[s], mine)
                    rest, end = behind - hashed[s], codes.MARGIN + piece * size
                    copy(raw[s, end - rest : end], raw[s, codes.MARGIN - rest : codes.MARGIN])
        for first in range(0, piece, chunk):
            n, skip = min(chunk, piece - first), codes.MARGIN + 2 * first
            for k in range(operations.shape[0]):
                code, to = operations[k, 0], operations[k, 1]
                a, b, c, d = operations[k, 2], operations[k, 3], operations[k, 4], operations[k, 5]
                if code == codes.LOAD:
                    if sources[a, 2] == 2:
                        widen(raw[a, skip : skip + 2 * n].view(np.uint16), registers[to, :n])
                    else:
                        at_first = codes.MARGIN + 4 * first
                        copy(raw[a, at_first : at_first + 4 * n].view(np.float32), registers[to, :n])
                elif code == codes.SUBTRACT:
                    if a >= codes.DIRECT:
                        short_x = raw[a - codes.DIRECT, skip : skip + 2 * n].view(np.uint16)
                        short_y = raw[b - codes.DIRECT, skip : skip + 2 * n].view(np.uint16)
                        subtract(short_x, short_y, registers[to, :n])
                    else:
                        subtract(registers[a, :n], registers[b, :n], registers[to, :n])
                elif code == codes.DROP:
                    high, low, q, kept = np.uint16(c), np.uint16(d), scalars[k, 0], registers[to, :n]
                    key0, key1 = keys[k, 0], keys[k, 1]
                    if a >= codes.DIRECT:
                        short_x = raw[a - codes.DIRECT, skip : skip + 2 * n].view(np.uint16)
                        short_y = raw[b - codes.DIRECT, skip : skip + 2 * n].view(np.uint16)
                        drop_at_random(short_x, short_y, key0, key1, at + first, high, low, q, kept)
                    else:
                        x, y = registers[a, :n], registers[b, :n]
                        drop_at_random(x, y, key0, key1, at + first, high, low, q, kept)
                elif code == codes.DIVIDE:
                    size = n if b < 0 else sizes[b]
                    divide(registers[a, :size], scalars[k, 0], registers[to, :size])
                elif code == codes.KEEP:
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
                elif code in (codes.ADD, codes.AGREE):
                    size, m = n if b < 0 else sizes[b], models[k]
                    for j in range(m):
                        source = operands_of[k, j] - codes.DIRECT
                        wholes[j] = source >= 0
                        if source >= 0:
                            addresses[j] = raw_at + raw_row * source + 2 * first
                        else:
                            addresses[j] = registers_at + register_row * operands_of[k, j]
                    w, scale, merged = weights[k, :m], scalars[k, 1], registers[to, :size]
                    if a >= codes.DIRECT:
                        short_base = raw[a - codes.DIRECT, skip : skip + 2 * n].view(np.uint16)
                        if code == codes.ADD:
                            add_weighted(short_base, addresses[:m], wholes[:m], w, scalars[k, 0], scale, merged)
                        else:
                            add_agreeing(short_base, addresses[:m], w, c != 0, scale, merged)
                    else:
                        base = registers[max(a, 0), : size if a >= 0 else 0]
                        if code == codes.ADD:
                            add_weighted(base, addresses[:m], wholes[:m], w, scalars[k, 0], scale, merged)
                        else:
                            add_agreeing(base, addresses[:m], w, c != 0, scale, merged)
                elif code == codes.STORE:
                    done = at + first - start
                    if size_of_out == 2:
                        narrow(registers[a, :n].view(np.uint32), out[2 * done : 2 * (done + n)].view(np.uint16))
                    else:
                        copy(registers[a, :n], out[4 * done : 4 * (done + n)].view(np.float32))
                elif code == codes.HIGH:
                    count_high(registers[a, :n].view(np.uint32), counts[d:])
                elif code == codes.LOW:
                    count_low(registers[a, :n].view(np.uint32), np.uint32(b), counts[d:])
                elif code == codes.EQUAL:
                    equal, threshold = 0, np.uint32(b)
                    entries = registers[a, :n].view(np.uint32)
                    for i in range(n):
                        equal += (entries[i] & np.uint32(0x7FFFFFFF)) == threshold
                    counts[d + number - start // block] += equal
                elif code == codes.DOTS:
                    behind, whole = min(stop - at, block - inside), min(stop - number * block, block)
                    runs, this = (whole + RUN - 1) // RUN, (inside + first) // RUN
                    part[c, this] = dot_of_run(registers[a, :n], registers[b, :n], runs > 1)
                    if first + n == behind:
                        sums[c, number - start // block] = add_by_halving(part[c], runs)
                elif code == codes.DRAW:
                    table = tables[bounds[a, 0] : bounds[a, 1]]
                    guide, shift = guides[bounds[a, 2] : bounds[a, 3]], np.uint64(bounds[a, 4])
                    sizes[to] = draw_positions(
                        table, guide, shift, keys[k, 0], keys[k, 1], at, at + n, SPARSE_BLOCK, places[to]
                    )
                elif code == codes.DIFFER_AT:
                    where = places[c, : sizes[c]]
                    short_x = raw[a, skip : skip + 2 * n].view(np.uint16)
                    short_y = raw[b, skip : skip + 2 * n].view(np.uint16)
                    subtract_at(short_x, short_y, where, registers[to, : where.size])
                elif code == codes.ALIGN:
                    m = models[k]
                    for j in range(m):
                        lengths[j] = sizes[places_of[k, j]]
                        found_at[j] = places_at + places_row * places_of[k, j]
                        addresses[j] = registers_at + register_row * operands_of[k, j]
                    marks[:] = np.uint64(0)
                    rows = registers[a : a + m]
                    found, values = found_at[:m], addresses[:m]
                    sizes[to] = align(found, values, lengths[:m], marks, numbers, places[to], rows)
                elif code == codes.BASE_AT:
                    where = places[b, : sizes[b]]
                    widen_at(raw[a, skip : skip + 2 * n].view(np.uint16), where, registers[to, : where.size])
                elif code == codes.LIST:
                    if inside == 0 and first == 0:
                        header[k] = used[c]
                        listed[c, used[c]] = listed[c, used[c] + 1] = np.uint32(0)
                        used[c] += 2
                    entries = registers[a, :n].view(np.uint32)
                    count, above = append_between(entries, np.uint32(b), np.uint32(d), listed[c, used[c] :])
                    listed[c, header[k]] += np.uint32(above)
                    listed[c, header[k] + 1] += np.uint32(count)
                    used[c] += count if d > b else 0
                elif code == codes.SAMPLE:
                    copy_magnitudes(registers[a, :n].view(np.uint32), listed[c, used[c] : used[c] + n])
                    used[c] += n
                else:
                    where = places[c, : sizes[c]]
                    done = at + first - start
                    short = out[2 * done : 2 * (done + n)].view(np.uint16)
                    patch(raw[a, skip : skip + 2 * n].view(np.uint16), registers[b, : where.size], where, short)
    return 1


def llvm() -> str:
    """`run` and all that it calls in LLVM's language, optimized for this processor."""
    run.compile((types.int64,))
    return str(run.inspect_llvm(run.signatures[0]))
