"""Rice codes decoded and applied in one pass, by numba: half the time of encodings.py, for those who have numba loaded.

Importing and compiling numba costs more than one artifact takes, so nothing imports this module for itself.
"""

from __future__ import annotations

import numba
import numpy as np
from numba.cpython.unsafe.numbers import trailing_zeros

from deltamerge.errors import InputError
from deltamerge.io.encodings import Array, rice_parts

BLOCK = 1024  # positions that wait in the first-level cache


def apply_rice(stored: Array, k: int, values: Array, scales: Array, group: int, out: Array, *, add: bool) -> None:
    """Put `values`, or add them, times the scale of their group where there are scales, at rice-coded positions, k < 8.

    out has the dtype of values, or float32 for int8 codes. InputError: positions are damaged; `out` may be changed.
    """
    _, packed, unary = rice_parts(stored, values.size, k)
    words = np.zeros(unary.size // 8 + 1, "<u8")
    words.view(np.uint8)[: unary.size] = unary
    if not _apply(words, packed, np.uint64(k), values, scales, group, out, add):
        raise InputError(f"positions are damaged, or outside of {out.size} elements")


@numba.njit(nogil=True, cache=True, error_model="numpy")
def _apply(
    words: Array,
    packed: Array,
    k: np.uint64,
    values: Array,
    scales: Array,
    group: int,
    out: Array,
    add: bool,
) -> bool:
    positions = np.empty(BLOCK, np.uint64)
    one, low = np.uint64(1), (np.uint64(1) << k) - np.uint64(1)
    size, count = np.uint64(out.size), values.size
    word, at, bit = words[0], 0, np.uint64(0)
    fields, held, byte = np.uint64(0), np.uint64(0), 0
    passed = np.uint64(0)  # Σ(r + 1) - Σ 2**k, modulo 2**64
    scale, stop, ahead = np.float32(0), np.uint64(0), 0
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        for i in range(n):
            while word == 0:
                at += 1
                if at == words.size:
                    return False
                word = words[at]
                bit += np.uint64(64)
            place = bit + np.uint64(trailing_zeros(word))
            word &= word - one
            if held < k:
                fields |= np.uint64(packed[byte]) << held
                held += np.uint64(8)
                byte += 1
            passed += (fields & low) - low
            fields >>= k
            held -= k
            position = (place << k) + passed + low
            if position >= size:
                return False
            positions[i] = position
        for i in range(n):
            position, value = positions[i], values[start + i]
            if scales.size:
                while position >= stop:
                    scale = scales[ahead]
                    ahead += 1
                    stop += np.uint64(group)
                out[position] += value * scale
            elif add:
                out[position] += value
            else:
                out[position] = value
    return word == 0 and at >= words.size - 2
