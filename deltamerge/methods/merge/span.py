"""Merges whose result is a weighted sum of their inputs, with weights found from the inputs' dot products alone.

slerp, nuslerp, multislerp, karcher and model_stock stay in the span of the flattened inputs x_i. One pass over the
tensor computes their Gram matrix G_ij = ⟨x_i, x_j⟩ in float64, the method turns it into coefficients c_i, and a second
pass adds the c_i x_i in float32. Each method is a function from Gram matrices (…, n, n), float64, to coefficients (…,
n): one for the whole tensor, or one per row or column.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.io.lazy import torch
from deltamerge.methods.ops import alike, densify, halved
from deltamerge.methods.prune.rescale import norm
from deltamerge.methods.tiles import LONGEST_ROW, Kept, Make, Tile, row_length

if TYPE_CHECKING:
    Part = torch.Tensor | Kept

Floats = NDArray[np.float64]

COLINEAR = 0.9995
ZERO_SUM = 1e-6
LIMB_BITS = 30
LIMBS = 3


def slerp(gram: Floats, *, t: float, tile: Tile | None = None) -> Floats:
    """sin((1 − t)θ)/sin θ and sin(tθ)/sin θ, θ the angle between base and model; 1 − t and t if abs(cos θ) > 0.9995.

    https://en.wikipedia.org/wiki/Slerp; norms of at most 1e-8 count as 1.
    """
    norms = _norms(gram)
    norms = np.where(norms > 1e-8, norms, 1.0)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1.0, 1.0)
    return _arc(cosine, np.abs(cosine) > COLINEAR, t)


def nuslerp(gram: Floats, *, weights: tuple[float, ...], tile: Tile | None = None) -> Floats:
    """slerp at t = w_2 / (w_1 + w_2), or 1/2 where that sum is 0; colinear only where sin θ is 0 to 1e-8."""
    total = math.fsum(weights)
    t = 0.5 if abs(total) < ZERO_SUM else weights[1] / total
    norms = np.maximum(_norms(gram), 1e-7)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1.0, 1.0)
    return _arc(cosine, 1.0 - cosine * cosine <= 1e-16, t)


def multislerp(
    gram: Floats, *, weights: tuple[float, ...], normalize_weights: bool, eps: float, tile: Tile | None = None
) -> Floats:
    """Directions u_i = x_i / (‖x_i‖ + ε), averaged in the tangent space of their normalised mean m.

        gram                of the models
        weights             w_i
        normalize_weights   whether to divide them by their sum
        eps                 ε

    v = Σ w_i (u_i − ⟨u_i, m⟩ m); back on the sphere m cos‖v‖ + v sin‖v‖/‖v‖; times Σ w_i ‖x_i‖. Two opposite models are
    interpolated linearly; InputError if more of them add up to 0.

    https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
    """
    count = gram.shape[-1]
    share = np.array(weights, np.float64)
    if normalize_weights:
        if abs(share.sum()) < ZERO_SUM:
            raise InputError("multislerp: the weights add up to 0", hint="change them, or set normalize_weights: false")
        share = share / share.sum()
    if count == 1:
        return np.ones(1)
    norms = _norms(gram)
    unit = gram / np.multiply.outer(norms + eps, norms + eps)
    length = _length(share, unit)
    if length < max(eps, 1e-12):
        if count == 2 or not norms.any():
            return share
        raise InputError("multislerp: the directions of the models add up to 0", hint="use other weights")
    mean = share / length
    tangent = share - (share @ unit @ mean) * mean
    angle = _length(tangent, unit) + eps
    direction = mean * math.cos(angle) + tangent * (math.sin(angle) / angle if angle else 1.0)
    return np.asarray((norms @ share) * direction / np.where(norms + eps > 0.0, norms + eps, 1.0))


def karcher(gram: Floats, *, max_iter: int, tol: float, tile: Tile | None = None) -> Floats:
    """The point of the sphere nearest to all directions u_i, × the mean norm: m ← exp_m(mean of log_m(u_i)).

    At most `max_iter` steps, until one is shorter than `tol`; models of norm ≤ `tol` have no direction
    (arXiv 2603.04972).
    """
    norms = _norms(gram)
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(norms))
    safe = np.where(valid, norms, 1.0)
    unit = gram / np.multiply.outer(safe, safe)
    share = valid / valid.sum()
    length = _length(share, unit)
    mean = share / length if length >= tol else np.eye(len(norms))[int(valid.argmax())]
    for _ in range(max_iter):
        cosine = np.clip(unit @ mean, -1.0, 1.0)
        angle = np.where(valid, np.arccos(cosine), 0.0)
        far = (angle >= tol) & (angle < math.pi)
        factor = np.divide(angle, np.sin(angle), out=np.zeros_like(angle), where=far) * share
        tangent = factor - (factor @ cosine) * mean
        length = _length(tangent, unit)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * (tangent / length)
        mean = mean / _length(mean, unit)
    return np.asarray(norms.mean() * mean / safe)


def model_stock(gram: Floats, *, tile: Tile | None = None) -> Floats:
    """t / N for each delta, t = N c / (1 + (N − 1) c), c the mean cosine of the pairs; t = 0 where that has no value.

    arXiv 2403.19522; products of norms below 1e-6 count as 1e-6.
    """
    count = gram.shape[-1]
    norms = _norms(gram)
    first, second = np.triu_indices(count, 1)
    products = np.maximum(norms[..., first] * norms[..., second], 1e-6)
    cosine = np.clip(gram[..., first, second] / products, -1.0, 1.0).mean(-1)
    divisor = 1.0 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return np.repeat(t[..., None] / count, count, axis=-1)


def keeps_single(**parameters: Any) -> bool:
    """multislerp and karcher give back a single model as it is."""
    return True


def nodes(
    make: Make,
    function: str,
    inputs: list[Any],
    shape: tuple[int, ...],
    *,
    based: bool,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    filter_wise: bool = False,
    **parameters: Any,
) -> Any:
    """The node of Σ c_i x_i, + base if `based`.

    make         makes a graph's node
    function     name of the method
    inputs       nodes of the models; if `based`, the base and then the deltas
    shape        of the tensor
    based        whether inputs[0] is a base that is added
    nuslerp_flatten, nuslerp_row_wise, filter_wise   whether vectors are the tensor, its rows or its columns
    """
    models = inputs[1:] if based else inputs
    along = _along(shape, rows=filter_wise or not nuslerp_flatten, columns=nuslerp_row_wise and not nuslerp_flatten)
    if along == "tensor":
        partials = make(gram, models, kind="concat", shape=shape)
        whole = make(add_up, [partials], kind="small", count=len(models))
        coefficients = make(function, [whole], kind="small", **parameters)
    elif along == "rows":
        grams = make(row_grams, models, shape=shape)
        coefficients = make(function, [grams], shape=shape, **parameters)
    else:
        largest = [make(norm, [x], kind="concat", shape=shape, norm="linf") for x in models]
        powers = make(scales, largest, kind="small")
        limbs = make(column_limbs, [*models, powers], kind="sum", shape=shape)
        columns = make(from_limbs, [limbs, powers], kind="small", count=len(models))
        coefficients = make(function, [columns], kind="small", **parameters)
    return make(combine, [*inputs, coefficients], shape=shape, along=along, based=based)


def _along(shape: tuple[int, ...], *, rows: bool, columns: bool) -> str:
    """Vectors are one row; rows have to fit in a tile."""
    if len(shape) < 2 or not math.prod(shape) or not rows:
        return "tensor"
    if columns:
        return "columns"
    if row_length(shape) > LONGEST_ROW:
        raise InputError("rows of more than 2**20 elements are not merged one by one", hint="merge whole tensors")
    return "rows"


def gram(*models: Part, tile: Tile) -> Floats:
    """Per block the upper triangle of ⟨x_i, x_j⟩: float64 (blocks, n(n+1)/2); products of float32 are exact in it."""
    rows = []
    for parts in zip(*(alike(densify(x, tile.size), tile) for x in models), strict=True):
        wide = [part.to(torch.float64) for part in parts]
        rows.append(torch.stack([halved(wide[i] * wide[j]) for i, j in pairs(len(wide))], 1))
    if not rows:
        return np.zeros((0, len(pairs(len(models)))))
    return torch.cat(rows).cpu().numpy()


def add_up(partials: Floats, *, count: int) -> Floats:
    """The Gram matrix (n, n) of all blocks, each entry summed exactly and rounded once."""
    sums = [math.fsum(column) if np.isfinite(column).all() else column.sum() for column in partials.T]
    return square(np.array(sums), count)


def row_grams(*models: Part, tile: Tile) -> Floats:
    """(rows, n, n): ⟨x_i, x_j⟩ for each row, the last dimension, of a tile."""
    wide = [densify(x, tile.size).to(torch.float64).view(-1, tile.shape[-1]) for x in models]
    upper = torch.stack([halved(wide[i] * wide[j]) for i, j in pairs(len(wide))], -1)
    return square(upper.cpu().numpy(), len(models))


def scales(*largest: Floats) -> list[float]:
    """A power of two ≥ max abs(x) per model, from its blocks' maxima; 1 where that is 0 or not finite."""
    found = [float(blocks.max(initial=0.0)) for blocks in largest]
    return [2.0 ** math.ceil(math.log2(x)) if 0.0 < x < math.inf else 1.0 for x in found]


def column_limbs(*inputs: Any, tile: Tile) -> NDArray[np.int64]:
    """Σ x_i x_j of each column (entries that differ in the first dimension alone), as integers: they add in any order.

    int64 (3, columns, n(n+1)/2): products over their scales, cut into three limbs of 30 bits; up to 2**31 rows.
    """
    *models, scale = inputs
    columns = math.prod(tile.shape[1:])
    wide = [densify(x, tile.size).to(torch.float64) / s for x, s in zip(models, scale, strict=True)]
    place = torch.arange(tile.start, tile.stop, device=wide[0].device) % columns
    upper = pairs(len(models))
    sums = torch.zeros(LIMBS, len(upper), columns, dtype=torch.int64, device=wide[0].device)
    for k, (i, j) in enumerate(upper):
        rest = wide[i] * wide[j]
        for limb in range(LIMBS):
            rest = rest * 2.0**LIMB_BITS
            whole = rest.trunc()
            sums[limb, k].index_add_(0, place, whole.to(torch.int64))
            rest = rest - whole
    return sums.transpose(1, 2).cpu().numpy()


def from_limbs(limbs: NDArray[np.int64], scale: list[float], *, count: int) -> Floats:
    """(columns, n, n) Gram matrices in float64."""
    total = sum(limbs[k].astype(np.float64) * 2.0 ** (-LIMB_BITS * (k + 1)) for k in range(LIMBS))
    return square(np.asarray(total) * [scale[i] * scale[j] for i, j in pairs(count)], count)


def combine(*inputs: Any, tile: Tile, along: str, based: bool) -> torch.Tensor:
    """Σ c_i x_i in float32, added to the base if `based`; c (n), or (rows, n) of the tile, or (columns, n)."""
    *parts, coefficients = inputs
    models = parts[1:] if based else parts
    total: torch.Tensor | None = None
    for i, part in enumerate(models):
        product = densify(part, tile.size).to(torch.float32) * _spread(coefficients[..., i], tile, along, part)
        total = product if total is None else total + product
    assert total is not None
    return parts[0].to(torch.float32) + total if based else total


def _spread(coefficient: Floats, tile: Tile, along: str, part: Any) -> Any:
    """One model's coefficient for every entry of a tile: a number, or a flat tensor."""
    if along == "tensor":
        return float(np.float32(coefficient))
    device = (part.values if isinstance(part, Kept) else part).device
    values = torch.from_numpy(np.ascontiguousarray(coefficient, np.float32)).to(device)
    if along == "rows":
        return values.repeat_interleave(tile.shape[-1])
    return values[torch.arange(tile.start, tile.stop, device=device) % len(values)]


def _arc(cosine: Floats, straight: Any, t: float) -> Floats:
    angle = np.arccos(np.where(straight, 0.0, cosine))
    sine = np.sin(angle)
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return np.stack([first, second], axis=-1)


def _norms(gram: Floats) -> Floats:
    return np.asarray(np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)))


def _length(coefficients: Floats, gram: Floats) -> float:
    """‖Σ c_i x_i‖."""
    return math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))


def pairs(count: int) -> list[tuple[int, int]]:
    """(i, j), i ≤ j: the order of an upper triangle."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def square(upper: Floats, count: int) -> Floats:
    """Symmetric matrices (…, n, n) of their upper triangles (…, n(n+1)/2)."""
    full = np.empty((*upper.shape[:-1], count, count))
    for k, (i, j) in enumerate(pairs(count)):
        full[..., i, j] = full[..., j, i] = upper[..., k]
    return full
