"""Weighted sums whose weights follow from the dot products of the inputs alone.

slerp, nuslerp, multislerp, karcher and model_stock stay in the span of the flattened inputs x_i. One pass over the
tensor computes their Gram matrix G_ij = ⟨x_i, x_j⟩ in float64, the method turns it into coefficients c_i, and a second
pass adds the c_i x_i in float32. Each method is a function from Gram matrices (…, n, n), float64, to coefficients (…,
n): one for the whole tensor, or one per row or column.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.operations import Assembly, weighted
from deltamerge.errors import InputError
from deltamerge.methods.prune.rescale import norm
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import LONGEST_ROW, Kept, alike, densify, halved, row_length
from deltamerge.tensors.traits import traits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Make, Tile

    Part = torch.Tensor | Kept
    Floats = NDArray[np.float64]

ZERO_SUM = 1e-6  # smaller sums of weights count as 0
LIMB_BITS = 30
LIMBS = 3


def keeps_single(**parameters: Any) -> bool:
    """Return True: multislerp and karcher return a single model unchanged."""
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
    """Return the node of Σ c_i x_i, + base if `based`.

    make         makes a graph's node
    function     name of the method
    inputs       nodes of the models; if `based`, the base and then the deltas
    shape        of the tensor
    based        whether inputs[0] is a base, to be added
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
    """Return the kind of vectors. A row must fit in a tile."""
    if len(shape) < 2 or not math.prod(shape) or not rows:
        return "tensor"
    if columns:
        return "columns"
    if row_length(shape) > LONGEST_ROW:
        raise InputError("rows of more than 2**20 elements are not merged one by one", hint="merge whole tensors")
    return "rows"


def _gram_loop(assembly: Assembly, node: Node) -> None:
    registers = list(map(assembly.register, node.inputs))
    of = pairs(len(registers))
    for row, (i, j) in enumerate(of, assembly.sums_of(node, len(of))):
        assembly.add(codes.DOTS, -1, registers[i], registers[j], row)


@traits(loop=_gram_loop, sums=True)
def gram(*models: Part, tile: Tile) -> Floats:
    """Return per block the upper triangle of ⟨x_i, x_j⟩: float64 (blocks, n(n+1)/2); products of float32 are exact in
    it."""
    rows = []
    for parts in zip(*(alike(densify(x, tile.size), tile) for x in models), strict=True):
        wide = [part.to(torch.float64) for part in parts]
        rows.append(torch.stack([halved(wide[i] * wide[j]) for i, j in pairs(len(wide))], 1))
    if not rows:
        return np.zeros((0, len(pairs(len(models)))))
    return torch.cat(rows).cpu().numpy()


def add_up(partials: Floats, *, count: int) -> Floats:
    """Return the Gram matrix (n, n) of all blocks, each entry summed exactly and rounded once."""
    sums = [math.fsum(column) if np.isfinite(column).all() else column.sum() for column in partials.T]
    return square(np.array(sums), count)


def row_grams(*models: Part, tile: Tile) -> Floats:
    """Return (rows, n, n): ⟨x_i, x_j⟩ for each row, the last dimension, of a tile."""
    wide = [densify(x, tile.size).to(torch.float64).view(-1, tile.shape[-1]) for x in models]
    upper = torch.stack([halved(wide[i] * wide[j]) for i, j in pairs(len(wide))], -1)
    return square(upper.cpu().numpy(), len(models))


def scales(*largest: Floats) -> list[float]:
    """Return a power of two ≥ max abs(x) per model, from its blocks' maxima; 1 where that is 0 or not finite."""
    found = [float(blocks.max(initial=0.0)) for blocks in largest]
    return [2.0 ** math.ceil(math.log2(x)) if 0.0 < x < math.inf else 1.0 for x in found]


def column_limbs(*inputs: Any, tile: Tile) -> NDArray[np.int64]:
    """Return Σ x_i x_j of each column (entries that differ in the first dimension alone), as integers: they add in any
    order.

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
    """Return (columns, n, n) Gram matrices in float64."""
    total = sum(limbs[k].astype(np.float64) * 2.0 ** (-LIMB_BITS * (k + 1)) for k in range(LIMBS))
    return square(np.asarray(total) * [scale[i] * scale[j] for i, j in pairs(count)], count)


def _combine_loop(assembly: Assembly, node: Node, along: str, based: bool) -> None:
    *inputs, coefficients = node.inputs
    weights = np.asarray(assembly.values[id(coefficients)]).tolist()
    weighted(assembly, node, weights, models=inputs[based:], base=inputs[0] if based else None)


def _is_along_tensor(node: Node, root: Node) -> bool:
    return bool(node.parameter("along") == "tensor")


@traits(loop=_combine_loop, fits=_is_along_tensor)
def combine(*inputs: Any, tile: Tile, along: str, based: bool) -> torch.Tensor:
    """Return Σ c_i x_i in float32, added to the base if `based`; c (n), or (rows, n) of the tile, or (columns, n)."""
    *parts, coefficients = inputs
    models = parts[1:] if based else parts
    total: torch.Tensor | None = None
    for i, part in enumerate(models):
        product = densify(part, tile.size).to(torch.float32) * _spread(coefficients[..., i], tile, along, part)
        total = product if total is None else total + product
    assert total is not None
    return parts[0].to(torch.float32) + total if based else total


def _spread(coefficient: Floats, tile: Tile, along: str, part: Any) -> Any:
    """Return one model's coefficients for the entries of a tile: a number, or a flat tensor."""
    if along == "tensor":
        return float(np.float32(coefficient))
    device = (part.values if isinstance(part, Kept) else part).device
    values = torch.from_numpy(np.ascontiguousarray(coefficient, np.float32)).to(device)
    if along == "rows":
        return values.repeat_interleave(tile.shape[-1])
    return values[torch.arange(tile.start, tile.stop, device=device) % len(values)]


def arc(cosine: Floats, straight: Any, t: float) -> Floats:
    """Return sin((1 − t)θ)/sin θ and sin(tθ)/sin θ, (…, 2); 1 − t and t where `straight`."""
    angle = np.arccos(np.where(straight, 0.0, cosine))
    sine = np.sin(angle)
    first = np.where(straight, 1.0 - t, np.sin((1.0 - t) * angle) / sine)
    second = np.where(straight, t, np.sin(t * angle) / sine)
    return np.stack([first, second], axis=-1)


def norms_of(gram: Floats) -> Floats:
    """Return ‖x_i‖, (…, n)."""
    return np.asarray(np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1)))


def length_of(coefficients: Floats, gram: Floats) -> float:
    """Return ‖Σ c_i x_i‖."""
    return math.sqrt(max(0.0, float(coefficients @ gram @ coefficients)))


def pairs(count: int) -> list[tuple[int, int]]:
    """Return (i, j), i ≤ j: the order of an upper triangle."""
    return [(i, j) for i in range(count) for j in range(i, count)]


def square(upper: Floats, count: int) -> Floats:
    """Return symmetric matrices (…, n, n) of their upper triangles (…, n(n+1)/2)."""
    full = np.empty((*upper.shape[:-1], count, count))
    for k, (i, j) in enumerate(pairs(count)):
        full[..., i, j] = full[..., j, i] = upper[..., k]
    return full
