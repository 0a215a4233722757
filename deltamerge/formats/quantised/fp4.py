"""E2M1 weights of four bits with a scale a group: MXFP4 (gpt-oss, compressed-tensors) and NVFP4 (modelopt,
compressed-tensors). Two codes a byte, the low nibble first; all values are float32.

MXFP4    W = e2m1 · 2^(scale − 127), 32 codes a scale (OCP Microscaling v1.0; scale 255 is NaN)
NVFP4    W = e2m1 · (scale · global), 16 codes a float8_e4m3fn scale; compressed-tensors stores 1/global, and divides

gpt-oss stores experts as `X_blocks` (E, rows, groups, 16) and `X_scales` (E, rows, groups), which are its weight X
(E, 32 groups, rows) transposed (transformers, integrations/mxfp4.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.packing import (
    columns_of,
    damaged,
    expect,
    fill_bands,
    finite,
    floats,
    held_columns,
    whole,
)
from deltamerge.formats.quantised.scaled import TURNED_PAIRS, Form, Part, TurnedPart, table_part
from deltamerge.formats.quantised.scaled import values_of as table_of
from deltamerge.formats.quantised.weight import Array, Floats, Stored, bits, put_rows, weight
from deltamerge.tensors.tensor import Read, TensorInfo

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_BYTES = np.arange(256)
LOW, HIGH = E2M1[_BYTES & 15], E2M1[_BYTES >> 4]
PAIRS = np.stack([LOW, HIGH], 1).view(np.complex64)[:, 0]  # both values of a byte
MX_GROUP, NV_GROUP = 32, 16
EXPONENTS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan)).astype(np.float32)
E8M0 = frozenset({"U8", "F8_E8M0"})


def values_of(codes: Array) -> Floats:
    """The values (…, 2 n) of bytes (…, n)."""
    values: Floats = np.take(PAIRS, codes).view(np.float32)
    return values


@dataclass(frozen=True, slots=True)
class GroupScaled:
    """E2M1 codes times the scale of their group of columns, and a tensor's global scale or its inverse."""

    codes: TensorInfo
    scales: TensorInfo
    columns: int
    group: int
    whole: TensorInfo | None = None
    apply: Literal["times", "over"] = "times"

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        put_rows(self.columns, start, out, lambda top, bottom, values: self._rows(read, top, bottom, values))

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes."""
        return True

    @property
    def bits(self) -> int:
        """The bits of an element in the file."""
        return 4

    def part(self, read: Read, start: int, stop: int) -> Part | None:
        """What the compiled loop needs for elements [start, stop)."""
        top, bottom, groups = start // self.columns, -(-stop // self.columns), self.columns // self.group
        scales = self._scales(read, top * groups, (bottom - top) * groups)
        shape = math.prod(self.scales.shape) // groups, self.columns
        return table_part(shape, self.group, scales, top, E2M1)

    def _rows(self, read: Read, top: int, bottom: int, out: Floats) -> None:
        count, groups, native = bottom - top, self.columns // self.group, kernels.native()
        codes = bits(read, self.codes, top * self.columns // 2, count * self.columns // 2)
        scales = self._scales(read, top * groups, count * groups)
        if native is not None:
            native.tabled(codes, scales, E2M1, out, self.group, False)
            return
        values = values_of(codes).reshape(-1, self.group)
        np.multiply(values, scales[:, None], out=out.reshape(-1, self.group))

    def _scales(self, read: Read, start: int, count: int) -> Floats:
        stored = bits(read, self.scales, start, count)
        if self.whole is None:
            return finite(exponents(stored), self.scales)
        scales, factor = finite(table_of("F8_E4M3")[stored], self.scales), floats(read, self.whole, 0, 1)
        if self.apply == "times":
            return scales * factor
        if not factor.all():
            raise damaged(self.whole, "is 0")
        return scales / factor


@dataclass(frozen=True, slots=True)
class Experts:
    """MXFP4 experts (E, 32 groups, rows), stored transposed."""

    keeps: ClassVar[bool] = True
    blocks: TensorInfo
    scales: TensorInfo

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        _, rows, groups, _ = self.blocks.shape
        fill_bands(groups * MX_GROUP, rows, MX_GROUP, start, out, partial(self._band, read))

    @property
    def codes(self) -> TensorInfo:
        """The stored codes."""
        return self.blocks

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes."""
        return True

    @property
    def bits(self) -> int:
        """0: its elements do not follow each other in the file."""
        return 0

    def part(self, read: Read, start: int, stop: int) -> TurnedPart | None:
        """What the compiled loop needs for elements [start, stop); None: of several experts."""
        _, rows, groups, _ = self.blocks.shape
        (expert, top), last = divmod(start // rows, groups * MX_GROUP), -(-stop // rows) - 1
        if last // (groups * MX_GROUP) != expert:
            return None
        codes, begin, scales = self._held(read, expert, top, last % (groups * MX_GROUP) + 1)
        form = Form(TURNED_PAIRS, 4, rows, codes.shape[1])
        return TurnedPart(form, codes, scales, top - begin * 2, table=E2M1)

    def _held(self, read: Read, expert: int, top: int, bottom: int) -> tuple[Array, int, Floats]:
        """Codes of at least rows [top, bottom) of an expert, their first column, and the scales of the groups of the
        rows, (groups, stored rows)."""
        _, rows, groups, half = self.blocks.shape
        first, last = top // MX_GROUP, -(-bottom // MX_GROUP)
        codes, begin = held_columns(read, self.blocks, rows, groups * half, first * half, last * half, expert)
        stored = columns_of(read, self.scales, rows, groups, first, last, expert)
        return codes, begin, finite(exponents(np.ascontiguousarray(stored.T)), self.scales)

    def _band(self, read: Read, expert: int, top: int, bottom: int, out: Floats) -> None:
        """Rows [top, bottom) of an expert."""
        _, rows, _, half = self.blocks.shape
        first, last = top // MX_GROUP, -(-bottom // MX_GROUP)
        codes, begin, scales = self._held(read, expert, top, bottom)
        native = kernels.native()
        if native is not None:
            skip = begin * 2
            native.turned_pairs(codes, scales, E2M1, out, codes.shape[1], rows, top - skip, bottom - skip)
            return
        codes = codes[:, first * half - begin : last * half - begin]
        values = np.empty((last - first, half, 2, rows), np.float32)
        turned = np.ascontiguousarray(codes.T).reshape(last - first, half, rows)  # while they are bytes
        for part, table in enumerate((LOW, HIGH)):
            np.take(table, turned, out=values[:, :, part], mode="clip")
        values *= scales[:, None, None]
        out[:] = values.reshape(-1, rows)[top - first * MX_GROUP : bottom - first * MX_GROUP]


def exponents(stored: Array) -> Floats:
    """2^(code − 127); 255 is NaN."""
    scales: Floats = np.take(EXPONENTS, stored)
    return scales


def experts(stored: Stored) -> TensorInfo:
    """The experts that gpt-oss's `_blocks` and `_scales` store."""
    blocks, scales = stored.codes, stored.need("_scales")
    if len(blocks.shape) != 4 or blocks.dtype != "U8" or blocks.shape[-1] != MX_GROUP // 2:
        raise InputError(f"its blocks are {blocks.dtype} {list(blocks.shape)}, must be U8 [experts, rows, groups, 16]")
    expect(scales, blocks.shape[:-1], E8M0)
    count, rows, groups, _ = blocks.shape
    return weight(stored, (count, groups * MX_GROUP, rows), Experts(blocks, scales))


def nvfp4(stored: Stored) -> TensorInfo:
    """The weight that modelopt stores as NVFP4."""
    codes = stored.codes
    columns = _columns(codes)
    scales = expect(stored.need("weight_scale"), (*codes.shape[:-1], whole(columns, NV_GROUP, "groups")), {"F8_E4M3"})
    factor = _single(stored.need("weight_scale_2"))
    return _made(stored, GroupScaled(codes, scales, columns, NV_GROUP, factor))


def compressed(stored: Stored) -> TensorInfo:
    """The weight that compressed-tensors stores as nvfp4-pack-quantized or mxfp4-pack-quantized."""
    codes, scales, factor = stored.codes, stored.need("weight_scale"), stored.part("weight_global_scale")
    columns = _columns(codes)
    if stored.part("weight_zero_point") is not None:
        raise InputError("has a zero point, which E2M1 codes cannot have")
    if scales.dtype in E8M0 and factor is None:
        expect(scales, (*codes.shape[:-1], whole(columns, MX_GROUP, "groups")), E8M0)
        return _made(stored, GroupScaled(codes, scales, columns, MX_GROUP))
    expect(scales, (*codes.shape[:-1], whole(columns, NV_GROUP, "groups")), {"F8_E4M3"})
    factor = _single(stored.need("weight_global_scale"))
    return _made(stored, GroupScaled(codes, scales, columns, NV_GROUP, factor, "over"))


def _made(stored: Stored, made: GroupScaled) -> TensorInfo:
    return weight(stored, (*stored.codes.shape[:-1], made.columns), made)


def _columns(codes: TensorInfo) -> int:
    """The columns of a matrix of codes. InputError: no matrix of E2M1 codes."""
    if len(codes.shape) < 2 or codes.dtype not in ("U8", "F4"):
        raise InputError(f"its codes are {codes.dtype} {list(codes.shape)}, must be a matrix of U8 or F4")
    return codes.shape[-1] * (2 if codes.dtype == "U8" else 1)


def _single(info: TensorInfo) -> TensorInfo:
    if info.dtype != "F32" or math.prod(info.shape) != 1:
        label = info.name.rpartition(".")[2]
        raise InputError(f"its {label} is {info.dtype} {list(info.shape)}, must be one F32")
    return info
