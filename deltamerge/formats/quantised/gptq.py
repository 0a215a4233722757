"""GPTQ weights: W_oi = scale_go · (code_io − zero_go), g the group of input i, in float32.

Codes lie transposed, as (inputs, outputs), in int32 words of 32/bits inputs one after the other, from the lowest bit
(3 bits: 32 codes in 3 words). `g_idx` gives each input's group (act order). Zeros are packed along outputs: version 1
(`checkpoint_format: gptq`) stores zero − 1, by whole words as gptqmodel subtracts it, and gptq_v2 stores zero.
(Frantar et al. 2022; gptqmodel, nn_modules/qlinear, utils/model.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import CHUNK, Adjustable, BlockCoder, CodedParts, Coding, Rounding, as_one
from deltamerge.formats.quantised.codes import (
    TURNED_ACROSS,
    TURNED_ALONG,
    WORD,
    CodedRows,
    CodeForm,
    Floats,
    Integers,
    Part,
    ScaleGrid,
    Shape,
    pack_awq,
    pack_words,
    unpack,
    unpack_awq,
)
from deltamerge.formats.quantised.scheme import (
    CodedWeight,
    StoredWeight,
    bits,
    columns_of,
    damaged,
    expect,
    finite,
    held_columns,
    weight,
    whole,
)
from deltamerge.tensors.dtypes import PLAIN, Array, bits_type, widen
from deltamerge.tensors.tensor import Read, TensorInfo

WIDTHS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 0}  # number to add to stored zeros
INTEGERS = frozenset({"I32", "U32"})


@dataclass(frozen=True, slots=True)
class TurnedWords(CodedWeight):
    """Integer codes in words, stored transposed, with a scale and a zero for each group of inputs: GPTQ and AWQ.

    order     the group of each input, where groups are not in order
    columns   inputs
    group     inputs of a group, where groups are in order
    width     bits of a code
    plus      added to stored zeros
    awq       whether words hold outputs, in AWQ's order; else they hold inputs
    """

    keeps: ClassVar[bool] = True
    codes: Part
    zeros: Part
    scales: Part
    order: Part | None
    columns: int
    group: int
    width: int
    plus: int = 0
    awq: bool = False

    @property
    def align(self) -> int:
        """Return the outputs that words hold whole."""
        return 8 if self.awq else WORD

    @property
    def across(self) -> int:
        """Return the outputs in a word of codes."""
        return 8 if self.awq else 1

    def rows(self, read: Read, start: int, stop: int) -> CodedRows:
        top, bottom, (groups, outputs) = start // self.columns, -(-stop // self.columns), self.scales.shape
        height, width = self.codes.shape
        words, begin = held_columns(read, self.codes, height, width, top // self.across, -(-bottom // self.across))
        number = TURNED_ACROSS if self.awq else TURNED_ALONG
        form, laid = CodeForm(number, self.width, self.columns, words.shape[1]), ScaleGrid(0, 0, 0, 0, groups)
        stored = np.ascontiguousarray(columns_of(read, self.scales, groups, outputs, top, bottom).T)
        scales, zeros = finite(widen(stored, self.scales.dtype), self.scales), self._zeros(read, top, bottom)
        of = np.ascontiguousarray(self.places(read), np.int32)
        return CodedRows(form, laid, top - begin * self.across, scales, zeros, stored=words, groups=of)

    def places(self, read: Read) -> Array:
        """Return the group of each input. InputError: there is no such group."""
        if self.order is None:
            return np.arange(self.columns) // self.group
        groups = bits(read, self.order, 0, self.columns).view(np.int32)
        if groups.min() < 0 or groups.max() >= self.scales.shape[0]:
            message = f"names group {groups.max() if groups.max() > 0 else groups.min()} of {self.scales.shape[0]}"
            raise damaged(self.order, message)
        return groups

    def _zeros(self, read: Read, top: int, bottom: int) -> Floats:
        """Return the zeros of outputs [top, bottom), of shape (outputs, groups)."""
        (groups, width), size = self.zeros.shape, self.align * self.width // WORD  # words that hold outputs whole
        first, last = top // self.align * size, min(-(-bottom // self.align) * size, width)
        words = columns_of(read, self.zeros, groups, width, first, last)
        if self.width == 3:
            zeros = unpack(words, 3) + np.uint8(self.plus) & 7
        else:
            words = words + np.uint32(sum(self.plus << shift for shift in range(0, WORD, self.width)))
            zeros = unpack_awq(words) if self.awq else unpack(words, self.width)
        skip = top % self.align
        return np.ascontiguousarray(zeros[:, skip : skip + bottom - top].T, np.float32)

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        if self.order is None and self.columns % self.group:
            what = f"has groups of {self.group} that do not divide {self.columns} inputs, which cannot be written"
            raise InputError(what)
        symmetric = not self.awq and settings.get("sym") is True
        return as_one(shape, TurnedCoder(self, symmetric), self.codes, self.scales, self.zeros)

    def pack(self, codes: Array) -> Array:
        """Return the words of codes (outputs, inputs)."""
        return pack_awq(codes.T) if self.awq else pack_words(codes, self.width).T

    def pack_zeros(self, zeros: Array) -> Array:
        """Return the words of zeros (groups, outputs)."""
        return pack_awq(zeros) if self.awq else pack_words(zeros - self.plus, self.width)


@dataclass(frozen=True, slots=True)
class TurnedCoder(Adjustable):
    """Writes codes, zeros and scales of a whole weight, its inputs in the groups that `like` has them in.

    With `sym` all zeros are the middle of the range. No zero is 0 where zero − 1 is stored.
    """

    like: TurnedWords
    sym: bool

    def encode(self, values: Floats, read: Read, rounding: Rounding | None = None) -> CodedParts:
        like, middle = self.like, 1 << self.like.width - 1
        order = like.places(read)
        sizes = np.bincount(order, minlength=like.scales.shape[0])
        if len(set(sizes.tolist())) != 1:
            raise InputError(f"{like.codes.name}: its groups differ in size, and cannot be written")
        sorted_by = np.argsort(order, kind="stable")
        how: Literal["words"] | None = None if self.sym else "words"
        numbers = Integers(like.width, signed=self.sym)
        block, scale = (1, int(sizes[0])), like.scales.dtype
        coder = BlockCoder(numbers, block, scale, how, search=like.width < 8, least_zero=like.plus)
        outputs, inputs = values.shape
        step = max(like.align, CHUNK // inputs // like.align * like.align)
        if rounding is not None:
            step, rounding = outputs, rounding.of_columns(sorted_by)
        codes = np.empty(like.codes.shape, np.int32)
        scales = np.empty((len(sizes), outputs), bits_type(scale))
        zeros = np.full((len(sizes), outputs), middle, np.int16)
        lost = 0.0
        for top in range(0, outputs, step):
            rows = np.ascontiguousarray(values[top : top + step])
            made = coder.matrix(np.ascontiguousarray(rows[:, sorted_by]), rounding)
            found = made.codes + np.uint8(middle) & np.uint8(2 * middle - 1) if self.sym else made.codes
            unsorted = np.empty_like(found)
            unsorted[:, sorted_by] = found
            bottom = top + len(rows)
            codes[:, top // like.across : bottom // like.across] = like.pack(unsorted)
            scales[:, top:bottom] = made.scales.T
            if made.zeros is not None:
                zeros[:, top:bottom] = made.zeros.T.view(np.uint8)
            lost += made.lost
        return CodedParts((codes, scales, like.pack_zeros(zeros)), lost)


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight (outputs, inputs) of a GPTQ layer. InputError: a format, width or shape that is not GPTQ's."""
    settings = stored.settings
    said = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if said not in VERSIONS:
        raise InputError(f"its format is {said[:40]!r}, must be {' or '.join(VERSIONS)}")
    codes, scales, zeros = stored.codes, matrix(stored.need("scales"), PLAIN), matrix(stored.need("qzeros"), INTEGERS)
    groups, outputs = scales.shape
    matrix(codes, INTEGERS)
    width = _width(zeros, outputs)
    said_bits = None if settings.get("dynamic") else settings.get("bits")  # gptqmodel's `dynamic`: layers differ
    if said_bits is not None and said_bits != width:
        raise InputError(f"its zeros are of {width} bits, config.json says {str(said_bits)[:40]}")
    inputs = whole(codes.shape[0] * WORD, width, "words of codes")
    expect(codes, (whole(inputs * width, WORD, "words"), outputs), INTEGERS)
    expect(zeros, (groups, whole(outputs * width, WORD, "words")), INTEGERS)
    order = stored.part("g_idx")
    if order is not None:
        expect(order, (inputs,), INTEGERS)
    group = _group(None if order or settings.get("dynamic") else settings.get("group_size"), inputs, groups)
    return weight(
        stored, (outputs, inputs), TurnedWords(codes, zeros, scales, order, inputs, group, width, VERSIONS[said])
    )


def matrix(info: TensorInfo, dtypes: frozenset[str]) -> TensorInfo:
    """Return `info`. InputError: it is no matrix, or has none of `dtypes`."""
    if len(info.shape) != 2 or 0 in info.shape or info.dtype not in dtypes:
        label = info.name.rpartition(".")[2]
        raise InputError(f"its {label} is {info.dtype} {list(info.shape)}, must be a matrix")
    return info


def _width(zeros: TensorInfo, outputs: int) -> int:
    """Return the bits of a code, from the words that a row of zeros takes."""
    width, rest = divmod(zeros.shape[1] * WORD, outputs)
    if rest or width not in WIDTHS:
        known = ", ".join(map(str, WIDTHS))
        raise InputError(f"its qzeros {list(zeros.shape)} for {outputs} outputs give no width of {known} bits")
    return width


def _group(said: Any, inputs: int, groups: int) -> int:
    """Return the number of inputs in a group. `said` is config.json's number."""
    size = said if type(said) is int and said > 0 else -(-inputs // groups)
    if -(-inputs // size) != groups:
        raise InputError(f"has {groups} groups, config.json says one for {size} of {inputs} inputs")
    return size
