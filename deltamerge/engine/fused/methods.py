"""The kernels of the methods of `method_loops`: slerp and its kin, della, breadcrumbs, sce."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import loops, method_loops, sums
from deltamerge.engine.fused.arrays import WIDE, Array, Delta, Floats, addresses, densified, loadable, widened
from deltamerge.methods.merge import span
from deltamerge.methods.ops import row_blocks
from deltamerge.methods.prune.bits import Key
from deltamerge.methods.prune.della import probabilities
from deltamerge.methods.prune.select import MAGNITUDE, Bracket, Cut, run_start, sampled_run
from deltamerge.methods.tiles import Kept, Tile, block_elements


def gram(*models: Array | Kept, tile: Tile) -> NDArray[np.float64]:
    return _dots(models, tile, block_elements(tile.shape))


def row_grams(*models: Array | Kept, tile: Tile) -> NDArray[np.float64]:
    return span.square(_dots(models, tile, tile.shape[-1]), len(models))


def _dots(models: tuple[Array | Kept, ...], tile: Tile, step: int) -> NDArray[np.float64]:
    """(tile.size / step, pairs) the dot products of each `step` elements."""
    dense = [densified(x, tile.size) for x in models]
    dense = [widened(x) if x.dtype == np.float16 else x for x in dense]
    pairs = span.pairs(len(dense))
    out = np.empty((len(pairs), -(-tile.size // step)), np.float64)
    for k, (i, j) in enumerate(pairs):
        sums.dots_of_blocks(dense[i], dense[j], step, out[k])
    return out.T


def combine(*inputs: Any, tile: Tile, along: str, based: bool) -> Floats:
    *parts, coefficients = inputs
    models = [loadable(densified(x, tile.size)) for x in (parts[1:] if based else parts)]
    base = loadable(parts[0]) if based else np.empty(0, WIDE)
    if along == "tensor":
        out = np.empty(tile.size, WIDE)
        narrow = np.array([x.dtype != WIDE for x in models])
        weights, one = np.asarray(coefficients).astype(WIDE), np.float32(1)
        loops.add_weighted(base, addresses(models), narrow, weights, one, one, out)
        return out
    total, columns = np.empty(0, WIDE), np.arange(tile.start, tile.stop) % len(coefficients)
    with np.errstate(all="ignore"):
        for i, x in enumerate(models):
            factors = coefficients[..., i].astype(WIDE)
            product = widened(x) * (np.repeat(factors, tile.shape[-1]) if along == "rows" else factors[columns])
            total = total + product if i else product
        return widened(base) + total if based else total


@lru_cache(maxsize=16)
def _limits(columns: int, density: float, epsilon: float) -> tuple[NDArray[np.int64], Floats]:
    """Of each rank: the bound of the words of the kept, π · 2**32, and π / density."""
    probability = probabilities(columns, density, epsilon)
    return np.round(probability * 2.0**32).astype(np.int64), (probability / density).astype(WIDE)


def della(delta: Delta, *, tile: Tile, key: Key, density: float, epsilon: float, weighted: bool = True) -> Floats:
    dense, out = densified(delta, tile.size), np.empty(tile.size, WIDE)
    words = np.uint64(key[0]), np.uint64(key[1])
    for part, columns in row_blocks(tile):
        tables = _limits(columns, density, epsilon)
        start = tile.start + part.start
        method_loops.keep_by_rank(dense[part], start, columns, *words, *tables, weighted, out[part])
    return out


def variance(*deltas: Delta, tile: Tile) -> Floats:
    out, dense = np.empty(tile.size, WIDE), [densified(x, tile.size) for x in deltas]
    method_loops.variance(addresses(dense), out)
    return out


def count_nonzero(x: Floats, *, tile: Tile) -> NDArray[np.int64]:
    return np.array([np.count_nonzero(x != 0)], np.int64)


def sce(base: Array, *inputs: Any, tile: Tile) -> Floats:
    *deltas, weights = inputs
    out, dense = np.empty(tile.size, WIDE), [densified(x, tile.size) for x in deltas]
    method_loops.add_elected(loadable(base), addresses(dense), np.array(weights, WIDE), out)
    return out


def sample(delta: Floats, *, tile: Tile) -> NDArray[np.uint32]:
    step, run = block_elements(tile.shape), sampled_run(tile.shape)
    bits, parts = delta.view(np.uint32), [np.empty(0, np.uint32)]
    for start in range(0, tile.size, step):
        block = bits[start : start + step]
        first = run_start((tile.start + start) // step, block.size, run)
        parts.append(block[first : first + run] & np.uint32(MAGNITUDE))
    return np.concatenate(parts)


def bracketed(delta: Floats, bracket: Bracket, *, tile: Tile) -> NDArray[np.uint32]:
    step = block_elements(tile.shape)
    out = np.empty(tile.size + 2 * -(-tile.size // step) + 1, np.uint32)
    ends = np.uint32(bracket.low), np.uint32(bracket.high)
    return out[: method_loops.list_between(delta.view(np.uint32), *ends, step, out)].copy()


def keep_where(delta: Delta, score: Floats, cut: Cut, ranks: NDArray[np.int64], *, tile: Tile) -> Floats:
    dense, scores, out = densified(delta, tile.size), score.view(np.uint32), np.empty(tile.size, WIDE)
    whole, wanted = _equals(cut, ranks, tile)
    least = np.uint32(cut.threshold + (not whole))
    method_loops.keep_scored(dense.view(np.uint32), scores, least, out.view(np.uint32))
    if not whole and wanted > 0:
        equals = np.flatnonzero(scores & np.uint32(0x7FFFFFFF) == cut.threshold)[:wanted]
        out[equals] = dense[equals]
    return out


def keep_largest(delta: Floats, cut: Cut, ranks: NDArray[np.int64], *, tile: Tile) -> Floats:
    bits, out = delta.view(np.uint32), np.empty(tile.size, WIDE)
    whole, wanted = _equals(cut, ranks, tile)
    loops.keep_from(bits, np.uint32(cut.threshold + (not whole)), out.view(np.uint32))
    if not whole and wanted > 0:
        equals = np.flatnonzero(bits & np.uint32(0x7FFFFFFF) == cut.threshold)[:wanted]
        out[equals] = delta[equals]
    return out


def _equals(cut: Cut, ranks: NDArray[np.int64], tile: Tile) -> tuple[bool, int]:
    """Whether the tile keeps every entry that equals the threshold, and how many it may keep."""
    if not ranks.size:
        return True, 0
    step = block_elements(tile.shape)
    before, after = tile.start // step, -(-tile.stop // step)
    wanted = cut.equal_kept - int(ranks[before])
    held = (int(ranks[after]) if after < ranks.size else cut.equal_total) - int(ranks[before])
    return wanted >= held, wanted


def keep_between(
    delta: Floats,
    outer: Cut,
    outer_ranks: NDArray[np.int64],
    inner: Cut,
    inner_ranks: NDArray[np.int64],
    *,
    tile: Tile,
) -> Floats:
    kept = keep_largest(delta, outer, outer_ranks, tile=tile)
    # an entry that the inner cut keeps as +0.0 is +0.0 anyway
    kept[keep_largest(delta, inner, inner_ranks, tile=tile).view(np.uint32) != 0] = 0.0
    return kept
