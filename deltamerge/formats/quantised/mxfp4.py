"""MXFP4 weights: W = e2m1 · 2^(scale − 127) in float32, 32 codes a scale (OCP Microscaling v1.0; scale 255 is NaN).

compressed-tensors (mxfp4-pack-quantized) stores `weight_packed` (rows, columns / 2), the low nibble first, and
`weight_scale` (rows, columns / 32). gpt-oss stores experts as `X_blocks` (E, rows, groups, 16) and `X_scales`
(E, rows, groups), which are its weight X (E, 32 groups, rows) transposed (transformers, integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.quantised.codes import E2M1, BlockCoder, ColumnCoder, scales_of, values_of
from deltamerge.formats.quantised.grid import Tabled
from deltamerge.formats.quantised.scheme import (
    EXPONENTS,
    TURNED_PAIRS,
    Array,
    CodedRows,
    CodedWeight,
    CodeForm,
    Coding,
    Floats,
    Part,
    Shape,
    StoredPart,
    StoredWeight,
    as_one,
    bits,
    by_rows,
    columns_of,
    expect,
    fill_bands,
    finite,
    held_columns,
    unit_rows,
    weight,
    whole,
)
from deltamerge.tensors.tensor import Read, TensorInfo

GROUP = 32


@dataclass(frozen=True, slots=True)
class Mxfp4(Tabled):
    """Rows of E2M1 codes."""

    codes: Part
    scales: Part
    columns: int
    group: int = GROUP

    def table_of(self, read: Read) -> Floats:
        return values_of("F4")

    def scales_at(self, read: Read, start: int, count: int) -> Floats:
        return finite(scales_of(bits(read, self.scales, start, count), "F8_E8M0"), self.scales)

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Take the power of two at or below the exact scale where less is lost by it."""
        return by_rows(shape, _coder(self.group), self.codes, self.scales)


@dataclass(frozen=True, slots=True)
class Mxfp4Experts(CodedWeight):
    """Experts (E, 32 groups, rows), stored transposed: codes (E, rows, groups, 16), scales (E, rows, groups)."""

    keeps: ClassVar[bool] = True
    codes: Part
    scales: Part

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        _, rows, groups, _ = self.codes.shape
        fill_bands(groups * GROUP, rows, GROUP, start, out, partial(self._band, read))

    @property
    def is_plain(self) -> bool:
        return True

    def part(self, read: Read, start: int, stop: int) -> CodedRows | None:
        """Return None for elements of several experts."""
        _, rows, groups, _ = self.codes.shape
        (expert, top), last = divmod(start // rows, groups * GROUP), -(-stop // rows) - 1
        if last // (groups * GROUP) != expert:
            return None
        codes, begin, scales = self._held(read, expert, top, last % (groups * GROUP) + 1)
        form = CodeForm(TURNED_PAIRS, 4, rows, codes.shape[1])
        return CodedRows(form, scales, top - begin * 2, table=values_of("F4"), stored=codes)

    def _held(self, read: Read, expert: int, top: int, bottom: int) -> tuple[Array, int, Floats]:
        """Return codes of at least rows [top, bottom) of an expert, their first column, and the rows' scales.

        The scales are (groups, stored rows).
        """
        _, rows, groups, half = self.codes.shape
        first, last = top // GROUP, -(-bottom // GROUP)
        codes, begin = held_columns(read, self.codes, rows, groups * half, first * half, last * half, expert)
        stored = columns_of(read, self.scales, rows, groups, first, last, expert)
        return codes, begin, finite(scales_of(np.ascontiguousarray(stored.T), "F8_E8M0"), self.scales)

    def _band(self, read: Read, expert: int, top: int, bottom: int, out: Floats) -> None:
        """Compute rows [top, bottom) of an expert."""
        _, rows, _, half = self.codes.shape
        first, last = top // GROUP, -(-bottom // GROUP)
        codes, begin, scales = self._held(read, expert, top, bottom)
        native, table = kernels.native(), values_of("F4")
        if native is not None:
            skip = begin * 2
            native.turned_pairs(codes, scales, table, out, codes.shape[1], rows, top - skip, bottom - skip)
            return
        codes = codes[:, first * half - begin : last * half - begin]
        values = np.empty((last - first, half, 2, rows), np.float32)
        turned = np.ascontiguousarray(codes.T).reshape(last - first, half, rows)  # while they are bytes
        np.take(table, turned & 15, out=values[:, :, 0], mode="clip")
        np.take(table, turned >> 4, out=values[:, :, 1], mode="clip")
        values *= scales[:, None, None]
        out[:] = values.reshape(-1, rows)[top - first * GROUP : bottom - first * GROUP]

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Code an expert at a time, by columns."""
        rows, columns = shape[-2:]
        return as_one(shape, ColumnCoder(_coder(GROUP)), self.codes, self.scales, matrix=(rows, columns))


def _coder(group: int) -> BlockCoder:
    return BlockCoder(E2M1, (1, group), "U8", search=True, packing="nibbles")


def write(name: str, shape: Shape) -> Coding:
    """Return the coding of a matrix as compressed-tensors' mxfp4-pack-quantized stores it."""
    rows, columns = shape
    module = name.removesuffix("weight")
    parts = (
        StoredPart(f"{module}weight_packed", "U8", (rows, columns // 2)),
        StoredPart(f"{module}weight_scale", "U8", (rows, columns // GROUP)),
    )
    return Coding(shape, _coder(GROUP), (rows, columns), unit_rows(rows, columns, 1), parts)


def read(stored: StoredWeight) -> TensorInfo:
    """Return the experts that gpt-oss's `_blocks` and `_scales` store. InputError: another dtype or shape."""
    blocks, scales = stored.codes, stored.need("_scales")
    if len(blocks.shape) != 4 or blocks.dtype != "U8" or blocks.shape[-1] != GROUP // 2:
        raise InputError(f"its blocks are {blocks.dtype} {list(blocks.shape)}, must be U8 [experts, rows, groups, 16]")
    expect(scales, blocks.shape[:-1], EXPONENTS)
    count, rows, groups, _ = blocks.shape
    return weight(stored, (count, groups * GROUP, rows), Mxfp4Experts(blocks, scales))


def read_rows(stored: StoredWeight, columns: int) -> TensorInfo:
    """Return the weight that compressed-tensors stores. InputError: scales of another shape."""
    codes, scales = stored.codes, stored.need("weight_scale")
    expect(scales, (*codes.shape[:-1], whole(columns, GROUP, "groups")), EXPONENTS)
    return weight(stored, (*codes.shape[:-1], columns), Mxfp4(codes, scales, columns))
