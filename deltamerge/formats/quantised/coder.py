"""Rows of float32 as codes and scales: each block is divided by its scale and rounded once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, Protocol

import numpy as np

from deltamerge.engine import kernels
from deltamerge.formats.quantised.numbers import Integers, Numbers, scales_in
from deltamerge.formats.quantised.weight import CHUNK, Array, Floats
from deltamerge.tensors.dtypes import bits_type
from deltamerge.tensors.tensor import Read

MARGIN = 1 - 1e-9  # of a sum of squares: less is no difference, since the order of a sum is the machine's
WIDE = 4 * CHUNK  # elements; a larger block is coded a few rows at a time
# Of the range of a block with few numbers: what is cut off at its ends may cost less than coarser steps.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
MORE_SHARES = (*SHARES, 0.7, 0.65, 0.6, 0.55, 0.5)  # of integers of up to 3 bits
EXPONENTS = frozenset({"F8_E8M0", "U8"})
Packing = Literal["bytes", "nibbles", "words"]


class Coded(NamedTuple):
    """Rows as they are stored, a contiguous array for each stored tensor (codes first), and Σ (x − stored)²."""

    arrays: tuple[Array, ...]
    lost: float


class Coder(Protocol):
    """Codes rows of a weight. Implementations are plain data."""

    def encode(self, values: Floats, read: Read) -> Coded:
        """What stores `values` (rows, columns), which are finite."""


class Choice(NamedTuple):
    """Scales (a, b) of blocks as codes are divided by them, what is stored of them, and what codes are shifted by:
    whole `zeros` after rounding, or a `bias` before (in float32, and as stored)."""

    scales: Floats
    stored: Array
    zeros: Array | None = None
    bias: tuple[Floats, Array] | None = None


class Found(NamedTuple):
    """Coded blocks: codes (a, m, b, n), scales, zeros and biases as stored (a, b), and what is lost of each."""

    codes: Array
    scales: Array
    zeros: Array | None
    biases: Array | None
    lost: Array


def best(blocks: Floats, numbers: Numbers, choices: Iterable[Choice]) -> Found:
    """Blocks (a, m, b, n) coded, each with the choice that loses least, the first of equals."""
    found: Found | None = None
    for choice in choices:
        made = coded(blocks, numbers, choice)
        if found is None:
            found = made
        elif (better := made.lost < found.lost * MARGIN).any():
            found = _either(better, made, found)
    assert found is not None
    return found


def coded(blocks: Floats, numbers: Numbers, choice: Choice) -> Found:
    """Blocks (a, m, b, n) coded: code = round((x − bias) / scale) + zero; by the compiled kernels, else by numpy."""
    form = numbers.form if choice.bias is None else None
    native = kernels.native()
    if native is not None and form is not None:
        codes, lost = np.empty(blocks.shape, np.uint8), np.zeros(choice.scales.shape)
        shifts = np.zeros(0, np.float32) if choice.zeros is None else choice.zeros.astype(np.float32)
        native.coded(blocks, np.ascontiguousarray(choice.scales), shifts, codes, lost, *blocks.shape, *form)
        return Found(codes, choice.stored, choice.zeros, None, lost)
    return _coded(blocks, numbers, choice)


def _coded(blocks: Floats, numbers: Numbers, choice: Choice) -> Found:
    over = choice.scales[:, None, :, None]
    bias = None if choice.bias is None else choice.bias[0][:, None, :, None]
    quotient = blocks / over if bias is None else (blocks - bias) / over
    shift = None
    if choice.zeros is not None:
        shift = choice.zeros.astype(np.float32)[:, None, :, None]
        np.rint(quotient, out=quotient)
        quotient += shift
    codes = numbers.codes(quotient)
    back = numbers.values(codes)
    if shift is not None:
        back -= shift
    back *= over
    if bias is not None:
        back += bias
    back -= blocks
    lost = np.einsum("ambn,ambn->ab", back, back, dtype=np.float64, casting="safe")
    return Found(codes, choice.stored, choice.zeros, None if choice.bias is None else choice.bias[1], lost)


def _either(better: Array, made: Found, old: Found) -> Found:
    """`made` where it is better, else `old`."""
    small = [None if a is None or b is None else np.where(better, a, b) for a, b in zip(made[1:], old[1:], strict=True)]
    codes = np.where(better[:, None, :, None], made.codes, old.codes)
    scales, zeros, biases, lost = small
    assert scales is not None
    assert lost is not None
    return Found(codes, scales, zeros, biases, lost)


@dataclass(frozen=True, slots=True)
class BlockCoder:
    """Codes with a scale for each block of `block` (rows, columns); a block that does not fit is cut at the edge.

    code_ij = round(x_ij / s), s = max |x| / largest number of the block; with `zeros` code_ij = round(x_ij / s) + z,
    s = (max − min) / (number of codes − 1), where max ≥ 0 ≥ min.
    Where `search`, s is tried with cut ranges too, and the one with the least Σ (x − stored)² is taken (of blocks that
    stay in cache).

    scale     dtype in which s is stored, and rounded to before codes are made
    zeros     how z is stored, if there is one: as codes are, down the columns
    packing   of codes. bytes: one a byte; nibbles: two, low first; words: 32 bits, the lowest first, made unsigned
    least_zero   of z, where not all codes can be
    """

    numbers: Numbers
    block: tuple[int, int]
    scale: str
    zeros: Literal["bytes", "words"] | None = None
    search: bool = False
    packing: Packing = "bytes"
    least_zero: int | None = None

    def encode(self, values: Floats, read: Read) -> Coded:
        codes, scales, zeros, lost = self.whole(values)
        arrays = [packed(codes, self.numbers, self.packing), scales]
        if zeros is not None:
            stored = zeros.view(np.uint8)
            if self.zeros == "words":
                stored = np.ascontiguousarray(packed(np.ascontiguousarray(stored.T), self.numbers, "words").T)
            arrays.append(stored)
        return Coded(tuple(arrays), lost)

    def whole(self, values: Floats) -> tuple[Array, Array, Array | None, float]:
        """Codes of a byte (rows, columns), scales as stored and zeros of the grid, and what is lost."""
        rows, columns = values.shape
        m, n = self.block[0], min(self.block[1], columns)
        down, across = -(-rows // m), -(-columns // n)
        codes = np.empty((rows, columns), np.uint8)
        scales = np.empty((down, across), bits_type(self.scale))
        zeros = np.empty((down, across), np.int8) if self.zeros else None
        lost = 0.0
        for top, bottom, left, right in chunks(rows, columns, m, n):
            at = slice(top // m, -(-bottom // m)), slice(left // n, -(-right // n))
            chunk, into = values[top:bottom, left:right], codes[top:bottom, left:right]
            if m * n > WIDE:
                found = self._wide(chunk, into)
            else:
                blocks = blocks_of(chunk, m, n)
                found = best(blocks, self.numbers, self._choices(*extremes(blocks)))
                into[...] = flat_of(found.codes)[: bottom - top, : right - left]
            scales[at] = found.scales
            if zeros is not None:
                zeros[at] = found.zeros
            lost += float(found.lost.sum())
        return codes, scales, zeros, lost

    def _wide(self, block: Floats, into: Array) -> Found:
        """Code one block, too large for the cache, a few rows at a time."""
        low, high = (np.full((1, 1), value, np.float32) for value in (block.min(), block.max()))
        choice = next(self._choices(low, high))
        lost = np.zeros((1, 1))
        step = max(1, CHUNK // block.shape[1])
        for top in range(0, len(block), step):
            rows = np.ascontiguousarray(block[top : top + step])[None, :, None, :]
            made = coded(rows, self.numbers, choice)
            into[top : top + step] = made.codes[0, :, 0, :]
            lost += made.lost
        return Found(into, choice.stored, choice.zeros, None, lost)

    def _choices(self, low: Floats, high: Floats) -> Iterator[Choice]:
        """Scales for blocks with these extremes."""
        shares = shares_of(self.numbers) if self.search else (1.0,)
        if self.zeros:
            assert isinstance(self.numbers, Integers)
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
            steps, least = np.float32(2**self.numbers.bits - 1), np.float32(self.numbers.least)
            for share in shares:
                stored, scales = scales_in(float32((high - low) * np.float32(share) / steps), self.scale)
                first = least if self.least_zero is None else np.float32(self.least_zero)
                zeros = np.clip(np.rint(least - low * np.float32(share) / scales), first, self.numbers.largest)
                yield Choice(scales, stored, zeros.astype(self.numbers.dtype))
            return
        most = float32(np.maximum(high, -low) / np.float32(self.numbers.largest))
        if self.scale in EXPONENTS:
            for down in (False, True)[: 1 + self.search]:
                stored, scales = scales_in(most, self.scale, down=down)
                yield Choice(scales, stored)
            return
        for share in shares:
            stored, scales = scales_in(float32(most * np.float32(share)), self.scale)
            yield Choice(scales, stored)


@dataclass(frozen=True, slots=True)
class Transposed:
    """Codes the columns of a whole matrix as rows."""

    coder: Coder

    def encode(self, values: Floats, read: Read) -> Coded:
        return self.coder.encode(np.ascontiguousarray(values.T), read)


def shares_of(numbers: Numbers) -> tuple[float, ...]:
    """What is tried of the range of a block."""
    return MORE_SHARES if isinstance(numbers, Integers) and numbers.bits <= 3 else SHARES


def chunks(rows: int, columns: int, m: int, n: int) -> Iterator[tuple[int, int, int, int]]:
    """Whole blocks of a matrix that together stay in cache: [top, bottom), [left, right); large ones one by one."""
    if m * n > WIDE:
        for top, left in product(range(0, rows, m), range(0, columns, n)):
            yield top, min(rows, top + m), left, min(columns, left + n)
        return
    height = min(rows, m if m * n >= CHUNK else max(1, CHUNK // max(1, m * columns)) * m)
    width = max(1, CHUNK // (height * n)) * n
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield top, min(rows, top + height), left, min(columns, left + width)


def blocks_of(values: Floats, m: int, n: int) -> Floats:
    """A matrix as blocks (a, m, b, n), with zeros to full blocks."""
    rows, columns = values.shape
    m = min(m, rows)
    below, beside = -rows % m, -columns % n
    if below or beside:
        values = np.pad(values, ((0, below), (0, beside)))
    return np.ascontiguousarray(values).reshape(-1, m, values.shape[1] // n, n)


def extremes(blocks: Floats) -> tuple[Floats, Floats]:
    """The least and the greatest number of each block (a, m, b, n)."""
    return blocks.min(axis=1).min(axis=2), blocks.max(axis=1).max(axis=2)


def flat_of(blocks: Array) -> Array:
    """Blocks (a, m, b, n) as a matrix."""
    a, m, b, n = blocks.shape
    return blocks.reshape(a * m, b * n)


def packed(codes: Array, numbers: Numbers, packing: Packing) -> Array:
    """Codes (rows, columns) of a byte each as they are stored."""
    if packing == "bytes":
        return codes
    if packing == "nibbles":
        return np.asarray(codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), np.uint8)
    assert isinstance(numbers, Integers)
    return pack_words(codes + np.uint8(-numbers.least), numbers.bits)


def pack_words(codes: Array, bits: int) -> Array:
    """Rows of integers in words of 32, without gaps, the first in the lowest bits; int32. Of an integer the lowest
    `bits` bits are taken."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    codes = codes & (1 << bits) - 1
    if 8 % bits == 0:  # bytes hold whole codes
        full = np.zeros((rows, words * 32 // bits), np.uint8)
        full[:, :columns] = codes
        parts = full.reshape(rows, -1, 8 // bits)
        filled = parts[:, :, 0].copy()
        for k in range(1, 8 // bits):
            filled |= parts[:, :, k] << np.uint8(k * bits)
        return filled.view("<i4")
    sent = np.zeros((rows, words + 1), np.uint64)
    place = np.arange(columns) * bits // 32
    for first in range(32):  # codes of one residue never share a word with another
        at = slice(first, None, 32)
        parts = codes[:, at].astype(np.uint64) << np.uint64(first * bits % 32)
        sent[:, place[at]] |= parts & np.uint64(0xFFFFFFFF)
        sent[:, place[at] + 1] |= parts >> np.uint64(32)
    return sent[:, :words].astype(np.uint32).view(np.int32)


def float32(values: Array) -> Floats:
    return np.asarray(values, np.float32)
