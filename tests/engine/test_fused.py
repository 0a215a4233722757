"""The fused kernels against the torch functions they stand for: equal bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from numba import njit

from deltamerge.engine.backends import FUSED_FUNCTIONS
from deltamerge.engine.fused.kernels import DTYPES, KERNELS
from deltamerge.engine.fused.loops import philox
from deltamerge.engine.fused.vectors import BLOCKS, philox_blocks
from deltamerge.engine.graph import resolve
from deltamerge.methods.prune.bits import mask_key
from deltamerge.methods.prune.select import (
    MAGNITUDE,
    Bin,
    Bracket,
    Cut,
    gathered,
    pick_bin,
    pick_bracket,
    pick_cut,
    pick_listed,
    pick_ranks,
    ranks_listed,
)
from deltamerge.methods.tiles import Kept, Patched, Tile, block_elements

CODES = list(DTYPES)
SIZES = [0, 1, 7, 4096, 4097, 20_000]
KEY = mask_key(5, "tune", "w")
SPECIALS = np.array(
    [0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-40, 3.4e38, -3.4e38, 65504, 65520, 1 + 2**-8, 1 + 3 * 2**-8, 1e-8],
    np.float32,
)


def floats(size: int, seed: int, scale: float = 1.0) -> np.ndarray:
    """Ordinary values with every special one met by every other, and some zeros."""
    rng = np.random.default_rng(seed)
    x = (scale * rng.standard_normal(size)).astype(np.float32)
    places = rng.random(size) < 0.1
    x[places] = rng.choice(SPECIALS, places.sum())
    return x


def stored(x: np.ndarray, code: str) -> tuple[torch.Tensor, np.ndarray]:
    """The same tile for torch and for the kernels."""
    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
    tensor = torch.from_numpy(x.copy()).to(names[code])
    return tensor, (tensor.view(torch.uint16) if code == "BF16" else tensor).numpy().copy()


def kept(value: Kept) -> Kept:
    return Kept(torch.from_numpy(value.positions), torch.from_numpy(value.values))


def same(ours: Any, theirs: Any) -> None:
    """Equal bits; any NaN of a float is as good as another."""
    if isinstance(theirs, Kept | Patched):
        assert type(ours) is type(theirs)
        same(ours.positions, theirs.positions)
        same(ours.values, theirs.values)
        if isinstance(ours, Patched) and isinstance(theirs, Patched):
            same(ours.base, theirs.base)
        return
    if isinstance(theirs, torch.Tensor):
        assert ours.shape == tuple(theirs.shape)
        if theirs.dtype == torch.bfloat16:
            assert ours.dtype == np.uint16
            nan = theirs.isnan().numpy()
            assert (ours[nan] & 0x7FFF > 0x7F80).all()
            assert (ours == theirs.view(torch.uint16).numpy())[~nan].all()
            return
        theirs = theirs.numpy()
    assert ours.dtype == theirs.dtype
    if theirs.dtype.kind == "f":
        nan = np.isnan(theirs)
        assert (np.isnan(ours) == nan).all()
        bits = f"u{theirs.dtype.itemsize}"
        assert (ours.view(bits) == theirs.view(bits))[~nan].all()
    else:
        assert (ours == theirs).all()


def check(name: str, ours: tuple[Any, ...], theirs: tuple[Any, ...], **parameters: Any) -> Any:
    before = [x.tobytes() for x in ours if isinstance(x, np.ndarray)]
    result = KERNELS[name](*ours, **parameters)
    assert [x.tobytes() for x in ours if isinstance(x, np.ndarray)] == before
    same(result, resolve(name)(*theirs, **parameters))
    return result


def flat(size: int) -> Tile:
    return Tile(0, size, (size,))


def test_table_is_the_one_that_plans_rely_on() -> None:
    assert set(KERNELS) == set(FUSED_FUNCTIONS)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("base_code", CODES)
def test_subtract(size: int, code: str, base_code: str) -> None:
    tune, base = stored(floats(size, 1), code), stored(floats(size, 2), base_code)
    check(
        "deltamerge.methods.ops:subtract",
        (tune[1], base[1]),
        (tune[0], base[0]),
        tile=flat(size),
        dtypes=(code, base_code),
    )


@pytest.mark.parametrize("to", CODES)
@pytest.mark.parametrize("code", CODES)
def test_cast(code: str, to: str) -> None:
    for size in SIZES:
        value, ours = stored(floats(size, 3), code)
        check("deltamerge.methods.ops:cast", (ours,), (value,), tile=flat(size), to=to)


@pytest.mark.parametrize("to", CODES)
@pytest.mark.parametrize("code", CODES)
def test_cast_of_a_patched_tile(code: str, to: str) -> None:
    size = 5000
    base, ours = stored(floats(size, 4), code)
    positions = np.arange(3, size, 7)
    values = floats(positions.size, 5)
    check(
        "deltamerge.methods.ops:cast",
        (Patched(ours, positions, values),),
        (Patched(base, torch.from_numpy(positions), torch.from_numpy(values)),),
        tile=flat(size),
        to=to,
    )


def test_every_float_rounds_to_bfloat16_like_torch() -> None:
    high = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = (high | low).ravel().view(np.float32)
    ours = check("deltamerge.methods.ops:cast", (x,), (torch.from_numpy(x),), tile=flat(x.size), to="BF16")
    assert (ours[np.isnan(x)] == 0x7FC0).all()


@pytest.mark.parametrize("codes", [("BF16", "BF16"), ("F32", "F32"), ("BF16", "F32"), ("F16", "BF16"), ("F64", "F16")])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.1, 1 / 16, 0.06, 0.01, 1e-3, 1e-6])
def test_dare(codes: tuple[str, str], density: float) -> None:
    for start, size in ((0, 20_000), (61_235, 200_001), (1 << 40, 70_000), (9, 1), (9, 0)):
        tune, base = stored(floats(size, 6), codes[0]), stored(floats(size, 7), codes[1])
        check(
            "deltamerge.methods.prune.masks:dare",
            (tune[1], base[1]),
            (tune[0], base[0]),
            tile=Tile(start, start + size, (1 << 41,)),
            key=KEY,
            density=density,
        )


def test_dare_breaks_ties_of_the_high_half() -> None:
    # a density whose low half is large: of 2**21 positions about 32 tie
    size, density = 1 << 21, (30_000 * 65_536 + 50_000) / 2**32
    tune, base = stored(np.ones(size, np.float32), "BF16"), stored(np.zeros(size, np.float32), "BF16")
    parameters = {"tile": Tile(3, size + 3, (size + 3,)), "key": KEY, "density": density}
    check("deltamerge.methods.prune.masks:dare", (tune[1], base[1]), (tune[0], base[0]), **parameters)


@pytest.mark.parametrize("numbers", [(0.5, 0.5), (0.1, 0.1), (0.5, 0.01), (0.01, 0.01), (1.0, 1.0)])
@pytest.mark.parametrize("code", CODES)
def test_structured(numbers: tuple[float, float], code: str) -> None:
    for tile in (Tile(0, 30_000, (300, 100)), Tile(20_011, 90_007, (100_000, 97)), Tile(4, 9_000, (10, 30, 30))):
        tune, base = stored(floats(tile.size, 8), code), stored(floats(tile.size, 9), code)
        check(
            "deltamerge.methods.prune.masks:structured",
            (tune[1], base[1]),
            (tune[0], base[0]),
            tile=tile,
            key=KEY,
            a=numbers[0],
            b=numbers[1],
        )


@pytest.mark.parametrize("q", [0.1, 1 / 3, 1.0, 1e-30])
def test_divide(q: float) -> None:
    name, tile = "deltamerge.methods.prune.rescale:divide", flat(9000)
    delta, ours = stored(floats(9000, 10), "F32")
    check(name, (ours, q), (delta, q), tile=tile)
    sparse = Kept(np.arange(0, 9000, 9), floats(1000, 11))
    check(name, (sparse, q), (kept(sparse), q), tile=tile)


WEIGHTS = [(1.0,), (0.3, 0.7), (0.5, -0.5), (-1.1, 0.2, 1 / 3), (0.0, 1e-9), (1e-5, 1e-6, 3e20)]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("codes", [("BF16",), ("F32",), ("BF16", "F32", "F16"), ("F64",)])
def test_linear(weights: tuple[float, ...], normalize: bool, codes: tuple[str, ...]) -> None:
    for size in SIZES:
        tiles = [stored(floats(size, 20 + i), codes[i % len(codes)]) for i in range(len(weights))]
        check(
            "deltamerge.methods.merge.arithmetic:linear",
            tuple(x for _, x in tiles),
            tuple(x for x, _ in tiles),
            tile=flat(size),
            weights=weights,
            normalize=normalize,
        )


def sparse_delta(size: int, seed: int, density: float) -> Kept:
    rng = np.random.default_rng(seed)
    positions = np.flatnonzero(rng.random(size) < density)
    return Kept(positions, floats(positions.size, seed))


@pytest.mark.parametrize(
    "name", ["deltamerge.methods.merge.arithmetic:task_arithmetic", "deltamerge.methods.merge.ties:ties"]
)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("lambda_", [1.0, 0.7])
@pytest.mark.parametrize("form", ["dense", "sparse", "mixed"])
def test_merges(name: str, weights: tuple[float, ...], normalize: bool, lambda_: float, form: str) -> None:
    for code, size in (("BF16", 20_000), ("F32", 9000), ("F16", 4097), ("F64", 1), ("BF16", 0)):
        base, ours = stored(floats(size, 30), code)
        deltas: list[Any] = []
        for i in range(len(weights)):
            if form == "sparse" or (form == "mixed" and i % 2):
                deltas.append(sparse_delta(size, 40 + i, 0.05))
            else:
                deltas.append(floats(size, 40 + i, 0.01))
        theirs = [kept(d) if isinstance(d, Kept) else torch.from_numpy(d) for d in deltas]
        check(
            name,
            (ours, *deltas),
            (base, *theirs),
            tile=flat(size),
            weights=weights,
            normalize=normalize,
            lambda_=lambda_,
        )


@pytest.mark.parametrize(
    "name", ["deltamerge.methods.merge.arithmetic:task_arithmetic", "deltamerge.methods.merge.ties:ties"]
)
def test_merges_round_every_step(name: str) -> None:
    # enough ordinary numbers that a fused multiply-add or a reciprocal would show
    size = 1 << 18
    rng = np.random.default_rng(0)
    base, *deltas = (rng.standard_normal(size).astype(np.float32) for _ in range(4))
    parameters = {"tile": flat(size), "weights": (0.3, 0.9, -0.7), "normalize": True, "lambda_": 1.3}
    check(name, (base, *deltas), tuple(map(torch.from_numpy, (base, *deltas))), **parameters)


def deltas_with_ties(size: int) -> np.ndarray:
    rng = np.random.default_rng(50)
    delta = rng.standard_normal(size).astype(np.float32).round(1) * np.float32(0.01)
    delta[rng.random(size) < 0.01] = -0.0
    return delta


@pytest.mark.parametrize("delta", [deltas_with_ties(70_000), floats(70_000, 51), np.zeros(70_000, np.float32)])
@pytest.mark.parametrize("k", [1, 700, 35_000, 69_999])
def test_selection(delta: np.ndarray, k: int) -> None:
    select = "deltamerge.methods.prune.select"
    shape = (700, 100)
    whole, theirs = flat(delta.size), torch.from_numpy(delta)
    counts = check(f"{select}:high_histogram", (delta,), (theirs,), tile=whole)
    found = pick_bin(counts, k=k)
    low = check(f"{select}:low_histogram", (delta, found), (theirs, found), tile=whole)
    check(f"{select}:high_counts", (delta, None), (theirs, None), tile=whole)
    check(f"{select}:low_counts", (delta, found), (theirs, found), tile=whole)
    cut = pick_cut(low, found)
    step = block_elements(shape)
    tiles = [Tile(0, step, shape), Tile(step, 70_000, shape)]

    def by_tile(function: str, *more: Any) -> np.ndarray:
        parts = [(delta[t.start : t.stop], theirs[t.start : t.stop], t) for t in tiles]
        return np.concatenate([check(f"{select}:{function}", (a, *more), (b, *more), tile=t) for a, b, t in parts])

    ranks = pick_ranks(by_tile("equal_counts", cut))
    bracket = pick_bracket(by_tile("sample"), k=k, size=delta.size)
    for ends in (bracket, Bracket(cut.threshold, cut.threshold), Bracket(0, MAGNITUDE)):
        listed = gathered(by_tile("bracketed", ends), ends)
        located = pick_listed(listed, k=k)
        assert located == replace(cut, listed=True)
        if cut.equal_kept < cut.equal_total:
            assert (ranks_listed(None, listed, located) == ranks).all()
    beside = Bracket(cut.threshold + 1, MAGNITUDE)
    assert pick_listed(gathered(by_tile("bracketed", beside), beside), k=k) is None
    for given in (ranks, pick_ranks(None)):
        values = [
            check(
                f"{select}:keep_largest",
                (delta[t.start : t.stop], cut, given),
                (theirs[t.start : t.stop], cut, given),
                tile=t,
            )
            for t in tiles
        ]
        if given is ranks:
            bits = np.concatenate(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
            assert np.count_nonzero(bits) == min(k, np.count_nonzero(delta))


def test_selection_over_many_blocks() -> None:
    delta, shape, step = deltas_with_ties(9 * (1 << 16)), (9 * (1 << 16),), 1 << 16
    for cut in (Cut(int(np.float32(0.01).view(np.uint32)), 12_345, 0), Cut(0x7FFFFFFF, 0, 0)):
        counts = KERNELS["deltamerge.methods.prune.select:equal_counts"](delta, cut, tile=Tile(0, delta.size, shape))
        ranks, whole = pick_ranks(counts), Cut(cut.threshold, cut.equal_kept, int(counts.sum()))
        for start, stop in ((0, 1), (1, 4), (4, 9), (0, 9)):
            tile = Tile(start * step, stop * step, shape)
            part = delta[tile.start : tile.stop]
            name = "deltamerge.methods.prune.select:keep_largest"
            check(name, (part, whole, ranks), (torch.from_numpy(part), whole, ranks), tile=tile)


@pytest.mark.parametrize("shape", [(50, 96), (1, 4096), (300, 1), (3, 20_000)])
@pytest.mark.parametrize("density", [1e-6, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("make", [deltas_with_ties, lambda n: floats(n, 52), lambda n: np.zeros(n, np.float32)])
def test_selection_of_rows(shape: tuple[int, int], density: float, make: Any) -> None:
    delta, tile = make(shape[0] * shape[1]), Tile(0, shape[0] * shape[1], shape)
    given = {"tile": tile, "density": density}
    check("deltamerge.methods.prune.select:keep_largest_rows", (delta,), (torch.from_numpy(delta),), **given)
    norms = np.abs(np.random.default_rng(53).standard_normal(shape[1])).astype(np.float32)
    name = "deltamerge.methods.prune.select:keep_largest_rows_scored"
    check(name, (delta, norms), (torch.from_numpy(delta), norms), **given)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
@pytest.mark.parametrize("shape", [(5,), (70_000,), (700, 100), (3, 70_001), (1, 1)])
def test_norm(norm: str, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    name, tile = "deltamerge.methods.prune.rescale:norm", Tile(0, size, shape)
    for delta in (floats(size, 54), deltas_with_ties(size)):
        check(name, (delta,), (torch.from_numpy(delta),), tile=tile, norm=norm)
    some = Kept(np.arange(0, size, 3), deltas_with_ties(size)[::3].copy())
    check(name, (some,), (kept(some),), tile=tile, norm=norm)


@pytest.mark.parametrize("q", [0.25, np.linspace(0.1, 1, 70)[:, None], np.linspace(0.1, 1, 100)[None]])
def test_divide_rows(q: Any) -> None:
    name, tile = "deltamerge.methods.prune.rescale:divide_rows", Tile(200, 5200, (70, 100))
    delta = floats(tile.size, 55)
    check(name, (delta, q), (torch.from_numpy(delta), q), tile=tile)
    some = Kept(np.arange(0, tile.size, 7), delta[::7].copy())
    check(name, (some, q), (kept(some), q), tile=tile)


@pytest.mark.parametrize("code", CODES)
def test_passthrough(code: str) -> None:
    theirs, ours = stored(floats(20_000, 56), code)
    check("deltamerge.methods.merge.arithmetic:passthrough", (ours,), (theirs,), tile=flat(20_000), scales=(0.3,))


def test_float64_is_narrowed_before_it_is_summed() -> None:
    values = 1 + np.random.default_rng(57).random(5000) * 1e-9
    theirs = (torch.from_numpy(values), torch.ones(5000))
    ours = (values, np.ones(5000, np.float32))
    check("deltamerge.methods.merge.span:gram", ours, theirs, tile=flat(5000))


@pytest.mark.parametrize("codes", [("BF16",), ("BF16", "BF16"), ("F32", "BF16", "F16"), ("F64", "F32")])
@pytest.mark.parametrize("shape", [(0,), (1,), (4097,), (150_000,), (700, 100), (1, 70_001), (64, 1024), (9, 20, 30)])
def test_gram(codes: tuple[str, ...], shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    tile = Tile(0, size, shape)
    for make in (floats, lambda n, seed: np.random.default_rng(seed).standard_normal(n).astype(np.float32)):
        tiles = [stored(make(size, 58 + i), code) for i, code in enumerate(codes)]
        ours, theirs = tuple(x for _, x in tiles), tuple(x for x, _ in tiles)
        check("deltamerge.methods.merge.span:gram", ours, theirs, tile=tile)
        if len(shape) > 1:
            check("deltamerge.methods.merge.span:row_grams", ours, theirs, tile=tile)
    some = sparse_delta(size, 59, 0.05)
    check("deltamerge.methods.merge.span:gram", (some, ours[0]), (kept(some), theirs[0]), tile=tile)


@pytest.mark.parametrize("size", [1, 100, 1500, 2048, 2049, 3100, 4096])
def test_gram_of_negative_zeros(size: int) -> None:
    ours = (np.full(size, -0.0, np.float32), np.ones(size, np.float32))
    check("deltamerge.methods.merge.span:gram", ours, tuple(map(torch.from_numpy, ours)), tile=flat(size))


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("codes", [("BF16", "BF16"), ("F32", "F16", "BF16"), ("F64", "F64")])
@pytest.mark.parametrize("along", ["tensor", "rows", "columns"])
def test_combine(along: str, codes: tuple[str, ...], based: bool) -> None:
    tile = Tile(500, 8500, (100, 100))
    tiles = [stored(floats(tile.size, 60 + i), code) for i, code in enumerate(codes)]
    count = len(codes) - based
    shape = {"tensor": (count,), "rows": (80, count), "columns": (100, count)}[along]
    coefficients = np.random.default_rng(61).standard_normal(shape)
    ours, theirs = (*(x for _, x in tiles), coefficients), (*(x for x, _ in tiles), coefficients)
    check("deltamerge.methods.merge.span:combine", ours, theirs, tile=tile, along=along, based=based)


def ordinary(size: int) -> np.ndarray:
    return np.random.default_rng(62).standard_normal(size).astype(np.float32)


@pytest.mark.parametrize("shape", [(1,), (70_001,), (300, 97), (64, 1024), (2, 70_001), (9, 20, 30), (50, 1)])
@pytest.mark.parametrize(
    "make", [deltas_with_ties, ordinary, lambda n: floats(n, 63), lambda n: np.zeros(n, np.float32)]
)
@pytest.mark.parametrize("numbers", [(0.5, 0.15), (0.1, 0.05), (0.9, 0.1)])
def test_della(shape: tuple[int, ...], make: Any, numbers: tuple[float, float]) -> None:
    whole = int(np.prod(shape))
    name, delta = "deltamerge.methods.prune.della:della", make(whole)
    given: dict[str, Any] = {"key": KEY, "density": numbers[0], "epsilon": numbers[1]}
    step = block_elements(shape)
    for start, stop in ((0, whole), (step, whole)):
        part = delta[start:stop]
        tile = Tile(start, stop, shape) if stop > start else Tile(0, 0, shape)
        for weighted in (False, True):
            check(name, (part,), (torch.from_numpy(part),), tile=tile, weighted=weighted, **given)
    some = Kept(np.arange(0, whole, 3), delta[::3].copy())
    check(name, (some,), (kept(some),), tile=Tile(0, whole, shape), **given)


def test_della_breaks_ties_of_the_high_half() -> None:
    # one row whose bounds fall between halves; of 2**20 positions about 16 tie
    delta, tile = ordinary(1 << 20), Tile(1 << 20, 2 << 20, (2, 1 << 20))
    given: dict[str, Any] = {"tile": tile, "key": KEY, "density": 0.3, "epsilon": 1e-7}
    check("deltamerge.methods.prune.della:della", (delta,), (torch.from_numpy(delta),), **given)


@pytest.mark.parametrize("make", [lambda n, i: floats(n, 64 + i, 0.01), lambda n, i: np.roll(deltas_with_ties(n), i)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_sce(make: Any, count: int) -> None:
    for size, code in ((0, "BF16"), (1, "F64"), (20_000, "BF16"), (9000, "F16")):
        base, ours = stored(floats(size, 68), code)
        deltas: list[Any] = [make(size, i) for i in range(count)]
        for mixed in (deltas, [sparse_delta(size, 69, 0.05), *deltas[1:]]):
            theirs = [kept(x) if isinstance(x, Kept) else torch.from_numpy(x) for x in mixed]
            tile = flat(size)
            score = check("deltamerge.methods.merge.sce:variance", (*mixed,), (*theirs,), tile=tile)
            check("deltamerge.methods.prune.select:count_nonzero", (score,), (torch.from_numpy(score),), tile=tile)
            for weights in ((1 / 3,) * count, (1e-9,) * count, (0.25, 0.75, float("nan"))[:count]):
                weights = tuple(float(np.float32(w)) for w in weights)
                check("deltamerge.methods.merge.sce:sce", (ours, *mixed, weights), (base, *theirs, weights), tile=tile)


@pytest.mark.parametrize("make", [deltas_with_ties, lambda n: floats(n, 70), lambda n: np.zeros(n, np.float32)])
def test_selection_by_another_and_between(make: Any) -> None:
    select, shape, step = "deltamerge.methods.prune.select", (9 * (1 << 16),), 1 << 16
    delta, score = floats(shape[0], 71), make(shape[0])
    cuts = []
    for value, equal_kept in ((0.01, 12_345), (0.02, 777), (0.01, 20_000), (0.0, 5), (np.inf, 1), (0.02, 10**6)):
        cut = Cut(int(np.float32(value).view(np.uint32)), equal_kept, 0)
        counts = KERNELS[f"{select}:equal_counts"](score, cut, tile=Tile(0, score.size, shape))
        cuts.append((Cut(cut.threshold, equal_kept, int(counts.sum())), pick_ranks(counts)))
    cuts += [(Cut(0x7FFFFFFF, 0, 0), pick_ranks(None)), (cuts[0][0], pick_ranks(None))]
    for start, stop in ((0, 1), (4, 9), (0, 9)):
        tile = Tile(start * step, stop * step, shape)
        part, scores = delta[tile.start : tile.stop], score[tile.start : tile.stop]
        theirs = torch.from_numpy(part), torch.from_numpy(scores)
        for cut in cuts:
            check(f"{select}:keep_where", (part, scores, *cut), (*theirs, *cut), tile=tile)
            for inner in cuts:
                check(f"{select}:keep_between", (scores, *cut, *inner), (theirs[1], *cut, *inner), tile=tile)


@pytest.mark.parametrize("first", [0, 2**33 + 5, 2**64 - 3])
def test_philox_of_many_blocks_is_philox(first: int) -> None:
    """Where the processor has no such vectors too."""
    keys = np.uint64(KEY[0]), np.uint64(KEY[1])

    @njit  # type: ignore[untyped-decorator]
    def both(first: Any, key0: Any, key1: Any, many: Any, single: Any) -> None:
        philox_blocks(many.ctypes.data, first, key0, key1)
        for i in range(single.shape[0]):
            zero = np.uint64(0)
            single[i] = np.array(philox(first + np.uint64(i), zero, zero, key0, key1))

    many, single = np.empty((BLOCKS, 4), np.uint64), np.empty((BLOCKS, 4), np.uint64)
    both(np.uint64(first), *keys, many, single)
    assert (many == single).all()


def test_low_histogram_of_an_empty_bin() -> None:
    delta = np.ones(100, np.float32)
    counts = KERNELS["deltamerge.methods.prune.select:low_histogram"](delta, Bin(5, 1), tile=flat(100))
    assert counts.sum() == 0


def test_kernels_release_the_gil() -> None:
    """A long kernel on one thread leaves another free to run Python."""
    tune = np.ones(1 << 24, np.uint16)
    kernel: Callable[..., Any] = KERNELS["deltamerge.methods.prune.masks:dare"]
    parameters = {"tile": flat(tune.size), "key": KEY, "density": 0.5}
    kernel(tune[:16], tune[:16], **{**parameters, "tile": flat(16)})
    started, steps = threading.Event(), 0

    def work() -> None:
        started.set()
        kernel(tune, tune, **parameters)

    thread = threading.Thread(target=work)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is made to give the GIL up
    try:
        thread.start()
        started.wait()
        while thread.is_alive():
            time.sleep(0)  # offers the GIL, so only a kernel that holds it can stop this loop
            steps += 1
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert steps > 10


def test_no_torch_is_imported() -> None:
    code = "import sys, deltamerge.engine.fused.kernels; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))
