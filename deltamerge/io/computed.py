"""Tensors whose bytes are computed when they are read: a weight with its LoRA update, a cast, zeros.

A `Reader` reads them like stored tensors, tile by tile; no model is loaded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from deltamerge.io import kernels
from deltamerge.io.dtypes import bits_type, narrow, widen
from deltamerge.io.tensor import Read, TensorInfo

Array = npt.NDArray[Any]

CHUNK = 1 << 18  # elements computed at once, in whole rows: they stay in cache


@dataclass(frozen=True, slots=True)
class Zeros:
    """Zeros, which stand for the base of an adapter's own weights."""

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        out[:] = bytes(len(out))


@dataclass(frozen=True, slots=True)
class Held:
    """The bytes of a small tensor of bytes, which are here before its file is."""

    data: bytes

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        out[:] = self.data[start : start + len(out)]


@dataclass(frozen=True, slots=True)
class Cast:
    """`source` in another `dtype`, rounded to nearest, ties to even."""

    source: TensorInfo
    dtype: str

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        target = np.frombuffer(out, bits_type(self.dtype))
        for low in range(0, len(target), CHUNK):
            high = min(low + CHUNK, len(target))
            target[low:high] = narrow(floats(read, self.source, start + low, high - low), self.dtype)


@dataclass(frozen=True, slots=True)
class LowRank:
    """W + s · B A, as PEFT merges a LoRA adapter (Hu et al., arXiv 2106.09685), in float32, rounded once to W's dtype.

    `base` W: (out, in), or (in, out) if `transposed` (GPT-2's Conv1D, embeddings), where (B A)ᵀ is added;
    `a` A: (r, in); `b` B: (out, r). With `magnitude` m: (out), row i of W + s · B A is multiplied by m_i / ‖row i‖₂
    (DoRA, arXiv 2402.09353), for W: (out, in) only.

    B A is Σ_k B_ik A_kj in the order of k, each product and sum rounded: a matrix product's own order would depend on
    the tile's shape, the library and its threads.
    """

    base: TensorInfo
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    magnitude: TensorInfo | None = None

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        dtype = self.base.dtype
        target = np.frombuffer(out, bits_type(dtype))
        columns = self.base.shape[1]
        right = _whole(read, self.b).T if self.transposed else _whole(read, self.a)
        step = max(1, CHUNK // columns)
        stop = start + len(target)
        for top in range(start // columns, math.ceil(stop / columns), step):
            bottom = min(top + step, self.base.shape[0])
            rows = narrow(self._rows(read, right, top, bottom), dtype).reshape(-1)
            low, high = max(start, top * columns), min(stop, bottom * columns)
            target[low - start : high - start] = rows[low - top * columns : high - top * columns]

    def _rows(self, read: Read, right: Array, top: int, bottom: int) -> Array:
        """Rows [top, bottom) of the updated weight in float32."""
        columns = self.base.shape[1]
        weight = floats(read, self.base, top * columns, (bottom - top) * columns).reshape(-1, columns)
        if self.transposed:
            inner = self.a.shape[1]
            left = np.stack([floats(read, self.a, k * inner + top, bottom - top) for k in range(self.a.shape[0])], 1)
        else:
            rank = self.b.shape[1]
            left = floats(read, self.b, top * rank, (bottom - top) * rank).reshape(-1, rank)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            update = self._product(left, right)
            update *= np.float32(self.scale)
            update += weight
            if self.magnitude is not None:
                norm = np.sqrt(np.square(update, dtype=np.float64).sum(axis=1)).astype(np.float32)
                update *= (floats(read, self.magnitude, top, bottom - top) / norm)[:, None]
        return np.asarray(update, np.float32)

    def _product(self, left: Array, right: Array) -> Array:
        """B A by the compiled kernels, else by numpy; the bits are the same."""
        out = np.empty((len(left), right.shape[1]), np.float32)
        native = kernels.native()
        if native is None:
            ordered_product(left, right, out)
        else:
            shape = (len(left), len(right), right.shape[1])
            native.ordered_product(np.ascontiguousarray(left), np.ascontiguousarray(right), out, *shape)
        return out


def ordered_product(left: Array, right: Array, out: Array) -> None:
    """out_ij = Σ_k left_ik right_kj in the order of k, float32; each product and sum is rounded."""
    np.multiply(left[:, :1], right[0], out=out)
    product = np.empty_like(out)
    for k in range(1, len(right)):
        np.multiply(left[:, k : k + 1], right[k], out=product)
        out += product


def _whole(read: Read, info: TensorInfo) -> Array:
    return floats(read, info, 0, math.prod(info.shape)).reshape(info.shape)


def floats(read: Read, info: TensorInfo, start: int, count: int) -> Array:
    """Elements [start, start + count) of a tensor in float32."""
    bits = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, bits)
    return widen(bits, info.dtype)
