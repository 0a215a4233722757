"""DARE: keep each entry with probability density, divide by q (Yu et al., arXiv 2311.03099; arXiv 2410.09344).

δ ∘ Δ / q, δ ~ Bernoulli(density) for each entry; q is the density unless the recipe gives another.

With `sampling: magnitude` entry i is kept with probability π_i = min(1, c · abs(Δ_i)), the mean of π being the density.
With x = abs(Δ) of N entries, Σ min(1, c x) = density · N has one solution: the m largest entries are clipped to 1, and
c = (density · N − m) / Σ x over the others. One pass counts entries and adds mantissas by the high 16 bits of x, which
gives the bin that contains 1/c. A second pass counts the values inside that bin, so c is exact. All sums are of
integers, so c is the same for any tiles, threads and device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.operations import Assembly, subtract, subtract_at
from deltamerge.methods.ops import at
from deltamerge.methods.prune.bits import guided, is_sparse, keep_torch, positions_torch, threshold, words_torch
from deltamerge.methods.prune.select import HIGH, LOW, Bin, low_histogram, magnitude_bits
from deltamerge.methods.registry import prune_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import Kept

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.methods.prune.bits import Key
    from deltamerge.methods.registry import Masking
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Tile

    Integers = NDArray[np.int64]

FAR = 1e200


def nodes(masking: Masking) -> Any:
    """Make the node of the kept entries, with one probability for all, or in proportion to abs(Δ)."""
    if masking.sampling == "magnitude":
        return importance(masking)
    return masking.masked(*masking.pair, key=masking.key, density=masking.density)


def loop(assembly: Assembly, node: Node, key: Key, density: float) -> None:
    """Add this pruning to the compiled loop as operations."""
    if is_sparse(density):
        kept = assembly.keep(node, assembly.new_list())
        assembly.add(codes.DRAW, kept.places, len(assembly.tables), key=key)
        assembly.tables.append(guided(density))
        subtract_at(assembly, node, kept)
        return
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        subtract(assembly, node)
        return
    tune, base = map(assembly.operand, node.inputs)
    assembly.add(codes.DROP, assembly.made(node), tune, base, high, low, key=key)


def gives_positions(node: Node) -> bool:
    """Tell whether the mask is so sparse that the result is a `Kept`."""
    return is_sparse(node.parameter("density"))


@prune_method(
    "keep each entry with probability density, divide by q (default: density)",
    "arXiv 2311.03099, 2410.09344",
    options=frozenset({"rescale", "sampling", "protect", "budget"}),
    random=True,
    nodes=nodes,
    loop=loop,
    sparse=gives_positions,
    q_decides_below=0.05,
)
def dare(tune: torch.Tensor, base: torch.Tensor, *, tile: Tile, key: Key, density: float) -> torch.Tensor | Kept:
    """Return δ ∘ Δ, δ ~ Bernoulli(density) for each entry, not rescaled.

        tune      flat tile in its stored dtype
        base      flat tile in its stored dtype
        key       the mask's key
        density   share of entries that are kept

    The result is flat float32 with zeros for dropped entries. Below density `SPARSE_BELOW` it is a `Kept`, whose cost
    grows with the number of kept entries.
    """
    if is_sparse(density):
        return kept_at(tune, base, positions_torch(key, tile.start, tile.stop, density, tune.device))
    delta = tune.to(torch.float32) - base.to(torch.float32)
    kept = keep_torch(key, tile.start, tile.stop, density, tune.device)
    return delta.where(kept, delta.new_zeros(()))


def kept_at(tune: torch.Tensor, base: torch.Tensor, positions: torch.Tensor) -> Kept:
    """Return Δ at the kept positions."""
    return Kept(positions, at(tune, positions) - at(base, positions))


# In proportion to abs(Δ).


@dataclass(frozen=True, slots=True)
class Clip:
    """The bin that contains 1/c, the number of entries above it, and Σ x of the entries below it."""

    high: int
    above: int
    below: float


def sums(delta: torch.Tensor, *, tile: Tile) -> Integers:
    """Return int64 (2, 32768): for each value of the high 16 bits of abs(Δ) its count and the sum of low bits."""
    bits = magnitude_bits(delta)
    high, low = bits >> 16, (bits & 0xFFFF).to(torch.float64)  # sums stay below 2**53: exact
    counts = torch.bincount(high, minlength=HIGH)
    return torch.stack([counts, torch.bincount(high, low, minlength=HIGH).to(torch.int64)]).cpu().numpy()


def pick_clip(found: Integers, *, expected: float) -> Clip:
    """Return the highest bin whose lower edge, as 1/c, keeps at least `expected` = density · N entries."""
    counts, lows = found.astype(np.float64)
    edges = _values(np.arange(HIGH) << 16)
    finite = np.isfinite(edges)
    edges = np.where(finite, edges, 0.0)
    step = np.where(finite, _values((np.arange(HIGH) << 16) + 1), 0.0) - edges
    total = counts * edges + lows * step
    at_least = np.cumsum(counts[::-1])[::-1]
    below = np.concatenate([[0.0], np.cumsum(total)[:-1]])
    kept = at_least + np.divide(below, edges, out=np.zeros(HIGH), where=edges > 0.0)
    enough = np.flatnonzero((kept >= expected) & (edges > 0.0))
    high = int(enough[-1]) if enough.size else 0
    return Clip(high, int(at_least[high] - counts[high]), float(below[high]))


def clip_bin(clip: Clip) -> Bin:
    """Return the bin in the form of `select.low_histogram`."""
    return Bin(clip.high, 1)


def factor(low: Integers, clip: Clip, *, expected: float) -> float:
    """Return c, or the largest float32 if all non-zero entries are fewer than `expected`."""
    values = _values((clip.high << 16) + np.arange(LOW))[::-1]
    counts = low.astype(np.float64)[::-1]
    clipped = clip.above + np.concatenate([[0.0], np.cumsum(counts)])
    inside = np.concatenate([np.cumsum((counts * values)[::-1])[::-1], [0.0]])
    c = np.divide(expected - clipped, clip.below + inside, out=np.full(LOW + 1, FAR), where=clip.below + inside > 0.0)
    # clip entries of the bin from the largest down, until the next is at most 1/c
    settled = np.flatnonzero(c[:-1] * values <= 1.0)
    return min(float(c[settled[0] if settled.size else LOW]), float(np.finfo(np.float32).max))


def sampled(tune: torch.Tensor, base: torch.Tensor, c: float, *, tile: Tile, key: Key, density: float) -> torch.Tensor:
    """Return Δ_i · density / π_i where kept, else 0: divided by q = density it is unbiased. Δ = 0 is never kept.

        tune      flat tile in its stored dtype
        base      flat tile in its stored dtype
        c         the factor in π_i = min(1, c · abs(Δ_i)), in float32
        key       the mask's key
        density   the mean of π

    An entry is kept if the position's 32-bit word is below π · 2**32.
    """
    delta = tune.to(torch.float32) - base.to(torch.float32)
    size = delta.abs()
    probability = (size * float(np.float32(c))).clamp(max=1.0)
    probability = probability.where(size > 0.0, size.new_zeros(()))
    words = words_torch(key, tile.start, tile.stop, delta.device)
    kept = words < (probability.to(torch.float64) * 2.0**32)
    weighted = delta / probability * float(np.float32(density))
    return weighted.where(kept, delta.new_zeros(()))


def _values(bits: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the float32 numbers of these bits."""
    with np.errstate(invalid="ignore"):  # the last bins hold NaN
        return bits.astype(np.int32).view(np.float32).astype(np.float64)


def importance(masking: Masking) -> Any:
    """Make the node of the kept entries: two passes find c, a third draws."""
    make, delta, shape = masking.make, masking.delta, masking.shape
    expected = masking.share * math.prod(shape)
    clip = make(pick_clip, [make(sums, [delta], kind="sum", shape=shape)], kind="small", expected=expected)
    inside = make(clip_bin, [clip], kind="small")
    low = make(low_histogram, [delta, inside], kind="sum", shape=shape)
    c = make(factor, [low, clip], kind="small", expected=expected)
    return make(sampled, [*masking.pair, c], shape=shape, key=masking.key, density=masking.share)
