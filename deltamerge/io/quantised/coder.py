"""Rows of float32 as codes and scales: each block is divided by its scale and rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple, Protocol

import numpy as np

from deltamerge.io.quantised.numbers import Integers, Numbers, scales_in
from deltamerge.io.quantised.weight import CHUNK, Array, Floats

MARGIN = 1 - 1e-9  # of a sum of squares: less is no difference, since the order of a sum is the machine's
WIDE = 4 * CHUNK  # elements; a larger block is coded a few rows at a time
# Of the range of a block with few numbers: what is cut off at its ends may cost less than coarser steps.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)


class Coded(NamedTuple):
    """Rows as they are stored, a contiguous array for each stored tensor (codes first), and Σ (x − stored)²."""

    arrays: tuple[Array, ...]
    lost: float


class Coder(Protocol):
    """Codes rows of a weight. Implementations are plain data."""

    def encode(self, values: Floats) -> Coded:
        """What stores `values` (rows, columns), which are finite."""


@dataclass(frozen=True, slots=True)
class BlockCoder:
    """Codes with a scale for each block of `block` (rows, columns); a block that does not fit is cut at the edge.

    code_ij = round(x_ij / s), s = max |x| / largest number of the block; with `zeros` code_ij = round(x_ij / s) + z,
    s = (max − min) / (number of codes − 1), where max ≥ 0 ≥ min.
    Where `search`, s is tried with cut ranges too, and the one with the least Σ (x − stored)² is taken (of blocks that
    stay in cache).

    scale     dtype in which s is stored, and rounded to before codes are made
    packing   bytes: one code a byte; nibbles: two, low first; words: 32 bits, the lowest first, offset to be unsigned
    """

    numbers: Numbers
    block: tuple[int, int]
    scale: str
    zeros: bool = False
    search: bool = False
    packing: Literal["bytes", "nibbles", "words"] = "bytes"

    def encode(self, values: Floats) -> Coded:
        rows, columns = values.shape
        m, n = self.block[0], min(self.block[1], columns)
        down, across = -(-rows // m), -(-columns // n)
        codes = np.empty((rows, columns), np.uint8)
        scales = np.empty((down, across), self._scale_type)
        zeros = np.empty((down, across), np.int8) if self.zeros else None
        lost = 0.0
        wide = m * n > WIDE
        for top, bottom, left, right in self._chunks(rows, columns):
            at = slice(top // m, -(-bottom // m)), slice(left // n, -(-right // n))
            chunk, into = values[top:bottom, left:right], codes[top:bottom, left:right]
            if wide:
                found = self._wide(chunk, into)
            else:
                found = self._blocks(_padded(chunk, m, n))
                into[...] = _flat(found.codes)[: bottom - top, : right - left]
            scales[at] = found.scales
            if zeros is not None:
                zeros[at] = found.zeros
            lost += float(found.lost.sum())
        arrays = [self._packed(codes), scales]
        if zeros is not None:
            arrays.append(zeros if self.packing == "bytes" else self._packed(zeros.T.view(np.uint8)).T.copy())
        return Coded(tuple(arrays), lost)

    @property
    def _scale_type(self) -> str:
        from deltamerge.io.dtypes import bits_type

        return bits_type(self.scale)

    def _chunks(self, rows: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
        """Whole blocks of a matrix that together stay in cache: [top, bottom), [left, right)."""
        m, n = self.block[0], min(self.block[1], columns)
        if m * n > WIDE:
            for top, left in product(range(0, rows, m), range(0, columns, n)):
                yield top, min(rows, top + m), left, min(columns, left + n)
            return
        height = min(rows, m if m * n >= CHUNK else max(1, CHUNK // max(1, m * columns)) * m)
        width = max(1, CHUNK // (height * n)) * n
        for top in range(0, rows, height):
            for left in range(0, columns, width):
                yield top, min(rows, top + height), left, min(columns, left + width)

    def _blocks(self, blocks: Floats) -> _Found:
        """Code blocks (a, m, b, n) with the scales that lose least."""
        best: _Found | None = None
        for scales, stored, zeros in self._candidates(blocks.min(axis=(1, 3)), blocks.max(axis=(1, 3))):
            made = self._with(blocks, scales, stored, zeros)
            if best is None:
                best = made
                continue
            better = made.lost < best.lost * MARGIN
            if better.any():
                best = _chosen(better, made, best)
        assert best is not None
        return best

    def _wide(self, block: Floats, into: Array) -> _Found:
        """Code one block, too large for the cache, a few rows at a time."""
        low, high = (np.full((1, 1), value, np.float32) for value in (block.min(), block.max()))
        scales, stored, zeros = next(self._candidates(low, high))
        lost = np.zeros((1, 1))
        step = max(1, CHUNK // block.shape[1])
        for top in range(0, len(block), step):
            rows = np.ascontiguousarray(block[top : top + step])[None, :, None, :]
            made = self._with(rows, scales, stored, zeros)
            into[top : top + step] = made.codes[0, :, 0, :]
            lost += made.lost
        return _Found(into, stored, zeros, lost)

    def _candidates(self, low: Floats, high: Floats) -> Iterator[tuple[Floats, Array, Array | None]]:
        """Scales (a, b) in float32 and as stored, and zeros, for blocks with these extremes."""
        shares = SHARES if self.search else (1.0,)
        if self.zeros:
            assert isinstance(self.numbers, Integers)
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
            steps, least = np.float32(2**self.numbers.bits - 1), np.float32(self.numbers.least)
            for share in shares:
                stored, scales = scales_in(_float32((high - low) * np.float32(share) / steps), self.scale)
                zeros = np.clip(np.rint(least - low * np.float32(share) / scales), least, self.numbers.largest)
                yield scales, stored, zeros.astype(np.int8)
            return
        most = _float32(np.maximum(high, -low) / np.float32(self.numbers.largest))
        if self.scale in ("F8_E8M0", "U8"):
            for down in (False, True)[: 1 + self.search]:
                stored, scales = scales_in(most, self.scale, down=down)
                yield scales, stored, None
            return
        for share in shares:
            stored, scales = scales_in(_float32(most * np.float32(share)), self.scale)
            yield scales, stored, None

    def _with(self, blocks: Floats, scales: Floats, stored: Array, zeros: Array | None) -> _Found:
        over = scales[:, None, :, None]
        quotient = blocks / over
        if zeros is not None:
            shift = zeros.astype(np.float32)[:, None, :, None]
            np.rint(quotient, out=quotient)
            quotient += shift
            codes = self.numbers.codes(quotient)
            back = self.numbers.values(codes)
            back -= shift
        else:
            codes = self.numbers.codes(quotient)
            back = self.numbers.values(codes)
        back *= over
        back -= blocks
        lost = np.einsum("ambn,ambn->ab", back, back, dtype=np.float64, casting="safe")
        return _Found(codes, stored, zeros, lost)

    def _packed(self, codes: Array) -> Array:
        """Codes (rows, columns) of a byte each as they are stored."""
        if self.packing == "bytes":
            return codes
        if self.packing == "nibbles":
            return np.asarray(codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), np.uint8)
        assert isinstance(self.numbers, Integers)
        return pack_words(codes.view(np.int8).astype(np.int64) - self.numbers.least, self.numbers.bits)


@dataclass(frozen=True, slots=True)
class Transposed:
    """Codes the columns of a whole matrix as rows."""

    coder: Coder

    def encode(self, values: Floats) -> Coded:
        return self.coder.encode(np.ascontiguousarray(values.T))


class _Found(NamedTuple):
    """Coded blocks: codes (a, m, b, n), stored scales and zeros (a, b), and what is lost of each."""

    codes: Array
    scales: Array
    zeros: Array | None
    lost: Array


def _chosen(better: Array, made: _Found, best: _Found) -> _Found:
    """`made` where it is better, else `best`."""
    zeros = None if made.zeros is None or best.zeros is None else np.where(better, made.zeros, best.zeros)
    return _Found(
        np.where(better[:, None, :, None], made.codes, best.codes),
        np.where(better, made.scales, best.scales),
        zeros,
        np.where(better, made.lost, best.lost),
    )


def _float32(values: Array) -> Floats:
    return np.asarray(values, np.float32)


def _padded(values: Floats, m: int, n: int) -> Floats:
    """A matrix as blocks (a, m, b, n), with zeros to full blocks."""
    rows, columns = values.shape
    m = min(m, rows)
    below, beside = -rows % m, -columns % n
    if below or beside:
        values = np.pad(values, ((0, below), (0, beside)))
    return np.ascontiguousarray(values).reshape(-1, m, values.shape[1] // n, n)


def _flat(blocks: Array) -> Array:
    a, m, b, n = blocks.shape
    return blocks.reshape(a * m, b * n)


def pack_words(codes: Array, bits: int) -> Array:
    """Rows of unsigned integers of `bits` bits in words of 32, without gaps, the first in the lowest bits; int32."""
    rows, columns = codes.shape
    words = -(-columns * bits // 32)
    shifts = np.arange(columns) * bits
    packed = np.zeros((rows, words + 1), np.uint64)
    for first in range(0, 32):  # codes of one residue never share a word with another
        at = slice(first, None, 32)
        place, shift = shifts[at] // 32, np.uint64(int(first * bits % 32))
        parts = codes[:, at].astype(np.uint64) << shift
        packed[:, place] |= parts & np.uint64(0xFFFFFFFF)
        packed[:, place + 1] |= parts >> np.uint64(32)
    return packed[:, :words].astype(np.uint32).view(np.int32)
