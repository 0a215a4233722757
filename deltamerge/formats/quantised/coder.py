"""Writing of coded weights: the coding and storing of rows, and the rounding of float32 blocks to codes and scales.

All rounding is to nearest, ties to even. Values beyond the largest number become that number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.codes import (
    EXPONENTS,
    Doubles,
    Floats,
    Integers,
    Numbers,
    Packing,
    Part,
    Shape,
    packed,
    scales_in,
    scales_of,
)
from deltamerge.tensors.dtypes import Array, nbytes_of
from deltamerge.tensors.tensor import Read, TensorInfo

CHUNK = 1 << 18  # elements computed at once, in whole rows: they stay in cache
WIDE = 4 * CHUNK  # elements; a larger block is coded a few rows at a time
MARGIN = 1 - 1e-9  # of a sum of squares: less is no difference, since the order of a sum is the machine's
# Shares of a block's range, for schemes with few numbers: cutting off its ends may cost less than coarser steps.
SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
MORE_SHARES = (*SHARES, 0.7, 0.65, 0.6, 0.55, 0.5)  # of integers of up to 3 bits


class CodedParts(NamedTuple):
    """Rows as they are stored: a contiguous array for each stored tensor, codes first, and Σ (x − stored)²."""

    arrays: tuple[Array, ...]
    lost: float


class Coder(Protocol):
    """Codes rows of a weight. Implementations are plain data.

    An `Adjustable` one lets a `Rounding` choose the codes.
    """

    def encode(self, values: Floats, read: Read) -> CodedParts:
        """Return finite `values` (rows, columns) as they are stored."""


class Adjustable:
    """A coder whose `encode` takes a third argument, a `Rounding` (codes.py).

    turned   whether the columns of the values are coded as rows
    """

    __slots__ = ()
    turned: ClassVar[bool] = False

    def encode(self, values: Floats, read: Read, rounding: Any = None) -> CodedParts:
        """Return finite `values` (rows, columns) as they are stored."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class StoredPart:
    """A stored tensor of a coded weight. `rows` rows of a matrix of the weight make one of its rows."""

    name: str
    dtype: str
    shape: Shape
    rows: int = 1

    @classmethod
    def like(cls, info: Part, rows: int = 1) -> StoredPart:
        """Return the part that is stored like `info`."""
        return cls(info.name, info.dtype, info.shape, rows)

    @property
    def nbytes(self) -> int:
        """Return its bytes in a file."""
        return nbytes_of(self.dtype, self.shape)


class Unit(NamedTuple):
    """Rows of a weight that are coded together: elements [start, stop), from row `top` of matrix `matrix` on."""

    start: int
    stop: int
    matrix: int
    top: int


@dataclass(frozen=True, slots=True)
class Coding:
    """How a float32 weight of `shape` is stored.

    matrix      rows and columns of a matrix that is coded by itself: of each expert, or of the whole tensor
    unit        rows coded together
    parts       the coder's results, codes first
    copied      further tensors that belong to it and are copied
    like        the weight in another model, in the same form: a unit that equals it gets its bytes, from `like_parts`
    rounding    how codes are chosen, and how their loss of the difference from `base` is measured; None: the nearest
    base        the weight of the base model
    """

    shape: Shape
    coder: Coder
    matrix: tuple[int, int]
    unit: int
    parts: tuple[StoredPart, ...]
    copied: tuple[TensorInfo, ...] = ()
    like: TensorInfo | None = None
    like_parts: tuple[TensorInfo, ...] = ()
    rounding: Literal["nearest", "inputs"] | None = None
    base: TensorInfo | None = None

    def rounded(self, rounding: Literal["nearest", "inputs"], base: TensorInfo | None) -> Coding:
        """Return the coding with another choice of codes, for all rows with the same inputs together.

        InputError: its coder cannot choose.
        """
        if not isinstance(self.coder, Adjustable):
            raise InputError("output.rounding: is not for its form", hint="leave output.rounding out")
        unit, own = self.matrix[0], self.shape[-2]  # of all experts, or of one
        if self.unit < unit and not any(own % part.rows for part in self.parts):
            unit = own
        return replace(self, unit=unit, rounding=rounding, base=base)

    @property
    def inputs(self) -> int:
        """Return the inputs of the layer, where codes may be chosen by them."""
        return self.shape[-2] if isinstance(self.coder, Adjustable) and self.coder.turned else self.shape[-1]

    @property
    def matrices(self) -> int:
        """Return the number of matrices."""
        return math.prod(self.shape) // max(1, math.prod(self.matrix))

    @property
    def unit_bytes(self) -> int:
        """Return the bytes of the largest unit in float32."""
        return 4 * min(self.unit, self.matrix[0]) * self.matrix[1]

    def units(self, start: int, stop: int) -> Iterator[Unit]:
        """Yield the units that elements [start, stop) belong to, in order."""
        rows, columns = self.matrix
        while start < stop:
            row = start // columns
            matrix, top = row // rows, row % rows // self.unit * self.unit
            end = matrix * rows + min(rows, top + self.unit)
            unit = Unit((matrix * rows + top) * columns, end * columns, matrix, top)
            yield unit
            start = unit.stop

    def places(self, unit: Unit) -> Iterator[tuple[StoredPart, int, int]]:
        """Yield each part with the bytes [begin, end) of it that a unit makes."""
        rows = self.matrix[0]
        bottom = unit.top + (unit.stop - unit.start) // self.matrix[1]
        for part in self.parts:
            own = -(-rows // part.rows)
            size = part.nbytes // (own * self.matrices)
            first = unit.matrix * own
            yield part, (first + unit.top // part.rows) * size, (first + -(-bottom // part.rows)) * size


def by_rows(shape: Shape, coder: Coder, *parts: Part | StoredPart, multiple: int = 1) -> Coding:
    """Return the coding of a weight whose rows, or groups of `multiple` rows, are stored by themselves."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    own = tuple(part if isinstance(part, StoredPart) else StoredPart.like(part) for part in parts)
    step = max(1, CHUNK // max(1, multiple * columns)) * multiple  # some 2**18 elements
    return Coding(shape, coder, (rows, columns), step if multiple < rows else rows, own)


def as_one(shape: Shape, coder: Coder, *parts: Part, matrix: tuple[int, int] | None = None) -> Coding:
    """Return the coding of a weight, or of each of its matrices, that is coded at once."""
    rows, columns = matrix or (math.prod(shape[:-1]), shape[-1])
    return Coding(shape, coder, (rows, columns), rows, tuple(StoredPart.like(part, rows) for part in parts))


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

    `weights` (b, n) multiply the squares of the errors.
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

    `choices` proposes scales for blocks (a, m, b, n); the best is taken. For a block too large for the cache the first
    is taken, and `choices` gets its extremes. `weights` of the columns multiply the squares of the errors.
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

    scale     dtype of the stored s, to which s is rounded before coding
    zeros     how z is stored, if there is one: like codes, down the columns
    search    also try scales of cut ranges, and take the least Σ (x − stored)² (for blocks that stay in cache)
    packing   packing of codes. bytes: one a byte; nibbles: two, low first; words: 32 bits, the lowest first, unsigned
    least_zero   the least z, if not every code can be a zero
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
    """Yield whole blocks of a matrix that fit in cache: [top, bottom), [left, right). A large block is alone."""
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
