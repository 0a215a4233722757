"""Every step's torch function again, on numpy tiles, in compiled loops.

`KERNELS` maps the function names of a graph to functions of the same signature and, bit for bit, the same result.
bfloat16 tiles are uint16 arrays, other dtypes native; sparse forms are those of `tensors`. Inputs are never changed.
Importing this imports numba.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import loops, methods, sums
from deltamerge.engine.fused.arrays import NARROW, WIDE, Array, Delta, Floats, addresses, densified, loadable, widened
from deltamerge.methods.merge.arithmetic import divisor_of
from deltamerge.methods.prune.bits import SPARSE_BLOCK, Key, guided, is_sparse, keep, threshold
from deltamerge.methods.prune.masks import column_choice, reduced_range, unreduced
from deltamerge.methods.prune.protect import is_among, places
from deltamerge.methods.prune.select import HIGH, LOW, Bin, Cut
from deltamerge.methods.tiles import Kept, Patched, Tile, block_elements

Weights = tuple[float, ...]

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": WIDE,
    "F16": np.dtype(np.float16),
    "BF16": NARROW,
}


def _difference(tune: Array, base: Array) -> Floats:
    if tune.dtype != NARROW or base.dtype != NARROW:
        with np.errstate(all="ignore"):
            return widened(tune) - widened(base)
    out = np.empty(tune.size, WIDE)
    loops.subtract(tune, base, out)
    return out


def subtract(tune: Array, base: Array, *, tile: Tile, dtypes: tuple[str, str]) -> Floats:
    return _difference(tune, base)


def zeros(like: Delta, *, tile: Tile) -> Floats:
    return np.zeros(tile.size, WIDE)


def cast(value: Array | Patched, *, tile: Tile, to: str) -> Array:
    if not isinstance(value, Patched):
        return _cast(value, to)
    result = _cast(value.base, to, copy=True)
    result[value.positions] = _cast(value.values, to)
    return result


def _cast(x: Array, to: str, *, copy: bool = False) -> Array:
    dtype = DTYPES[to]
    if x.dtype == dtype:
        return x.copy() if copy else x
    if dtype == NARROW:
        out = np.empty(x.size, NARROW)
        loops.narrow(widened(x).view(np.uint32), out)
        return out
    # torch rounds float64 to float16 by way of float32
    source = widened(x) if x.dtype == NARROW or dtype == np.float16 else x
    with np.errstate(all="ignore"):
        return source.astype(dtype, copy=False)


def dare(tune: Array, base: Array, *, tile: Tile, key: Key, density: float) -> Delta:
    if is_sparse(density):
        return _kept(tune, base, _positions(key, tile.start, tile.stop, density))
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        return _difference(tune, base)
    out = np.empty(tile.size, WIDE)
    cut = np.uint16(high), np.uint16(low)
    loops.drop_at_random(loadable(tune), loadable(base), *_words(key), tile.start, *cut, np.float32(1), out)
    return out


def structured(tune: Array, base: Array, *, tile: Tile, key: Key, a: float, b: float) -> Delta:
    if len(tile.shape) != 2:
        return dare(tune, base, tile=tile, key=key, density=a * b)
    columns = column_choice(tile, key, a)
    start, stop = reduced_range(tile, columns)
    kept = _kept(tune, base, unreduced(tile, columns, _positions(key, start, stop, b) + start))
    return kept if is_sparse(a * b) else densified(kept, tile.size)


def _words(key: Key) -> tuple[np.uint64, np.uint64]:
    return np.uint64(key[0]), np.uint64(key[1])


def _kept(tune: Array, base: Array, positions: NDArray[np.int64]) -> Kept:
    if not {tune.dtype, base.dtype} <= {NARROW, WIDE}:
        return Kept(positions, _difference(tune[positions], base[positions]))
    values = np.empty(positions.size, WIDE)
    loops.subtract_at(tune, base, positions, values)
    return Kept(positions, values)


def _positions(key: Key, start: int, stop: int, density: float) -> NDArray[np.int64]:
    """`bits.positions`."""
    if not is_sparse(density):
        return np.flatnonzero(keep(key, start, stop, density))
    table, guide, shift = guided(density)
    out = np.empty(stop - start + 1, np.int64)
    count = loops.draw_positions(table, guide, shift, *_words(key), start, stop, SPARSE_BLOCK, out)
    return out[:count].copy()


def divide(delta: Delta, q: float, *, tile: Tile) -> Delta:
    divisor = np.float32(q)
    with np.errstate(all="ignore"):
        if isinstance(delta, Kept):
            return Kept(delta.positions, delta.values / divisor)
        return delta / divisor


def clear(delta: Delta, columns: NDArray[np.int64], *, tile: Tile) -> Delta:
    if isinstance(delta, Kept):
        stays = ~is_among(columns, tile)[(delta.positions + tile.start) % tile.columns]
        return Kept(delta.positions[stays], delta.values[stays])
    cleared = delta.copy()
    cleared[places(columns, tile)] = 0.0
    return cleared


def restore(delta: Delta, tune: Array, base: Array, columns: NDArray[np.int64], *, tile: Tile) -> Delta:
    whole = _kept(tune, base, places(columns, tile))
    if isinstance(delta, Kept):
        positions = np.concatenate([delta.positions, whole.positions])
        order = np.argsort(positions)
        return Kept(positions[order], np.concatenate([delta.values, whole.values])[order])
    restored = delta.copy()
    restored[whole.positions] = whole.values
    return restored


def linear(*tensors: Array, tile: Tile, weights: Weights, normalize: bool) -> Floats:
    return _sum(np.empty(0, WIDE), [loadable(x) for x in tensors], weights, normalize, 1.0)


def task_arithmetic(
    base: Array, *deltas: Delta, tile: Tile, weights: Weights, normalize: bool, lambda_: float
) -> Floats | Patched:
    return _merge(_sum, base, deltas, tile, weights, normalize, lambda_)


def ties(
    base: Array, *deltas: Delta, tile: Tile, weights: Weights, normalize: bool, lambda_: float
) -> Floats | Patched:
    return _merge(_consensus, base, deltas, tile, weights, normalize, lambda_)


def _merge(
    combine: Callable[[Array, list[Array], Weights, bool, float], Floats],
    base: Array,
    deltas: tuple[Delta, ...],
    tile: Tile,
    weights: Weights,
    normalize: bool,
    lambda_: float,
) -> Floats | Patched:
    """`combine` on the whole tile, or where every delta is sparse on the union of their positions."""
    kept = [delta for delta in deltas if isinstance(delta, Kept)]
    if len(kept) < len(deltas):
        dense: list[Array] = [densified(delta, tile.size) for delta in deltas]
        return combine(loadable(base), dense, weights, normalize, lambda_)
    positions, rows = _align(kept, tile.size)
    there = loadable(base[positions])
    return Patched(base, positions, combine(there, rows, weights, normalize, lambda_))


def _align(kept: list[Kept], size: int) -> tuple[NDArray[np.int64], list[Array]]:
    if len(kept) == 1:
        return kept[0].positions, [kept[0].values]
    sizes = np.array([delta.positions.size for delta in kept], np.int64)
    total = int(sizes.sum())
    positions, rows = np.empty(total, np.int64), np.empty((len(kept), total), WIDE)
    count = loops.align(
        addresses([delta.positions for delta in kept]),
        addresses([delta.values for delta in kept]),
        sizes,
        np.zeros(-(-size // 64), np.uint64),
        np.empty(-(-size // 64), np.int64),
        positions,
        rows,
    )
    return positions[:count], [row[:count] for row in rows]


def _sum(base: Array, parts: list[Array], weights: Weights, normalize: bool, scale: float) -> Floats:
    out = np.empty(parts[0].size, WIDE)
    loops.add_weighted(
        base,
        addresses(parts),
        np.array([x.dtype == NARROW for x in parts]),
        np.array(weights, WIDE),
        np.float32(divisor_of(weights) if normalize else 1),
        np.float32(scale),
        out,
    )
    return out


def _consensus(base: Array, deltas: list[Array], weights: Weights, normalize: bool, scale: float) -> Floats:
    out = np.empty(deltas[0].size, WIDE)
    loops.add_agreeing(base, addresses(deltas), np.array(weights, WIDE), normalize, np.float32(scale), out)
    return out


def high_histogram(delta: Floats, *, tile: Tile) -> NDArray[np.int64]:
    counts = np.zeros(HIGH, np.int64)
    loops.count_high(delta.view(np.uint32), counts)
    return counts


def low_histogram(delta: Floats, high: Bin, *, tile: Tile) -> NDArray[np.int64]:
    counts = np.zeros(LOW, np.int64)
    loops.count_low(delta.view(np.uint32), np.uint32(high.high), counts)
    return counts


def high_counts(delta: Floats, listed: Cut | None, *, tile: Tile) -> NDArray[np.int64]:
    return high_histogram(delta, tile=tile)


def low_counts(delta: Floats, high: Bin | None, *, tile: Tile) -> NDArray[np.int64]:
    assert high is not None
    return low_histogram(delta, high, tile=tile)


def equal_counts(delta: Floats, cut: Cut, *, tile: Tile) -> NDArray[np.int64]:
    step = block_elements(tile.shape)
    counts = np.empty(-(-tile.size // step), np.int64)
    loops.count_equal(delta.view(np.uint32), np.uint32(cut.threshold), step, counts)
    return counts


def _largest_of_rows(delta: Floats, scores: Floats, tile: Tile, density: float) -> Floats:
    rows = (tile.size // tile.columns, tile.columns)
    k = round(density * tile.columns)
    if k == 0:
        return np.zeros(tile.size, WIDE)
    out = np.empty(tile.size, WIDE)
    bits, of_scores, kept = (x.view(np.uint32).reshape(rows) for x in (delta, scores, out))
    loops.keep_largest_of_rows(bits, of_scores, k, kept)
    return out


def keep_largest_rows(delta: Floats, *, tile: Tile, density: float) -> Floats:
    return _largest_of_rows(delta, delta, tile, density)


def keep_largest_rows_scored(delta: Floats, norms: Floats, *, tile: Tile, density: float) -> Floats:
    with np.errstate(all="ignore"):
        scores = np.abs(delta.reshape(-1, tile.columns)) * norms
    return _largest_of_rows(delta, scores, tile, density)


def norm(delta: Delta, *, tile: Tile, norm: str) -> NDArray[np.float64]:
    dense = densified(delta, tile.size)
    step = block_elements(tile.shape)
    out = np.empty(-(-tile.size // step), np.float64)
    sums.norm_of_blocks(dense, step, {"linf": 0, "l1": 1, "l2": 2}[norm], out)
    return out


def divide_rows(delta: Delta, q: float | Floats, *, tile: Tile) -> Delta:
    if isinstance(q, float):
        return divide(delta, q, tile=tile)
    divisors = q.astype(WIDE).reshape(-1)
    with np.errstate(all="ignore"):
        if isinstance(delta, Kept):
            places = delta.positions + tile.start
            of_entry = places // tile.columns if q.shape[-1] == 1 else places % tile.columns
            return Kept(delta.positions, delta.values / divisors[of_entry])
        places = np.arange(tile.start, tile.stop)
        return delta / divisors[places // tile.columns if q.shape[-1] == 1 else places % tile.columns]


def passthrough(x: Array, *, tile: Tile, scales: Weights) -> Floats:
    with np.errstate(all="ignore"):
        return widened(x) * np.float32(scales[0])


KERNELS: dict[str, Callable[..., Any]] = {
    "deltamerge.methods.ops:subtract": subtract,
    "deltamerge.methods.ops:cast": cast,
    "deltamerge.methods.ops:zeros": zeros,
    "deltamerge.methods.prune.masks:dare": dare,
    "deltamerge.methods.prune.masks:structured": structured,
    "deltamerge.methods.prune.protect:clear": clear,
    "deltamerge.methods.prune.protect:restore": restore,
    "deltamerge.methods.prune.rescale:divide": divide,
    "deltamerge.methods.prune.select:high_histogram": high_histogram,
    "deltamerge.methods.prune.select:low_histogram": low_histogram,
    "deltamerge.methods.prune.select:high_counts": high_counts,
    "deltamerge.methods.prune.select:low_counts": low_counts,
    "deltamerge.methods.prune.select:sample": methods.sample,
    "deltamerge.methods.prune.select:bracketed": methods.bracketed,
    "deltamerge.methods.prune.select:equal_counts": equal_counts,
    "deltamerge.methods.prune.select:keep_largest": methods.keep_largest,
    "deltamerge.methods.prune.select:keep_largest_rows": keep_largest_rows,
    "deltamerge.methods.prune.select:keep_largest_rows_scored": keep_largest_rows_scored,
    "deltamerge.methods.prune.rescale:norm": norm,
    "deltamerge.methods.prune.rescale:divide_rows": divide_rows,
    "deltamerge.methods.merge.arithmetic:passthrough": passthrough,
    "deltamerge.methods.merge.arithmetic:linear": linear,
    "deltamerge.methods.merge.arithmetic:task_arithmetic": task_arithmetic,
    "deltamerge.methods.merge.ties:ties": ties,
    "deltamerge.methods.merge.span:gram": methods.gram,
    "deltamerge.methods.merge.span:row_grams": methods.row_grams,
    "deltamerge.methods.merge.span:combine": methods.combine,
    "deltamerge.methods.prune.della:della": methods.della,
    "deltamerge.methods.prune.select:keep_between": methods.keep_between,
    "deltamerge.methods.prune.select:keep_where": methods.keep_where,
    "deltamerge.methods.prune.select:count_nonzero": methods.count_nonzero,
    "deltamerge.methods.merge.sce:variance": methods.variance,
    "deltamerge.methods.merge.sce:sce": methods.sce,
}
