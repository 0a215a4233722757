"""LoHa and LoKr on a weight, as PEFT merges them.

LoHa is W + s · (A₁ B₁) ∘ (A₂ B₂) (Hyeon-Woo et al., arXiv 2108.06098). LoKr is W + s · C ⊗ D (Yeh et al., arXiv
2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.peft.adapter import BY_PEFT, factors_of, scale_of
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed
from deltamerge.tensors.views import base_rows, fill_rows, flat_rows, product


@view(entrywise=True)
def hadamard(read: Read, tensor: Tensor, start: int, out: memoryview, *, scale: float) -> None:
    """Compute W + s · (A₁ B₁) ∘ (A₂ B₂) in float32, rounded once to W's dtype.

    Inputs: W (out, in, …), A₁, A₂ (out, r), B₁, B₂ (r, in · …). With two more, the cores T (r, r, …), A is (r, out) and
    B (r, in), and a factor is Σ_ij T_ij… A_i,out B_j,in.
    """
    base, a1, a2, b1, b2, *cores = tensor.inputs
    rights = [flat_rows(read, b1), flat_rows(read, b2)]
    lefts = [flat_rows(read, a1), flat_rows(read, a2)]
    if cores:
        lefts = [left.T for left in lefts]
        pairs = zip(cores, rights, strict=True)
        rights = [with_core(flat_rows(read, core).reshape(*core.shape[:2], -1), right) for core, right in pairs]

    def rows(top: int, bottom: int) -> Array:
        one, other = (product(left[top:bottom], right) for left, right in zip(lefts, rights, strict=True))
        one *= other
        one *= np.float32(scale)
        one += base_rows(read, base, top, bottom)
        return one

    fill_rows(tensor, start, out, rows)


def with_core(core: Array, right: Array) -> Array:
    """Return (r, in · n): Σ_j T_ij· B_j,in of T (r, r, n) and B (r, in), in the order of j."""
    rank, _, size = core.shape
    total = np.zeros((rank, right.shape[1], size), np.float32)
    for j in range(core.shape[1]):
        total += right[j][None, :, None] * core[:, j][:, None, :]
    return total.reshape(rank, -1)


def with_loha(info: TensorInfo, factors: Mapping[str, TensorInfo], key: str, config: Mapping[str, Any]) -> TensorInfo:
    """Return a weight with its LoHa update. InputError: factors that do not fit it."""
    a1, b1, a2, b2 = factors_of(factors, ("w1_a", "w1_b", "w2_a", "w2_b"), ("t1", "t2"))
    rows, columns = info.shape[0], math.prod(info.shape[1:])
    cores: list[TensorInfo] = []
    if "t1" in factors or "t2" in factors:
        cores = factors_of(factors, ("t1", "t2"), ("w1_a", "w1_b", "w2_a", "w2_b"))
    for n, (a, b) in enumerate(((a1, b1), (a2, b2))):
        rank = b.shape[0]
        if not cores:
            sound = a.shape == (rows, rank) and b.shape == (rank, columns)
        else:
            core = cores[n].shape
            sound = len(core) > 2 and core[:2] == (rank, rank) and a.shape == (rank, rows)
            sound = sound and b.shape[1] * math.prod(core[2:]) == columns
        if not sound:
            raise InputError(f"LoHa's factors do not fit the base's weight {list(info.shape)}", hint=BY_PEFT)
    inputs = [info, a1, a2, b1, b2, *cores]
    scale = scale_of(config, key, b1.shape[0])
    return replace(info, tensor=viewed(hadamard, inputs, info.shape, info.dtype, scale=scale))


@view(entrywise=True)
def kronecker(read: Read, tensor: Tensor, start: int, out: memoryview, *, scale: float, of_c: int, of_d: int) -> None:
    """Compute W + s · C ⊗ D in float32, rounded once to W's dtype.

    Inputs: W (out, in, …), `of_c` factors of C (o₁, i₁), `of_d` of D (o₂, i₂ · …), each the matrix itself or a product
    of two. One more input is a core T (r, r, …): D is Σ_jk T_jk… A_j,o B_k,i.
    """
    base, rest = tensor.inputs[0], tensor.inputs[1 + of_c :]
    c = _factor(read, tensor.inputs[1 : 1 + of_c])
    if len(rest) == of_d:
        d = _factor(read, rest)
    else:
        left, right, core = (flat_rows(read, part) for part in rest)
        d = product(left.T, with_core(core.reshape(*rest[2].shape[:2], -1), right))

    def rows(top: int, bottom: int) -> Array:
        upper, lower = np.divmod(np.arange(top, bottom), len(d))
        update = (c[upper][:, :, None] * d[lower][:, None, :]).reshape(bottom - top, -1)
        update *= np.float32(scale)
        update += base_rows(read, base, top, bottom)
        return update

    fill_rows(tensor, start, out, rows)


def _factor(read: Read, parts: Sequence[Tensor]) -> Array:
    """Return a matrix that is stored whole, or as the product of two."""
    first = flat_rows(read, parts[0])
    return first if len(parts) == 1 else product(first, flat_rows(read, parts[1]))


def with_lokr(info: TensorInfo, factors: Mapping[str, TensorInfo], key: str, config: Mapping[str, Any]) -> TensorInfo:
    """Return a weight with its LoKr update. InputError: factors that do not fit it."""
    names = tuple(factors)
    c = factors_of(factors, ("w1",) if "w1" in factors else ("w1_a", "w1_b"), names)
    d = factors_of(factors, ("w2",) if "w2" in factors else ("w2_a", "w2_b"), names)
    core = factors.get("t2")
    if len({*factors} - {"w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"}) or (core is not None and len(d) == 1):
        raise InputError(f"not LoKr: {', '.join(sorted(factors))}", hint=BY_PEFT)
    if len(d) == 1 and len(d[0].shape) == 3:
        raise InputError("LoKr of a convolution over one dimension", hint=BY_PEFT)
    rows, columns = (c[0].shape[0], c[-1].shape[1]) if len(c[0].shape) == len(c[-1].shape) == 2 else (0, 0)
    if core is not None:
        inner, outer = d[0].shape[1], d[1].shape[1] * math.prod(core.shape[2:])
        sound = core.shape[:2] == (d[0].shape[0], d[1].shape[0])
    else:
        inner, outer = d[0].shape[0], math.prod(d[-1].shape[1:])
        sound = len(d) == 1 or d[0].shape[1] == d[1].shape[0]
    sound = sound and (len(c) == 1 or c[0].shape[1] == c[1].shape[0])
    if not sound or (rows * inner, columns * outer) != (info.shape[0], math.prod(info.shape[1:])):
        raise InputError(f"LoKr's factors do not fit the base's weight {list(info.shape)}", hint=BY_PEFT)
    rank = c[1].shape[0] if len(c) == 2 else d[1].shape[0] if len(d) == 2 else None
    inputs = [info, *c, *d, *([] if core is None else [core])]
    scale = scale_of(config, key, rank)
    update = viewed(kronecker, inputs, info.shape, info.dtype, scale=scale, of_c=len(c), of_d=len(d))
    return replace(info, tensor=update)
