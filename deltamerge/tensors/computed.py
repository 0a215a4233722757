"""Tensors whose bytes are computed when they are read: a weight with its LoRA update, a cast, zeros.

A `Reader` reads them like stored tensors, tile by tile; no model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from deltamerge.engine import kernels
from deltamerge.tensors.dtypes import bits_type, narrow, widen
from deltamerge.tensors.tensor import Read, TensorInfo

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
    `a` A: (r, in); `b` B: (out, r). A convolution's W: (out, in, …) is (out, in · …), as are A: (r, in, …) and
    B: (out, r, 1, …). With `magnitude` m: (out), the part of W + s · B A that makes output i is multiplied by
    m_i / ‖that part‖₂ (DoRA, arXiv 2402.09353).

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
        right = flat_rows(read, self.b).T if self.transposed else flat_rows(read, self.a)
        norms = None
        if self.magnitude is not None and self.transposed:
            norms = read.once(("norms of columns", self), lambda: self._norms(read, right))

        def rows(top: int, bottom: int) -> Array:
            update = self._sum(read, right, top, bottom)
            return update if self.magnitude is None else self._scaled(read, update, norms, top, bottom)

        fill_rows(self.base, start, out, rows)

    def _sum(self, read: Read, right: Array, top: int, bottom: int) -> Array:
        """Rows [top, bottom) of W + s · B A in float32."""
        if self.transposed:
            inner = math.prod(self.a.shape[1:])
            left = np.stack([floats(read, self.a, k * inner + top, bottom - top) for k in range(self.a.shape[0])], 1)
        else:
            rank = self.b.shape[1]
            left = floats(read, self.b, top * rank, (bottom - top) * rank).reshape(-1, rank)
        with np.errstate(over="ignore", invalid="ignore"):
            update = product(left, right)
            update *= np.float32(self.scale)
            update += base_rows(read, self.base, top, bottom)
        return update

    def _scaled(self, read: Read, update: Array, norms: Array | None, top: int, bottom: int) -> Array:
        assert self.magnitude is not None
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            if norms is not None:
                update *= floats(read, self.magnitude, 0, len(norms)) / norms
            else:
                norm = np.sqrt(np.square(update, dtype=np.float64).sum(axis=1)).astype(np.float32)
                update *= (floats(read, self.magnitude, top, bottom - top) / norm)[:, None]
        return np.asarray(update, np.float32)

    def _norms(self, read: Read, right: Array) -> Array:
        """The norm of each column of W + s · B A, which the whole weight is read for, piece by piece."""
        rows, columns = self.base.shape[0], math.prod(self.base.shape[1:])
        step, squares = max(1, CHUNK // columns), np.zeros(columns, np.float64)
        for top in range(0, rows, step):
            part = self._sum(read, right, top, min(rows, top + step))
            squares += np.square(part, dtype=np.float64).sum(axis=0)
        return np.asarray(np.sqrt(squares).astype(np.float32))


def update_of(info: TensorInfo, base: TensorInfo) -> TensorInfo | None:
    """s · B A alone in float32, where `info` is `base` with that update; None where it is anything else."""
    made = info.made
    if not isinstance(made, LowRank) or made.magnitude is not None or info.begin or not made.base.is_same(base):
        return None
    nothing = replace(made.base, dtype="F32", begin=0, nbytes=4 * math.prod(info.shape), made=Zeros(), saved_as=None)
    return replace(nothing, name=info.name, made=replace(made, base=nothing))


def fill_rows(base: TensorInfo, start: int, out: memoryview, rows: Callable[[int, int], Array]) -> None:
    """Fill `out` from element `start` with whole rows computed in float32, `base` being (rows, all that follows)."""
    target = np.frombuffer(out, bits_type(base.dtype))
    columns = math.prod(base.shape[1:])
    step = max(1, CHUNK // columns)
    stop = start + len(target)
    for top in range(start // columns, math.ceil(stop / columns), step):
        bottom = min(top + step, math.prod(base.shape) // columns)
        made = narrow(np.ascontiguousarray(rows(top, bottom)), base.dtype).reshape(-1)
        low, high = max(start, top * columns), min(stop, bottom * columns)
        target[low - start : high - start] = made[low - top * columns : high - top * columns]


def product(left: Array, right: Array) -> Array:
    """left · right in float32 by the compiled kernels, else by numpy; the bits are the same."""
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


def flat_rows(read: Read, info: TensorInfo) -> Array:
    """A whole tensor in float32, as (rows, all that follows)."""
    return floats(read, info, 0, math.prod(info.shape)).reshape(info.shape[0], -1)


def base_rows(read: Read, info: TensorInfo, top: int, bottom: int) -> Array:
    """Rows [top, bottom) in float32, as (rows, all that follows)."""
    columns = math.prod(info.shape[1:])
    return floats(read, info, top * columns, (bottom - top) * columns).reshape(-1, columns)


def floats(read: Read, info: TensorInfo, start: int, count: int) -> Array:
    """Elements [start, start + count) in float32."""
    bits = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, bits)
    return widen(bits, info.dtype)
