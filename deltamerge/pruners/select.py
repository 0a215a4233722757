"""The k largest entries of a delta by magnitude, exactly, without sorting and without holding the tensor.

The bits of abs(Δ) in float32, read as an integer, order as the magnitudes do. One pass counts their high 16 bits and
finds the bin of the k-th largest; a second lists the low 16 bits of what is in that bin, which tells the k-th largest
itself and where its equals are, of which the first in flat order are kept. Where too many are in the bin to be listed,
the second pass counts them, and a third counts the equals per block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from deltamerge.tensors import Tile, block_elements

if TYPE_CHECKING:
    import torch

HIGH = 1 << 15
LOW = 1 << 16
# Entries of a bin that are listed at most: 2 bytes each, held between two passes of a tensor.
MOST = 1 << 21


@dataclass(frozen=True, slots=True)
class Bin:
    """The k-th largest magnitude has high bits `high` and is the `rank`-th largest (from 1) of the `size` with them."""

    high: int
    rank: int
    size: int = 0


@dataclass(frozen=True, slots=True)
class Cut:
    """Entries whose bits exceed `threshold` are kept, and the first `equal_kept` of the `equal_total` that equal it.

    `listed`: where those are is known from `lows`, and need not be counted.
    """

    threshold: int
    equal_kept: int
    equal_total: int
    listed: bool = False


def magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    """abs(Δ) as int32: the bits of float32 without the sign, which order as the magnitudes do."""
    import torch

    return delta.contiguous().view(torch.int32) & 0x7FFFFFFF


def high_histogram(delta: torch.Tensor, *, tile: Tile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Counts of the high 16 bits of abs(Δ): int64[32768]."""
    import torch

    return torch.bincount(magnitude_bits(delta) >> 16, minlength=HIGH).cpu().numpy()


def pick_bin(counts: np.ndarray[tuple[int], np.dtype[np.int64]], *, k: int) -> Bin:
    """The bin that holds the k-th largest, k ≥ 1."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, k))
    high = HIGH - 1 - index
    return Bin(high, k - int(above[index] - counts[high]), int(counts[high]))


def count_nonzero(x: torch.Tensor, *, tile: Tile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many entries are not 0: int64[1]."""
    return x.count_nonzero().view(1).cpu().numpy()


def pick_share(
    counts: np.ndarray[tuple[int], np.dtype[np.int64]],
    nonzero: np.ndarray[tuple[int], np.dtype[np.int64]],
    *,
    share: float,
) -> Bin:
    """The bin of the k-th largest, k = int(share · nonzero); for k = 0 the last bin, of whose entries none is kept."""
    k = int(share * int(nonzero[0]))
    return pick_bin(counts, k=k) if k else Bin(HIGH - 1, 0)


def low_histogram(delta: torch.Tensor, high: Bin, *, tile: Tile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Counts of the low 16 bits of abs(Δ) among entries with the bin's high bits: int64[65536]."""
    import torch

    bits = magnitude_bits(delta)
    inside = bits[(bits >> 16) == high.high]
    return torch.bincount(inside & 0xFFFF, minlength=LOW).cpu().numpy()


def low_counts(delta: torch.Tensor, high: Bin, *, tile: Tile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`low_histogram` of a bin that is too large for `lows`."""
    return low_histogram(delta, high, tile=tile)


def low_counts_needless(high: Bin) -> bool:
    return high.size <= MOST


def lows(delta: torch.Tensor, high: Bin, *, tile: Tile) -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """The low 16 bits of abs(Δ) of all entries with the bin's high bits, in flat order; before those of each block how
    many they are, in two words, the lower first."""
    import torch

    step, bits = block_elements(tile.shape), magnitude_bits(delta)
    parts: list[np.ndarray[tuple[int], np.dtype[np.uint16]]] = [np.empty(0, np.uint16)]
    for start in range(0, tile.size, step):
        block = bits[start : start + step]
        inside = (block[(block >> 16) == high.high] & 0xFFFF).to(torch.int32).cpu().numpy().astype(np.uint16)
        parts += [np.array(divmod(inside.size, LOW)[::-1], np.uint16), inside]
    return np.concatenate(parts)


def lows_needless(high: Bin) -> bool:
    """Whether the bin has too many entries to be listed."""
    return high.size > MOST


def by_block(
    listed: np.ndarray[tuple[int], np.dtype[np.uint16]],
) -> list[np.ndarray[tuple[int], np.dtype[np.uint16]]]:
    """What `lows` lists, block by block."""
    blocks, at = [], 0
    while at < listed.size:
        stop = at + 2 + int(listed[at]) + LOW * int(listed[at + 1])
        blocks.append(listed[at + 2 : stop])
        at = stop
    return blocks


def pick_listed(
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
    listed: np.ndarray[tuple[int], np.dtype[np.uint16]] | None,
    high: Bin,
) -> Cut:
    """`pick_cut` of the counts of the low bits, or of the low bits themselves."""
    if listed is None:
        assert counts is not None
        return pick_cut(counts, high)
    counts = np.bincount(np.concatenate(by_block(listed)), minlength=LOW)
    return replace(pick_cut(counts, high), listed=True)


def ranks_listed(
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
    listed: np.ndarray[tuple[int], np.dtype[np.uint16]] | None,
    cut: Cut,
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`pick_ranks` of the counts of equals per block, or of the low bits."""
    if listed is None or cut.equal_kept == cut.equal_total:
        return pick_ranks(counts)
    low = cut.threshold & 0xFFFF
    return pick_ranks(np.array([np.count_nonzero(block == low) for block in by_block(listed)], np.int64))


def pick_cut(counts: np.ndarray[tuple[int], np.dtype[np.int64]], high: Bin) -> Cut:
    """The exact k-th largest magnitude, and how many of its equals are kept."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, high.rank))
    low = LOW - 1 - index
    equal = int(counts[low])
    return Cut((high.high << 16) | low, high.rank - int(above[index] - equal), equal)


def equal_counts(delta: torch.Tensor, cut: Cut, *, tile: Tile) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many entries of each block equal the threshold: int64 per block."""
    import torch

    equal = magnitude_bits(delta) == cut.threshold
    step = block_elements(tile.shape)
    blocks = torch.arange(tile.size, device=delta.device) // step
    return torch.bincount(blocks[equal], minlength=-(-tile.size // step)).cpu().numpy()


def equal_counts_needless(cut: Cut) -> bool:
    """Whether every equal is kept, or where they are is known: no pass to count them is needed."""
    return cut.listed or cut.equal_kept == cut.equal_total


def pick_ranks(
    counts: np.ndarray[tuple[int], np.dtype[np.int64]] | None,
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """How many equals lie before each block: exclusive prefix sums, int64 per block; empty if ranks do not matter."""
    if counts is None:
        return np.zeros(0, np.int64)
    return np.cumsum(counts) - counts


def nothing() -> Cut:
    """The cut that keeps no entry."""
    return Cut(0x7FFFFFFF, 0, 0)


def no_ranks() -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The ranks of a cut whose equals are all kept."""
    return np.zeros(0, np.int64)


def keep_largest(
    delta: torch.Tensor, cut: Cut, ranks: np.ndarray[tuple[int], np.dtype[np.int64]], *, tile: Tile
) -> torch.Tensor:
    """Δ where it is among the k largest magnitudes of the tensor, else 0."""
    return delta.where(among_largest(delta, cut, ranks, tile), delta.new_zeros(()))


def keep_between(
    delta: torch.Tensor,
    outer: Cut,
    outer_ranks: np.ndarray[tuple[int], np.dtype[np.int64]],
    inner: Cut,
    inner_ranks: np.ndarray[tuple[int], np.dtype[np.int64]],
    *,
    tile: Tile,
) -> torch.Tensor:
    """Δ where it is among the largest magnitudes that `outer` keeps and not among those of `inner`, else 0.

    Model breadcrumbs (arXiv 2312.06795): the very largest are outliers, the smallest noise.
    """
    keep = among_largest(delta, outer, outer_ranks, tile) & ~among_largest(delta, inner, inner_ranks, tile)
    return delta.where(keep, delta.new_zeros(()))


def keep_where(
    delta: torch.Tensor,
    score: torch.Tensor,
    cut: Cut,
    ranks: np.ndarray[tuple[int], np.dtype[np.int64]],
    *,
    tile: Tile,
) -> torch.Tensor:
    """Δ where the magnitude of its score is among the k largest of the tensor, else 0."""
    return delta.where(among_largest(score, cut, ranks, tile), delta.new_zeros(()))


def among_largest(
    score: torch.Tensor, cut: Cut, ranks: np.ndarray[tuple[int], np.dtype[np.int64]], tile: Tile
) -> torch.Tensor:
    """Whether each entry's magnitude is one of the k largest of the tensor."""
    bits = magnitude_bits(score)
    keep = bits > cut.threshold
    equal = bits == cut.threshold
    if ranks.size:
        before = int(ranks[tile.start // block_elements(tile.shape)])
        keep |= equal & (equal.cumsum(0) + before <= cut.equal_kept)
    else:
        keep |= equal
    return keep


def keep_largest_rows(delta: torch.Tensor, *, tile: Tile, density: float) -> torch.Tensor:
    """Δ where it is among the round(density · n) largest magnitudes of its row of n, else 0; equals from the left."""
    return _largest_of_rows(delta, delta.view(-1, tile.columns), density)


def keep_largest_rows_scored(
    delta: torch.Tensor, norms: np.ndarray[tuple[int], np.dtype[np.float32]], *, tile: Tile, density: float
) -> torch.Tensor:
    """Δ where abs(Δ_ij) · ‖x_j‖, in float32, is among the round(density · n) largest of row i; equals from the left.

    norms (n) of the input features (WANDA, arXiv 2306.11695, on deltas: arXiv 2410.09344).
    """
    import torch

    rows = delta.view(-1, tile.columns)
    return _largest_of_rows(delta, rows.abs() * torch.from_numpy(norms).to(delta.device), density)


def _largest_of_rows(delta: torch.Tensor, score: torch.Tensor, density: float) -> torch.Tensor:
    """Δ where abs(score) (rows, n) is among the round(density · n) largest of its row."""
    columns = score.shape[1]
    k = round(density * columns)
    if k == 0:
        return delta.new_zeros(delta.shape)
    bits = magnitude_bits(score)
    threshold = bits.kthvalue(columns - k + 1, dim=1, keepdim=True).values
    above = bits > threshold
    equal = bits == threshold
    keep = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdim=True)))
    return delta.where(keep.view(-1), delta.new_zeros(()))
