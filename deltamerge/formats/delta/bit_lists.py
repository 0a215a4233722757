"""Lists of small numbers as bits, one list after another: by the compiled kernels, else by numpy, the same bits.

A byte is filled from its lowest bit. A list of n numbers is n times q zeros and a one, and then n fields, each from its
lowest bit:

    rice (a `k`)       value = q * 2**k + field            field: k bits
    wide rice          value = 2**(k + q) + field - 2**k   field: k + q bits

Rice is near the entropy of gaps between random positions, wide rice (exponential Golomb) grows with the logarithm.
"""

from __future__ import annotations

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.delta.positions import Array

LARGEST_RICE = 20
LARGEST_WIDE = 15
LARGEST_VALUE = (1 << 20) - 1  # of a list
PADDING = 8  # bytes behind bits that the kernels may touch
DAMAGED = "its bits are damaged"
_LENGTHS = np.frexp(np.arange(1 << 16))[1].astype(np.uint8)  # in bits, of the numbers below 2**16


def best_rice(values: Array) -> tuple[int, int]:
    """The k of the fewest bits for uint32 `values`, and these bits; the smallest of equals."""
    total = int(values.sum(dtype=np.int64))
    middle = (total // values.size).bit_length() - 1
    ks = range(max(0, min(middle - 1, LARGEST_RICE - 2)), max(0, min(middle + 2, LARGEST_RICE)) + 1)
    sums = (
        (total if k == 0 else int((values >> np.uint32(k)).sum(dtype=np.int64))) + (k + 1) * values.size for k in ks
    )
    nbits, k = min(zip(sums, ks, strict=True))
    return k, nbits


def best_wide(values: Array) -> tuple[int, int]:
    """The same of wide rice, for values below 2**15."""
    top = min(LARGEST_WIDE, int(values.max()).bit_length())
    shifted = ((k, _LENGTHS[values + np.uint32(1 << k)].astype(np.int64)) for k in range(top + 1))
    nbits, k = min((int((2 * lengths - k - 1).sum()), k) for k, lengths in shifted)
    return k, nbits


class BitWriter:
    """Bits written list by list; at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._native = kernels.native()
        self._at = 0
        self._parts: list[Array] = []
        self._bytes = np.zeros(-(-capacity // 8) + 2 * PADDING if self._native else 0, np.uint8)

    def put(self, values: Array, k: int, *, wide: bool = False) -> None:
        """A list of uint32 `values`."""
        if self._native is not None:
            self._at = self._native.steps_pack(values, self._bytes, k, int(wide), self._at)
            assert self._at >= 0
            return
        values = values.astype(np.int64)
        whole = values + (1 << k) if wide else values
        zeros = _LENGTHS[whole].astype(np.int64) - 1 - k if wide else values >> k
        widths = zeros + k if wide else np.full_like(zeros, k)
        unary = np.zeros(int(zeros.sum()) + zeros.size, bool)
        unary[np.cumsum(zeros + 1) - 1] = True
        starts = np.cumsum(widths) - widths
        places = np.arange(int(widths.sum())) - np.repeat(starts, widths)
        self._parts += [unary, (np.repeat(whole, widths) >> places & 1).astype(bool)]

    def put_bits(self, bits: Array) -> None:
        """Bits (bool), one for each."""
        if self._native is None:
            self._parts.append(bits)
            return
        packed = np.packbits(np.concatenate([np.zeros(self._at & 7, bool), bits]), bitorder="little")
        self._bytes[self._at >> 3 :][: packed.size] |= packed
        self._at += bits.size

    def bytes(self) -> Array:
        """All of it, with zeros to the end of the last byte."""
        if self._native is None:
            return np.packbits(np.concatenate([np.zeros(0, bool), *self._parts]), bitorder="little")
        return self._bytes[: -(-self._at // 8)]


class BitReader:
    """Reads what a BitWriter wrote into `stored` (uint8). InputError: there are too few bits, or numbers too large."""

    def __init__(self, stored: Array) -> None:
        self._native = kernels.native()
        self._at = 0
        self._size = 8 * stored.size
        self._stored = np.concatenate([stored, np.zeros(PADDING, np.uint8)])
        self._bits = np.empty(0, bool)
        if self._native is None:
            self._bits = np.unpackbits(stored, bitorder="little").view(bool)

    def take(self, count: int, k: int, *, wide: bool = False) -> Array:
        """The next list, of `count` uint32 numbers."""
        if count > self._size - self._at:  # a number has a bit at least: what a stranger claims is not allocated
            raise InputError(DAMAGED)
        if self._native is not None:
            out = np.empty(count, np.uint32)
            self._at = self._native.steps_unpack(self._stored, out, k, int(wide), self._at, LARGEST_VALUE)
            if self._at < 0:
                raise InputError(DAMAGED)
            return out
        ones = np.flatnonzero(self._bits[self._at :])[:count]
        if ones.size < count:
            raise InputError(DAMAGED)
        zeros = np.diff(ones, prepend=-1) - 1
        widths = zeros + k if wide else np.full_like(zeros, k)
        at = self._at + (int(ones[-1]) + 1 if count else 0)
        starts = at + np.cumsum(widths) - widths
        self._at = at + int(widths.sum())
        if self._at > self._size or widths.max(initial=0) > LARGEST_RICE or zeros.max(initial=0) > LARGEST_VALUE:
            raise InputError(DAMAGED)
        first = starts >> 3
        words = sum(self._stored[first + i].astype(np.int64) << 8 * i for i in range(4))
        fields = words >> (starts & 7) & (1 << widths) - 1
        values: Array = (1 << widths) + fields - (1 << k) if wide else (zeros << k) + fields
        if values.max(initial=0) > LARGEST_VALUE:
            raise InputError(DAMAGED)
        return values.astype(np.uint32)

    def take_bits(self, count: int) -> Array:
        """The next `count` bits (bool)."""
        if count > self._size - self._at:
            raise InputError(DAMAGED)
        start, self._at = self._at, self._at + count
        if self._native is None:
            bits: Array = self._bits[start : self._at]
            return bits
        part = np.unpackbits(self._stored[start >> 3 : -(-self._at // 8)], bitorder="little").view(bool)
        return part[start & 7 :][:count]

    def end(self) -> None:
        """InputError: something is left but zeros to the end of a byte."""
        rest = self._stored[-(-self._at // 8) : -PADDING]
        last = self._stored[self._at >> 3] >> (self._at & 7) if self._at & 7 else 0
        if rest.size or last:
            raise InputError(DAMAGED)
