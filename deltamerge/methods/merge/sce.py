"""SCE: select entries that vary, weigh the models, erase the minority's sign (Wan et al., arXiv 2408.07990).

Σ w_i Δ_i ÷ Σ w_i over the models of the elected sign is added to the base, w_i in proportion to mean(Δ_i²).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from deltamerge.engine.fused import codes
from deltamerge.methods.merge.sums import weighted_sum
from deltamerge.methods.prune import select
from deltamerge.methods.prune.rescale import norm
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import densify
from deltamerge.tensors.traits import traits

if TYPE_CHECKING:
    from deltamerge.engine.fused.operations import Assembly
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Kept, Make, Tile

TopShare = Annotated[float, Param("fraction kept of the entries that vary", low=0, high=1)]
SMALLEST_WEIGHT = 1e-6


def _variance_loop(assembly: Assembly, node: Node) -> None:
    assembly.add(codes.VARIANCE, assembly.made(node), models=tuple(map(assembly.register, node.inputs)))


@traits(loop=_variance_loop)
def variance(*deltas: torch.Tensor | Kept, tile: Tile) -> torch.Tensor:
    """Return each entry's variance over models in float32, computed from differences to the first model; 0 if equal."""
    first, *others = (densify(delta, tile.size) for delta in deltas)
    count = float(len(deltas))
    apart = [torch.zeros_like(first), *(other - first for other in others)]
    mean = weighted_sum(apart, (1.0,) * len(apart)) / first.new_tensor(count)
    total = torch.zeros_like(first)
    for x in apart:
        total += (x - mean) * (x - mean)
    return total / first.new_tensor(count)


def weights(*squares: np.ndarray[Any, Any], size: int) -> tuple[float, ...]:
    """Return the mean (Δ_i²) ÷ their sum, in float32; all equal where that sum is below 1e-6."""
    means = [math.fsum(part) / max(size, 1) for part in squares]
    total = math.fsum(means)
    if total < SMALLEST_WEIGHT:
        return (float(np.float32(1.0 / len(means))),) * len(means)
    return tuple(float(np.float32(mean / total)) for mean in means)


def nodes(
    make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool, select_topk: float
) -> Any:
    """Make the node of `sce`.

    Passes find the int(select_topk · n) most varying of the n entries that vary. One more gives the weights.
    """
    base, *deltas = inputs
    if select_topk < 1.0:
        spread = make(variance, deltas, shape=shape)
        high = make(select.high_histogram, [spread], kind="sum", shape=shape)
        nonzero = make(select.count_nonzero, [spread], kind="sum", shape=shape)
        found = make(select.pick_share, [high, nonzero], kind="small", share=select_topk)
        low = make(select.low_histogram, [spread, found], kind="sum", shape=shape)
        cut = make(select.pick_cut, [low, found], kind="small")
        equal = make(select.equal_counts, [spread, cut], kind="concat", shape=shape)
        ranks = make(select.pick_ranks, [equal], kind="small")
        deltas = [make(select.keep_where, [delta, spread, cut, ranks], shape=shape) for delta in deltas]
    squares = [make(norm, [x], kind="concat", shape=shape, norm="l2") for x in deltas]
    shares = make(weights, squares, kind="small", size=math.prod(shape))
    return make(function, [base, *deltas, shares], shape=shape)


def loop(assembly: Assembly, node: Node) -> None:
    """Add this merge to the compiled loop as an operation."""
    base, *deltas, weights = node.inputs
    start, registers = assembly.operand(base), tuple(map(assembly.register, deltas))
    given = tuple(assembly.values[id(weights)])
    assembly.add(codes.ELECT, assembly.made(node), start, models=registers, weights=given)


@delta_method(
    "entries of the largest variance over models, weighted by mean(Δ_i²), without entries of the minority's sign",
    "arXiv 2408.07990",
    nodes=nodes,
    loop=loop,
)
def sce(base: torch.Tensor, *inputs: Any, tile: Tile, select_topk: TopShare = 1.0) -> torch.Tensor:
    """Return base + Σ w_i Δ_i ÷ Σ w_i over the models with the sign of Σ Δ_i (0 counts as +).

    inputs        the deltas, selected by `nodes`, and the weights, which add up to 1
    select_topk   used by `nodes`

    The result is float32. A sum of weights below 1e-6 counts as 1e-6.
    """
    *deltas, weights = inputs
    dense = [densify(delta, tile.size) for delta in deltas]
    positive = weighted_sum(dense, (1.0,) * len(dense)) >= 0
    mixed, divisor = torch.zeros_like(dense[0]), torch.zeros_like(dense[0])
    for delta, weight in zip(dense, weights, strict=True):
        agrees = torch.where(positive, delta > 0, delta < 0)
        mixed += torch.where(agrees, delta * weight, 0.0)
        divisor += torch.where(agrees, weight, 0.0)
    return base.to(torch.float32) + mixed / divisor.clamp(min=float(np.float32(SMALLEST_WEIGHT)))
