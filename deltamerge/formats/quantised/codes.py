"""Numbers that one-byte codes stand for, integers packed into words, and float32 blocks rounded to codes and scales.

Small floats are those of `ml_dtypes`. All rounding is to nearest, ties to even; beyond the largest number lies that
number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from deltamerge.engine import kernels
from deltamerge.formats.quantised.scheme import (
    CHUNK,
    EXPONENTS,
    Adjustable,
    Array,
    CodedParts,
    Doubles,
    Floats,
)
from deltamerge.tensors.dtypes import NUMPY, PLAIN, narrow, widen
from deltamerge.tensors.tensor import Read

WORD = 32
LEAST_EXPONENT = -127  # of E8M0
MARGIN = 1 - 1e-9  # of a sum of squares: less is no difference, since the order of a sum is the machine's
WIDE = 4 * CHUNK  # elements; a larger block is coded a few rows at a time
# Of the range of a block with few numbers: what is cut off at its ends may cost less than coarser steps.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
MORE_SHARES = (*SHARES, 0.7, 0.65, 0.6, 0.55, 0.5)  # of integers of up to 3 bits
Packing = Literal["bytes", "nibbles", "words"]


# Numbers.


class Numbers(Protocol):
    """The numbers that codes of one byte stand for."""

    @property
    def largest(self) -> float:
        """Return the largest number."""

    @property
    def form(self) -> tuple[int, ...] | None:
        """Return the numbers' description for the kernels (kernels/src/loops.h, CodeForm), or None."""

    def codes(self, values: Floats) -> Array:
        """Return the code (uint8) of the number nearest to each finite value; `values` may be changed."""

    def values(self, codes: Array) -> Floats:
        """Return the numbers of codes in float32."""


@cache
def small(dtype: str) -> np.dtype[Any]:
    """Return numpy's dtype of codes of at most 8 bits, by safetensors' name."""
    if dtype in ("I8", "U8"):
        return np.dtype(NUMPY[dtype])
    import ml_dtypes  # not where the compiled loop reads the codes

    names = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn"}
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, names[dtype]))
    return found


@cache
def values_of(dtype: str) -> Floats:
    """Return the float32 values of all codes of a dtype of at most 8 bits, in the order of the codes."""
    codes = np.arange(16 if dtype == "F4" else 256, dtype=np.uint8)
    values: Floats = codes.view(small(dtype)).astype(np.float32)
    values.flags.writeable = False
    return values


@cache
def _limits(dtype: str) -> tuple[float, tuple[int, ...]]:
    """Return the largest number of a dtype of small floats, and the kernels' description of it."""
    from ml_dtypes import finfo

    limits: Any = finfo(small(dtype))  # type: ignore[no-untyped-call]
    last = int(np.array(limits.max, small(dtype)).view(np.uint8))
    return float(limits.max), (int(limits.nexp), int(limits.nmant), 1 - int(limits.minexp), last, 0, 0)


@dataclass(frozen=True, slots=True)
class SmallFloats:
    """Floats of a dtype of 4 or 8 bits: E4M3, E5M2, E2M1."""

    dtype: str

    @property
    def largest(self) -> float:
        return _limits(self.dtype)[0]

    @property
    def form(self) -> tuple[int, ...]:
        return _limits(self.dtype)[1]

    def codes(self, values: Floats) -> Array:
        largest = np.float32(self.largest)
        return np.clip(values, -largest, largest).astype(small(self.dtype)).view(np.uint8)

    def values(self, codes: Array) -> Floats:
        found: Floats = np.take(values_of(self.dtype), codes)
        return found


@dataclass(frozen=True, slots=True)
class Integers:
    """Integers of `bits` bits in a byte, as two's complement where they are `signed`."""

    bits: int = 8
    signed: bool = True

    @property
    def least(self) -> int:
        return -(1 << self.bits - 1) if self.signed else 0

    @property
    def largest(self) -> float:
        return float(self.least + (1 << self.bits) - 1)

    @property
    def form(self) -> tuple[int, ...]:
        return 0, 0, 0, 0, self.least, int(self.largest)

    @property
    def dtype(self) -> str:
        """Return numpy's name of the byte that holds one."""
        return "i1" if self.signed else "u1"

    def codes(self, values: Floats) -> Array:
        np.rint(values, out=values)
        np.clip(values, np.float32(self.least), np.float32(self.largest), out=values)
        return values.astype(self.dtype).view(np.uint8)

    def values(self, codes: Array) -> Floats:
        return codes.view(self.dtype).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a table; a code is a place in it. Halfway between two the larger one is taken."""

    numbers: tuple[float, ...]

    @property
    def largest(self) -> float:
        return max(self.numbers)

    @property
    def form(self) -> None:
        return None

    def codes(self, values: Floats) -> Array:
        order = np.argsort(np.asarray(self.numbers, np.float32), kind="stable")
        ordered = np.asarray(self.numbers, np.float32)[order]
        between = (ordered[1:].astype(np.float64) + ordered[:-1]) / 2
        return order.astype(np.uint8)[np.searchsorted(between, values, side="right")]

    def values(self, codes: Array) -> Floats:
        return np.asarray(self.numbers, np.float32)[codes]


E4M3, E5M2, E2M1 = SmallFloats("F8_E4M3"), SmallFloats("F8_E5M2"), SmallFloats("F4")


def scales_of(stored: Array, dtype: str) -> Floats:
    """Return stored scales in float32: floats, small floats, or exponents (U8 is E8M0 too)."""
    dtype = "F8_E8M0" if dtype in EXPONENTS else dtype
    if dtype in PLAIN:
        return widen(stored, dtype)
    scales: Floats = np.take(values_of(dtype), stored)
    return scales


def scales_in(wanted: Floats, dtype: str, *, down: bool = False) -> tuple[Array, Floats]:
    """Return scales as they are stored, and their values in float32; a scale of 0 becomes 1.

    dtype   a plain float's, to the nearest; or F8_E8M0 (U8: the same in bytes), the next power of two, or with `down`
            the one before
    """
    safe = np.where(wanted > 0, wanted, np.float32(1)).astype(np.float32)
    if dtype in EXPONENTS:
        fraction, power = np.frexp(safe)  # safe = fraction · 2^power, fraction in [½, 1)
        exponents = power - (fraction == 0.5) - bool(down)
        stored = (np.clip(exponents, LEAST_EXPONENT, -LEAST_EXPONENT) - LEAST_EXPONENT).astype(np.uint8)
        return stored, scales_of(stored, dtype)
    stored = narrow(np.ascontiguousarray(safe), dtype)
    back = np.asarray(widen(stored, dtype), np.float32)
    if not ((back > 0).all() and np.isfinite(back).all()):
        least = np.float32(np.finfo(np.float32).tiny if dtype in ("F32", "BF16") else 2.0**-24)
        top = np.float32(65504 if dtype == "F16" else 3.3e38)
        stored = narrow(np.clip(safe, least, top), dtype)
        back = np.asarray(widen(stored, dtype), np.float32)
    return stored, back


# Integers in words and nibbles.


def word_of(element: int, width: int, dense: bool) -> int:
    """Return the 32-bit word in which packed integer number `element` begins."""
    return element * width // WORD if dense else element // (WORD // width)


def words_of(elements: int, width: int, dense: bool) -> int:
    """Return the number of 32-bit words that `elements` packed integers take."""
    return -(-elements * width // WORD) if dense else -(-elements // (WORD // width))


def unpacked(words: Array, width: int, dense: bool, start: int, stop: int, begin: int = 0) -> Array:
    """Return integers [start, stop) of each row of 32-bit words, less half their range, as int32.

    `begin` is the number of the first word; `dense` integers may lie across two words.
    """
    at = np.arange(start, stop)
    if dense:
        place, shift = at * width // WORD - begin, at * width % WORD
    else:
        place, shift = at // (WORD // width) - begin, at % (WORD // width) * width
    wide = np.concatenate([words, np.zeros((len(words), 1), words.dtype)], axis=1).astype(np.uint64)
    pairs = wide[:, place] | wide[:, place + 1] << np.uint64(WORD)
    found = pairs >> shift.astype(np.uint64) & np.uint64((1 << width) - 1)
    return found.astype(np.int32) - (1 << width - 1)


def unpack(stored: Array, width: int) -> Array:
    """Return codes of `width` bits, uint8 (…, 8 n / width), of bytes (…, n), the lowest bits first.

    `width` divides n or 8.
    """
    if width == 8:
        return stored
    step = 1 if 8 % width == 0 else width  # bytes that hold whole codes
    count = 8 * step // width
    groups = stored.reshape(*stored.shape[:-1], -1, step)
    codes = np.empty((*groups.shape[:-1], count), np.uint8)
    mask = np.uint8((1 << width) - 1)
    for k in range(count):
        byte, shift = divmod(k * width, 8)
        code = groups[..., byte] >> np.uint8(shift)
        if shift + width > 8:
            code |= groups[..., byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(code, mask, out=codes[..., k])
    return codes.reshape(*stored.shape[:-1], -1)


def packed(codes: Array, numbers: Numbers, packing: Packing) -> Array:
    """Return codes (rows, columns) of a byte each as they are stored."""
    if packing == "bytes":
        return codes
    if packing == "nibbles":
        return np.asarray(codes[:, 0::2] | codes[:, 1::2] << np.uint8(4), np.uint8)
    assert isinstance(numbers, Integers)
    return pack_words(codes + np.uint8(-numbers.least), numbers.bits)


def pack_words(codes: Array, bits: int) -> Array:
    """Return rows of integers in words of 32 (int32) without gaps, the first in the lowest bits.

    The lowest `bits` bits of each integer are taken.
    """
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


# Blocks rounded to codes.


class ScaleChoice(NamedTuple):
    """Scales to try for blocks.

    scales   (a, b), by which blocks are divided
    stored   the same as they are stored
    zeros    whole numbers, added after rounding
    bias     subtracted before division: in float32, and as stored
    """

    scales: Floats
    stored: Array
    zeros: Array | None = None
    bias: tuple[Floats, Array] | None = None


Choices = Callable[[Floats], Iterator[ScaleChoice]]
"""Proposes scales for blocks (a, m, b, n)."""


@dataclass(frozen=True, slots=True)
class Lattice:
    """The numbers that a matrix may be stored as.

    numbers   of the codes
    block     rows and columns that share a scale
    choices   proposes scales for blocks
    scales    returns stored scales in float32
    """

    numbers: Numbers
    block: tuple[int, int]
    choices: Choices
    scales: Callable[[Array], Floats]

    def nearest(self, values: Floats, weights: Doubles | None = None) -> CodedMatrix:
        """Return a matrix with every value at its nearest number; `weights` of columns count when scales are chosen."""
        return code_grid(values, self.numbers, self.block, self.choices, weights)


class Rounding(Protocol):
    """Chooses codes and scales of matrices whose columns are the inputs of a layer."""

    def code(self, values: Floats, lattice: Lattice) -> CodedMatrix:
        """Return `values` coded with numbers of `lattice`."""

    def turned(self) -> Rounding:
        """Return the same for the transpose of the matrix."""

    def of_columns(self, order: Array) -> Rounding:
        """Return the same for the matrix with its columns in another order."""


class CodedBlocks(NamedTuple):
    """Codes (a, m, b, n), scales, zeros and biases as stored (a, b), and Σ (x − stored)² of each block."""

    codes: Array
    scales: Array
    zeros: Array | None
    biases: Array | None
    lost: Array


def best(
    blocks: Floats, numbers: Numbers, choices: Iterable[ScaleChoice], weights: Doubles | None = None
) -> CodedBlocks:
    """Return blocks (a, m, b, n) coded, each with the choice that loses least, the first of equals.

    `weights` (b, n) multiply the squares of what is lost.
    """
    found: CodedBlocks | None = None
    for choice in choices:
        made = coded(blocks, numbers, choice) if weights is None else _coded(blocks, numbers, choice, weights)
        if found is None:
            found = made
        elif (better := made.lost < found.lost * MARGIN).any():
            found = _either(better, made, found)
    assert found is not None
    return found


def coded(blocks: Floats, numbers: Numbers, choice: ScaleChoice) -> CodedBlocks:
    """Return blocks (a, m, b, n) coded: code = round((x − bias) / scale) + zero; by the kernels, else by numpy."""
    form = numbers.form if choice.bias is None else None
    native = kernels.native()
    if native is not None and form is not None:
        codes, lost = np.empty(blocks.shape, np.uint8), np.zeros(choice.scales.shape)
        shifts = np.zeros(0, np.float32) if choice.zeros is None else choice.zeros.astype(np.float32)
        native.coded(blocks, np.ascontiguousarray(choice.scales), shifts, codes, lost, *blocks.shape, *form)
        return CodedBlocks(codes, choice.stored, choice.zeros, None, lost)
    return _coded(blocks, numbers, choice)


def _coded(blocks: Floats, numbers: Numbers, choice: ScaleChoice, weights: Doubles | None = None) -> CodedBlocks:
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
    if weights is None:
        lost = np.einsum("ambn,ambn->ab", back, back, dtype=np.float64, casting="safe")
    else:
        lost = np.einsum("ambn,ambn,bn->ab", back, back, weights, dtype=np.float64, casting="safe")
    return CodedBlocks(codes, choice.stored, choice.zeros, None if choice.bias is None else choice.bias[1], lost)


def _either(better: Array, made: CodedBlocks, old: CodedBlocks) -> CodedBlocks:
    """Return `made` where it is better, else `old`."""
    small = [None if a is None or b is None else np.where(better, a, b) for a, b in zip(made[1:], old[1:], strict=True)]
    codes = np.where(better[:, None, :, None], made.codes, old.codes)
    scales, zeros, biases, lost = small
    assert scales is not None
    assert lost is not None
    return CodedBlocks(codes, scales, zeros, biases, lost)


class CodedMatrix(NamedTuple):
    """Codes (rows, columns) of a byte, scales, zeros and biases of the grid as stored, and Σ (x − stored)²."""

    codes: Array
    scales: Array
    zeros: Array | None
    biases: Array | None
    lost: float


def code_grid(
    values: Floats, numbers: Numbers, block: tuple[int, int], choices: Choices, weights: Doubles | None = None
) -> CodedMatrix:
    """Return a matrix coded with a scale for each block of (rows, columns), cut at the edges.

    `choices` proposes scales for blocks (a, m, b, n); the best is taken. Of a block too large for the cache the first
    is taken, and `choices` gets its extremes. `weights` of the columns multiply the squares of what is lost.
    """
    rows, columns = values.shape
    m, n = block[0], min(block[1], columns)
    codes, grid, lost = np.empty((rows, columns), np.uint8), (-(-rows // m), -(-columns // n)), 0.0
    made: list[Array | None] = [None, None, None]  # scales, zeros, biases
    for top, bottom, left, right in chunks(rows, columns, m, n):
        chunk, into = values[top:bottom, left:right], codes[top:bottom, left:right]
        if m * n > WIDE:
            found = _wide(chunk, into, numbers, choices)
        else:
            of_columns = (
                None if weights is None else np.pad(weights[left:right], (0, (left - right) % n)).reshape(-1, n)
            )
            found = best(blocks := blocks_of(chunk, m, n), numbers, choices(blocks), of_columns)
            into[...] = flat_of(found.codes)[: bottom - top, : right - left]
        at = slice(top // m, -(-bottom // m)), slice(left // n, -(-right // n))
        for i, part in enumerate(found[1:4]):
            if part is not None:
                whole = np.empty(grid, part.dtype) if (old := made[i]) is None else old
                whole[at], made[i] = part, whole
        lost += float(found.lost.sum())
    scales, zeros, biases = made
    assert scales is not None
    return CodedMatrix(codes, scales, zeros, biases, lost)


def _wide(block: Floats, into: Array, numbers: Numbers, choices: Choices) -> CodedBlocks:
    """Code one block, too large for the cache, a few rows at a time."""
    choice = next(choices(np.array([block.min(), block.max()], np.float32).reshape(1, 1, 1, 2)))
    lost = np.zeros((1, 1))
    step = max(1, CHUNK // block.shape[1])
    for top in range(0, len(block), step):
        rows = np.ascontiguousarray(block[top : top + step])[None, :, None, :]
        made = coded(rows, numbers, choice)
        into[top : top + step] = made.codes[0, :, 0, :]
        lost += made.lost
    return CodedBlocks(into, choice.stored, choice.zeros, None, lost)


@dataclass(frozen=True, slots=True)
class BlockCoder(Adjustable):
    """Codes with a scale for each block of `block` (rows, columns).

    code_ij = round(x_ij / s), s = max |x| / largest number of the block; with `zeros` code_ij = round(x_ij / s) + z,
    s = (max − min) / (number of codes − 1), where max ≥ 0 ≥ min.

    scale     dtype in which s is stored, and rounded to before codes are made
    zeros     how z is stored, if there is one: as codes are, down the columns
    search    try scales of cut ranges too, and take the least Σ (x − stored)² (of blocks that stay in cache)
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

    def encode(self, values: Floats, read: Read, rounding: Rounding | None = None) -> CodedParts:
        made = self.matrix(values, rounding)
        arrays = [packed(made.codes, self.numbers, self.packing), made.scales]
        if made.zeros is not None:
            stored = made.zeros.view(np.uint8)
            if self.zeros == "words":
                stored = np.ascontiguousarray(packed(np.ascontiguousarray(stored.T), self.numbers, "words").T)
            arrays.append(stored)
        return CodedParts(tuple(arrays), made.lost)

    def matrix(self, values: Floats, rounding: Rounding | None = None) -> CodedMatrix:
        """Return a matrix coded, codes not yet packed."""
        lattice = Lattice(self.numbers, self.block, self._choices, partial(scales_of, dtype=self.scale))
        return lattice.nearest(values) if rounding is None else rounding.code(values, lattice)

    def _choices(self, blocks: Floats) -> Iterator[ScaleChoice]:
        """Yield scales for blocks, by their extremes."""
        low, high = extremes(blocks)
        shares = shares_of(self.numbers) if self.search else (1.0,)
        if self.zeros:
            assert isinstance(self.numbers, Integers)
            low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
            steps, least = np.float32(2**self.numbers.bits - 1), np.float32(self.numbers.least)
            for share in shares:
                stored, scales = scales_in(float32((high - low) * np.float32(share) / steps), self.scale)
                first = least if self.least_zero is None else np.float32(self.least_zero)
                zeros = np.clip(np.rint(least - low * np.float32(share) / scales), first, self.numbers.largest)
                yield ScaleChoice(scales, stored, zeros.astype(self.numbers.dtype))
            return
        most = float32(np.maximum(high, -low) / np.float32(self.numbers.largest))
        if self.scale in EXPONENTS:
            for down in (False, True)[: 1 + self.search]:
                stored, scales = scales_in(most, self.scale, down=down)
                yield ScaleChoice(scales, stored)
            return
        for share in shares:
            stored, scales = scales_in(float32(most * np.float32(share)), self.scale)
            yield ScaleChoice(scales, stored)


@dataclass(frozen=True, slots=True)
class ColumnCoder(Adjustable):
    """Codes the columns of a whole matrix as rows."""

    turned: ClassVar[bool] = True
    coder: BlockCoder

    def encode(self, values: Floats, read: Read, rounding: Rounding | None = None) -> CodedParts:
        turned = None if rounding is None else rounding.turned()
        return self.coder.encode(np.ascontiguousarray(values.T), read, turned)


def shares_of(numbers: Numbers) -> tuple[float, ...]:
    """Return the shares of the range of a block that are tried."""
    return MORE_SHARES if isinstance(numbers, Integers) and numbers.bits <= 3 else SHARES


def chunks(rows: int, columns: int, m: int, n: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield whole blocks of a matrix that together stay in cache: [top, bottom), [left, right); large ones alone."""
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
    """Return a matrix as blocks (a, m, b, n), with zeros to full blocks."""
    rows, columns = values.shape
    m = min(m, rows)
    below, beside = -rows % m, -columns % n
    if below or beside:
        values = np.pad(values, ((0, below), (0, beside)))
    return np.ascontiguousarray(values).reshape(-1, m, values.shape[1] // n, n)


def extremes(blocks: Floats) -> tuple[Floats, Floats]:
    """Return the least and the greatest number of each block (a, m, b, n)."""
    return blocks.min(axis=1).min(axis=2), blocks.max(axis=1).max(axis=2)


def flat_of(blocks: Array) -> Array:
    """Return blocks (a, m, b, n) as a matrix."""
    a, m, b, n = blocks.shape
    return blocks.reshape(a * m, b * n)


def float32(values: Array) -> Floats:
    """Return values in float32."""
    return np.asarray(values, np.float32)
