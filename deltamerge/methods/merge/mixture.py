"""Tiles of a mixture of experts: rows of its routers, and noise on an expert's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from deltamerge.methods.prune import bits
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.tensors.tiles import Tile


class Vectors(Protocol):
    """The vectors of all routers, (layers, experts, hidden) float32."""

    values: NDArray[Any]


def router(vectors: Vectors, *, tile: Tile, layer: int, first: int, end: int) -> torch.Tensor:
    """Return the rows [first, end) of a layer's routers, one for each expert, in float32."""
    flat = vectors.values[layer, first:end].reshape(-1)
    return torch.from_numpy(flat[tile.start : tile.stop].copy())


def noisy(x: torch.Tensor, *, tile: Tile, noise: float, scale: float, key: bits.Key) -> torch.Tensor:
    """Return (x + noise · z) · scale in float32; z is a standard normal number of `key` and the entry's position."""
    drawn = torch.from_numpy(bits.normals(key, tile.start, tile.stop)).to(x.device)
    return (x.to(torch.float32) + drawn * noise) * scale


def nothing(*, tile: Tile) -> torch.Tensor:
    """Return zeros in float32: the gate of a shared expert without prompts."""
    return torch.zeros(tile.size, dtype=torch.float32)
