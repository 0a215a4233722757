"""RAM: entries that only one model changed are kept, entries that several changed are averaged (arXiv 2601.13572)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import densify
from deltamerge.methods.tiles import Kept, Make, Tile


def ram(base: torch.Tensor, *deltas: torch.Tensor | Kept, tile: Tile, epsilon: float) -> torch.Tensor:
    """base + the mean over the models with abs(Δ_i) > ε, entry by entry, 0 where there is none; float32."""
    return ramplus_tl(base, *deltas, (1.0,) * len(deltas), tile=tile, epsilon=epsilon)


def ramplus_tl(base: torch.Tensor, *inputs: Any, tile: Tile, epsilon: float) -> torch.Tensor:
    """`ram`, with the entries that only model i changed multiplied by its factor; inputs are the deltas and the
    factors."""
    *deltas, factor = inputs
    dense = [densify(delta, tile.size) for delta in deltas]
    count = changes(dense, epsilon)
    own = count == 1
    total = torch.zeros_like(dense[0])
    for delta, times in zip(dense, factor, strict=True):
        entry = torch.where(own, delta * float(np.float32(times)), delta)
        total += entry.where(delta.abs() > epsilon, entry.new_zeros(()))
    return base.to(torch.float32) + total / count.clamp(min=1).to(torch.float32)


def nodes(
    make: Make,
    function: str,
    inputs: list[Any],
    shape: tuple[int, ...],
    *,
    based: bool,
    epsilon: float,
    r: float,
    alpha: float,
) -> Any:
    """The node of `ramplus_tl`: one pass counts each model's changes, a second adds.

    epsilon    entries up to it count as unchanged
    r, alpha   of `factors`
    """
    found = make(counts, inputs[1:], kind="sum", shape=shape, epsilon=epsilon)
    factor = make(factors, [found], kind="small", r=r, alpha=alpha)
    return make(function, [*inputs, factor], shape=shape, epsilon=epsilon)


def counts(*deltas: torch.Tensor | Kept, tile: Tile, epsilon: float) -> NDArray[np.int64]:
    """int64 (n, 2): the number of entries that each model changed alone, and that it changed together with others."""
    dense = [densify(delta, tile.size) for delta in deltas]
    count = changes(dense, epsilon)
    rows = []
    for delta in dense:
        changed = delta.abs() > epsilon
        rows.append(torch.stack([(changed & (count == 1)).sum(), (changed & (count > 1)).sum()]))
    return torch.stack(rows).cpu().numpy()


def factors(counts: NDArray[np.int64], *, r: float, alpha: float) -> tuple[float, ...]:
    """1 + r · min(shared / own, α) of each model; 1 where it changed nothing alone."""
    return tuple(1.0 + r * min(shared / own, alpha) if own else 1.0 for own, shared in counts.tolist())


def changes(deltas: list[torch.Tensor], epsilon: float) -> torch.Tensor:
    """The number of models that changed each entry."""
    count = torch.zeros(deltas[0].shape, dtype=torch.int32, device=deltas[0].device)
    for delta in deltas:
        count += delta.abs() > epsilon
    return count
