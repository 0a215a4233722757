"""Weights in quantised form: as a checkpoint stores them, or as a recipe asks for them.

A form is one function, the mirror of what reads it, from what computes a weight (`TensorInfo.made`) to the `Coding`
that makes its stored tensors; `ENCODERS` has them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.blockwise import RowScaled, Tabled
from deltamerge.formats.quantised.coder import BlockCoder, Coder, Packing, Transposed
from deltamerge.formats.quantised.coding import Coding, Part, unit_rows
from deltamerge.formats.quantised.columnwise import Awq, Gptq
from deltamerge.formats.quantised.fp4 import Experts, GroupScaled
from deltamerge.formats.quantised.mlx import Packed
from deltamerge.formats.quantised.numbers import E2M1, E4M3, FLOATS, Integers
from deltamerge.formats.quantised.packed_coders import Affine, AwqCoder, GptqCoder, RowCoder, TableCoder, TwoLevel
from deltamerge.formats.quantised.scaled import WORD, Scaled
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import in_memory

Shape = tuple[int, ...]
BYTES = 8  # bits of an integer code that has a byte to itself


def kept(weight: TensorInfo, stored: Sequence[TensorInfo], settings: Mapping[str, Any], name: str) -> Coding:
    """The coding of a weight of the output, `name`, in the form in which a checkpoint stores `weight`, as `stored`.

    `settings` are those of the checkpoint's config. InputError: the form cannot be written.
    """
    encoder = ENCODERS.get(type(weight.made))
    if encoder is None:
        raise InputError("is in a form that cannot be written, only read")
    coding = encoder(weight.made, weight.shape, settings)
    by_name = {info.name: info for info in stored}
    made = tuple(by_name[part.name] for part in coding.parts)
    old, new = _module(weight.name), _module(name)
    parts = tuple(replace(part, name=new + part.name.removeprefix(old)) for part in coding.parts)
    rest = (replace(info, name=new + info.name.removeprefix(old)) for info in stored if info not in made)
    return replace(coding, parts=parts, copied=tuple(rest), like=weight, like_parts=made)


def _module(name: str) -> str:
    """The module of a weight, with its dot."""
    stem, dot, _ = name.rpartition(".")
    return stem + dot


def _scaled(made: Scaled, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    """Codes one by one or packed, with scales and perhaps zeros on a grid."""
    grid, codes, scales = made.scales.grid, made.codes, made.scales.info
    if made.order is not None:
        raise InputError(f"has columns in the order of {made.order.name}, which cannot be written")
    if made.form == "packed" and not made.dense and WORD % made.width:
        raise InputError(f"has words with gaps, of {made.width} bits a code, which cannot be written")
    rows, columns = grid.height, shape[-1] if shape else 1
    block = (grid.m, grid.n)
    packed = made.form == "packed"
    numbers = FLOATS.get(made.form) or Integers(made.width if packed else BYTES)
    parts = [_part(codes), _part(scales, grid.m)]
    multiple, zeros = grid.m, made.zeros
    if zeros is not None:
        if not isinstance(numbers, Integers) or (not zeros.packed and zeros.info.dtype != "I8"):
            raise InputError(f"has zeros of {zeros.info.dtype}, which cannot be written")
        inside = zeros.packed and grid.m == 1 and WORD % zeros.width == 0
        per = WORD // zeros.width if inside else rows if zeros.packed else grid.m
        multiple = math.lcm(grid.m, per)
        parts.append(_part(zeros.info, per))
    search = packed and made.width < BYTES
    how: Literal["bytes", "words"] | None = None if zeros is None else "words" if zeros.packed else "bytes"
    packing: Packing = "words" if packed else "bytes"
    coder = BlockCoder(numbers, block, scales.dtype, how, search, packing)
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, multiple), tuple(parts))


def _fp4(made: GroupScaled, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    """E2M1 with a scale a group, and perhaps one more for the whole weight."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    if made.whole is None:
        coder: Coder = BlockCoder(E2M1, (1, made.group), "U8", search=True, packing="nibbles")
        parts = (_part(made.codes), _part(made.scales))
        return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), parts)
    all_parts = (_part(made.codes), _part(made.scales), _part(made.whole, rows))
    return Coding(shape, TwoLevel(made.group, made.apply), (rows, columns), rows, all_parts)


def _experts(made: Experts, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    """MXFP4 of gpt-oss: an expert at a time, by columns."""
    rows, columns = shape[-2:]
    group = 2 * made.blocks.shape[-1]
    coder = Transposed(BlockCoder(E2M1, (1, group), "U8", search=True, packing="nibbles"))
    return Coding(shape, coder, (rows, columns), rows, (_part(made.blocks, rows), _part(made.scales, rows)))


def _mlx(made: Packed, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    rows, columns = math.prod(shape[:-1]), shape[-1]
    parts = [_part(made.codes), _part(made.scales)]
    coder: Coder
    if made.biases is not None:
        if made.biases.dtype != made.scales.dtype:
            raise InputError(f"has biases of {made.biases.dtype} beside scales of {made.scales.dtype}")
        parts.append(_part(made.biases))
        coder = Affine(made.width, made.group, made.scales.dtype)
    elif made.mode == "nvfp4":
        coder = TwoLevel(made.group, "single")
    else:
        packing: Packing = "bytes" if made.mode == "mxfp8" else "nibbles"
        numbers = E4M3 if made.mode == "mxfp8" else E2M1
        coder = BlockCoder(numbers, (1, made.group), "U8", None, made.mode == "mxfp4", packing)
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), tuple(parts))


def _gptq(made: Gptq, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    if made.order is None and made.inputs % made.group:
        raise InputError(f"has groups of {made.group} that do not divide {made.inputs} inputs, which cannot be written")
    parts = (_part(made.codes, shape[0]), _part(made.scales, shape[0]), _part(made.zeros, shape[0]))
    return Coding(shape, GptqCoder(made, settings.get("sym") is True), (shape[0], shape[1]), shape[0], parts)


def _awq(made: Awq, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    parts = (_part(made.codes, shape[0]), _part(made.scales, shape[0]), _part(made.zeros, shape[0]))
    return Coding(shape, AwqCoder(made), (shape[0], shape[1]), shape[0], parts)


def _tabled(made: Tabled, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    """bitsandbytes of four bits: blocks go on from row to row, so the weight is coded as a whole."""
    rows, columns = math.prod(shape[:-1]), shape[-1]
    parts = [_part(made.codes, rows), _part(made.scales, rows)]
    if made.nested is not None:
        parts.append(_part(made.nested.scales, rows))
    return Coding(shape, TableCoder(made), (rows, columns), rows, tuple(parts))


def _rows(made: RowScaled, shape: Shape, settings: Mapping[str, Any]) -> Coding:
    rows, columns = shape
    parts = (_part(made.codes), _part(made.scales))
    return Coding(shape, RowCoder(), (rows, columns), unit_rows(rows, columns, 1), parts)


def _part(info: TensorInfo, rows: int = 1) -> Part:
    return Part(info.name, info.dtype, info.shape, rows)


ENCODERS: Mapping[type, Callable[[Any, Shape, Mapping[str, Any]], Coding]] = {
    Scaled: _scaled,
    GroupScaled: _fp4,
    Experts: _experts,
    Packed: _mlx,
    Gptq: _gptq,
    Awq: _awq,
    Tabled: _tabled,
    RowScaled: _rows,
}


def fp8_blocks(name: str, shape: Shape, block: tuple[int, int]) -> Coding:
    """A matrix as DeepSeek-V3 and Qwen3-FP8 store it: E4M3 with a float32 scale a block."""
    rows, columns = shape
    m, n = block
    parts = (
        Part(name, "F8_E4M3", shape),
        Part(f"{name}_scale_inv", "F32", (-(-rows // m), -(-columns // n)), m),
    )
    coder = BlockCoder(E4M3, block, "F32")
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, m), parts)


def channels(name: str, shape: Shape, dtype: str, scale: str) -> Coding:
    """A matrix as compressed-tensors' float-quantized (F8_E4M3) and int-quantized (I8) store it, with a scale a row.

    Scales have the dtype of the model, which is what transformers reads them in.
    """
    rows, columns = shape
    coder = BlockCoder(Integers(BYTES) if dtype == "I8" else FLOATS[dtype], (1, columns), scale)
    parts = (Part(name, dtype, shape), Part(f"{name}_scale", scale, (rows, 1)))
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), parts)


def int4_groups(name: str, shape: Shape, group: int, scale: str, path: Path) -> Coding:
    """A matrix as compressed-tensors' pack-quantized stores it: 8 codes in 32 bits, with a scale for `group` columns.

    Its shape is stored too; `path` is a file that stands for where that comes from.
    """
    rows, columns = shape
    module = name.removesuffix("weight")
    parts = (
        Part(f"{module}weight_packed", "I32", (rows, -(-columns // 8))),
        Part(f"{module}weight_scale", scale, (rows, columns // group)),
    )
    numbers = memoryview(np.asarray(shape, "<i8").tobytes())
    whole = in_memory(f"{module}weight_shape", "I64", (2,), numbers, path)
    coder = BlockCoder(Integers(4), (1, group), scale, search=True, packing="words")
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), parts, (whole,))
