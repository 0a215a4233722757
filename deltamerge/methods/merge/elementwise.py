"""Merges of one model into the base, entry by entry: nearswap."""

from __future__ import annotations

import numpy as np

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import densify
from deltamerge.methods.tiles import Kept, Tile

SMALLEST_DIFFERENCE = 1e-6


def nearswap(base: torch.Tensor, delta: torch.Tensor | Kept, *, tile: Tile, t: float) -> torch.Tensor:
    """base + w Δ, w = min(1, t / max(abs(Δ), 1e-6)), in float32: no entry moves by more than t.

    https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001
    """
    dense = densify(delta, tile.size)
    size = dense.abs().clamp(min=float(np.float32(SMALLEST_DIFFERENCE)))
    weight = (torch.full_like(size, float(np.float32(t))) / size).clamp(max=1.0)
    return base.to(torch.float32) + weight * dense
