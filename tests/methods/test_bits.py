"""Random bits: the standard they follow, the laws they obey, and that nothing but their arguments moves them."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deltamerge.methods.prune import bits

KEY = bits.mask_key(0, "tune", "model.layers.0.self_attn.q_proj.weight")
DENSITIES = [1.0, 0.9, 0.5, 1 / 3, 0.1, bits.SPARSE_BELOW, 0.0624, 0.01, 1e-3, 1e-4]


def philox(key: bits.Key, counter: tuple[int, int, int, int]) -> list[int]:
    """Philox4x64-10, written from the paper."""
    c, k = list(counter), list(key)
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [second >> 64 ^ c[1] ^ k[0], second % 2**64, first >> 64 ^ c[3] ^ k[1], first % 2**64]
        k = [(k[0] + 0x9E3779B97F4A7C15) % 2**64, (k[1] + 0xBB67AE8584CAA73B) % 2**64]
    return c


def walk(key: bits.Key, start: int, stop: int, density: float) -> list[int]:
    """The sparse mask from its definition, one position at a time."""
    size, found = min(65536, math.ceil(4 / density)), []
    miss = 1 - Fraction(density)
    table = [math.floor(2**63 * (1 - miss**k)) for k in range(1, size + 1)]
    for block in range(start // 65536, -(-stop // 65536)):
        place, draws = 0, 0
        while place < 65536:
            u = philox(key, (draws // 4, block, 2, 0))[draws % 4] >> 1
            gap = int(np.searchsorted(np.array(table, np.uint64), np.uint64(u), "right"))
            place, draws = place + gap, draws + 1
            if gap < size:
                if place < 65536:
                    found.append(block * 65536 + place - start)
                place += 1
    return [p for p in found if 0 <= p < stop - start]


def device_positions(key: bits.Key, start: int, stop: int, density: float) -> NDArray[np.int64]:
    if bits.is_sparse(density):
        found = bits._positions_device(key, start, stop, density, "cpu")
    else:
        found = bits._keep_device(key, start, stop, density, "cpu").nonzero().flatten()
    return found.numpy()


def test_philox_is_the_published_generator() -> None:
    # Random123, kat_vectors: philox4x64 10, counter 0, key 0
    known = [0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B]
    assert philox((0, 0), (0, 0, 0, 0)) == known
    assert bits._generator((0, 0), 0, 0, 0).random_raw(4).tolist() == known


@pytest.mark.parametrize("counter", [(0, 0, 0), (0, 7, 2), (2**32 - 1, 2**33, 3), (2**40 + 5, 1, 1)])
def test_streams_are_numpy_philox_at_a_counter(counter: tuple[int, int, int]) -> None:
    index, block, lane = counter
    expected = [philox(KEY, (index + i, block, lane, 0)) for i in range(3)]
    assert bits._generator(KEY, index, block, lane).random_raw(12).reshape(3, 4).tolist() == expected
    ours = bits._philox_device(KEY, torch.arange(index, index + 3), torch.tensor([block]), lane)
    assert ours.numpy().view(np.uint64).tolist() == expected


def test_word_is_two_halves_from_two_lanes() -> None:
    word = bits.words(KEY, 70, 71)[0]
    high, low = (philox(KEY, (4, 0, lane, 0))[1] >> 32 & 0xFFFF for lane in (0, 1))  # 70 = 16·4 + 4·1 + 2
    assert word == high << 16 | low


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (5, 200_000), (3, 3), (2**40 + 7, 2**40 + 90_000)])
def test_torch_equals_numpy(start: int, stop: int) -> None:
    assert (bits._words_device(KEY, start, stop, "cpu").numpy() == bits.words(KEY, start, stop)).all()
    assert (bits.words_torch(KEY, start, stop).numpy() == bits.words(KEY, start, stop)).all()
    for density in [*DENSITIES, 1e-6, 1e-12]:
        expected = bits.positions(KEY, start, stop, density)
        assert (device_positions(KEY, start, stop, density) == expected).all()
        assert (bits.positions_torch(KEY, start, stop, density).numpy() == expected).all()


@pytest.mark.gpu
@pytest.mark.parametrize("density", DENSITIES)
def test_gpu_equals_numpy(density: float) -> None:
    start, stop = 12_345, 300_000
    found = bits.positions_torch(KEY, start, stop, density, "cuda").cpu().numpy()
    assert (found == bits.positions(KEY, start, stop, density)).all()
    assert (bits.words_torch(KEY, start, stop, "cuda").cpu().numpy() == bits.words(KEY, start, stop)).all()


@pytest.mark.parametrize("density", [1.0, 0.5, 0.25, 0.1, 1 / 3, bits.SPARSE_BELOW])
def test_dense_mask_compares_32_bits(density: float) -> None:
    words = bits.words(KEY, 1000, 1_000_000)
    assert (bits.keep(KEY, 1000, 1_000_000, density) == (words < round(density * 2**32))).all()


def test_ties_of_the_high_half_are_broken_by_the_low_half() -> None:
    words = bits.words(KEY, 0, 500)
    for at in np.flatnonzero(words >> 16 >= 4096)[:20].tolist():
        word = int(words[at])
        assert not bits.keep(KEY, at, at + 1, word / 2**32)[0]
        assert bits.keep(KEY, at, at + 1, (word + 1) / 2**32)[0]
        assert not bits._keep_device(KEY, at, at + 1, word / 2**32, "cpu")[0]
        assert bits._keep_device(KEY, at, at + 1, (word + 1) / 2**32, "cpu")[0]


@pytest.mark.parametrize("density", [0.06, 0.01, 0.003])
def test_sparse_mask_follows_its_definition(density: float) -> None:
    start, stop = 60_000, 140_000
    assert bits.positions(KEY, start, stop, density).tolist() == walk(KEY, start, stop, density)


@pytest.mark.parametrize("density", [0.06, 0.01, 1e-4, 1e-6])
def test_gap_table_is_the_geometric_law(density: float) -> None:
    table = bits.gap_table(density)
    assert len(table) == min(65536, math.ceil(4 / density))
    for k in (1, 2, 3, 40):
        assert table[k - 1] == math.floor(2**63 * (1 - (1 - Fraction(density)) ** k))
    exact = -np.expm1(np.arange(1, len(table) + 1) * math.log1p(-density))
    np.testing.assert_allclose(table / 2**63, exact, rtol=1e-9)


@pytest.mark.parametrize("density", DENSITIES)
def test_rate_is_binomial(density: float) -> None:
    n, seeds = 1 << 20, 6
    z = []
    for seed in range(seeds):
        kept = len(bits.positions(bits.mask_key(seed, "m", "t"), 0, n, density))
        z.append((kept - n * density) / max(1e-9, math.sqrt(n * density * (1 - density))))
    assert max(map(abs, z)) < 4
    assert abs(sum(z)) < 4 * math.sqrt(seeds)


@pytest.mark.parametrize("density", [0.5, 0.1, 0.05, 0.01])
def test_counts_of_windows_have_binomial_variance(density: float) -> None:
    # windows cut the sparse regime's blocks, so a wrong restart at a block's edge would show
    n, window = 1 << 22, 3 * 1 << 12
    found = bits.positions(KEY, 0, n, density)
    counts = np.bincount(found // window)[: n // window]
    ratio = counts.var() / (window * density * (1 - density))
    assert abs(ratio - 1) < 5 * math.sqrt(2 / len(counts))
    edges = np.isin(np.arange(n // bits.SPARSE_BLOCK) * bits.SPARSE_BLOCK, found).mean()
    assert abs(edges - density) < 5 * math.sqrt(density / (n // bits.SPARSE_BLOCK))


@pytest.mark.parametrize("density", [0.5, 0.05])
def test_masks_are_independent(density: float) -> None:
    n = 1 << 20

    def mask(seed: int, model: str, tensor: str) -> NDArray[np.float64]:
        mask = np.zeros(n)
        mask[bits.positions(bits.mask_key(seed, model, tensor), 0, n, density)] = 1
        return (mask - density) / math.sqrt(density * (1 - density))

    base = mask(0, "m", "t")
    others = [mask(1, "m", "t"), mask(0, "n", "t"), mask(0, "m", "u"), mask(-1, "m", "t")]
    shifted = [np.roll(base, k) for k in (1, 2, 4, 16, 65536)]
    for other in others + shifted:
        assert abs((base * other).mean()) < 5 / math.sqrt(n)


def test_keys_tell_their_parts_apart() -> None:
    parts = [
        (1, "a", "bc"), (1, "ab", "c"), (1, "abc", ""), (11, "a", "bc"), (-1, "a", "bc"), (1, 'a","', "bc"),
        (1, "a", '","bc'), (2**70, "a", "bc"), (1, "é", "bc"), (1, "\ud800", "bc"),
    ]  # fmt: skip
    keys = {bits.mask_key(*part) for part in parts}
    assert len(keys) == len(parts)
    assert all(0 <= word < 2**64 for key in keys for word in key)


@settings(deadline=None, max_examples=40)
@given(
    cuts=st.lists(st.integers(0, 200_000), min_size=2, max_size=6),
    density=st.sampled_from(DENSITIES),
    seed=st.integers(),
)
def test_tiles_do_not_matter(cuts: list[int], density: float, seed: int) -> None:
    key = bits.mask_key(seed, "m", "t")
    cuts = sorted(cuts)
    whole = bits.positions(key, cuts[0], cuts[-1], density) + cuts[0]
    for part in (bits.positions, device_positions):
        tiles = [part(key, a, b, density) + a for a, b in itertools.pairwise(cuts)]
        assert (np.concatenate(tiles) == whole).all()


@pytest.mark.parametrize("density", DENSITIES)
def test_positions_ascend_inside_the_range(density: float) -> None:
    found = bits.positions(KEY, 70_001, 200_003, density)
    assert found.dtype == np.int64
    assert (np.diff(found) > 0).all()
    assert found.size == 0 or (found[0] >= 0 and found[-1] < 200_003 - 70_001)


def test_extreme_densities() -> None:
    assert bits.keep(KEY, 3, 1000, 1.0).all()
    assert bits.keep(KEY, 3, 1000, math.nextafter(1, 0)).all()
    assert len(bits.positions(KEY, 0, 1000, 1.0)) == 1000
    assert 0 < len(bits.positions(KEY, 0, 1 << 24, 1e-6)) < 50
    for density in (0.0, 1e-30):
        assert len(bits.positions(KEY, 0, 1 << 20, density)) == 0
        assert len(bits._positions_device(KEY, 0, 1 << 20, density, "cpu")) == 0


@pytest.mark.parametrize(("n", "count"), [(1, 1), (40, 5), (1000, 1000), (4096, 409)])
def test_columns_are_the_smallest_draws(n: int, count: int) -> None:
    columns = bits.choose_columns(KEY, n, count)
    draws = [word for i in range(-(-n // 4)) for word in philox(KEY, (i, 0, 3, 0))][:n]
    assert columns.tolist() == sorted(sorted(range(n), key=draws.__getitem__)[:count])
    assert columns.dtype == np.int64


def test_masks_never_change() -> None:
    """If this fails, every published recipe's result changes: give the new masks a new domain tag instead."""
    assert KEY == (0xC5E6847CAB1156C7, 0x1D02C69837A90D1A)
    assert bits.words(KEY, 0, 4).tolist() == [165944248, 3118184513, 3811344718, 3769770693]
    assert np.flatnonzero(bits.keep(KEY, 0, 64, 0.1)).tolist() == [0, 10, 30, 39, 41, 42, 46]
    assert bits.positions(KEY, 0, 400, 0.02).tolist() == [39, 78, 120, 180, 260, 320, 362, 387]
    assert bits.positions(KEY, 65_000, 95_000, 1e-4).tolist() == [1363, 3198, 28815]
    assert bits.choose_columns(KEY, 40, 5).tolist() == [24, 26, 27, 35, 37]
