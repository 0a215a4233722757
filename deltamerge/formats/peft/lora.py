"""The update of a weight by an adapter: LoRA (DoRA, stacked experts, residuals of PiSSA and OLoRA, biases), LoHa, LoKr.

Each is computed in float32 and rounded once to the weight's dtype, tile by tile. Products are summed in the order of k.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.peft.adapter import BY_PEFT, DERIVED, factors_of, scale_of
from deltamerge.tensors.dtypes import PLAIN, Array, bits_type, narrow
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed
from deltamerge.tensors.views import CHUNK, base_rows, fill_lines, fill_rows, flat_rows, floats, product, zeros_like

Config = Mapping[str, Any]


@view(entrywise=True)
def low_rank(read: Read, tensor: Tensor, start: int, out: memoryview, *, scale: float, transposed: bool) -> None:
    """Compute W + s · B A, as PEFT merges a LoRA adapter (Hu et al., arXiv 2106.09685).

    Inputs: W (out, in), A (r, in), B (out, r). If `transposed`, W is (in, out) (GPT-2's Conv1D, embeddings), and (B A)ᵀ
    is added. A convolution's W (out, in, …) is read as (out, in · …), and so are A (r, in, …) and B (out, r, 1, …).
    A fourth input is DoRA's magnitude m (out): the part of W + s · B A that makes output i is multiplied by
    m_i / ‖that part‖₂ (arXiv 2402.09353).

    B A is Σ_k B_ik A_kj in the order of k, each product and sum rounded: a matrix product's own order would depend on
    the tile's shape, the library and its threads.
    """
    a, b = tensor.inputs[1:3]
    magnitude = tensor.inputs[3] if len(tensor.inputs) > 3 else None
    right = flat_rows(read, b).T if transposed else flat_rows(read, a)
    norms = None
    if magnitude is not None and transposed:
        norms = read.once(("norms of columns", tensor), lambda: _norms(read, tensor, right))

    def rows(top: int, bottom: int) -> Array:
        update = _sum(read, tensor, right, top, bottom)
        return update if magnitude is None else _scaled(read, update, magnitude, norms, top, bottom)

    fill_rows(tensor, start, out, rows)


def _sum(read: Read, tensor: Tensor, right: Array, top: int, bottom: int) -> Array:
    """Return rows [top, bottom) of W + s · B A in float32."""
    base, a, b = tensor.inputs[:3]
    if tensor.parameter("transposed"):
        inner = math.prod(a.shape[1:])
        left = np.stack([floats(read, a, k * inner + top, bottom - top) for k in range(a.shape[0])], 1)
    else:
        rank = b.shape[1]
        left = floats(read, b, top * rank, (bottom - top) * rank).reshape(-1, rank)
    with np.errstate(over="ignore", invalid="ignore"):
        update = product(left, right)
        update *= np.float32(tensor.parameter("scale"))
        update += base_rows(read, base, top, bottom)
    return update


def _scaled(read: Read, update: Array, magnitude: Tensor, norms: Array | None, top: int, bottom: int) -> Array:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if norms is not None:
            update *= floats(read, magnitude, 0, len(norms)) / norms
        else:
            norm = np.sqrt(np.square(update, dtype=np.float64).sum(axis=1)).astype(np.float32)
            update *= (floats(read, magnitude, top, bottom - top) / norm)[:, None]
    return np.asarray(update, np.float32)


def _norms(read: Read, tensor: Tensor, right: Array) -> Array:
    """Return the norm of each column of W + s · B A. The whole weight is read for them, piece by piece."""
    rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
    step, squares = max(1, CHUNK // columns), np.zeros(columns, np.float64)
    for top in range(0, rows, step):
        part = _sum(read, tensor, right, top, min(rows, top + step))
        squares += np.square(part, dtype=np.float64).sum(axis=0)
    return np.asarray(np.sqrt(squares).astype(np.float32))


@view(entrywise=True)
def residual(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, begins: str, rank: int, scale: float, transposed: bool
) -> None:
    """Compute the residual of a weight W (out, in), or transposed, when PEFT starts A and B with a part of it.

    pissa   W − the best approximation of rank r (Meng et al., arXiv 2404.02948)
    olora   W − s · Q_r R_r, of W = Q R (Büyükakyüz, arXiv 2406.01775)

    The decomposition of the whole matrix is computed once, in float64.
    """
    (base,) = tensor.inputs

    def decomposed() -> tuple[Array, Array]:
        weight = flat_rows(read, base).astype(np.float64)
        matrix = weight.T if transposed else weight
        if begins == "pissa":
            u, s, v = np.linalg.svd(matrix, full_matrices=False)
            left, right = u[:, :rank] * s[:rank], v[:rank]
        else:
            q, r = np.linalg.qr(matrix)
            left, right = scale * q[:, :rank], r[:rank]
        return (right.T, left.T) if transposed else (left, right)

    left, right = read.once(("start of A and B", tensor), decomposed)

    def rows(top: int, bottom: int) -> Array:
        part = (left[top:bottom] @ right).astype(np.float32)
        return np.asarray(base_rows(read, base, top, bottom) - part)

    fill_rows(tensor, start, out, rows)


@view(entrywise=True)
def added(read: Read, tensor: Tensor, start: int, out: memoryview, *, scale: float) -> None:
    """Compute the first input + s · the second, of one shape: a LoRA's own bias."""
    base, addend = tensor.inputs
    target = np.frombuffer(out, bits_type(tensor.dtype))
    total = floats(read, addend, start, len(target)) * np.float32(scale)
    total += floats(read, base, start, len(target))
    target[:] = narrow(total, tensor.dtype)


def is_low_rank(tensor: Tensor) -> bool:
    """Tell whether a tensor is a weight with a LoRA update."""
    return tensor.function == low_rank.__name__


def is_residual(tensor: Tensor) -> bool:
    """Tell whether a tensor is the residual of a weight under PiSSA or OLoRA."""
    return tensor.function == residual.__name__


def is_dora(tensor: Tensor) -> bool:
    """Tell whether a LoRA update has magnitudes."""
    return len(tensor.inputs) > 3


def update_of(info: TensorInfo, base: TensorInfo) -> TensorInfo | None:
    """Return s · B A alone in float32, where `info` is `base` with that update; None where it is anything else."""
    tensor = info.tensor
    if not is_low_rank(tensor) or is_dora(tensor) or not tensor.inputs[0].is_same(base):
        return None
    nothing = zeros_like(tensor.inputs[0], "F32")
    update = viewed(low_rank, [nothing, *tensor.inputs[1:]], tensor.shape, "F32", **dict(tensor.parameters))
    return TensorInfo(info.name, update)


def is_lora(factors: Mapping[str, TensorInfo]) -> bool:
    """Tell whether the factors are A and B, of a matrix or an embedding."""
    return not factors.keys().isdisjoint({"A", "B", "embedding_A", "embedding_B", "magnitude", "B.bias"})


def pair_of(factors: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo]:
    """Return A and B. InputError: there is not one of each, or their ranks differ."""
    tail = "embedding_" if "embedding_A" in factors or "embedding_B" in factors else ""
    a, b = factors_of(factors, (f"{tail}A", f"{tail}B"), ("magnitude", *([] if tail else ["B.bias"])))
    if min(len(a.shape), len(b.shape)) < 2 or any(n != 1 for n in b.shape[2:]):
        raise InputError(f"A {list(a.shape)} and B {list(b.shape)} are no matrices", hint=BY_PEFT)
    if a.shape[0] != b.shape[1] or not a.shape[0]:
        groups = " (a convolution in groups?)" if len(a.shape) > 2 else ""
        raise InputError(f"the ranks of A {list(a.shape)} and B {list(b.shape)} differ{groups}", hint=BY_PEFT)
    return a, b


def expected(factors: Mapping[str, TensorInfo]) -> tuple[int, ...] | None:
    """Return the shape (out, in, …) of the weight that A and B are for; None where factors do not tell it."""
    if not is_lora(factors) or "embedding_A" in factors:
        return None
    a, b = pair_of(factors)
    return (b.shape[0], *a.shape[1:])


def with_lora(
    info: TensorInfo, factors: Mapping[str, TensorInfo], key: str, config: Config, turned: bool
) -> TensorInfo:
    """Return a weight with its LoRA update. InputError: shapes that do not fit, or parts that are missing."""
    a, b = pair_of(factors)
    shape = (b.shape[0], *a.shape[1:])
    embedding = "embedding_A" in factors
    transposed = embedding or turned or (len(shape) == 2 and shape != info.shape == shape[::-1])
    if info.shape != (shape[::-1] if transposed else shape):
        raise InputError(f"B A gives {list(shape)}, the base's weight is {list(info.shape)}")
    magnitude = factors.get("magnitude")
    if magnitude is not None and math.prod(magnitude.shape) != shape[0]:
        raise InputError(f"lora_magnitude_vector must have {shape[0]} elements, has the shape {list(magnitude.shape)}")
    if magnitude is None and config.get("use_dora"):
        raise InputError("has no lora_magnitude_vector, which use_dora needs", hint="download the adapter again")
    if config.get("lora_bias") and "B.bias" not in factors and not embedding:
        raise InputError("has no lora_B.bias, which lora_bias needs", hint="download the adapter again")
    begins = config.get("init_lora_weights")
    # A decomposition has no more parts than the weight has rows or columns, whatever r says.
    most = min(shape) if begins in DERIVED and not embedding else math.inf
    scale, base = scale_of(config, key, a.shape[0], most), info.tensor
    if begins in DERIVED and not embedding:
        if len(shape) != 2:
            raise InputError(f"init_lora_weights {begins!r} of a convolution", hint=BY_PEFT)
        flipped = transposed and begins == "pissa"  # PEFT computes OLoRA's Q and R from a Conv1D's weight as stored
        rank = a.shape[0]
        base = viewed(
            residual, [base], info.shape, info.dtype, begins=str(begins), rank=rank, scale=scale, transposed=flipped
        )
    inputs: list[Tensor | TensorInfo] = [base, a, b, *([] if magnitude is None else [magnitude])]
    update = viewed(low_rank, inputs, info.shape, info.dtype, scale=scale, transposed=transposed)
    return replace(info, tensor=update)


def with_bias(bias: TensorInfo | None, factors: Mapping[str, TensorInfo], key: str, config: Config) -> TensorInfo:
    """Return the bias of a layer plus the bias of B. InputError: the layer has no bias, or another shape."""
    a, _ = pair_of(factors)
    addend = factors["B.bias"]
    if bias is None:
        raise InputError("lora_bias needs a bias in the base's layer, which has none", hint=BY_PEFT)
    if bias.shape != addend.shape or bias.dtype not in PLAIN:
        raise InputError(f"lora_B.bias is {list(addend.shape)}, the base's bias {list(bias.shape)} {bias.dtype}")
    scale = scale_of(config, key, a.shape[0])
    return replace(bias, tensor=viewed(added, [bias, addend], bias.shape, bias.dtype, scale=scale))


Tensors = Mapping[str, TensorInfo]


@view(entrywise=True)
def expert_updates(read: Read, tensor: Tensor, start: int, out: memoryview, *, scale: float, transposed: bool) -> None:
    """Compute W_e + s · B_e A_e in float32, rounded once to W's dtype.

    Inputs: W (E, out, in), or (E, in, out) if `transposed`; A (E · r, in), expert by expert; B (out, r · E), where
    column k · E + e is expert e's.
    """
    base, a, b = tensor.inputs
    count, rows, columns = tensor.shape
    rank = a.shape[0] // count
    whole = flat_rows(read, b).reshape(-1, rank, count)

    def made(top: int, bottom: int) -> Array:
        parts = []
        for expert in range(top // rows, -(-bottom // rows)):
            low, high = max(top, expert * rows), min(bottom, (expert + 1) * rows)
            own_a, own_b = base_rows(read, a, expert * rank, (expert + 1) * rank), whole[:, :, expert]
            left, right = (own_a.T, own_b.T) if transposed else (own_b, own_a)
            part = product(left[low - expert * rows : high - expert * rows], right)
            part *= np.float32(scale)
            part += floats(read, base, low * columns, (high - low) * columns).reshape(-1, columns)
            parts.append(part)
        return np.concatenate(parts)

    fill_lines(columns, tensor.dtype, start, out, made)


def with_experts(
    info: TensorInfo, factors: Tensors, key: str, config: Mapping[str, Any], transposed: bool | None
) -> TensorInfo:
    """Return a stack of experts' weights with its update; `transposed` decides where shapes do not."""
    a, b = pair_of(factors)
    if not fits(info, factors):
        raise InputError(f"A {list(a.shape)} and B {list(b.shape)} do not fit the base's {list(info.shape)}")
    if config.get("init_lora_weights") in DERIVED or not factors.keys() <= {"A", "B"}:
        raise InputError("only plain LoRA of experts can be read", hint=BY_PEFT)
    straight, turned = _ways(info, factors)
    if straight and turned and transposed is None:
        raise InputError(f"square experts {list(info.shape)} do not tell whether they are transposed", hint=BY_PEFT)
    way = bool(transposed) if straight and turned else turned
    scale = scale_of(config, key, a.shape[0] // info.shape[0])
    update = viewed(expert_updates, [info, a, b], info.shape, info.dtype, scale=scale, transposed=way)
    return replace(info, tensor=update)


def fits(info: TensorInfo, factors: Tensors) -> bool:
    """Tell whether A and B are for the stack of experts `info`."""
    a, _ = pair_of(factors)
    return len(info.shape) == 3 and not a.shape[0] % info.shape[0] and any(_ways(info, factors))


def _ways(info: TensorInfo, factors: Tensors) -> tuple[bool, bool]:
    """Tell whether the experts can be (out, in), and whether they can be (in, out)."""
    a, b = pair_of(factors)
    return info.shape[1:] == (b.shape[0], a.shape[1]), info.shape[1:] == (a.shape[1], b.shape[0])


def stored_transposed(gate_up: TensorInfo | None, down: TensorInfo | None) -> bool | None:
    """Tell by both shapes whether a container's fused experts are (in, out); None if they do not tell."""
    if gate_up is None or down is None or len(gate_up.shape) != 3 or len(down.shape) != 3:
        return None
    (_, p, q), (_, s, t) = gate_up.shape, down.shape
    straight, turned = (p == 2 * t and q == s), (q == 2 * s and p == t)
    return turned if straight != turned else None


# LoHa and LoKr, as PEFT merges them.
#
# LoHa is W + s · (A₁ B₁) ∘ (A₂ B₂) (Hyeon-Woo et al., arXiv 2108.06098). LoKr is W + s · C ⊗ D (Yeh et al., arXiv
# 2309.14859).


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
