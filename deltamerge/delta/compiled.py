"""Stored positions decoded and put to use in one pass by numba, for those who have it loaded.

A block of positions at a time: positions, values, and only then the memory of the tensor. What makes it fast is the
prefetch: every position is asked for as soon as it is known, a block before its use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.cpython.unsafe.numbers import trailing_zeros
from numba.extending import intrinsic

from deltamerge.delta.positions import Array, Coding, index_itemsize, rice_offsets
from deltamerge.delta.stored import PADDING
from deltamerge.delta.values import VALUE_BITS, Values
from deltamerge.errors import InputError
from deltamerge.io.jit import compiled

BLOCK = 128  # positions between prefetch and use
LINE = 64

_DENSE, _INDICES, _GAPS, _ONES = range(4)


def put(coding: Coding, stored: Array, k: int, count: int, values: Array, out: Array) -> bool:
    """Put `values` at the `count` stored positions of `out`, both unsigned. False: positions are damaged.

    stored   bytes of the positions and PADDING zeros; k of rice is at most 15
    Positions that are damaged, or outside of `out`, may be found only when others were changed. InputError: rice codes
    are too short, or too long.
    """
    arguments = (*_positions(coding, stored, k, count, out), values, out)
    return bool(_put(*arguments))


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
    number = list(VALUE_BITS).index(kind)
    arguments = (*_positions(coding, stored, k, count, out), values, number, scales, np.uint64(group), out)
    return bool(_add(*arguments))


def ranked(stored: Array, scales: Array, out: Array) -> bool:
    """Fill `out` with the scales whose ranks are stored (bytes and PADDING zeros). False: they are damaged."""
    return bool(stored[-PADDING - 1] and _ranked(stored, scales, out))


def _positions(coding: Coding, stored: Array, k: int, count: int, out: Array) -> tuple[Any, ...]:
    """The first arguments of the kernels; `is_dense`: about every line of `out` is touched."""
    way, first, second = _DENSE, 0, 0
    if coding == "rice":
        way, (first, second) = _ONES, rice_offsets(stored.size - PADDING, count, k)
        if not stored[-PADDING - 1]:
            raise InputError("rice codes end in padding")
    elif coding != "dense":
        way = {"bitmask": _ONES, "gaps": _GAPS, "indices": _INDICES}[coding]
        first = index_itemsize(out.size)
    is_dense = count * LINE >= out.nbytes
    return way, stored, np.uint64(k), count, first, np.array([second, 0, 0, 0], np.uint64), is_dense


def _prefetch(locality: int) -> Any:
    """Ask for the cache line of array[index], into the second-level cache (locality 2) or the first (3)."""

    @intrinsic
    def prefetch(context: Any, array: Any, index: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            data = target.make_array(signature.args[0])(target, builder, arguments[0]).data
            pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
            flag = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
            function = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
            builder.call(function, [pointer, flag(0), flag(locality), flag(1)])
            return target.get_dummy_value()

        return types.void(array, index), generate

    return prefetch


_prefetch_near, _prefetch_far = _prefetch(3), _prefetch(2)


@intrinsic
def _load(context: Any, array: Any, index: Any) -> Any:
    """Eight bytes of a uint8 array from `index` on, aligned or not, little-endian."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = target.make_array(signature.args[0])(target, builder, arguments[0]).data
        pointer = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(array, index), generate


_word: Any = _load  # to mypy they want the context that numba gives
_trailing_zeros: Any = trailing_zeros


@compiled
def _ask(array: Any, index: Any, is_dense: Any) -> None:
    """Into the first-level cache where about every line is touched: there the hardware has brought the second's."""
    if is_dense:
        _prefetch_near(array, index)
    else:
        _prefetch_far(array, index)


@compiled
def _remainders(stored: Any, packed: Any, k: Any, start: Any, n: Any, out: Any) -> None:
    """Rice's remainders [start, start + n); start is a multiple of 8."""
    b = k & np.uint64(7)
    step, mask = np.int64(b), (np.uint64(1) << b) - np.uint64(1)
    for i in range(0, n, 8):
        fields = _word(stored, packed + ((start + i) >> 3) * step)
        for j in range(8):
            out[i + j] = fields >> (np.uint64(j) * b) & mask
    if k > np.uint64(7):
        for i in range(n):
            out[i] = out[i] << np.uint64(8) | np.uint64(stored[start + i])


@compiled
def _ones(stored: Any, cursor: Any, n: Any, out: Any) -> bool:
    """The next n set bits. The cursor has the byte after the word it is in, its last bit, what is left of it."""
    at, bit, word = cursor[0], cursor[1], cursor[2]
    end = np.uint64(stored.size - PADDING)
    for i in range(n):
        while word == 0:
            if at >= end:
                return False
            word = _word(stored, at)
            at += np.uint64(8)
            bit += np.uint64(64)
        out[i] = bit + np.uint64(_trailing_zeros(word)) - np.uint64(64)
        word &= word - np.uint64(1)
    cursor[0], cursor[1], cursor[2] = at, bit, word
    return True


@compiled
def _gaps(stored: Any, cursor: Any, n: Any, out: Any) -> bool:
    """The next n positions of byte gaps. The cursor has the next byte, and the position that gap 0 would give."""
    at, position = cursor[0], cursor[3]
    end = np.uint64(stored.size - PADDING)
    for i in range(n):
        gap = np.uint64(stored[at])
        while gap == np.uint64(255):  # the padding ends it
            position += gap
            at += np.uint64(1)
            gap = np.uint64(stored[at])
        position += gap
        out[i] = position
        position += np.uint64(1)
        at += np.uint64(1)
        if at > end:
            return False
    cursor[0], cursor[3] = at, position
    return True


@compiled
def _indices(stored: Any, itemsize: Any, start: Any, n: Any, cursor: Any, out: Any) -> bool:
    """Indices [start, start + n). The cursor has the least that may come."""
    least, ok = cursor[3], True
    mask = ~np.uint64(0) >> np.uint64(64 - 8 * itemsize)
    for i in range(n):
        position = _word(stored, (start + i) * itemsize) & mask
        ok &= least <= position
        least = position + np.uint64(1)
        out[i] = position
    cursor[3] = least
    return ok


@compiled
def _block(
    way: Any, stored: Any, k: Any, start: Any, n: Any, first: Any, cursor: Any, is_dense: Any, remainders: Any,
    positions: Any, out: Any,
) -> Any:  # fmt: skip
    """Positions [start, start + n), asked for. False: they are damaged or outside of `out`."""
    if way == _ONES:
        if not _ones(stored, cursor, n, positions):
            return False
    elif way == _GAPS:
        if not _gaps(stored, cursor, n, positions):
            return False
    elif way == _INDICES:
        if not _indices(stored, first, start, n, cursor, positions):
            return False
    else:
        for i in range(n):
            positions[i] = np.uint64(start + i)
    if k:
        _remainders(stored, first, k, start, n, remainders)
        low, passed = (np.uint64(1) << k) - np.uint64(1), cursor[3]
        for i in range(n):  # one loop: what is asked for arrives while the next is reckoned
            passed += remainders[i] - low  # modulo 2**64
            positions[i] = (positions[i] << k) + passed + low
            _ask(out, positions[i], is_dense)
        cursor[3] = passed
    else:
        for i in range(n):
            _ask(out, positions[i], is_dense)
    return positions[n - 1] < np.uint64(out.size)


@compiled
def _is_read(way: Any, stored: Any, cursor: Any) -> Any:
    """Whether nothing is left."""
    if way == _ONES:
        return cursor[2] == 0 and not stored[cursor[0] :].any()
    return way != _GAPS or cursor[0] == stored.size - PADDING


@compiled
def _ranked(stored: Any, scales: Any, out: Any) -> Any:
    places, cursor, last = np.empty(BLOCK, np.uint64), np.zeros(4, np.uint64), np.int64(-1)
    for start in range(0, out.size, BLOCK):
        n = min(BLOCK, out.size - start)
        if not _ones(stored, cursor, n, places):
            return False
        for i in range(n):
            place = np.int64(places[i])
            rank = place - last - 1
            if rank >= scales.size:
                return False
            out[start + i] = scales[rank]
            last = place
    return _is_read(_ONES, stored, cursor)


@compiled
def _put(
    way: Any, stored: Any, k: Any, count: Any, first: Any, cursor: Any, is_dense: Any, values: Any, out: Any
) -> Any:
    positions, remainders = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        if not _block(way, stored, k, start, n, first, cursor, is_dense, remainders, positions, out):
            return False
        for i in range(n):
            out[positions[i]] = values[np.uint64(start + i)]
    return _is_read(way, stored, cursor)


@compiled
def _add(
    way: Any, stored: Any, k: Any, count: Any, first: Any, cursor: Any, is_dense: Any, values: Any, kind: Any,
    scales: Any, group: Any, out: Any,
) -> Any:  # fmt: skip
    positions, remainders = np.empty(BLOCK, np.uint64), np.empty(BLOCK, np.uint64)
    bits, sums = np.empty(BLOCK, np.uint32), np.empty(BLOCK, np.uint32)
    floats, totals = bits.view(np.float32), sums.view(np.float32)
    edge, scale = np.uint64(0), np.float32(0)
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        if not _block(way, stored, k, start, n, first, cursor, is_dense, remainders, positions, out):
            return False
        if kind == 0:
            for i in range(n):
                floats[i] = values[np.uint64(start + i)]
        elif kind == 1:
            for i in range(n):
                bits[i] = np.uint32(values[np.uint64(start + i)]) << np.uint32(16)
        else:
            for i in range(n):
                if positions[i] >= edge:
                    row = positions[i] // group
                    edge = (row + np.uint64(1)) * group
                    scale = scales[row]
                floats[i] = scale
            if kind == 2:
                for i in range(n):
                    floats[i] *= values[np.uint64(start + i)]
            else:
                for i in range(n):
                    negative = np.uint32(values[np.uint64(start + i) >> np.uint64(3)]) >> np.uint32(i & 7)
                    bits[i] ^= negative << np.uint32(31)
        if out.itemsize == 4:
            for i in range(n):
                out[positions[i]] += floats[i]
            continue
        for i in range(n):
            sums[i] = np.uint32(out[positions[i]]) << np.uint32(16)
        for i in range(n):
            totals[i] += floats[i]
        for i in range(n):
            x = sums[i]
            even = (x + np.uint32(0x7FFF) + ((x >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            nan = (x & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            out[positions[i]] = np.uint16(0x7FC0) if nan else np.uint16(even)
    return _is_read(way, stored, cursor)
