"""Weights in quantised form: as a checkpoint stores them, or as a recipe asks for them.

A scheme is one function, the mirror of its decoder, from the tensors that store a weight to the `Coding` that makes
them; `ENCODERS` has them all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from deltamerge.errors import InputError
from deltamerge.io.dtypes import PLAIN
from deltamerge.io.quantised.coder import BlockCoder, Coder, Transposed
from deltamerge.io.quantised.coding import Coding, Part, unit_rows
from deltamerge.io.quantised.numbers import E2M1, E4M3, FLOATS, Integers
from deltamerge.io.quantised.weight import Constant, Stored
from deltamerge.io.tensor import TensorInfo

Encoder = Callable[[Stored, tuple[int, ...]], Coding]
BYTES = 8  # bits of an integer code that has a byte to itself


def kept(scheme: str, stored: Stored, weight: TensorInfo, name: str) -> Coding:
    """The coding of a weight of the output, `name`, in the form in which a checkpoint stores `weight`.

    InputError: the scheme cannot be written, or not in this form.
    """
    encoder = ENCODERS.get(scheme)
    if encoder is None:
        raise InputError(f"cannot be written in {scheme}, only read")
    coding = encoder(stored, weight.shape)
    old, new = (_module(one) for one in (stored.name, name))
    parts = tuple(replace(part, name=new + part.name.removeprefix(old)) for part in coding.parts)
    by_name = {info.name: info for info in stored.parts}
    made = tuple(by_name[part.name] for part in coding.parts)
    rest = (replace(info, name=new + info.name.removeprefix(old)) for info in stored.parts if info not in made)
    return replace(coding, parts=parts, copied=tuple(rest), like=weight, like_parts=made)


def _module(name: str) -> str:
    """The module of a weight, with its dot."""
    stem, dot, _ = name.rpartition(".")
    return stem + dot


def fp8(stored: Stored, shape: tuple[int, ...]) -> Coding:
    """Float8 codes with the scale of a block, a row, or all."""
    codes, scales = stored.codes, stored.need("_scale_inv", "_scale")
    if codes.dtype not in FLOATS:
        raise InputError(f"{codes.name}: {codes.dtype} is no dtype of float8 weights")
    return _blocks(stored, shape, scales, stored.settings.get("weight_block_size"), [codes])


def compressed(stored: Stored, shape: tuple[int, ...]) -> Coding:
    """compressed-tensors: float8, integers of 8 bits, and packed integers of up to 8 bits."""
    if order := stored.part("weight_g_idx"):
        raise InputError(f"{order.name}: columns in the order of their activations cannot be written")
    if two := stored.part("weight_global_scale"):
        raise InputError(f"{two.name}: scales of scales (nvfp4) cannot be written")
    codes, scales = stored.codes, stored.need("weight_scale")
    zeros = stored.part("weight_zero_point")
    said = next((group.get("block_structure") for group in weight_settings(stored.settings)), None)
    made = [codes] if zeros is None else [codes, zeros]
    return _blocks(stored, shape, scales, said, made)


def weight_settings(settings: Mapping[str, object]) -> list[Mapping[str, object]]:
    """The `weights` of each of compressed-tensors' config groups."""
    groups = settings.get("config_groups")
    found = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)] if isinstance(
        groups, Mapping
    ) else []  # fmt: skip
    return [one for one in found if isinstance(one, Mapping)]


def mxfp4(stored: Stored, shape: tuple[int, ...]) -> Coding:
    """Microscaling FP4 as gpt-oss stores it: `_blocks` (…, columns, rows / 32, 16), two E2M1 a byte, low first, and
    `_scales` (…, columns, rows / 32), exponents, of a weight (…, rows, columns)."""
    codes, scales = stored.codes, stored.need("_scales")
    *outer, across, groups, half = codes.shape
    rows, columns = shape[-2:]
    if (*outer, rows, columns) != shape or (across, groups * 2 * half) != (columns, rows):
        raise InputError(f"{codes.name}: its shape {list(codes.shape)} is not that of {list(shape)} by columns")
    coder = Transposed(BlockCoder(E2M1, (1, 2 * half), "U8", search=True, packing="nibbles"))
    parts = (Part(codes.name, "U8", codes.shape, rows), Part(scales.name, "U8", scales.shape, rows))
    return Coding(shape, coder, (rows, columns), rows, parts)


ENCODERS: Mapping[str, Encoder] = {
    "fp8": fp8,
    "fbgemm_fp8": fp8,
    "compressed-tensors": compressed,
    "mxfp4": mxfp4,
}


def _blocks(
    stored: Stored, shape: tuple[int, ...], scales: TensorInfo, said: object, made: Sequence[TensorInfo]
) -> Coding:
    """Codes (and zeros) with a scale a block of a matrix."""
    codes, zeros = made[0], made[1] if len(made) > 1 else None
    if len(shape) < 2:
        raise InputError(f"{codes.name}: a vector cannot be written in blocks")
    if scales.dtype not in PLAIN | {"F8_E8M0", "U8"} or scales.dtype == "F64":
        raise InputError(f"{scales.name}: {scales.dtype} is no dtype of scales")
    matrix, block = _geometry(shape, scales.shape, said, scales.name)
    rows, columns = matrix
    packed = codes.dtype == "I32"
    if packed:
        bits = round(32 * codes.shape[-1] / columns)
        coder: Coder = BlockCoder(Integers(bits), block, scales.dtype, zeros is not None, bits < BYTES, "words")
        multiple = math.lcm(block[0], 32 if zeros is not None else 1)
        zero_rows = 32 // math.gcd(32, bits)
    elif codes.dtype == "I8":
        coder = BlockCoder(Integers(BYTES), block, scales.dtype, zeros is not None)
        multiple, zero_rows = block[0], block[0]
    elif codes.dtype in FLOATS and zeros is None:
        coder = BlockCoder(FLOATS[codes.dtype], block, scales.dtype)
        multiple, zero_rows = block[0], 1
    else:
        raise InputError(f"{codes.name}: codes of {codes.dtype} cannot be written")
    parts = [Part(codes.name, codes.dtype, codes.shape), Part(scales.name, scales.dtype, scales.shape, block[0])]
    if zeros is not None:
        if packed and block[0] != 1:
            raise InputError(f"{zeros.name}: packed zeros of blocks cannot be written")
        parts.append(Part(zeros.name, zeros.dtype, zeros.shape, zero_rows))
    return Coding(shape, coder, matrix, unit_rows(rows, columns, multiple), tuple(parts))


def _geometry(
    shape: tuple[int, ...], scales: tuple[int, ...], said: object, name: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) of what is a matrix by itself, and of a block of it, from the shapes of weight and scales.

    InputError: the scales are not one for each of such blocks.
    """
    rows, columns = shape[-2:]
    if math.prod(scales) == 1:
        whole = math.prod(shape[:-1]), columns
        return whole, whole
    if scales == shape[:-1]:
        scales = (*scales, 1)
    if len(scales) == len(shape) and scales[:-2] == shape[:-2]:
        down, across = scales[-2:]
        options = [(rows, columns)] if (down, across) == (1, 1) else []
        if isinstance(said, list | tuple) and len(said) == 2 and all(type(n) is int and n > 0 for n in said):
            options.append((min(said[0], rows), min(said[1], columns)))
        if down == rows and columns % across == 0:
            options.append((1, columns // across))
        for m, n in options:
            if (-(-rows // m), -(-columns // n)) == (down, across):
                return (rows, columns), (m, n)
    raise InputError(f"{name}: scales of the shape {list(scales)} do not fit a weight of {list(shape)}")


def fp8_blocks(name: str, shape: tuple[int, ...], block: tuple[int, int]) -> Coding:
    """A weight as DeepSeek-V3 and Qwen3-FP8 store it: E4M3 with a float32 scale a block."""
    *outer, rows, columns = shape
    m, n = block
    scales = (*outer, -(-rows // m), -(-columns // n))
    parts = (Part(name, "F8_E4M3", shape), Part(f"{name}_scale_inv", "F32", scales, m))
    coder = BlockCoder(E4M3, block, "F32")
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, m), parts)


def channels(name: str, shape: tuple[int, ...], dtype: str, scale: str) -> Coding:
    """A matrix as compressed-tensors' float-quantized (F8_E4M3) and int-quantized (I8) store it, with a scale a row.

    Scales have the dtype of the model, which is what transformers reads them in.
    """
    rows, columns = shape
    coder = BlockCoder(Integers(BYTES) if dtype == "I8" else FLOATS[dtype], (1, columns), scale)
    parts = (Part(name, dtype, shape), Part(f"{name}_scale", scale, (rows, 1)))
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), parts)


def int4_groups(name: str, shape: tuple[int, ...], group: int, scale: str, path: Path) -> Coding:
    """A matrix as compressed-tensors' pack-quantized stores it: 8 codes in 32 bits, with a scale for `group` columns.

    Its shape is stored too; `path` is a file that stands for where that comes from.
    """
    rows, columns = shape
    module = name.removesuffix("weight")
    parts = (
        Part(f"{module}weight_packed", "I32", (rows, -(-columns // 8))),
        Part(f"{module}weight_scale", scale, (rows, columns // group)),
    )
    numbers = np.asarray(shape, "<i8").tobytes()
    whole = TensorInfo(f"{module}weight_shape", "I64", (2,), path, 0, len(numbers), Constant(numbers, 8))
    coder = BlockCoder(Integers(4), (1, group), scale, search=True, packing="words")
    return Coding(shape, coder, (rows, columns), unit_rows(rows, columns, 1), parts, (whole,))
