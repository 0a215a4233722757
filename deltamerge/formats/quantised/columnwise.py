"""GPTQ and AWQ: integer codes with a scale and a zero a group of inputs, stored transposed, as (inputs, outputs), in
int32 words; W_oi = scale_go · (code_io − zero_go), g the group of input i, in float32.

GPTQ     words hold codes of 32/bits inputs one after the other, from the lowest bit (3 bits: 32 codes in 3 words);
         `g_idx` gives each input's group (act order). Zeros are packed along outputs: version 1 (`checkpoint_format:
         gptq`) stores zero − 1, by whole words as gptqmodel subtracts it, and gptq_v2 stores zero. (Frantar et al.
         2022; gptqmodel, nn_modules/qlinear, utils/model.py)
AWQ      words hold codes of eight outputs, output (0, 2, 4, 6, 1, 3, 5, 7)_k in bits [4 k, 4 k + 4), and so do zeros
         (`version: gemm`; Lin et al. 2023; AutoAWQ, utils/packing_utils.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.packing import (
    columns_of,
    damaged,
    expect,
    fill_bands,
    finite,
    held_columns,
    unpack,
    whole,
)
from deltamerge.formats.quantised.scaled import TURNED_ACROSS, TURNED_ALONG, Form, TurnedPart
from deltamerge.formats.quantised.weight import Array, Floats, Stored, bits, weight
from deltamerge.tensors.dtypes import PLAIN, widen
from deltamerge.tensors.tensor import Read, TensorInfo

WORD = 32
GPTQ_BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 0}  # what is added to stored zeros
AWQ_BITS = 4
AWQ_PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # of each output's code in its word
INTEGERS = frozenset({"I32", "U32"})


@dataclass(frozen=True, slots=True)
class Gptq:
    """Codes of `width` bits, inputs × outputs packed along inputs; `plus` is added to zeros; without `order` input i is
    in group i // `group`."""

    keeps: ClassVar[bool] = True
    codes: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    order: TensorInfo | None
    inputs: int
    group: int
    width: int
    plus: int

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        outputs = self.scales.shape[1]
        fill_bands(outputs, self.inputs, WORD, start, out, partial(self._band, read))

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes."""
        return True

    @property
    def bits(self) -> int:
        """0: its elements do not follow each other in the file."""
        return 0

    def part(self, read: Read, start: int, stop: int) -> TurnedPart:
        """What the compiled loop needs for elements [start, stop)."""
        return self._outputs(read, start // self.inputs, -(-stop // self.inputs))

    def _outputs(self, read: Read, top: int, bottom: int) -> TurnedPart:
        outputs, groups = self.scales.shape[1], self.groups(read)
        words, begin = held_columns(read, self.codes, self.codes.shape[0], outputs, top, bottom)
        form = Form(TURNED_ALONG, self.width, self.inputs, words.shape[1])
        scales, zeros = self._scales(read, top, bottom), self._zeros(read, top, bottom)
        places = np.arange(self.inputs) // self.group if groups is None else groups
        return TurnedPart(form, words, scales, top - begin, zeros, np.ascontiguousarray(places, np.int32))

    def _band(self, read: Read, _: int, top: int, bottom: int, out: Floats) -> None:
        """Outputs [top, bottom)."""
        native = kernels.native()
        if native is not None:
            _turn(native, self._outputs(read, top, bottom), out)
            return
        words = columns_of(read, self.codes, self.codes.shape[0], self.scales.shape[1], top, bottom)
        scales, zeros = self._scales(read, top, bottom), self._zeros(read, top, bottom)
        out[:] = self._values(words, scales, zeros, self.groups(read))

    def _values(self, words: Array, scales: Floats, zeros: Floats, groups: Array | None) -> Floats:
        values = unpack(_bytes(words.T), self.width)[:, : self.inputs].astype(np.float32)
        if groups is None:
            cut = values.reshape(len(values), -1, self.group)
            cut -= zeros[:, :, None]
            cut *= scales[:, :, None]
            return values
        values -= np.take(zeros, groups, axis=1)
        values *= np.take(scales, groups, axis=1)
        return values

    def _scales(self, read: Read, top: int, bottom: int) -> Floats:
        groups, outputs = self.scales.shape
        stored = np.ascontiguousarray(columns_of(read, self.scales, groups, outputs, top, bottom).T)
        return finite(widen(stored, self.scales.dtype), self.scales)

    def _zeros(self, read: Read, top: int, bottom: int) -> Floats:
        """The zeros of outputs [top, bottom), of shape (outputs, groups)."""
        groups, width = self.zeros.shape
        first, last = top // WORD * self.width, min(-(-bottom // WORD) * self.width, width)
        words = columns_of(read, self.zeros, groups, width, first, last)
        if self.width == 3:
            zeros = unpack(_bytes(words), 3) + np.uint8(self.plus) & 7
        else:
            one = np.uint32(sum(self.plus << shift for shift in range(0, WORD, self.width)))
            zeros = unpack(_bytes(words + one), self.width)
        skip = top % WORD
        return np.ascontiguousarray(zeros[:, skip : skip + bottom - top].T, np.float32)

    def groups(self, read: Read) -> Array | None:
        """The group of each input; None where they are equal and in order."""
        in_order = np.arange(self.inputs) // self.group
        if self.order is None:
            return in_order if self.inputs % self.group else None
        groups = bits(read, self.order, 0, self.inputs).view(np.int32)
        if groups.min() < 0 or groups.max() >= self.scales.shape[0]:
            message = f"names group {groups.max() if groups.max() > 0 else groups.min()} of {self.scales.shape[0]}"
            raise damaged(self.order, message)
        return None if not self.inputs % self.group and np.array_equal(groups, in_order) else groups


@dataclass(frozen=True, slots=True)
class Awq:
    """Codes of four bits, inputs × outputs packed along outputs, `group` inputs a group."""

    keeps: ClassVar[bool] = True
    codes: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    group: int

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        inputs, outputs = self.codes.shape[0], self.scales.shape[1]
        fill_bands(outputs, inputs, 8, start, out, partial(self._band, read))

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes."""
        return True

    @property
    def bits(self) -> int:
        """0: its elements do not follow each other in the file."""
        return 0

    def part(self, read: Read, start: int, stop: int) -> TurnedPart:
        """What the compiled loop needs for elements [start, stop)."""
        inputs = self.codes.shape[0]
        return self._outputs(read, start // inputs, -(-stop // inputs))

    def _outputs(self, read: Read, top: int, bottom: int) -> TurnedPart:
        inputs, width = self.codes.shape
        words, begin = held_columns(read, self.codes, inputs, width, top // 8, -(-bottom // 8))
        form = Form(TURNED_ACROSS, AWQ_BITS, inputs, words.shape[1])
        scales, zeros = self._scales(read, top, bottom)
        places = (np.arange(inputs) // self.group).astype(np.int32)
        return TurnedPart(form, words, scales, top - begin * 8, zeros, places)

    def _scales(self, read: Read, top: int, bottom: int) -> tuple[Floats, Floats]:
        """Scales and zeros of outputs [top, bottom), of shape (outputs, groups)."""
        groups, outputs = self.scales.shape
        stored = np.ascontiguousarray(columns_of(read, self.scales, groups, outputs, top, bottom).T)
        scales = finite(widen(stored, self.scales.dtype), self.scales)
        return scales, self._unpacked(read, self.zeros, top, bottom).astype(np.float32)

    def _band(self, read: Read, _: int, top: int, bottom: int, out: Floats) -> None:
        """Outputs [top, bottom)."""
        native = kernels.native()
        if native is not None:
            _turn(native, self._outputs(read, top, bottom), out)
            return
        scales, zeros = self._scales(read, top, bottom)
        out[:] = self._unpacked(read, self.codes, top, bottom)
        cut = out.reshape(bottom - top, -1, self.group)
        cut -= zeros[:, :, None]
        cut *= scales[:, :, None]

    def _unpacked(self, read: Read, info: TensorInfo, top: int, bottom: int) -> Array:
        """Columns [top, bottom) of a packed matrix, as rows."""
        rows, words = info.shape
        first = top // 8
        found = columns_of(read, info, rows, words, first, -(-bottom // 8))
        codes = unpack(_bytes(found), AWQ_BITS).reshape(rows, -1, 8)[:, :, AWQ_PLACES].reshape(rows, -1)
        return np.ascontiguousarray(codes[:, top - first * 8 : bottom - first * 8].T)


def _turn(native: Any, part: TurnedPart, out: Floats) -> None:
    """(code − zero) · scale of a part's rows by the kernels."""
    form, top = part.form, part.line
    assert part.zeros is not None
    native.turned_words(
        part.stored, part.scales, part.zeros, part.groups, out, form.stride, form.columns, top, top + len(out),
        part.zeros.shape[1], form.width, form.number == TURNED_ACROSS,
    )  # fmt: skip


def _bytes(words: Array) -> Array:
    """The bytes (…, 4 n) of words (…, n), the lowest first."""
    return np.ascontiguousarray(words, "<u4").view(np.uint8)


def gptq(stored: Stored) -> TensorInfo:
    """The weight (outputs, inputs) of a GPTQ layer. InputError: a format, width or shape that is not GPTQ's."""
    settings = stored.settings
    said = str(settings.get("checkpoint_format") or settings.get("format") or "gptq")
    if said not in VERSIONS:
        raise InputError(f"its format is {said[:40]!r}, must be {' or '.join(VERSIONS)}")
    codes, scales, zeros = stored.codes, _matrix(stored.need("scales"), PLAIN), _matrix(stored.need("qzeros"), INTEGERS)
    groups, outputs = scales.shape
    _matrix(codes, INTEGERS)
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
    return weight(stored, (outputs, inputs), Gptq(codes, zeros, scales, order, inputs, group, width, VERSIONS[said]))


def awq(stored: Stored) -> TensorInfo:
    """The weight (outputs, inputs) of an AWQ layer. InputError: a version, width or shape that is not AWQ's."""
    settings = stored.settings
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise InputError(f"its version is {version[:40]!r}, must be gemm")
    said = settings.get("bits", settings.get("w_bit", AWQ_BITS))
    if said != AWQ_BITS:
        raise InputError(f"its codes are of {str(said)[:40]} bits, must be {AWQ_BITS}")
    codes, scales = _matrix(stored.codes, INTEGERS), _matrix(stored.need("scales"), PLAIN)
    groups, outputs = scales.shape
    words = whole(outputs * AWQ_BITS, WORD, "words")
    group = whole(codes.shape[0], groups, "groups")
    expect(codes, (codes.shape[0], words), INTEGERS)
    zeros = expect(stored.need("qzeros"), (groups, words), INTEGERS)
    return weight(stored, (outputs, codes.shape[0]), Awq(codes, zeros, scales, group))


def _matrix(info: TensorInfo, dtypes: frozenset[str]) -> TensorInfo:
    if len(info.shape) != 2 or 0 in info.shape or info.dtype not in dtypes:
        label = info.name.rpartition(".")[2]
        raise InputError(f"its {label} is {info.dtype} {list(info.shape)}, must be a matrix")
    return info


def _width(zeros: TensorInfo, outputs: int) -> int:
    """The bits of a code, from the words that a row of zeros takes."""
    width, rest = divmod(zeros.shape[1] * WORD, outputs)
    if rest or width not in GPTQ_BITS:
        known = ", ".join(map(str, GPTQ_BITS))
        raise InputError(f"its qzeros {list(zeros.shape)} for {outputs} outputs give no width of {known} bits")
    return width


def _group(said: Any, inputs: int, groups: int) -> int:
    """The inputs of a group, where `said` is what config.json says."""
    size = said if type(said) is int and said > 0 else -(-inputs // groups)
    if -(-inputs // size) != groups:
        raise InputError(f"has {groups} groups, config.json says one for {size} of {inputs} inputs")
    return size
