"""The k largest entries of a delta by magnitude, exactly, without sorting and without holding the tensor.

The bits of abs(Δ) in float32, read as an integer, sort like the magnitudes. NaN is above every number, and its bits,
which differ from processor to processor, count as one value. A sample gives a bracket of two values that almost surely
contains the k-th largest. One pass over the tensor counts the entries above the bracket and lists the entries inside
it. This gives the k-th largest and the places of entries equal to it; the first of these in flat order are kept. If the
bracket holds too many entries to list, or missed, counting passes follow: over the high 16 bits, which finds the bin of
the k-th largest; over the low 16 bits inside that bin; and over equal entries per block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.operations import Assembly, spread
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import LONGEST_ROW, Kept, alike, block_elements, densify, row_length
from deltamerge.tensors.traits import traits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Make, Tile

    Counts: TypeAlias = NDArray[np.int64]
    Magnitudes: TypeAlias = NDArray[np.uint32]

HIGH = 1 << 15
LOW = 1 << 16
MAGNITUDE = 0x7FFFFFFF
ANY_NAN = 0x7F800001
GOLDEN = 0x9E3779B9
# The most entries in a list: 4 bytes each, held between two passes of a tensor.
MOST = 1 << 20
# Entries of a sample: all of a small tensor, otherwise one of 128, up to 2**18.
SAMPLE_LEAST, SAMPLE_MOST, SAMPLE_SHARE = 1 << 15, 1 << 18, 128
# The distance of the bracket's ends, in standard deviations of the sample's rank.
DEVIATIONS = 4.0


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

    `listed`: the places of equal entries are known from `bracketed` and need no counting.
    """

    threshold: int
    equal_kept: int
    equal_total: int
    listed: bool = False


def magnitude_bits(delta: torch.Tensor) -> torch.Tensor:
    """Return abs(Δ) as int32: float32's bits without the sign sort like the magnitudes; NaN is 0x7F800001."""
    return (delta.contiguous().view(torch.int32) & MAGNITUDE).clamp_max_(ANY_NAN)


def sampled_run(shape: tuple[int, ...]) -> int:
    """Return the number of consecutive entries that the sample takes from each block."""
    size, block = math.prod(shape), block_elements(shape)
    wanted = min(size, max(SAMPLE_LEAST, min(SAMPLE_MOST, size // SAMPLE_SHARE)))
    return min(block, -(-wanted // max(1, -(-size // block))))


def run_start(number: int, size: int, run: int) -> int:
    """Return the start of the sampled run in block `number` of `size` entries.

    It moves from block to block by the golden ratio. Blocks begin at rows, so a fixed start would sample the same
    columns.
    """
    return ((number * GOLDEN) & 0xFFFFFFFF) * max(0, size - run + 1) >> 32


def _counted(assembly: Assembly, node: Node, code: int, size: int, wanted: int = 0) -> None:
    """Count into `size` counters, or into one for each block (0)."""
    delta = assembly.register(node.inputs[0])
    assembly.counters[id(node)] = (len(assembly.operations), size)
    assembly.add(code, -1, delta, wanted)


def _sample_loop(assembly: Assembly, node: Node) -> None:
    run = sampled_run(assembly.form.shape)
    assembly.add(codes.SAMPLE, -1, assembly.register(node.inputs[0]), run, assembly.list_of(node))


@traits(loop=_sample_loop, samples=sampled_run, rare=True)
def sample(delta: torch.Tensor, *, tile: Tile) -> Magnitudes:
    """Return the bits of abs(Δ) of a run of each block."""
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


@traits(loop=_sample_loop, samples=sampled_run)
def magnitudes(delta: torch.Tensor, *, tile: Tile) -> Magnitudes:
    """Return the bits of abs(Δ) of a tensor of at most `SAMPLE_LEAST` entries, which is one block."""
    return _words(magnitude_bits(delta))


def pick_largest(magnitudes: Magnitudes, *, k: int) -> Cut:
    """Return the cut of the k-th largest (k ≥ 1) of all magnitudes of a tensor."""
    threshold = np.partition(magnitudes, magnitudes.size - k)[magnitudes.size - k]
    above, equal = np.count_nonzero(magnitudes > threshold), np.count_nonzero(magnitudes == threshold)
    return Cut(int(threshold), k - int(above), int(equal), listed=True)


def rank_of_block(cut: Cut) -> Counts:
    """Return the ranks for a tensor of one block: no earlier block has entries equal to the cut."""
    return np.zeros(int(cut.equal_kept != cut.equal_total), np.int64)


def pick_bracket(sample: Magnitudes, *, k: int, size: int) -> Bracket | None:
    """Return the bracket of the k-th largest (k ≥ 1) of `size` magnitudes; None: too many would lie inside.

    Differences of bfloat16 take few values. If the value at the sample's rank has so many equals that the true rank
    almost surely falls among them, the bracket is that single value, and nothing is listed.
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


def _bracketed_loop(assembly: Assembly, node: Node) -> None:
    delta, bracket = node.inputs
    ends, row = assembly.values[id(bracket)], assembly.list_of(node)
    assembly.add(codes.LIST, -1, assembly.register(delta), ends.low, row, ends.high)


def _no_bracket(bracket: Bracket | None) -> bool:
    """Tell whether there is no bracket, because too many entries would lie inside."""
    return bracket is None


@traits(loop=_bracketed_loop, needless=_no_bracket)
def bracketed(delta: torch.Tensor, bracket: Bracket, *, tile: Tile) -> Magnitudes:
    """Return per block the numbers of magnitudes above and inside the bracket, and the bits of magnitudes inside.

    The bits are in flat order. If the bracket is a single value, they are left out.
    """
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


def _words(bits: torch.Tensor) -> Magnitudes:
    return bits.cpu().numpy().view(np.uint32)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The joined result of `bracketed`.

    above    number of entries above the bracket
    inside   number of entries inside, per block
    bits     bits of the entries inside; one for all if the bracket is a single value
    """

    above: int
    counts: Counts
    values: Magnitudes

    @property
    def one(self) -> bool:
        """Tell whether all entries inside the bracket have one value."""
        return self.values.size == 1


def gathered(found: Magnitudes | None, bracket: Bracket | None) -> Candidates | None:
    """Join the blocks of `bracketed`."""
    if found is None or bracket is None:
        return None
    if bracket.low == bracket.high:
        per_block = found.reshape(-1, 2).astype(np.int64)
        return Candidates(int(per_block[:, 0].sum()), per_block[:, 1], np.array([bracket.low], np.uint32))
    above, counts, blocks, at = 0, [], [], 0
    while at < found.size:
        above, count = above + int(found[at]), int(found[at + 1])
        counts.append(count)
        blocks.append(found[at + 2 : at + 2 + count])
        at += 2 + count
    return Candidates(above, np.array(counts, np.int64), np.concatenate(blocks))


def pick_listed(listed: Candidates | None, *, k: int) -> Cut | None:
    """Return the cut of the k-th largest magnitude. None: it was not listed."""
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


def _high_loop(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.HIGH, HIGH)


def _is_listed(listed: Cut | None = None) -> bool:
    """Tell whether the k-th largest was listed."""
    return listed is not None


@traits(loop=_high_loop, needless=_is_listed, rare=True)
def high_histogram(delta: torch.Tensor, listed: Cut | None = None, *, tile: Tile) -> Counts:
    """Count the high 16 bits of abs(Δ): int64[32768]."""
    return torch.bincount(magnitude_bits(delta) >> 16, minlength=HIGH).cpu().numpy()


def pick_bin(counts: Counts, *, k: int) -> Bin:
    """Return the bin that holds the k-th largest, k ≥ 1."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, k))
    high = HIGH - 1 - index
    return Bin(high, k - int(above[index] - counts[high]))


def _nonzero_loop(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.NONZERO, 1)


@traits(loop=_nonzero_loop)
def count_nonzero(x: torch.Tensor, *, tile: Tile) -> Counts:
    """Count the entries that are not 0: int64[1]."""
    return x.count_nonzero().view(1).cpu().numpy()


def pick_share(counts: Counts, nonzero: Counts, *, share: float) -> Bin:
    """Return the bin of the k-th largest, k = int(share · nonzero). For k = 0: the last bin, with no entry kept."""
    k = int(share * int(nonzero[0]))
    return pick_bin(counts, k=k) if k else Bin(HIGH - 1, 0)


def _low_loop(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.LOW, LOW, assembly.values[id(node.inputs[1])].high)


def _no_bin(high: Bin | None) -> bool:
    """Tell whether no bin was needed."""
    return high is None


@traits(loop=_low_loop, needless=_no_bin, rare=True)
def low_histogram(delta: torch.Tensor, high: Bin | None, *, tile: Tile) -> Counts:
    """Count the low 16 bits of abs(Δ) among entries with the bin's high bits: int64[65536]."""
    assert high is not None
    bits = magnitude_bits(delta)
    inside = bits[(bits >> 16) == high.high]
    return torch.bincount(inside & 0xFFFF, minlength=LOW).cpu().numpy()


def find_bin(counts: Counts | None, *, k: int) -> Bin | None:
    """Return `pick_bin` of the counts, if they were made."""
    return None if counts is None else pick_bin(counts, k=k)


def pick_either(listed: Cut | None, counts: Counts | None, high: Bin | None) -> Cut:
    """Return the cut from the listed magnitudes, or from the counts of low bits."""
    if listed is not None:
        return listed
    assert counts is not None
    assert high is not None
    return pick_cut(counts, high)


def ranks_listed(counts: Counts | None, listed: Candidates | None, cut: Cut) -> Counts:
    """Return `pick_ranks` of the counts of equal entries per block, or of the list."""
    if listed is None or not cut.listed or cut.equal_kept == cut.equal_total:
        return pick_ranks(counts)
    before = pick_ranks(listed.counts)
    if listed.one:
        return before
    return np.searchsorted(np.flatnonzero(listed.values == cut.threshold), before)


def pick_cut(counts: Counts, high: Bin) -> Cut:
    """Return the exact k-th largest magnitude, and the number of kept entries equal to it."""
    above = np.cumsum(counts[::-1])
    index = int(np.searchsorted(above, high.rank))
    low = LOW - 1 - index
    equal = int(counts[low])
    return Cut((high.high << 16) | low, high.rank - int(above[index] - equal), equal)


def _equal_loop(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.EQUAL, 0, assembly.values[id(node.inputs[1])].threshold)


def _no_ties(cut: Cut) -> bool:
    """Tell whether no pass must count equal entries: all are kept, or their places are known."""
    return cut.listed or cut.equal_kept == cut.equal_total


@traits(loop=_equal_loop, needless=_no_ties, rare=True)
def equal_counts(delta: torch.Tensor, cut: Cut, *, tile: Tile) -> Counts:
    """Count the entries of each block that equal the threshold: int64 per block."""
    equal = magnitude_bits(delta) == cut.threshold
    step = block_elements(tile.shape)
    blocks = torch.arange(tile.size, device=delta.device) // step
    return torch.bincount(blocks[equal], minlength=-(-tile.size // step)).cpu().numpy()


def pick_ranks(counts: Counts | None) -> Counts:
    """Return the number of equal entries before each block, int64. It is empty if it does not matter."""
    if counts is None:
        return np.zeros(0, np.int64)
    return np.cumsum(counts) - counts


def nothing() -> Cut:
    """Return the cut that keeps no entry."""
    return Cut(MAGNITUDE, 0, 0)


def no_ranks() -> Counts:
    """Return the ranks for a cut that keeps all equal entries."""
    return np.zeros(0, np.int64)


def _keep(assembly: Assembly, to: int, score: int, values: int, cut: Cut, before: Counts) -> None:
    """Keep in a register the values whose score is among the largest."""
    offset = sum(map(len, assembly.ranks)) if before.size else -1
    assembly.ranks += [before, np.array([cut.equal_total])] if before.size else []
    assembly.add(codes.KEEP, to, score, cut.threshold, cut.equal_kept, offset, models=(values,))


def _keep_largest_loop(assembly: Assembly, node: Node) -> None:
    delta = assembly.register(node.inputs[0])
    cut, ranks = (assembly.values[id(x)] for x in node.inputs[1:])
    _keep(assembly, assembly.made(node), delta, delta, cut, ranks)


@traits(loop=_keep_largest_loop)
def keep_largest(delta: torch.Tensor, cut: Cut, ranks: Counts, *, tile: Tile) -> torch.Tensor:
    """Return Δ where it is among the k largest magnitudes of the tensor, else 0."""
    return delta.where(among_largest(delta, cut, ranks, tile), delta.new_zeros(()))


def _keep_between_loop(assembly: Assembly, node: Node) -> None:
    delta = assembly.register(node.inputs[0])
    outer, outer_ranks, inner, inner_ranks = (assembly.values[id(x)] for x in node.inputs[1:])
    wide, narrow = assembly.new(), assembly.new()
    _keep(assembly, wide, delta, delta, outer, outer_ranks)
    _keep(assembly, narrow, delta, delta, inner, inner_ranks)
    # an entry that the inner cut keeps as +0.0 needs no clearing
    assembly.add(codes.CLEAR, assembly.made(node), wide, narrow)
    assembly.free += [wide, narrow]


@traits(loop=_keep_between_loop)
def keep_between(
    delta: torch.Tensor, outer: Cut, outer_ranks: Counts, inner: Cut, inner_ranks: Counts, *, tile: Tile
) -> torch.Tensor:
    """Return Δ where it is among the largest magnitudes by `outer` and not by `inner`, else 0.

        delta                  a tile
        outer, outer_ranks     the cut of the larger set, and ranks of its equal entries
        inner, inner_ranks     the cut of the smaller set

    Model breadcrumbs (arXiv 2312.06795): the very largest are outliers, the smallest noise.
    """
    keep = among_largest(delta, outer, outer_ranks, tile) & ~among_largest(delta, inner, inner_ranks, tile)
    return delta.where(keep, delta.new_zeros(()))


def _keep_where_loop(assembly: Assembly, node: Node) -> None:
    delta, score = map(assembly.register, node.inputs[:2])
    cut, ranks = (assembly.values[id(x)] for x in node.inputs[2:])
    _keep(assembly, assembly.made(node), score, delta, cut, ranks)


@traits(loop=_keep_where_loop)
def keep_where(delta: torch.Tensor | Kept, score: torch.Tensor, cut: Cut, ranks: Counts, *, tile: Tile) -> torch.Tensor:
    """Return Δ where the magnitude of its score is among the k largest of the tensor (`cut`, `ranks` of equal
    ones), else 0.
    """
    delta = densify(delta, tile.size)
    return delta.where(among_largest(score, cut, ranks, tile), delta.new_zeros(()))


def among_largest(score: torch.Tensor, cut: Cut, ranks: Counts, tile: Tile) -> torch.Tensor:
    """Tell whether each entry's magnitude is one of the k largest of the tensor."""
    bits = magnitude_bits(score)
    keep = bits > cut.threshold
    equal = bits == cut.threshold
    if ranks.size:
        before = int(ranks[tile.start // block_elements(tile.shape)])
        keep |= equal & (equal.cumsum(0) + before <= cut.equal_kept)
    else:
        keep |= equal
    return keep


def _keep_largest_rows_loop(assembly: Assembly, node: Node, density: float) -> None:
    delta, row = assembly.register(node.inputs[0]), assembly.form.row
    score, k = delta, round(density * row)
    if len(node.inputs) > 1:
        score = assembly.new()
        spread(assembly, score, delta, assembly.values[id(node.inputs[1])], 2)
    assembly.add(codes.ROWS, assembly.made(node), delta, score, k, row)
    if score != delta:
        assembly.free.append(score)


def _rows_fit(node: Node, root: Node) -> bool:
    return row_length(node.shape) <= LONGEST_ROW


@traits(loop=_keep_largest_rows_loop, fits=_rows_fit, sorts=True)
def keep_largest_rows(delta: torch.Tensor, *, tile: Tile, density: float) -> torch.Tensor:
    """Return Δ where it is among the round(density · n) largest magnitudes of its row of n, else 0.

    Equal entries are kept from the left.
    """
    return _largest_of_rows(delta, delta.view(-1, tile.columns), density)


@traits(loop=_keep_largest_rows_loop, fits=_rows_fit, sorts=True)
def keep_largest_rows_scored(
    delta: torch.Tensor, norms: np.ndarray[tuple[int], np.dtype[np.float32]], *, tile: Tile, density: float
) -> torch.Tensor:
    """Return Δ where abs(Δ_ij) · ‖x_j‖, in float32, is among the round(density · n) largest of row i.

    Equal entries are kept from the left.

    `norms` (n) are the norms of the input features (WANDA, arXiv 2306.11695; on deltas: arXiv 2410.09344).
    """
    rows = delta.view(-1, tile.columns)
    return _largest_of_rows(delta, rows.abs() * torch.from_numpy(norms).to(delta.device), density)


def keep_largest_rows_stacked(
    delta: torch.Tensor, norms: np.ndarray[tuple[int, int], np.dtype[np.float32]], *, tile: Tile, density: float
) -> torch.Tensor:
    """Do the same with stacked matrices (E, m, n), with `norms` (E, n) of their inputs."""
    rows = delta.view(-1, tile.columns)
    numbers = (tile.start // tile.columns + torch.arange(len(rows))) // tile.shape[-2]
    return _largest_of_rows(delta, rows.abs() * torch.from_numpy(norms)[numbers].to(delta.device), density)


def scored_stacked(
    delta: torch.Tensor | Kept, norms: np.ndarray[tuple[int, int], np.dtype[np.float32]], *, tile: Tile
) -> torch.Tensor:
    """Return abs(Δ_ji) · ‖x_j‖ in float32 of stacked matrices (E, n, m), stored (in, out), with `norms` (E, n)."""
    rows = densify(delta, tile.size).view(-1, tile.columns)
    numbers = tile.start // tile.columns + torch.arange(len(rows))
    return (rows.abs() * torch.from_numpy(norms).reshape(-1)[numbers].to(rows.device)[:, None]).view(-1)


def _largest_of_rows(delta: torch.Tensor, score: torch.Tensor, density: float) -> torch.Tensor:
    """Return Δ where abs(score) (rows, n) is among the round(density · n) largest of its row."""
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


def largest(make: Make, delta: Any, k: int) -> Any:
    """Make Δ with only its k largest magnitudes: a sample, a pass over the tensor, rarely three more, then the mask."""
    if k >= math.prod(delta.shape):
        return delta
    return make(keep_largest, [delta, *end_of(make, delta, k)], shape=delta.shape)


def above(make: Make, delta: Any, cut: Any) -> Any:
    """Make Δ above a cut, with the first entries equal to it in flat order."""
    equal = make(equal_counts, [delta, cut], kind="concat", shape=delta.shape)
    return make(keep_largest, [delta, cut, make(pick_ranks, [equal], kind="small")], shape=delta.shape)


def end_of(make: Make, delta: Any, k: int) -> tuple[Any, Any]:
    """Make the end of the k largest magnitudes: the cut, and the ranks of the entries equal to it."""
    if k == 0:
        return make(nothing, kind="small"), make(no_ranks, kind="small")
    shape, size = delta.shape, math.prod(delta.shape)
    if size <= SAMPLE_LEAST:  # one block, whose magnitudes fit in memory
        cut = make(pick_largest, [make(magnitudes, [delta], kind="concat", shape=shape)], kind="small", k=k)
        return cut, make(rank_of_block, [cut], kind="small")
    some = make(sample, [delta], kind="concat", shape=shape)
    bracket = make(pick_bracket, [some], kind="small", k=k, size=size)
    inside = make(bracketed, [delta, bracket], kind="concat", shape=shape)
    listed = make(gathered, [inside, bracket], kind="small")
    near = make(pick_listed, [listed], kind="small", k=k)
    high = make(high_histogram, [delta, near], kind="sum", shape=shape)
    found = make(find_bin, [high], kind="small", k=k)
    low = make(low_histogram, [delta, found], kind="sum", shape=shape)
    cut = make(pick_either, [near, low, found], kind="small")
    equal = make(equal_counts, [delta, cut], kind="concat", shape=shape)
    return cut, make(ranks_listed, [equal, listed, cut], kind="small")
