"""What a stored dtype is, and its bit patterns as numbers; torch only for float8."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

# safetensors dtypes whose elements share bytes -> bits per element
PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


# safetensors dtype -> bytes per element; a packed tensor is read and copied as bytes, so its element here is one
ITEMSIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "C64": 8, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1, **dict.fromkeys(PACKED_BITS, 1),
}  # fmt: skip


FLOATING = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


# numbers that are copied as they are and never computed with
COPIED = frozenset({"C64", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", *PACKED_BITS})


def bits_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bits that a tensor takes in a file."""
    return math.prod(shape) * PACKED_BITS.get(dtype, 8 * ITEMSIZE[dtype])


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes that a tensor takes in a file."""
    return -(-bits_of(dtype, shape) // 8)


Array = npt.NDArray[Any]


def bits_type(dtype: str) -> str:
    """The unsigned numpy dtype of a safetensors dtype's bits."""
    return f"<u{ITEMSIZE[dtype]}"


def widen(bits: Array, dtype: str) -> Array:
    """Bit patterns (unsigned) of a safetensors floating `dtype` -> float32."""
    if dtype == "BF16":
        words = bits.astype(np.uint32)
        words <<= 16
        return words.view(np.float32)
    if dtype == "F32":
        return bits.view(np.float32)
    if dtype in _NATIVE:
        return bits.view(_NATIVE[dtype]).astype(np.float32)
    return _torch_cast(bits, dtype, "F32").view(np.float32)


def narrow(values: Array, dtype: str) -> Array:
    """Float32 -> bit patterns of `dtype`, to the nearest, ties to even; NaN becomes 0x7FC0 in bfloat16."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        rounded[np.isnan(values)] = 0x7FC0
        return rounded
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype in _NATIVE:
        with np.errstate(over="ignore"):
            native = values.astype(_NATIVE[dtype])
        return native.view(f"u{native.itemsize}")
    return _torch_cast(values.view(np.uint32), "F32", dtype)


def cast(bits: Array, source: str, target: str) -> Array:
    """Bit patterns of one dtype as bit patterns of another, through float32."""
    return bits if source == target else narrow(widen(bits, source), target)


_NATIVE = {"F64": "<f8", "F16": "<f2"}


def _torch_cast(bits: Array, source: str, target: str) -> Array:
    import torch

    types = {"F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
    signed = {
        "F32": (np.int32, torch.int32),
        "F8_E4M3": (np.int8, torch.int8),
        "F8_E5M2": (np.int8, torch.int8),
    }
    tensor = torch.from_numpy(np.array(bits).view(signed[source][0])).view(types[source])
    cast: Array = tensor.to(types[target]).view(signed[target][1]).numpy()
    return cast.view(f"u{cast.itemsize}")
