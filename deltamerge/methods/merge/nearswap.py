"""Nearswap: entries near the base's are taken from the model (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import densify

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Kept, Tile

Distance = Annotated[float, Param("abs(Δ) up to which the model's entry is taken whole", low=0)]
SMALLEST_DIFFERENCE = 1e-6


@delta_method(
    "base + w Δ, w = min(1, t / abs(Δ)): entries near the base's are taken from the model",
    "https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
    maximum=1,
)
def nearswap(base: torch.Tensor, delta: torch.Tensor | Kept, *, tile: Tile, t: Distance) -> torch.Tensor:
    """Return base + w Δ, w = min(1, t / max(abs(Δ), 1e-6)), in float32: no entry moves by more than t."""
    dense = densify(delta, tile.size)
    size = dense.abs().clamp(min=float(np.float32(SMALLEST_DIFFERENCE)))
    weight = (torch.full_like(size, float(np.float32(t))) / size).clamp(max=1.0)
    return base.to(torch.float32) + weight * dense
