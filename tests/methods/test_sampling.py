"""Importance sampling against probabilities found by bisection in float64."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch

from deltamerge.methods.prune import dare, select
from deltamerge.methods.prune.bits import mask_key
from deltamerge.tensors.tiles import Tile, block_elements

DENSITIES = [0.001, 0.01, 0.3, 0.9, 1.0]


def deltas(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(3))
    values = generator.standard_normal(shape)
    if kind == "heavy":
        values = values**5
    if kind == "levels":
        values = np.round(2 * values) / 2
    return (values * 1e-3).astype(np.float32)


def factor(delta: np.ndarray, density: float, blocks: int = 1) -> float:
    """What the passes of a run compute, tile by tile."""
    flat = torch.from_numpy(delta.reshape(-1).copy())
    step = block_elements(delta.shape) * blocks
    tiles = [Tile(i, min(flat.numel(), i + step), delta.shape) for i in range(0, max(flat.numel(), 1), step)]
    expected = density * delta.size
    clip = dare.pick_clip(sum(dare.sums(flat[t.start : t.stop], tile=t) for t in tiles), expected=expected)
    inside = dare.clip_bin(clip)
    low = sum(select.low_histogram(flat[t.start : t.stop], inside, tile=t) for t in tiles)
    return dare.factor(low, clip, expected=expected)


@pytest.mark.parametrize("kind", ["normal", "heavy", "levels"])
@pytest.mark.parametrize("density", DENSITIES)
def test_the_mean_probability_is_the_density(kind, density):
    delta = deltas(kind, (300, 257))
    c = factor(delta, density)
    nonzero = np.count_nonzero(delta) / delta.size
    probability = np.where(delta != 0, np.minimum(1.0, c * np.abs(delta.astype(np.float64))), 0.0)
    assert probability.mean() == pytest.approx(min(density, nonzero), rel=1e-9)
    if density < nonzero:
        np.testing.assert_allclose(probability, reference.keep_probability(delta, density), rtol=1e-9)
    assert factor(delta, density, blocks=3) == c


@pytest.mark.parametrize(
    ("delta", "wanted"),
    [
        (np.zeros(10, np.float32), float(np.finfo(np.float32).max)),  # fewer non-zero entries than are to be kept
        (np.zeros(0, np.float32), float(np.finfo(np.float32).max)),
        (np.ones(5, np.float32), 0.2),
    ],
)
def test_flat_deltas(delta, wanted):
    c = factor(delta, 0.2)
    base = torch.zeros(delta.size)
    tune = torch.from_numpy(delta)
    kept = dare.sampled(tune, base, c, tile=Tile(0, delta.size, delta.shape), key=(1, 2), density=0.2)
    assert c == pytest.approx(wanted)
    np.testing.assert_array_equal(kept[kept != 0], tune[kept != 0])  # π is the density: Δ comes through as it is


def test_unbiased_and_the_same_for_any_tiles():
    delta = deltas("heavy", (64, 50))
    density, draws = 0.1, 400
    c = factor(delta, density)
    tune, base = torch.from_numpy(delta.reshape(-1)), torch.zeros(delta.size)
    total = np.zeros(delta.size)
    count = 0
    for seed in range(draws):
        key = mask_key(seed, "m", "t")
        whole = dare.sampled(tune, base, c, tile=Tile(0, 3200, (64, 50)), key=key, density=density)
        total += whole.double().numpy() / density
        count += int(whole.count_nonzero())
    probability = reference.keep_probability(delta, density).reshape(-1)
    deviation = np.abs(delta.reshape(-1)) * np.sqrt((1 - probability) / probability / draws)
    z = np.where(deviation > 0, np.abs(total / draws - delta.reshape(-1)) / np.maximum(deviation, 1e-30), 0)
    often = probability * draws > 20  # rarer entries are not near normal after so few draws
    assert z[often].max() < 5
    assert np.sqrt((z[often] ** 2).mean()) < 1.2
    assert count / draws == pytest.approx(density * delta.size, rel=0.03)
    part = dare.sampled(tune[1000:], base[1000:], c, tile=Tile(1000, 3200, (64, 50)), key=key, density=density)
    assert torch.equal(part, whole[1000:])
