"""Exact top-k by counting, against a stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st

from deltamerge.pruners import select
from deltamerge.tensors import Tile, block_elements


def keep(delta: np.ndarray, k: int, tile_blocks: int = 1) -> np.ndarray:
    """What the passes of a run compute, tile by tile."""
    flat = torch.from_numpy(delta.reshape(-1).copy())
    step = block_elements(delta.shape) * tile_blocks
    tiles = [Tile(i, min(flat.numel(), i + step), delta.shape) for i in range(0, flat.numel(), step)]
    high = select.pick_bin(sum(select.high_histogram(flat[t.start : t.stop], tile=t) for t in tiles), k=k)
    cut = select.pick_cut(sum(select.low_histogram(flat[t.start : t.stop], high, tile=t) for t in tiles), high)
    counts = None
    if not select.equal_counts_needless(cut):
        counts = np.concatenate([select.equal_counts(flat[t.start : t.stop], cut, tile=t) for t in tiles])
    ranks = select.pick_ranks(counts)
    parts = [select.keep_largest(flat[t.start : t.stop], cut, ranks, tile=t) for t in tiles]
    return torch.cat(parts).numpy().reshape(delta.shape)


@given(st.data())
def test_the_k_largest_are_kept_and_the_first_among_equals(data):
    shape = data.draw(st.sampled_from([(7,), (3, 5), (300_000,), (3, 40_000), (2, 3, 4)]))
    levels = data.draw(st.sampled_from([2, 5, 1000, 10**9]))
    seed = data.draw(st.integers(0, 2**32 - 1))
    generator = np.random.Generator(np.random.PCG64(seed))
    delta = (generator.integers(-levels, levels + 1, shape) / levels).astype(np.float32)
    k = data.draw(st.integers(1, delta.size))
    np.testing.assert_array_equal(keep(delta, k, data.draw(st.integers(1, 3))), reference.keep_top(delta, k))


@pytest.mark.parametrize("density", [0.01, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 100), (31, 7), (2, 3, 10)])
def test_rows_keep_their_own_largest(shape, density):
    delta = np.random.Generator(np.random.PCG64(1)).integers(-4, 5, shape).astype(np.float32)
    flat = torch.from_numpy(delta.reshape(-1))
    kept = select.keep_largest_rows(flat, tile=Tile(0, delta.size, shape), density=density)
    np.testing.assert_array_equal(kept.numpy().reshape(shape), reference.magnitude_rows(delta, density))


def test_nothing_is_kept_for_a_density_that_rounds_to_no_entry():
    flat = torch.tensor([3.0, -4.0])
    kept = select.keep_largest(flat, select.nothing(), select.no_ranks(), tile=Tile(0, 2, (2,)))
    assert torch.equal(kept, torch.zeros(2))


def test_specials_rank_as_their_bits_do():
    delta = np.array([1.0, -np.inf, 0.0, -0.0, 1e-42, 2.0], np.float32)
    np.testing.assert_array_equal(keep(delta, 2), np.array([0, -np.inf, 0, 0, 0, 2.0], np.float32))
