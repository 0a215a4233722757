"""The updates of adapters other than LoRA of one matrix, computed when read: experts, LoHa, LoKr, rows, biases.

Each is W + s · ΔW in float32, rounded once to W's dtype, tile by tile; products are summed in the order of k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from deltamerge.tensors.computed import Array, base_rows, fill_rows, flat_rows, floats, product
from deltamerge.tensors.dtypes import bits_type, cast, narrow
from deltamerge.tensors.tensor import Read, TensorInfo


@dataclass(frozen=True, slots=True)
class Experts:
    """W_e + s · B_e A_e for every expert e, as PEFT merges a LoRA of a parameter of three dimensions.

    `base` W: (E, out, in), or (E, in, out) if `transposed`; `a`: (E · r, in), expert by expert; `b`: (out, r · E),
    where column k · E + e is expert e's.
    """

    base: TensorInfo
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        count, rows, columns = self.base.shape
        rank = self.a.shape[0] // count
        whole = flat_rows(read, self.b).reshape(-1, rank, count)
        plain = TensorInfo("", self.base.dtype, (count * rows, columns), self.base.path, 0, self.base.nbytes)

        def made(top: int, bottom: int) -> Array:
            parts = []
            for expert in range(top // rows, -(-bottom // rows)):
                low, high = max(top, expert * rows), min(bottom, (expert + 1) * rows)
                a, b = base_rows(read, self.a, expert * rank, (expert + 1) * rank), whole[:, :, expert]
                left, right = (a.T, b.T) if self.transposed else (b, a)
                part = product(left[low - expert * rows : high - expert * rows], right)
                part *= np.float32(self.scale)
                part += floats(read, self.base, low * columns, (high - low) * columns).reshape(-1, columns)
                parts.append(part)
            return np.concatenate(parts)

        fill_rows(plain, start, out, made)


@dataclass(frozen=True, slots=True)
class Hadamard:
    """W + s · (A₁ B₁) ∘ (A₂ B₂), LoHa (Hyeon-Woo et al., arXiv 2108.06098), as PEFT merges it.

    `base` W: (out, in, …). Without cores A: (out, r) and B: (r, in · …). With cores T: (r, r, …) A: (r, out),
    B: (r, in), and a factor is Σ_ij T_ij… A_i,out B_j,in.
    """

    base: TensorInfo
    a: tuple[TensorInfo, TensorInfo]
    b: tuple[TensorInfo, TensorInfo]
    cores: tuple[TensorInfo, TensorInfo] | None
    scale: float

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        rights = [flat_rows(read, b) for b in self.b]
        lefts = [flat_rows(read, a) for a in self.a]
        if self.cores is not None:
            lefts = [left.T for left in lefts]
            pairs = zip(self.cores, rights, strict=True)
            rights = [_core(flat_rows(read, core).reshape(*core.shape[:2], -1), right) for core, right in pairs]

        def made(top: int, bottom: int) -> Array:
            one, other = (product(left[top:bottom], right) for left, right in zip(lefts, rights, strict=True))
            one *= other
            one *= np.float32(self.scale)
            one += base_rows(read, self.base, top, bottom)
            return one

        fill_rows(self.base, start, out, made)


@dataclass(frozen=True, slots=True)
class Kronecker:
    """W + s · C ⊗ D, LoKr (Yeh et al., arXiv 2309.14859), as PEFT merges it.

    `base` W: (out, in, …); C: (o₁, i₁) is `c`, or the product of two; D: (o₂, i₂ · …) is `d`, the product of two, or
    with `core` T: (r, r, …) Σ_jk T_jk… A_j,o B_k,i.
    """

    base: TensorInfo
    c: tuple[TensorInfo, ...]
    d: tuple[TensorInfo, ...]
    core: TensorInfo | None
    scale: float

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        c = _factor(read, self.c)
        if self.core is None:
            d = _factor(read, self.d)
        else:
            left, right = (flat_rows(read, part) for part in self.d)
            core = flat_rows(read, self.core).reshape(*self.core.shape[:2], -1)
            d = product(left.T, _core(core, right))

        def made(top: int, bottom: int) -> Array:
            upper, lower = np.divmod(np.arange(top, bottom), len(d))
            update = (c[upper][:, :, None] * d[lower][:, None, :]).reshape(bottom - top, -1)
            update *= np.float32(self.scale)
            update += base_rows(read, self.base, top, bottom)
            return update

        fill_rows(self.base, start, out, made)


@dataclass(frozen=True, slots=True)
class Rows:
    """`base` (rows, width) with the rows `places` replaced by those of `values`, in the base's dtype."""

    base: TensorInfo
    values: TensorInfo
    places: tuple[int, ...]

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        target = np.frombuffer(out, bits_type(self.base.dtype))
        read.read_into(self.base, start, out)
        width, stop = math.prod(self.base.shape[1:]), start + len(target)
        for row, place in enumerate(self.places):
            low, high = max(start, place * width), min(stop, (place + 1) * width)
            if low < high:
                raw = np.empty(high - low, bits_type(self.values.dtype))
                read.read_into(self.values, row * width + low - place * width, raw)
                target[low - start : high - start] = cast(raw, self.values.dtype, self.base.dtype)


@dataclass(frozen=True, slots=True)
class Shifted:
    """`base` + s · `added`, of one shape: a LoRA's own bias."""

    base: TensorInfo
    added: TensorInfo
    scale: float

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        target = np.frombuffer(out, bits_type(self.base.dtype))
        total = floats(read, self.added, start, len(target)) * np.float32(self.scale)
        total += floats(read, self.base, start, len(target))
        target[:] = narrow(total, self.base.dtype)


@dataclass(frozen=True, slots=True)
class Residual:
    """What PEFT leaves of a weight W when A and B begin with a part of it, in W's dtype; W: (out, in), or transposed.

    pissa   W − the best approximation of rank r (Meng et al., arXiv 2404.02948)
    olora   W − s · Q_r R_r, of W = Q R (Büyükakyüz, arXiv 2406.01775)

    The decomposition is computed in float64, of the whole matrix, once.
    """

    base: TensorInfo
    start: str
    rank: int
    scale: float
    transposed: bool

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        left, right = read.once(("start of A and B", self), lambda: self._start(read))

        def made(top: int, bottom: int) -> Array:
            part = (left[top:bottom] @ right).astype(np.float32)
            return np.asarray(base_rows(read, self.base, top, bottom) - part)

        fill_rows(self.base, start, out, made)

    def _start(self, read: Read) -> tuple[Array, Array]:
        weight = flat_rows(read, self.base).astype(np.float64)
        matrix = weight.T if self.transposed else weight
        if self.start == "pissa":
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            left, right = u[:, : self.rank] * s[: self.rank], v[: self.rank]
        else:
            q, r = np.linalg.qr(matrix)
            left, right = self.scale * q[:, : self.rank], r[: self.rank]
        return (right.T, left.T) if self.transposed else (left, right)


def _core(core: Array, right: Array) -> Array:
    """(r, in · n): Σ_j T_ij· B_j,in of T: (r, r, n) and B: (r, in), in the order of j."""
    rank, _, size = core.shape
    total = np.zeros((rank, right.shape[1], size), np.float32)
    for j in range(core.shape[1]):
        total += right[j][None, :, None] * core[:, j][:, None, :]
    return total.reshape(rank, -1)


def _factor(read: Read, parts: tuple[TensorInfo, ...]) -> Array:
    """A matrix that is stored whole, or as the product of two."""
    first = flat_rows(read, parts[0])
    return first if len(parts) == 1 else product(first, flat_rows(read, parts[1]))
