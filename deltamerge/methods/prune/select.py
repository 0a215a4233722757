"""The k largest entries of a delta by magnitude, exactly, without sorting and without holding the tensor.

The bits of abs(Δ) in float32, read as an integer, sort like the magnitudes. NaN is above every number, and its bits,
which differ from processor to processor, count as one value. A sample gives a bracket of two values that
almost surely contains the k-th largest. One pass over the tensor counts the entries above the bracket and lists those
inside it; this gives the k-th largest and the places of entries equal to it, of which the first in flat order are kept.
If too many lie inside to be listed, or the bracket missed, counting passes follow: over the high 16 bits, which finds
the bin of the k-th largest; over the low 16 bits inside that bin; and over equal entries per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import alike, densify
from deltamerge.methods.tiles import Kept, Tile, block_elements

HIGH = 1 << 15
LOW = 1 << 16
MAGNITUDE = 0x7FFFFFFF
ANY_NAN = 0x7F800001
GOLDEN = 0x9E3779B9
# The most entries that are listed: 4 bytes each, kept between two passes of a tensor.
MOST = 1 << 20
# Entries of a sample: all of a small tensor, else one of 128, up to 2**18.
SAMPLE_LEAST, SAMPLE_MOST, SAMPLE_SHARE = 1 << 15, 1 << 18, 128
# The distance of the bracket's ends, in standard deviations of the sample's rank.
DEVIATIONS = 4.0

Counts: TypeAlias = "NDArray[np.int64]"
Magnitudes: TypeAlias = "NDArray[np.uint32]"


@dataclass(frozen=True, slots=True)
class Bin:
    """The k-th largest magnitude has high bits `high` and is the `rank`-th largest (from 1) with them."""

    high: int
    rank: int


@dataclass(frozen=True, slots=True)
class Bracket:
    """The k-th largest magnitude has bits from `low` to `high`, unless the sample misled."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Cut:
    """Entries whose bits exceed `threshold` are kept, and the first `equal_kept` of the `equal_total` equal to it.

    `listed`: the places of the equal ones are known from `bracketed` and need not be counted.
    """

    threshold: int
    equal_kept: int
    equal_total: int
    listed: bool = False


def magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    """abs(Δ) as int32: the bits of float32 without the sign, which sort like the magnitudes; NaN is 0x7F800001."""
    return (delta.contiguous().view(torch.int32) & MAGNITUDE).clamp_max_(ANY_NAN)


def sampled_run(shape: tuple[int, ...]) -> int:
    """The length of the run of entries that the sample takes from each block."""
    size, block = math.prod(shape), block_elements(shape)
    wanted = min(size, max(SAMPLE_LEAST, min(SAMPLE_MOST, size // SAMPLE_SHARE)))
    return min(block, -(-wanted // max(1, -(-size // block))))


def run_start(number: int, size: int, run: int) -> int:
    """Where the sampled run of block `number`, of `size` entries, begins in it.

    It moves from block to block by the golden ratio: blocks begin at rows, and otherwise all runs would take the same
    columns.
    """
    return ((number * GOLDEN) & 0xFFFFFFFF) * max(0, size - run + 1) >> 32


def sample(delta: torch.Tensor, *, tile: Tile) -> Magnitudes:
    """The bits of abs(Δ) of a run of each block."""
    bits, step, run = magnitude_bits(delta), block_elements(tile.shape), sampled_run(tile.shape)
    number, parts = tile.start // step, [np.empty(0, np.uint32)]
    for rows in alike(bits, tile):
        size = rows.shape[1]
        length = min(run, size)
        starts = [run_start(number + i, size, run) for i in range(len(rows))]
        first = torch.tensor(starts, device=rows.device)[:, None]
        parts.append(_words(rows.gather(1, first + torch.arange(length, device=rows.device)).flatten()))
        number += len(rows)
    return np.concatenate(parts)


def pick_bracket(sample: Magnitudes, *, k: int, size: int) -> Bracket | None:
    """The bracket of the k-th largest (k ≥ 1) of `size` magnitudes; None: too many would lie inside.

    Differences of bfloat16 take few values. If the value at the sample's rank has so many equals that the true rank
    almost surely falls among them, the bracket is that one value, and nothing is listed.
    """
    n, rank = sample.size, sample.size * k / size
    deviation = 0.0 if n == size else math.sqrt(rank * (1 - k / size))
    first, last = math.floor(rank - DEVIATIONS * deviation), math.ceil(rank + DEVIATIONS * deviation)
    ranks = [min(n, max(1, r)) for r in (last, round(rank), first)]
    low, middle, high = map(int, np.partition(sample, [n - r for r in ranks])[[n - r for r in ranks]])
    low, high = 0 if last > n else low, MAGNITUDE if first < 1 else high
    if low == high or np.count_nonzero((sample >= low) & (sample <= high)) * size <= MOST * n:
        return Bracket(low, high)
    above, with_equals = np.count_nonzero(sample > middle), np.count_nonzero(sample >= middle)
    equals = above < rank - 2 * deviation and rank + 2 * deviation < with_equals
    return Bracket(middle, middle) if equals else None


def bracketed(delta: torch.Tensor, bracket: Bracket, *, tile: Tile) -> Magnitudes:
    """Per block the numbers of magnitudes above and inside the bracket, and the bits of those inside in flat order;
    without the bits if the bracket is one value."""
    bits, parts = magnitude_bits(delta), [np.empty(0, np.uint32)]
    for rows in alike(bits, tile):
        inside = (rows >= bracket.low) & (rows <= bracket.high)
        counts = torch.stack([(rows > bracket.high).sum(1), inside.sum(1)], 1).cpu().numpy().astype(np.uint32)
        if bracket.low == bracket.high:
            parts.append(counts.reshape(-1))
            continue
        ends = np.cumsum(counts[:, 1])
        for pair, some in zip(counts, np.split(_words(rows[inside]), ends[:-1]), strict=True):
            parts += [pair, some]
    return np.concatenate(parts)


def bracketed_needless(bracket: Bracket | None) -> bool:
    """Whether there is no bracket, because too many entries would lie inside."""
    return bracket is None


def _words(bits: torch.Tensor) -> Magnitudes:
    return bits.cpu().numpy().view(np.uint32)


@dataclass(frozen=True, slots=True)
class Listed:
    """The result of `bracketed`: the number above the bracket, the numbers inside per block, and the bits of those
    inside (one for all if the bracket is one value)."""

    above: int
    counts: Counts
    values: Magnitudes

    @property
    def one(self) -> bool:
        """Whether one value stands for all that are inside the bracket."""
        return self.values.size == 1


def gathered(found: Magnitudes | None, bracket: Bracket | None) -> Listed | None:
    """The blocks of `bracketed`, joined."""
    if found is None or bracket is None:
        return None
    if bracket.low == bracket.high:
        per_block = found.reshape(-1, 2).astype(np.int64)
        return Listed(int(per_block[:, 0].sum()), per_block[:, 1], np.array([bracket.low], np.uint32))
    above, counts, blocks, at = 0, [], [], 0
    while at < found.size:
        above, count = above + int(found[at]), int(found[at + 1])
        counts.append(count)
        blocks.append(found[at + 2 : at + 2 + count])
        at += 2 + count
    return Listed(above, np.array(counts, np.int64), np.concatenate(blocks))


def pick_listed(listed: Listed | None, *, k: int) -> Cut | None:
    """The cut of the k-th largest magnitude; None if it is not among those listed."""
    if listed is None:
        return None
    rank, inside = k - listed.above, int(listed.counts.sum())
    if not 1 <= rank <= inside:
        return None
    if listed.one:
        return Cut(int(listed.values[0]), rank, inside, listed=True)
    high = pick_bin(np.bincount(listed.values >> 16, minlength=HIGH), k=rank)
    low = listed.values[listed.values >> 16 == high.high] & 0xFFFF
    return replace(pick_cut(np.bincount(low, minlength=LOW), high), listed=True)


def high_histogram(delta: torch.Tensor, listed: Cut | None = None, *, tile: Tile) -> Counts:
    """Counts of the high 16 bits of abs(Δ): int64[32768]."""
    return torch.bincount(magnitude_bits(delta) >> 16, minlength=HIGH).cpu().numpy()


def high_histogram_needless(listed: Cut | None = None) -> bool:
    """Whether the k-th largest was listed."""
    return listed is not None


def pick_bin(counts: Counts, *, k: int) -> Bin:
    """The bin that holds the k-th largest, k ≥ 1."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, k))
    high = HIGH - 1 - index
    return Bin(high, k - int(above[index] - counts[high]))


def count_nonzero(x: torch.Tensor, *, tile: Tile) -> Counts:
    """How many entries are not 0: int64[1]."""
    return x.count_nonzero().view(1).cpu().numpy()


def pick_share(counts: Counts, nonzero: Counts, *, share: float) -> Bin:
    """The bin of the k-th largest, k = int(share · nonzero); for k = 0 the last bin, with nothing of it kept."""
    k = int(share * int(nonzero[0]))
    return pick_bin(counts, k=k) if k else Bin(HIGH - 1, 0)


def low_histogram(delta: torch.Tensor, high: Bin | None, *, tile: Tile) -> Counts:
    """Counts of the low 16 bits of abs(Δ) among entries with the bin's high bits: int64[65536]."""
    assert high is not None
    bits = magnitude_bits(delta)
    inside = bits[(bits >> 16) == high.high]
    return torch.bincount(inside & 0xFFFF, minlength=LOW).cpu().numpy()


def low_histogram_needless(high: Bin | None) -> bool:
    """Whether no bin was needed."""
    return high is None


def find_bin(counts: Counts | None, *, k: int) -> Bin | None:
    """`pick_bin` of the counts, if they were made."""
    return None if counts is None else pick_bin(counts, k=k)


def pick_either(listed: Cut | None, counts: Counts | None, high: Bin | None) -> Cut:
    """The cut from the listed magnitudes, else from the counts of low bits."""
    if listed is not None:
        return listed
    assert counts is not None
    assert high is not None
    return pick_cut(counts, high)


def ranks_listed(counts: Counts | None, listed: Listed | None, cut: Cut) -> Counts:
    """`pick_ranks` of the counts of equal entries per block, or of the list."""
    if listed is None or not cut.listed or cut.equal_kept == cut.equal_total:
        return pick_ranks(counts)
    before = pick_ranks(listed.counts)
    if listed.one:
        return before
    return np.searchsorted(np.flatnonzero(listed.values == cut.threshold), before)


def pick_cut(counts: Counts, high: Bin) -> Cut:
    """The exact k-th largest magnitude, and how many entries equal to it are kept."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, high.rank))
    low = LOW - 1 - index
    equal = int(counts[low])
    return Cut((high.high << 16) | low, high.rank - int(above[index] - equal), equal)


def equal_counts(delta: torch.Tensor, cut: Cut, *, tile: Tile) -> Counts:
    """How many entries of each block equal the threshold: int64 per block."""
    equal = magnitude_bits(delta) == cut.threshold
    step = block_elements(tile.shape)
    blocks = torch.arange(tile.size, device=delta.device) // step
    return torch.bincount(blocks[equal], minlength=-(-tile.size // step)).cpu().numpy()


def equal_counts_needless(cut: Cut) -> bool:
    """Whether all equal entries are kept, or their places are known, so that no pass need count them."""
    return cut.listed or cut.equal_kept == cut.equal_total


def pick_ranks(counts: Counts | None) -> Counts:
    """The number of equal entries before each block: exclusive prefix sums, int64; empty if it does not matter."""
    if counts is None:
        return np.zeros(0, np.int64)
    return np.cumsum(counts) - counts


def nothing() -> Cut:
    """The cut that keeps no entry."""
    return Cut(MAGNITUDE, 0, 0)


def no_ranks() -> Counts:
    """The ranks for a cut that keeps all equal entries."""
    return np.zeros(0, np.int64)


def keep_largest(delta: torch.Tensor, cut: Cut, ranks: Counts, *, tile: Tile) -> torch.Tensor:
    """Δ where it is among the k largest magnitudes of the tensor, else 0."""
    return delta.where(among_largest(delta, cut, ranks, tile), delta.new_zeros(()))


def keep_between(
    delta: torch.Tensor, outer: Cut, outer_ranks: Counts, inner: Cut, inner_ranks: Counts, *, tile: Tile
) -> torch.Tensor:
    """Δ where it is among the largest magnitudes of `outer` and not among those of `inner`, else 0.

        delta                  a tile
        outer, outer_ranks     the cut of the larger set, and ranks of its equal entries
        inner, inner_ranks     the cut of the smaller set

    Model breadcrumbs (arXiv 2312.06795): the very largest are outliers, the smallest noise.
    """
    keep = among_largest(delta, outer, outer_ranks, tile) & ~among_largest(delta, inner, inner_ranks, tile)
    return delta.where(keep, delta.new_zeros(()))


def keep_where(delta: torch.Tensor | Kept, score: torch.Tensor, cut: Cut, ranks: Counts, *, tile: Tile) -> torch.Tensor:
    """Δ where the magnitude of its score is among the k largest of the tensor (`cut`, `ranks` of equal
    ones), else 0.
    """
    delta = densify(delta, tile.size)
    return delta.where(among_largest(score, cut, ranks, tile), delta.new_zeros(()))


def among_largest(score: torch.Tensor, cut: Cut, ranks: Counts, tile: Tile) -> torch.Tensor:
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
    """Δ where it is among the round(density · n) largest magnitudes of its row of n, else 0; equal ones
    from the left."""
    return _largest_of_rows(delta, delta.view(-1, tile.columns), density)


def keep_largest_rows_scored(
    delta: torch.Tensor, norms: np.ndarray[tuple[int], np.dtype[np.float32]], *, tile: Tile, density: float
) -> torch.Tensor:
    """Δ where abs(Δ_ij) · ‖x_j‖, in float32, is among the round(density · n) largest of row i; equal ones from the
    left.

    `norms` (n) of the input features (WANDA, arXiv 2306.11695; on deltas: arXiv 2410.09344).
    """
    rows = delta.view(-1, tile.columns)
    return _largest_of_rows(delta, rows.abs() * torch.from_numpy(norms).to(delta.device), density)


def keep_largest_rows_stacked(
    delta: torch.Tensor, norms: np.ndarray[tuple[int, int], np.dtype[np.float32]], *, tile: Tile, density: float
) -> torch.Tensor:
    """The same of stacked matrices (E, m, n) with `norms` (E, n) of their inputs."""
    rows = delta.view(-1, tile.columns)
    numbers = (tile.start // tile.columns + torch.arange(len(rows))) // tile.shape[-2]
    return _largest_of_rows(delta, rows.abs() * torch.from_numpy(norms)[numbers].to(delta.device), density)


def scored_stacked(
    delta: torch.Tensor | Kept, norms: np.ndarray[tuple[int, int], np.dtype[np.float32]], *, tile: Tile
) -> torch.Tensor:
    """abs(Δ_ji) · ‖x_j‖ in float32 of stacked matrices (E, n, m), stored (in, out), with `norms` (E, n)."""
    rows = densify(delta, tile.size).view(-1, tile.columns)
    numbers = tile.start // tile.columns + torch.arange(len(rows))
    return (rows.abs() * torch.from_numpy(norms).reshape(-1)[numbers].to(rows.device)[:, None]).view(-1)


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
