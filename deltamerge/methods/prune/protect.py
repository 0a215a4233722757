"""Protected input columns of a delta: taken out before a mask is drawn, put back whole and unscaled after q.

Source: arXiv 2410.09344, App. D.2 (massive activations).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import at
from deltamerge.methods.tiles import Kept, Tile

Columns = NDArray[np.int64]


def clear(delta: torch.Tensor | Kept, columns: Columns, *, tile: Tile) -> torch.Tensor | Kept:
    """Δ of a matrix (out, in) with 0 in the given columns, which are ascending."""
    if isinstance(delta, Kept):
        inside = torch.from_numpy(is_among(columns, tile)).to(delta.positions.device)
        stays = ~inside[(delta.positions + tile.start) % tile.columns]
        return Kept(delta.positions[stays], delta.values[stays])
    cleared = delta.clone()
    cleared[torch.from_numpy(places(columns, tile)).to(delta.device)] = 0.0
    return cleared


def restore(
    delta: torch.Tensor | Kept, tune: torch.Tensor, base: torch.Tensor, columns: Columns, *, tile: Tile
) -> torch.Tensor | Kept:
    """The kept entries of a delta, with fine-tune − base in the columns that `clear` took out.

    delta     the kept entries
    tune      tile in its stored dtype
    base      tile in its stored dtype
    columns   ascending
    """
    there = torch.from_numpy(places(columns, tile)).to(tune.device)
    values = at(tune, there) - at(base, there)
    if isinstance(delta, Kept):
        positions, order = torch.cat([delta.positions, there]).sort()
        return Kept(positions, torch.cat([delta.values, values])[order])
    restored = delta.clone()
    restored[there] = values
    return restored


def is_among(columns: Columns, tile: Tile) -> NDArray[np.bool_]:
    """(n) whether a column is one of `columns`."""
    among = np.zeros(tile.columns, np.bool_)
    among[columns] = True
    return among


def places(columns: Columns, tile: Tile) -> Columns:
    """The positions, relative to the tile's start, that lie in the columns; a tile may begin and end inside a row."""
    rows = np.arange(tile.start // tile.columns, -(-tile.stop // tile.columns), dtype=np.int64)
    flat = (rows[:, None] * tile.columns + columns).reshape(-1)
    return flat[(flat >= tile.start) & (flat < tile.stop)] - tile.start
