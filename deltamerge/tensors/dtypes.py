"""The dtypes of safetensors files: one table, and conversions of their bit patterns; torch only for float8."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, TypeAlias

from deltamerge.tensors.lazy import NDArray, torch
from deltamerge.tensors.lazy import numpy as np

Array: TypeAlias = "NDArray[Any]"


class DType(NamedTuple):
    """A safetensors dtype and its counterparts."""

    bits: int  # bits of an element in a file
    numpy: str  # numpy's type of stored elements: numbers if numpy has them, otherwise unsigned integers
    torch: str | None  # torch's name, if they become torch tensors
    kind: Literal["float", "integer", "copied"]  # copied only: never computed with


# Messages list the codes in this order.
DTYPES = {
    "F64": DType(64, "<f8", "float64", "float"),
    "F32": DType(32, "<f4", "float32", "float"),
    "F16": DType(16, "<f2", "float16", "float"),
    "BF16": DType(16, "<u2", "bfloat16", "float"),
    "F8_E4M3": DType(8, "<u1", "float8_e4m3fn", "float"),
    "F8_E5M2": DType(8, "<u1", "float8_e5m2", "float"),
    "I64": DType(64, "<i8", "int64", "integer"),
    "I32": DType(32, "<i4", "int32", "integer"),
    "I16": DType(16, "<i2", "int16", "integer"),
    "I8": DType(8, "<i1", "int8", "integer"),
    "U64": DType(64, "<u8", "uint64", "integer"),
    "U32": DType(32, "<u4", "uint32", "integer"),
    "U16": DType(16, "<u2", "uint16", "integer"),
    "U8": DType(8, "<u1", "uint8", "integer"),
    "BOOL": DType(8, "<u1", "bool", "integer"),
    "C64": DType(64, "<c8", None, "copied"),
    "F8_E8M0": DType(8, "<u1", None, "copied"),
    "F8_E4M3FNUZ": DType(8, "<u1", None, "copied"),
    "F8_E5M2FNUZ": DType(8, "<u1", None, "copied"),
    "F4": DType(4, "<u1", None, "copied"),
    "F6_E2M3": DType(6, "<u1", None, "copied"),
    "F6_E3M2": DType(6, "<u1", None, "copied"),
}

# Elements that share bytes. Such a tensor is read and copied as bytes: its element is one byte in `ITEMSIZE`.
PACKED = frozenset(code for code, dtype in DTYPES.items() if dtype.bits % 8)
ITEMSIZE = {code: max(1, dtype.bits // 8) for code, dtype in DTYPES.items()}
FLOATING = frozenset(code for code, dtype in DTYPES.items() if dtype.kind == "float")
COPIED = frozenset(code for code, dtype in DTYPES.items() if dtype.kind == "copied")
# Floating dtypes that hold weights as they are; float8 often has scales in another tensor.
PLAIN = frozenset(code for code in FLOATING if DTYPES[code].bits >= 16)
NUMPY = {code: dtype.numpy for code, dtype in DTYPES.items()}
TORCH_NAMES = {code: dtype.torch for code, dtype in DTYPES.items() if dtype.torch is not None}
LOW_BITS = {"BF16": 16, "F16": 13}  # of a float32's mantissa, which the dtype lacks
CODES = {name: code for code, name in TORCH_NAMES.items()}


def bits_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bits that a tensor takes in a file."""
    return math.prod(shape) * DTYPES[dtype].bits


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the bytes that a tensor takes in a file."""
    return math.prod(shape) * ITEMSIZE[dtype] if dtype not in PACKED else -(-bits_of(dtype, shape) // 8)


def bits_type(dtype: str) -> str:
    """Return the unsigned numpy dtype as wide as an element of a safetensors dtype."""
    return f"<u{ITEMSIZE[dtype]}"


def torch_dtype(code: str) -> torch.dtype:
    """Return the torch dtype of a safetensors code such as "BF16"."""
    return getattr(torch, TORCH_NAMES[code])  # type: ignore[no-any-return]  # every name in the table is a dtype


def code_of(dtype: torch.dtype) -> str | None:
    """Return the safetensors code of a torch dtype. None: the table has none."""
    return CODES.get(str(dtype).removeprefix("torch."))


def widen(bits: Array, dtype: str) -> Array:
    """Return bit patterns (unsigned) of a floating `dtype` as float32 of the same shape; float64 is rounded."""
    if dtype == "BF16":
        words = bits.astype(np.uint32)
        words <<= 16
        return words.view(np.float32)
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype in PLAIN:
        with np.errstate(over="ignore", invalid="ignore"):
            return bits.view(NUMPY[dtype]).astype(np.float32)
    return _torch_cast(bits, dtype, "F32").view(np.float32)


def narrow(values: Array, dtype: str) -> Array:
    """Return float32 as bit patterns of a floating `dtype`: to the nearest, ties to even; NaN is 0x7FC0 in bfloat16."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        rounded[np.isnan(values)] = 0x7FC0
        return rounded
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype in PLAIN:
        with np.errstate(over="ignore", invalid="ignore"):
            return values.astype(NUMPY[dtype]).view(bits_type(dtype))
    return _torch_cast(values.view(np.uint32), "F32", dtype)


def narrow_randomly(values: Array, dtype: str, first: int) -> Array:
    """Return float32 as bit patterns of bfloat16 or float16, up or down by chance: stochastic rounding.

    A value x between the neighbours a and b of `dtype` becomes b with the probability (x − a) / (b − a), so that the
    expectation is x (below float16's 2⁻¹⁴ it is rounded to the nearest). Values of `dtype` stay as they are. Chance is
    a hash of the flat position; `first` is the position of the first value.
    """
    cut = LOW_BITS[dtype]
    bits = values.view(np.uint32) + (_draws(first, values.size) >> np.uint32(32 - cut)).reshape(values.shape)
    bits &= np.uint32(-1 << cut & 0xFFFFFFFF)
    bits[np.isnan(values)] = 0x7FC00000
    return narrow(bits.view(np.float32), dtype)


def _draws(first: int, count: int) -> Array:
    """Return a number of 32 bits for each position: a hash of its low 32 bits (lowbias32, Wellons 2018)."""
    x = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x ^= x >> np.uint32(shift)
        x *= np.uint32(factor)
    x ^= x >> np.uint32(16)
    return x


def cast(bits: Array, source: str, target: str) -> Array:
    """Return bit patterns of one floating dtype as bit patterns of another, through float32."""
    return bits if source == target else narrow(widen(bits, source), target)


def _torch_cast(bits: Array, source: str, target: str) -> Array:
    """Convert bit patterns between float8 and float32 with torch."""
    signed = np.array(bits).view(f"<i{ITEMSIZE[source]}")
    result = torch.from_numpy(signed).view(torch_dtype(source)).to(torch_dtype(target))
    stored: Array = result.view(getattr(torch, f"int{DTYPES[target].bits}")).numpy()
    return stored.view(bits_type(target))
