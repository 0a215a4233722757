"""Structured DAREx: draw input columns, keep entries inside them at random (arXiv 2410.09344, App. C.10)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from deltamerge.methods.prune.bits import choose_columns, is_sparse, positions_torch
from deltamerge.methods.prune.dare import dare, kept_at
from deltamerge.methods.registry import Param, prune_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.methods.prune.bits import Key
    from deltamerge.methods.registry import Masking
    from deltamerge.tensors.tiles import Kept, Tile

Columns = Annotated[float, Param("fraction of the input columns that are picked", low=0, high=1, low_open=True)]
Inside = Annotated[float, Param("fraction kept inside the picked columns", low=0, high=1, low_open=True)]


def nodes(masking: Masking) -> Any:
    """Make the node of the kept entries."""
    return masking.masked(*masking.pair, key=masking.key, **masking.parameters)


@prune_method(
    "pick round(a · n) input columns, keep each entry inside with probability b; density = a · b",
    "arXiv 2410.09344, App. C.10",
    options=frozenset({"rescale", "protect"}),
    random=True,
    factors=("a", "b"),
    nodes=nodes,
    q_decides_below=0.1,
)
def structured(
    tune: torch.Tensor, base: torch.Tensor, *, tile: Tile, key: Key, a: Columns, b: Inside
) -> torch.Tensor | Kept:
    """Return δ ∘ Δ of a matrix, not rescaled; other tensors as `dare` with density a · b.

    tune   flat tile in its stored dtype
    base   flat tile in its stored dtype
    key    the mask's key
    a      share of the n input columns that are drawn: max(1, round(a · n))
    b      probability with which an entry of a drawn column is kept
    """
    if len(tile.shape) != 2:
        return dare(tune, base, tile=tile, key=key, density=a * b)
    columns = choose_columns(key, tile.columns, max(1, round(a * tile.columns)))
    start, stop = reduced_range(tile, columns)
    reduced = positions_torch(key, start, stop, b, tune.device) + start
    positions = unreduced(tile, torch.tensor(columns, device=tune.device), reduced)
    kept = kept_at(tune, base, positions)
    if is_sparse(a * b):
        return kept
    delta = torch.zeros(tile.size, dtype=torch.float32, device=tune.device)
    delta[positions] = kept.values
    return delta


def reduced_range(tile: Tile, columns: Any) -> tuple[int, int]:
    """Return the tile's range of the index row · len(columns) + j, which counts only entries of chosen columns."""
    (first, last), inside = np.divmod([tile.start, tile.stop], tile.columns)
    before, until = np.searchsorted(columns, inside)
    return int(first * len(columns) + before), int(last * len(columns) + until)


def unreduced(tile: Tile, columns: Any, reduced: Any) -> Any:
    """Return positions, relative to the tile's start, of reduced indices; numpy arrays or torch tensors."""
    rows = reduced // len(columns)
    return rows * tile.columns + columns[reduced - rows * len(columns)] - tile.start
