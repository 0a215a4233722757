"""WANDA: keep the entries of largest abs(Δ_ij) · ‖x_j‖ in each row (Sun et al., arXiv 2306.11695; arXiv 2410.09344).

In weights stored (in, out), as in GPT-2, each output's inputs lie in a column, which tiles cut. Every tile gives the
k + 1 best scores of each column. They contain the column's k best, and show whether further entries equal the k-th. If
so, a second pass counts the equal entries, and the first rows are kept. Memory: 4 (k + 1) bytes per column and tile, at
most one float32 copy of the weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltamerge.methods.prune.select import (
    end_of,
    keep_largest_rows_scored,
    keep_largest_rows_stacked,
    keep_where,
    largest,
    magnitude_bits,
    scored_stacked,
)
from deltamerge.methods.registry import prune_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import block_elements
from deltamerge.tensors.traits import traits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.methods.registry import Masking
    from deltamerge.tensors.tiles import Make, Tile


@prune_method(
    "keep the round(density · n) entries of largest abs(Δ_ij) · ‖x_j‖ in each row, on calibration data",
    "arXiv 2306.11695, 2410.09344",
    options=frozenset({"rescale", "group", "protect"}),
    groups=("row",),
    needs_activations=True,
    q_decides_below=0.2,
)
def wanda(masking: Masking) -> Any:
    """Make the node of the best scores of each output's inputs.

    A tensor that is no weight of a linear layer keeps its largest entries. In stacked experts that are stored (in,
    out), all scores compete, because tiles cut an output's inputs.
    """
    make, delta, shape = masking.make, masking.delta, masking.shape
    k = round(masking.share * math.prod(shape))
    if masking.norms is None:
        return largest(make, delta, k)
    inputs = [delta, masking.norms]
    if len(shape) == 3 and not masking.transposed:
        return make(keep_largest_rows_stacked, inputs, shape=shape, density=masking.share)
    if len(shape) == 3:
        score = make(scored_stacked, inputs, shape=shape)
        return make(keep_where, [delta, score, *end_of(make, score, k)], shape=shape)
    if masking.transposed:
        return largest_of_columns(make, delta, masking.norms, masking.share)
    return make(keep_largest_rows_scored, inputs, shape=shape, density=masking.share)


# Weights stored (in, out).


@dataclass(frozen=True, slots=True, eq=False)
class ColumnCut:
    """Per column (m): the score bits of the k-th best, the number of kept entries equal to it, and if more equal it."""

    threshold: NDArray[np.int32]
    equal_kept: NDArray[np.int64]
    more: NDArray[np.bool_]


def best_of_columns(
    delta: torch.Tensor, norms: NDArray[np.float32], *, tile: Tile, density: float
) -> NDArray[np.int32]:
    """Return int32 (≤ k + 1, m): the largest bits of abs(Δ_ji) · ‖x_j‖ of each column in this tile."""
    bits = _bits(delta, norms, tile)
    k = round(density * tile.shape[0])
    return bits.topk(min(k + 1, len(bits)), dim=0).values.cpu().numpy()


def pick_columns(best: NDArray[np.int32], *, density: float, rows: int) -> ColumnCut:
    """Return the exact cut of every column of `rows` entries."""
    k = round(density * rows)
    if k == 0:
        columns = best.shape[1]
        none = np.zeros(columns, np.int64)
        return ColumnCut(np.full(columns, 0x7FFFFFFF, np.int32), none, none > 0)
    threshold = np.partition(best, len(best) - k, axis=0)[len(best) - k]
    kept = k - (best > threshold).sum(0)
    return ColumnCut(threshold, kept, (best == threshold).sum(0) > kept)


def _no_ties(norms: NDArray[np.float32], cut: ColumnCut) -> bool:
    """Tell whether all equal entries are kept."""
    return not cut.more.any()


@traits(needless=_no_ties)
def equal_columns(delta: torch.Tensor, norms: NDArray[np.float32], cut: ColumnCut, *, tile: Tile) -> NDArray[np.int64]:
    """Return int64 (blocks, m): the number of entries of each block and column that equal the threshold."""
    equal = _bits(delta, norms, tile) == torch.from_numpy(cut.threshold).to(delta.device)
    step = block_elements(tile.shape) // tile.columns
    starts = range(0, len(equal), step)
    return torch.stack([equal[start : start + step].sum(0) for start in starts]).cpu().numpy()


def column_ranks(counts: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Return per column the number of equal entries before each block. It is empty if it does not matter."""
    return np.zeros((0, 0), np.int64) if counts is None else np.cumsum(counts, 0) - counts


def keep_best_of_columns(
    delta: torch.Tensor, norms: NDArray[np.float32], cut: ColumnCut, ranks: NDArray[np.int64], *, tile: Tile
) -> torch.Tensor:
    """Return Δ where its score is among the round(density · n) largest of its column, else 0.

    Of equal scores the first rows are kept.

    delta   (in, out) tile
    norms   (in) norms of the input features
    cut     the cut of every column
    ranks   from `column_ranks`
    """
    bits = _bits(delta, norms, tile)
    threshold = torch.from_numpy(cut.threshold).to(delta.device)
    keep, equal = bits > threshold, bits == threshold
    if ranks.size:
        before = torch.from_numpy(ranks[tile.start // block_elements(tile.shape)]).to(delta.device)
        equal &= equal.cumsum(0) + before <= torch.from_numpy(cut.equal_kept).to(delta.device)
    keep |= equal
    return delta.where(keep.view(-1), delta.new_zeros(()))


def _bits(delta: torch.Tensor, norms: NDArray[np.float32], tile: Tile) -> torch.Tensor:
    """Return (rows of the tile, m) the bits of the scores, which sort like the scores."""
    rows = delta.view(-1, tile.columns)
    first = tile.start // tile.columns
    some = torch.from_numpy(norms[first : first + len(rows)]).to(delta.device)
    return magnitude_bits(rows.abs() * some[:, None])


def largest_of_columns(make: Make, delta: Any, norms: Any, density: float) -> Any:
    """Make the node of WANDA's mask of a weight stored (in, out)."""
    shape = delta.shape
    best = make(best_of_columns, [delta, norms], kind="concat", shape=shape, density=density)
    cut = make(pick_columns, [best], kind="small", density=density, rows=shape[0])
    equal = make(equal_columns, [delta, norms, cut], kind="concat", shape=shape)
    ranks = make(column_ranks, [equal], kind="small")
    return make(keep_best_of_columns, [delta, norms, cut, ranks], shape=shape)
