"""Views that every format is made of: zeros, bytes in memory, casts; and rows of a tensor as float32."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from deltamerge.engine import kernels
from deltamerge.tensors.dtypes import ITEMSIZE, bits_type, narrow, widen
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, unique, view, viewed

Array = npt.NDArray[Any]

CHUNK = 1 << 18  # elements computed at once, in whole rows: they stay in cache


@view(entrywise=True)
def zeros(read: Read, tensor: Tensor, start: int, out: memoryview, *, path: Path) -> None:
    """Fill with zeros, which stand for the base of an adapter's own weights."""
    out[:] = bytes(len(out))


def zeros_like(like: Tensor | TensorInfo, dtype: str | None = None) -> Tensor:
    """Return zeros in the shape of a tensor, and in its dtype or another."""
    return viewed(zeros, (), like.shape, dtype or like.dtype, path=like.path)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Bytes in memory. Two buffers are never the same."""

    data: memoryview


@view()
def memory(read: Read, tensor: Tensor, start: int, out: memoryview, *, buffer: Buffer, name: str, path: Path) -> None:
    """Take bytes that are in memory."""
    out[:] = buffer.data[start * ITEMSIZE[tensor.dtype] :][: len(out)]


def in_memory(name: str, dtype: str, shape: tuple[int, ...], data: memoryview, path: Path = Path()) -> TensorInfo:
    """Return the tensor of those bytes; `dtype` is safetensors' code."""
    return TensorInfo(name, unique(memory, (), shape, dtype, buffer=Buffer(data), name=name, path=path))


@view(entrywise=True)
def cast(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Round the input to the dtype, to nearest, ties to even."""
    (source,) = tensor.inputs
    target = np.frombuffer(out, bits_type(tensor.dtype))
    for low in range(0, len(target), CHUNK):
        high = min(low + CHUNK, len(target))
        target[low:high] = narrow(floats(read, source, start + low, high - low), tensor.dtype)


def fill_rows(tensor: Tensor, start: int, out: memoryview, rows: Callable[[int, int], Array]) -> None:
    """Fill `out` from element `start` with whole rows computed in float32; a row is all that follows dimension 0."""
    fill_lines(math.prod(tensor.shape[1:]), tensor.dtype, start, out, rows)


def fill_lines(columns: int, dtype: str, start: int, out: memoryview, rows: Callable[[int, int], Array]) -> None:
    """Fill `out` from element `start` with rows of `columns`. `rows(top, bottom)` computes some in float32."""
    target = np.frombuffer(out, bits_type(dtype))
    step = max(1, CHUNK // columns)
    stop = start + len(target)
    last = math.ceil(stop / columns)
    for top in range(start // columns, last, step):
        bottom = min(top + step, last)
        made = narrow(np.ascontiguousarray(rows(top, bottom)), dtype).reshape(-1)
        low, high = max(start, top * columns), min(stop, bottom * columns)
        target[low - start : high - start] = made[low - top * columns : high - top * columns]


def product(left: Array, right: Array) -> Array:
    """Return left · right in float32 by the compiled kernels, else by numpy; the bits are the same."""
    out = np.empty((len(left), right.shape[1]), np.float32)
    native = kernels.native()
    if native is None:
        ordered_product(left, right, out)
    else:
        shape = (len(left), len(right), right.shape[1])
        native.ordered_product(np.ascontiguousarray(left), np.ascontiguousarray(right), out, *shape)
    return out


def ordered_product(left: Array, right: Array, out: Array) -> None:
    """Compute out_ij = Σ_k left_ik right_kj in the order of k, float32; each product and sum is rounded."""
    np.multiply(left[:, :1], right[0], out=out)
    product = np.empty_like(out)
    for k in range(1, len(right)):
        np.multiply(left[:, k : k + 1], right[k], out=product)
        out += product


def flat_rows(read: Read, info: Tensor | TensorInfo) -> Array:
    """Return a whole tensor in float32, as (rows, all that follows)."""
    return floats(read, info, 0, math.prod(info.shape)).reshape(info.shape[0], -1)


def base_rows(read: Read, info: Tensor | TensorInfo, top: int, bottom: int) -> Array:
    """Return rows [top, bottom) in float32, as (rows, all that follows)."""
    columns = math.prod(info.shape[1:])
    return floats(read, info, top * columns, (bottom - top) * columns).reshape(-1, columns)


def floats(read: Read, info: Tensor | TensorInfo, start: int, count: int) -> Array:
    """Return elements [start, start + count) in float32."""
    bits = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, bits)
    return widen(bits, info.dtype)
