"""The numbers of codes, integers packed into words, and the float32 values of coded rows.

A weight's values are ((code − zero) · scale + bias) · factor in float32, each step rounded. `CodedRows` describes the
layout of some rows' codes, the number of each code, and the codes that share a scale, a zero and a bias. From it
`decode` computes values, by the kernels or by numpy with the same bits. A compiled pass reads the codes directly.

Small floats come from `ml_dtypes`. All rounding is to nearest, ties to even. Values beyond the largest number become
that number.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from deltamerge.engine import kernels
from deltamerge.tensors.dtypes import NUMPY, PLAIN, Array, narrow, widen
from deltamerge.tensors.tensor import Tensor, TensorInfo

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Shape = tuple[int, ...]
Part: TypeAlias = Tensor | TensorInfo
"""A stored tensor, as formats name it or as the graph has it."""

EXPONENTS = frozenset({"F8_E8M0", "U8"})  # dtypes of scales 2^(code − 127)
WORD = 32
LEAST_EXPONENT = -127  # of E8M0
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
    """The numbers of a table; a code is a place in it. A value halfway between two numbers becomes the larger."""

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

    dtype   a plain float, rounded to nearest; or F8_E8M0 (U8: the same in bytes), the next power of two, or with `down`
            the previous one
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

AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of each output's code in its word


def words_of(elements: int, width: int, dense: bool) -> int:
    """Return the number of 32-bit words that `elements` packed integers take."""
    return -(-elements * width // WORD) if dense else -(-elements // (WORD // width))


def unpack(words: Array, width: int, dense: bool = True) -> Array:
    """Return the integers of `width` bits, uint8 (…, integers), of rows of 32-bit words, the lowest bits first.

    `dense` integers may lie across two words.
    """
    mask = (1 << width) - 1
    if not dense and WORD % width:
        shifts = np.arange(0, WORD - width + 1, width, dtype=np.uint32)
        return (
            (words.view("<u4")[..., None] >> shifts & np.uint32(mask)).astype(np.uint8).reshape(*words.shape[:-1], -1)
        )
    stored = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if width == 8:
        return stored
    step = 1 if 8 % width == 0 else width  # bytes that hold whole integers
    if short := -stored.shape[-1] % step:
        stored = np.concatenate([stored, np.zeros((*stored.shape[:-1], short), np.uint8)], axis=-1)
    groups = stored.reshape(*stored.shape[:-1], -1, step)
    found = np.empty((*groups.shape[:-1], 8 * step // width), np.uint8)
    for k in range(found.shape[-1]):
        byte, shift = divmod(k * width, 8)
        code = groups[..., byte] >> np.uint8(shift)
        if shift + width > 8:
            code |= groups[..., byte + 1] << np.uint8(8 - shift)
        np.bitwise_and(code, np.uint8(mask), out=found[..., k])
    return found.reshape(*stored.shape[:-1], -1)


def unpack_awq(words: Array) -> Array:
    """Return the integers of four bits of rows of words in AWQ's order."""
    return unpack(words, 4).reshape(*words.shape[:-1], -1, 8)[..., AWQ_PLACES].reshape(*words.shape[:-1], -1)


def pack_awq(codes: Array) -> Array:
    """Return rows of integers of four bits in words in AWQ's order."""
    groups = codes.reshape(len(codes), -1, 8)
    placed = np.empty_like(groups)
    placed[:, :, AWQ_PLACES] = groups
    return pack_words(placed.reshape(codes.shape), 4)


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


# Rows of codes, and their values.

# How the kernels number codes (kernels/src/loops.h).
FORMS = {"F8_E4M3": 0, "F8_E5M2": 1, "I8": 2}
PACKED, PAIRS, SWAPPED_PAIRS = 3, 4, 5
TURNED_PAIRS, TURNED_ALONG, TURNED_ACROSS = 6, 7, 8
NO_ARRAY = -1  # stands for a missing array
NO_BYTES = np.empty(0, np.uint8)
TURNED_GROUP = 32  # codes of `TURNED_PAIRS` that share a scale


class CodeForm(NamedTuple):
    """How codes lie: the kernels' number of it, the bits of a code, and the columns and bytes of a row.

    FORMS             one a byte: float8 or int8
    PACKED            unsigned integers in words, less half their range
    PAIRS             two a byte, places in a table, the lower half first; SWAPPED_PAIRS: the upper
    TURNED_PAIRS      the same of a weight that is stored transposed
    TURNED_ALONG      unsigned integers of a weight that is stored transposed, in words of its columns
    TURNED_ACROSS     the same in words of its rows, in AWQ's order
    """

    number: int
    width: int
    columns: int
    stride: int


class ScaleGrid(NamedTuple):
    """`height` rows of each matrix of a weight, in blocks of `m` rows and `n` columns: `down` × `across` blocks."""

    height: int
    m: int
    n: int
    down: int
    across: int

    def rows_of(self, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row of blocks of each of the weight's rows, matrices one below the other."""
        return numbers // self.height * self.down + numbers % self.height // self.m


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Rows of codes, with everything to compute their values.

    grid     grid of the scales, zeros and biases
    line     the first row of the grid; for a `TURNED` form, the range's first row in `stored`
    table    the numbers of codes that are places in a table
    stored   codes in memory: the range's rows, or (rows, …) for a `TURNED` form. Their bytes are not hashed
    groups   for a `TURNED` form, the grid column of each column
    """

    form: CodeForm
    grid: ScaleGrid
    line: int
    scales: Floats
    zeros: Floats | None = None
    biases: Floats | None = None
    factor: float = 1.0
    table: Floats | None = None
    stored: Array | None = None
    groups: npt.NDArray[np.int32] | None = None

    @property
    def is_turned(self) -> bool:
        """Return whether the weight is stored transposed."""
        return self.form.number >= TURNED_PAIRS

    def numbers(self, hashed: bool, arrays: list[Array]) -> tuple[int, ...]:
        """Return the fields of `CodedSource` (kernels/src/program.h). Arrays are put into `arrays` and numbered."""
        factor = None if self.factor == 1 else np.array([self.factor], np.float32)
        scales, zeros, table, stored, groups, biases, factor_at = (
            _numbered(array, arrays)
            for array in (self.scales, self.zeros, self.table, self.stored, self.groups, self.biases, factor)
        )
        hashed = hashed and self.stored is None
        return (*self.form, scales, zeros, *self.grid, self.line, hashed, table, stored, groups, biases, factor_at)


def _numbered(array: Array | None, arrays: list[Array]) -> int:
    """Append an array to a list and return its number there."""
    if array is None:
        return NO_ARRAY
    arrays.append(array)
    return len(arrays) - 1


def decode(rows: CodedRows, codes: Array, start: int, out: Floats) -> None:
    """Write the values of elements from `start` on into `out`, flat.

    codes   the bytes of the rows with these elements; empty if `rows` has codes in memory
    """
    native = kernels.native()
    if native is not None:
        arrays: list[Array] = []
        described = np.array([rows.numbers(False, arrays)], np.int64)
        native.decode(described, codes, out, start, tuple(arrays))
        return
    columns = rows.form.columns
    top, bottom = start // columns, -(-(start + len(out)) // columns)
    values = _turned(rows, bottom - top) if rows.is_turned else _straight(rows, codes, top, bottom)
    out[:] = values.reshape(-1)[start - top * columns :][: len(out)]


def _straight(rows: CodedRows, codes: Array, top: int, bottom: int) -> Floats:
    """Return rows [top, bottom) by numpy."""
    (number, width, columns, stride), across = rows.form, rows.grid.across
    flat = (codes if rows.stored is None else rows.stored).reshape(-1).view(np.uint8)[: (bottom - top) * stride]
    if short := (bottom - top) * stride - len(flat):  # the last row is cut short
        flat = np.concatenate([flat, np.zeros(short, np.uint8)])
    stored = flat.reshape(-1, stride)
    if rows.table is not None:
        halves = [rows.table[np.arange(256) & 15], rows.table[np.arange(256) >> 4]]
        pairs = np.stack(halves[::-1] if number == SWAPPED_PAIRS else halves, 1).view(np.complex64)[:, 0]
        values: Floats = np.take(pairs, stored).view(np.float32)[:, :columns]  # both values of a byte at once
    elif number == PACKED:
        values = unpack(stored.view("<u4"), width)[:, :columns].astype(np.float32)
        values -= np.float32(1 << width - 1)
    elif number == FORMS["I8"]:
        values = stored.view(np.int8).astype(np.float32)
    else:
        values = np.take(values_of(next(dtype for dtype, form in FORMS.items() if form == number)), stored)
    values, lines = np.ascontiguousarray(values), rows.grid.rows_of(np.arange(top, bottom)) - rows.line
    places = None if across == 1 or across * rows.grid.n == columns else np.arange(columns) // rows.grid.n
    for operate, numbers in ((np.subtract, rows.zeros), (np.multiply, rows.scales), (np.add, rows.biases)):
        if numbers is not None:
            _each(operate, values, numbers[lines], places)
    if rows.factor != 1:
        values *= np.float32(rows.factor)
    return values


def _each(operate: np.ufunc, values: Floats, numbers: Floats, places: Array | None) -> None:
    """Change contiguous values (rows, columns) by numbers (rows, across).

    places   the number of each column; None: blocks of columns are equal, and in order
    """
    if places is None:
        cut = values.reshape(*numbers.shape, -1)
        operate(cut, numbers[:, :, None], out=cut)
    else:
        operate(values, np.take(numbers, places, axis=1), out=values)


def _turned(rows: CodedRows, count: int) -> Floats:
    """Return `count` rows of a weight that is stored transposed, by numpy."""
    line, columns, across = rows.line, rows.form.columns, rows.grid.across
    assert rows.stored is not None
    if rows.form.number == TURNED_PAIRS:
        assert rows.table is not None
        at = np.arange(line, line + count)
        codes = rows.stored[:, at // 2] >> (at % 2 * 4).astype(np.uint8) & np.uint8(15)
        found: Floats = rows.table[codes.T]
        found *= rows.scales[at // TURNED_GROUP - line // TURNED_GROUP]
        return found
    if rows.form.number == TURNED_ALONG:
        codes = unpack(rows.stored[:, line : line + count].T, rows.form.width)[:, :columns]
    else:
        codes = unpack_awq(rows.stored[:, line // 8 : -(-(line + count) // 8)])[:, line % 8 :][:, :count].T
    assert rows.zeros is not None
    assert rows.groups is not None
    values, in_order = np.ascontiguousarray(codes, np.float32), np.arange(columns) // max(1, columns // across)
    places = None if not columns % across and np.array_equal(rows.groups, in_order) else rows.groups
    _each(np.subtract, values, rows.zeros, places)
    _each(np.multiply, values, rows.scales, places)
    return values


def zero_scale(rows: CodedRows, codes: Array, start: int, count: int) -> tuple[int, int] | None:
    """Return the row and column, in the grid, of the first scale of 0 whose codes are not zeros. None: there is none.

    The arguments are as for `decode`; `count` counts elements.
    """
    values = np.empty(count, np.float32)
    is_zero = rows.scales == 0
    decode(replace(rows, scales=is_zero.astype(np.float32), biases=None, factor=1.0), codes, start, values)
    places = start + np.flatnonzero(values)
    lines = rows.grid.rows_of(places // rows.form.columns)
    across = places % rows.form.columns // rows.grid.n
    for line, column in zip(lines.tolist(), across.tolist(), strict=True):
        if is_zero[line - rows.line, column]:
            return line, column
    return None
