"""Agreement with predictions does not depend on the scale of logits; and the plot of a search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltamerge.apps.report.pictures import draw
from deltamerge.calibrate.q.objectives import discord, divergence
from deltamerge.errors import InputError, OutputError


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def fitted(logits: np.ndarray, target: np.ndarray) -> float:
    """The divergence from its formula, by gradient descent in float64."""
    z, t = (x - x.mean(1, keepdims=True) for x in (logits, target))
    z, p, a = z * np.sqrt((t**2).mean() / (z**2).mean()), np.exp(log_softmax(t)), 1.0
    for _ in range(5_000):
        a = max(0.0, a - 0.05 * (((np.exp(log_softmax(a * z)) - p) * z).sum() + a - 1.0) / len(z))
    return float((p * (log_softmax(t) - log_softmax(a * z))).sum(1).mean())


@pytest.mark.parametrize("rows", [8, 25])
@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("size", [0.01, 1.0, -1.0])
def test_divergence_is_that_of_the_formula(rows: int, classes: int, size: float) -> None:
    generator = np.random.Generator(np.random.PCG64(rows))
    target = 2.0 * generator.standard_normal((rows, classes)) + np.arange(classes)
    noisy = size * (target + generator.standard_normal(target.shape))
    assert divergence(noisy, target) == pytest.approx(fitted(noisy, target), rel=1e-6)


@pytest.mark.parametrize("rows", [25, 400])
@pytest.mark.parametrize("classes", [2, 5])
def test_divergence_ignores_what_no_accuracy_sees(rows: int, classes: int) -> None:
    """The scale, exactly and however few the rows, and a row's mean; not a shift that moves rows to another class."""
    generator = np.random.Generator(np.random.PCG64(1))
    target = 2.0 * generator.standard_normal((rows, classes))
    noisy = target + generator.standard_normal(target.shape)
    assert divergence(target, target) == pytest.approx(0.0, abs=1e-9)
    for scale in (0.01, 0.5, 30.0):
        moved = scale * noisy + generator.standard_normal((rows, 1))
        assert divergence(moved, target) == pytest.approx(divergence(noisy, target), rel=1e-9)
    unrelated, reversed_ = divergence(generator.standard_normal(target.shape), target), divergence(-target, target)
    assert divergence(noisy, target) < 0.5 * unrelated
    assert reversed_ == divergence(np.zeros_like(target), target)
    one_class = noisy + 10.0 * np.eye(classes)[0]
    assert divergence(one_class, target) > 0.8 * reversed_


def test_divergence_of_logits_that_settle_everything_is_a_number() -> None:
    """Where softmax is one in float64, and pruned logits separate the rows too, the fit has no end but the ridge."""
    target = 1e3 * np.array([[1.0, -1.0], [-1.0, 1.0], [1.0, -1.0]])
    assert 0.0 <= divergence(1e-3 * target, target) < 1e-3
    assert divergence(-target, target) == pytest.approx(np.log(2.0))


def test_discord_is_one_minus_the_correlation() -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    x, y = generator.standard_normal((2, 50, 1))
    assert discord(x, y) == pytest.approx(1.0 - np.corrcoef(x[:, 0], y[:, 0])[0, 1])
    assert discord(3.0 * y + 1.0, y) == pytest.approx(0.0, abs=1e-12)
    assert discord(np.ones_like(y), y) == 1.0


def test_a_search_is_drawn(tmp_path: Path) -> None:
    record = {
        "method": "dare",
        "mask": "random",
        "density": 0.01,
        "objective": "output_change",
        "scope": "global",
        "search": "auto",
        "chosen": "calibrated",
        "why": "less output change",
        "plain": {"q": 0.01, "value": 0.6},
        "searched": {"q": 0.03},
        "q": {},
        "value": 0.4,
        "path": [["q", 0.01, 0.6], ["q", 0.03, 0.4], ["q", 1.0, 0.5]],
    }
    draw({"t": record}, tmp_path / "a.svg")
    assert "vanilla DARE: q = density" in (tmp_path / "a.svg").read_text()
    with pytest.raises(OutputError, match=r"a\.png: cannot be drawn"):
        draw({"t": record}, tmp_path / "a.png")
    with pytest.raises(InputError, match="nothing was searched"):
        draw({"t": {**record, "path": []}}, tmp_path / "b.svg")
