"""RAM: entries that only one model changed are kept, entries that several changed are averaged (arXiv 2601.13572)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from deltamerge.methods.parameters import Change
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import densify

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Kept, Tile


def changes(deltas: list[torch.Tensor], epsilon: float) -> torch.Tensor:
    """Count the models that changed each entry."""
    count = torch.zeros(deltas[0].shape, dtype=torch.int32, device=deltas[0].device)
    for delta in deltas:
        count += delta.abs() > epsilon
    return count


def averaged(
    base: torch.Tensor, deltas: Sequence[torch.Tensor | Kept], factors: Sequence[float], tile: Tile, epsilon: float
) -> torch.Tensor:
    """Add to the base the mean over the models with abs(Δ_i) > ε; multiply entries of one model alone by its factor."""
    dense = [densify(delta, tile.size) for delta in deltas]
    count = changes(dense, epsilon)
    own = count == 1
    total = torch.zeros_like(dense[0])
    for delta, times in zip(dense, factors, strict=True):
        entry = torch.where(own, delta * float(np.float32(times)), delta)
        total += entry.where(delta.abs() > epsilon, entry.new_zeros(()))
    return base.to(torch.float32) + total / count.clamp(min=1).to(torch.float32)


@delta_method("keep entries that one model changed, average entries that several changed", "arXiv 2601.13572")
def ram(base: torch.Tensor, *deltas: torch.Tensor | Kept, tile: Tile, epsilon: Change = 1e-5) -> torch.Tensor:
    """Return base + the mean of Δ_i over the models with abs(Δ_i) > ε, entry by entry; 0 if there are none; float32."""
    return averaged(base, deltas, (1.0,) * len(deltas), tile, epsilon)
