"""Random masks: which entries of a delta are kept. Torch on any device; the bits come from `prune.bits`."""

from __future__ import annotations

from typing import Any

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import at
from deltamerge.methods.prune.bits import Key, choose_columns, is_sparse, keep_torch, positions_torch
from deltamerge.methods.tiles import Kept, Tile


def dare(tune: torch.Tensor, base: torch.Tensor, *, tile: Tile, key: Key, density: float) -> torch.Tensor | Kept:
    """δ ∘ Δ, δ ~ Bernoulli(density) for each entry, not rescaled (DARE, arXiv 2311.03099).

        tune      flat tile in its stored dtype
        base      flat tile in its stored dtype
        key       the mask's
        density   share of entries that are kept

    Returns flat float32 with zeros where dropped; `Kept` below density `SPARSE_BELOW`, whose cost grows with what is
    kept.
    """
    if is_sparse(density):
        return _kept(tune, base, positions_torch(key, tile.start, tile.stop, density, tune.device))
    delta = tune.to(torch.float32) - base.to(torch.float32)
    kept = keep_torch(key, tile.start, tile.stop, density, tune.device)
    return delta.where(kept, delta.new_zeros(()))


def structured(
    tune: torch.Tensor, base: torch.Tensor, *, tile: Tile, key: Key, a: float, b: float
) -> torch.Tensor | Kept:
    """δ ∘ Δ of a matrix, not rescaled (DAREx, arXiv 2410.09344, App. C.10); other tensors as `dare` with density a · b.

    tune   flat tile in its stored dtype
    base   flat tile in its stored dtype
    key    the mask's
    a      share of the n input columns that are drawn: max(1, round(a · n))
    b      probability with which an entry of a drawn column is kept
    """
    if len(tile.shape) != 2:
        return dare(tune, base, tile=tile, key=key, density=a * b)
    columns = choose_columns(key, tile.columns, max(1, round(a * tile.columns)))
    start, stop = reduced_range(tile, columns)
    reduced = positions_torch(key, start, stop, b, tune.device) + start
    positions = unreduced(tile, torch.tensor(columns, device=tune.device), reduced)
    kept = _kept(tune, base, positions)
    if is_sparse(a * b):
        return kept
    delta = torch.zeros(tile.size, dtype=torch.float32, device=tune.device)
    delta[positions] = kept.values
    return delta


def reduced_range(tile: Tile, columns: Any) -> tuple[int, int]:
    """The tile's range of the index row · len(columns) + j, which counts only entries of chosen columns."""
    import numpy as np

    (first, last), inside = np.divmod([tile.start, tile.stop], tile.columns)
    before, until = np.searchsorted(columns, inside)
    return int(first * len(columns) + before), int(last * len(columns) + until)


def unreduced(tile: Tile, columns: Any, reduced: Any) -> Any:
    """Positions, relative to the tile's start, of reduced indices; numpy arrays or torch tensors."""
    rows = reduced // len(columns)
    return rows * tile.columns + columns[reduced - rows * len(columns)] - tile.start


def _kept(tune: torch.Tensor, base: torch.Tensor, positions: torch.Tensor) -> Kept:
    return Kept(positions, at(tune, positions) - at(base, positions))
