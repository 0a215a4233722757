"""DARE: keep each entry with probability density, divide by q (Yu et al., arXiv 2311.03099; arXiv 2410.09344).

δ ∘ Δ / q, δ ~ Bernoulli(density) for each entry; q is the density unless the recipe gives another. With
`sampling: magnitude` the probability is in proportion to abs(Δ) (`prune.sampling`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.operations import Assembly, subtract, subtract_at
from deltamerge.methods.ops import at
from deltamerge.methods.prune.bits import guided, is_sparse, keep_torch, positions_torch, threshold
from deltamerge.methods.prune.sampling import importance
from deltamerge.methods.registry import prune_method
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import Kept

if TYPE_CHECKING:
    from deltamerge.methods.prune.bits import Key
    from deltamerge.methods.registry import Masking
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Tile


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
