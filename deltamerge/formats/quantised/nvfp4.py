"""NVFP4 weights: W = e2m1 · (scale · global) in float32, 16 codes a float8_e4m3fn scale, one global scale a tensor.

modelopt stores `weight` (two codes a byte, the low nibble first), `weight_scale` and `weight_scale_2`, the global
scale. compressed-tensors stores `weight_packed`, `weight_scale` and `weight_global_scale`, which is 1/global and
divides. MLX's nvfp4 has no global scale (`mlx.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised import mxfp4
from deltamerge.formats.quantised.coder import (
    SHARES,
    Adjustable,
    CodedParts,
    Coding,
    Lattice,
    Rounding,
    ScaleChoice,
    StoredPart,
    by_rows,
    extremes,
    float32,
)
from deltamerge.formats.quantised.codes import E2M1, E4M3, EXPONENTS, Floats, Part, Shape, packed, scales_of, values_of
from deltamerge.formats.quantised.scheme import (
    StoredWeight,
    Tabled,
    bits,
    damaged,
    expect,
    finite,
    floats,
    weight,
    whole,
)
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.tensor import Read, TensorInfo

GROUP = 16
WHOLE_RANGE = np.float32(E2M1.largest * E4M3.largest)
Apply = Literal["times", "over"]


@dataclass(frozen=True, slots=True)
class Nvfp4(Tabled):
    """Rows of E2M1 codes; scales are multiplied by the tensor's global scale, or divided by its inverse (`over`)."""

    codes: Part
    scales: Part
    columns: int
    single: Part | None = None
    apply: Apply = "times"
    group: int = GROUP

    def table_of(self, read: Read) -> Floats:
        return values_of("F4")

    def scales_at(self, read: Read, start: int, count: int) -> Floats:
        scales = finite(scales_of(bits(read, self.scales, start, count), "F8_E4M3"), self.scales)
        if self.single is None:
            return scales
        factor = floats(read, self.single, 0, 1)
        if self.apply == "times":
            return scales * factor
        if not factor.all():
            raise damaged(self.single, "is 0")
        return scales / factor

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Code rows by themselves, or the whole weight where it has a global scale."""
        if self.single is None:
            return by_rows(shape, Nvfp4Coder(self.group, "single"), self.codes, self.scales)
        rows, columns = math.prod(shape[:-1]), shape[-1]
        parts = StoredPart.like(self.codes), StoredPart.like(self.scales), StoredPart.like(self.single, rows)
        return Coding(shape, Nvfp4Coder(self.group, self.apply), (rows, columns), rows, parts)


@dataclass(frozen=True, slots=True)
class Nvfp4Coder(Adjustable):
    """Writes E2M1 codes with an E4M3 scale for `group` columns, and one float32 for the whole weight.

    The scales are multiplied by the float32, or divided (`over`). `single`: there is no float32. It is
    max |x| / (6 · 448), so that no scale is out of range.
    """

    group: int
    apply: Literal["times", "over", "single"]

    def encode(self, values: Floats, read: Read, rounding: Rounding | None = None) -> CodedParts:
        most = np.float32(max(float(values.max()), -float(values.min())))
        factor = np.float32(1)
        if self.apply != "single" and most > 0:
            factor = most / WHOLE_RANGE if self.apply == "times" else WHOLE_RANGE / most
            factor = factor if np.isfinite(factor) and factor > 0 else np.float32(1)
        lattice = Lattice(E2M1, (1, self.group), partial(self._choices, factor=factor), partial(self._scales, factor))
        made = lattice.nearest(values) if rounding is None else rounding.code(values, lattice)
        single = () if self.apply == "single" else (np.full(1, factor, np.float32),)
        return CodedParts((packed(made.codes, E2M1, "nibbles"), made.scales, *single), made.lost)

    def _choices(self, blocks: Floats, factor: np.float32) -> Iterator[ScaleChoice]:
        low, high = extremes(blocks)
        most = np.maximum(high, -low) / np.float32(E2M1.largest)
        exact = most * factor if self.apply == "over" else most / factor
        for share in SHARES:
            stored = np.maximum(E4M3.codes(float32(exact * np.float32(share))), np.uint8(1))
            yield ScaleChoice(self._scales(factor, stored), stored)

    def _scales(self, factor: np.float32, stored: Array) -> Floats:
        scales = E4M3.values(stored)
        return scales / factor if self.apply == "over" else scales * factor


def write(name: str, shape: Shape) -> Coding:
    """Return the coding of a matrix as compressed-tensors' nvfp4-pack-quantized stores it."""
    rows, columns = shape
    module = name.removesuffix("weight")
    parts = (
        StoredPart(f"{module}weight_packed", "U8", (rows, columns // 2)),
        StoredPart(f"{module}weight_scale", "F8_E4M3", (rows, columns // GROUP)),
        StoredPart(f"{module}weight_global_scale", "F32", (1,), rows),
    )
    return Coding(shape, Nvfp4Coder(GROUP, "over"), (rows, columns), rows, parts)


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight that modelopt or compressed-tensors stores in four-bit floats, MXFP4 among them.

    InputError: codes, scales or a global scale of another dtype or shape, or a zero point.
    """
    codes, scales = stored.codes, stored.need("weight_scale")
    if len(codes.shape) < 2 or codes.dtype not in ("U8", "F4"):
        raise InputError(f"its codes are {codes.dtype} {list(codes.shape)}, must be a matrix of U8 or F4")
    columns = codes.shape[-1] * (2 if codes.dtype == "U8" else 1)
    if stored.part("weight_zero_point") is not None:
        raise InputError("has a zero point, which E2M1 codes cannot have")
    single = "weight_scale_2"
    apply: Apply = "times"
    if codes.name.endswith("weight_packed"):
        single, apply = "weight_global_scale", "over"
        if scales.dtype in EXPONENTS and stored.part(single) is None:
            return mxfp4.read_rows(stored, columns)
    expect(scales, (*codes.shape[:-1], whole(columns, GROUP, "groups")), {"F8_E4M3"})
    factor = stored.need(single)
    if factor.dtype != "F32" or math.prod(factor.shape) != 1:
        label = factor.name.rpartition(".")[2]
        raise InputError(f"its {label} is {factor.dtype} {list(factor.shape)}, must be one F32")
    return weight(stored, (*codes.shape[:-1], columns), Nvfp4(codes, scales, columns, factor, apply))
