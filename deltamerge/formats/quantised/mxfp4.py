"""MXFP4 weights: W = e2m1 · 2^(scale − 127) in float32, 32 codes a scale (OCP Microscaling v1.0; scale 255 is NaN).

compressed-tensors (mxfp4-pack-quantized) stores `weight_packed` (rows, columns / 2), the low nibble first, and
`weight_scale` (rows, columns / 32). gpt-oss stores experts as `X_blocks` (E, rows, groups, 16) and `X_scales`
(E, rows, groups), which are its weight X (E, 32 groups, rows) transposed (transformers, integrations/mxfp4.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import BlockCoder, Coding, ColumnCoder, StoredPart, as_one, by_rows
from deltamerge.formats.quantised.codes import (
    E2M1,
    EXPONENTS,
    TURNED_PAIRS,
    CodedRows,
    CodeForm,
    Floats,
    Part,
    ScaleGrid,
    Shape,
    scales_of,
    values_of,
)
from deltamerge.formats.quantised.codes import TURNED_GROUP as GROUP
from deltamerge.formats.quantised.scheme import (
    CodedWeight,
    StoredWeight,
    Tabled,
    bits,
    columns_of,
    expect,
    finite,
    held_columns,
    weight,
    whole,
)
from deltamerge.tensors.tensor import Read, TensorInfo


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

    @property
    def columns(self) -> int:  # type: ignore[override]  # no field
        return self.codes.shape[1]

    @property
    def matrix(self) -> int:
        return self.codes.shape[2] * GROUP

    def rows(self, read: Read, start: int, stop: int) -> CodedRows:
        _, rows, groups, half = self.codes.shape
        (expert, top), bottom = divmod(start // rows, self.matrix), (-(-stop // rows) - 1) % self.matrix + 1
        first, last = top // GROUP, -(-bottom // GROUP)
        codes, begin = held_columns(read, self.codes, rows, groups * half, first * half, last * half, expert)
        stored = np.ascontiguousarray(columns_of(read, self.scales, rows, groups, first, last, expert).T)
        scales = finite(scales_of(stored, "F8_E8M0"), self.scales)
        form, laid = CodeForm(TURNED_PAIRS, 4, rows, codes.shape[1]), ScaleGrid(0, 0, 0, 0, rows)
        return CodedRows(form, laid, top - begin * 2, scales, table=values_of("F4"), stored=codes)

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
    codes = StoredPart(f"{module}weight_packed", "U8", (rows, columns // 2))
    return by_rows(shape, _coder(GROUP), codes, StoredPart(f"{module}weight_scale", "U8", (rows, columns // GROUP)))


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
