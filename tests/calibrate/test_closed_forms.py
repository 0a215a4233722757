"""Every closed form against brute force in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from deltamerge.calibrate.q import statistics as stats
from deltamerge.calibrate.q.statistics import LayerStatistics


def layer(seed: int = 0, m: int = 6, n: int = 40, tokens: int = 200, kept: float | None = None, **changes: Any) -> Any:
    """(Δ, x, Δb, mask, statistics) of a synthetic layer with correlated inputs, computed the plain way."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(tokens, n)) + random.normal(size=(tokens, 1)) + random.normal(size=n)
    delta, bias = random.normal(size=(m, n)) * 0.1, random.normal(size=m) * 0.1
    mask = random.random((m, n)) < (kept or 0.5)
    mean = x.mean(0)
    y, kept_y = x @ delta.T, x @ (mask * delta).T
    values: dict[str, Any] = {
        "tokens": tokens, "mean": mean, "mean_abs": np.abs(x).mean(0), "square": (x**2).mean(0),
        "energy": (y**2).mean(0), "diagonal": (delta**2) @ (x**2).mean(0),
        "c1": delta @ mean + bias, "c2": (delta * mean) ** 2 @ np.ones(n) + bias**2,
        "influence": (delta[None] * x[:, None]).mean((0, 2)), "mean_influence": np.abs(delta[None] * x[:, None]).mean(),
        "mean_delta": np.abs(delta).mean(),
    }  # fmt: skip
    if kept is not None:
        values |= {"cross": (y * kept_y).mean(0), "power": (kept_y**2).mean(0)}
    return delta, x, bias, mask, LayerStatistics(**{**values, **changes})


@pytest.mark.parametrize(
    ("p", "want"), [(0.5, 0.5), (0.0, 0.0), (1.0, 0.0), (0.99, 0.98 / math.log(99)), (0.1, 0.8 / math.log(9))]
)
def test_phi(p: float, want: float) -> None:
    assert stats.phi(p) == pytest.approx(want, rel=1e-12)


def test_phi_is_continuous_and_symmetric() -> None:
    for p in (0.3, 0.4999, 0.49989, 0.5001, 0.50011):
        assert stats.phi(p) == pytest.approx(stats.phi(1.0 - p), rel=1e-9)
        assert stats.phi(p) == pytest.approx(0.5 - (2 * p - 1) ** 2 / 6, abs=(2 * p - 1) ** 4 / 10 + 1e-10)


def test_influence_adds_up_to_the_diagonal() -> None:
    delta, x, *_, found = layer()
    c = delta[None] * x[:, None]
    np.testing.assert_allclose(found.variance, (c**2).mean((0, 2)) - c.mean((0, 2)) ** 2)
    np.testing.assert_allclose(delta.shape[1] * (found.influence**2 + found.variance), found.diagonal)
    np.testing.assert_allclose(found.norm, np.linalg.norm(x, axis=0))


def test_massive_activations_are_the_largest_in_the_mean() -> None:
    *_, found = layer(mean_abs=np.array([1.0, 9.0, 2.0, 9.0, 0.0]))
    assert found.massive(1) == [1]
    assert found.massive(3) == [1, 2, 3]


@pytest.mark.parametrize("p", [0.5, 0.9, 0.99])
def test_the_bound_holds(p: float) -> None:
    """Theorem 3.1: |h_i| exceeds the bound in less than γ of the draws."""
    gamma, random = 0.05, np.random.default_rng(1)
    delta, x, *_ = layer(tokens=1)
    *_, found = layer(tokens=1)
    dropped = random.random((4000, *delta.shape)) < p
    h = (delta * x[0]).sum(1) - (np.where(dropped, 0.0, delta * x[0])).sum(2) / (1.0 - p)
    bound = stats.guaranteed(found, 1.0 - p, gamma)
    assert (np.abs(h) > bound).mean() <= gamma
    np.testing.assert_allclose(
        bound, np.sqrt(stats.phi(p) * math.log(2 / gamma) * ((delta * x[0]) ** 2).sum(1)) / (1 - p)
    )
    assert (stats.typical(found, 1.0 - p, gamma) <= bound * (1 + 1e-12)).all()


@pytest.mark.parametrize("density", [0.5, 0.1, 0.01, 0.001])
def test_least_squares_q_is_the_minimiser_of_the_expected_error(density: float) -> None:
    """E‖Δx − (1/q)(δ∘Δ)x‖² = (1 − d/q)² A + (p d/q²) D, minimised on a fine grid."""
    *_, found = layer()
    p = 1.0 - density

    def error(q: Any, a: Any, d: Any) -> Any:
        return (1.0 - density / q) ** 2 * a + p * density / q**2 * d

    grid = np.exp(np.linspace(math.log(density), 0.0, 200_001))
    a, d = found.energy.sum(), found.diagonal.sum()
    q = stats.least_squares(found, density)
    assert q == pytest.approx(grid[np.argmin(error(grid, a, d))], rel=1e-4)
    assert stats.least_squares_error(found, density) == pytest.approx(error(q, a, d) / a, rel=1e-9)
    assert stats.dare_error(found, density) == pytest.approx(error(density, a, d) / a, rel=1e-9)
    rows = stats.least_squares_rows(found, density)
    best = [grid[np.argmin(error(grid, a_i, d_i))] for a_i, d_i in zip(found.energy, found.diagonal, strict=True)]
    np.testing.assert_allclose(rows, best, rtol=1e-4)
    assert stats.least_squares(found, density, 0.0) == density


def test_the_expected_error_is_the_mean_over_masks() -> None:
    delta, x, *_, found = layer()
    density, q, random = 0.2, 0.35, np.random.default_rng(2)
    total = 0.0
    for _ in range(2000):
        kept = random.random(delta.shape) < density
        total += float((((x @ delta.T) - x @ (kept * delta).T / q) ** 2).sum(1).mean())
    a, d = found.energy.sum(), found.diagonal.sum()
    assert total / 2000 == pytest.approx((1 - density / q) ** 2 * a + (1 - density) * density / q**2 * d, rel=0.02)


@pytest.mark.parametrize("kept", [0.5, 0.05])
def test_q_of_a_drawn_mask_is_exact(kept: float) -> None:
    delta, x, _, mask, found = layer(kept=kept)
    y, kept_y = x @ delta.T, x @ (mask * delta).T
    grid = np.exp(np.linspace(-8.0, 2.0, 400_001))
    errors = (y**2).sum() - 2 * (y * kept_y).sum() / grid + (kept_y**2).sum() / grid**2
    q = stats.drawn(found)
    assert q == pytest.approx(grid[np.argmin(errors)], rel=1e-4)
    assert q is not None
    assert stats.drawn_error(found, q) == pytest.approx(((y - kept_y / q) ** 2).sum() / (y**2).sum())
    rows = stats.drawn_rows(found)
    for i, row in enumerate(rows):
        errors = (y[:, i] ** 2).sum() - 2 * (y[:, i] * kept_y[:, i]).sum() / grid + (kept_y[:, i] ** 2).sum() / grid**2
        if errors.min() < errors[-1]:
            assert row == pytest.approx(grid[np.argmin(errors)], rel=1e-4)
        else:
            assert row == q
    assert stats.drawn_error(found, rows) <= stats.drawn_error(found, q) + 1e-12


def test_rows_and_layers_without_an_answer() -> None:
    nothing = np.zeros(2)
    *_, found = layer(m=2, cross=np.array([0.0, 0.4]), power=np.array([0.0, 0.2]))
    np.testing.assert_allclose(stats.drawn_rows(found), [0.5, 0.5])
    *_, found = layer(m=2, cross=np.array([-1.0, 0.4]), power=np.array([1.0, 0.2]))
    assert stats.drawn(found) is None
    np.testing.assert_allclose(stats.drawn_rows(found), [1.0, 0.5])
    *_, found = layer(m=2, energy=nothing, diagonal=nothing, c1=nothing, c2=nothing)
    assert stats.least_squares(found, 0.1) == 0.1
    assert stats.bound_layer(found, 0.1, 1.0) == 0.1
    assert found.coherence == 0.0


@pytest.mark.parametrize("eta", [1e-3, 0.03, 0.3, 30.0])
def test_q_of_the_bound_is_its_minimiser(eta: float) -> None:
    """|1 − d/q| |C1| + η φ C2/(4 q²) + log(2/γ)/η over q in [d, 1], row by row."""
    density = 0.05
    *_, found = layer()
    grid = np.exp(np.linspace(math.log(density), 0.0, 200_001))
    for q, c1, c2 in zip(stats.bound_rows(found, density, eta), found.c1, found.c2, strict=True):
        bound = np.abs(1 - density / grid) * abs(c1) + eta * stats.phi(1 - density) * c2 / (4 * grid**2)
        assert q == pytest.approx(grid[np.argmin(bound)], rel=1e-4)
    assert stats.bound_layer(found, density, eta) == pytest.approx(stats.bound_rows(found, density, eta).mean())


def test_a_row_whose_c1_is_zero_is_not_rescaled() -> None:
    *_, found = layer(m=2, c1=np.array([0.0, 1e9]), c2=np.array([1.0, 1.0]))
    np.testing.assert_allclose(stats.bound_rows(found, 0.1, 1.0), [1.0, 0.1])


@pytest.mark.parametrize("family", stats.FAMILIES)
def test_eta_starts_where_every_q_is_the_density(family: str) -> None:
    layers = [layer(seed)[-1] for seed in range(3)]
    q = stats.FAMILIES[family][0]
    low, high = stats.eta_range(q, layers, 0.01)
    assert 0.0 < low < high
    means = [np.mean([q(some, 0.01, eta) for some in layers]) for eta in np.geomspace(low, high, 9)]
    assert 0.01 <= means[0] <= 0.0101
    assert 0.3 < means[-1] <= 0.5
    assert means == sorted(means)
