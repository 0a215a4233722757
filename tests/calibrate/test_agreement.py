"""Agreement with predictions does not depend on the scale and shift of logits; and the plot of a search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deltamerge.calibrate.agreement import discord, divergence
from deltamerge.errors import InputError, OutputError
from deltamerge.inspect.pictures import draw


@pytest.mark.parametrize("classes", [2, 5])
def test_divergence_ignores_scale_and_shift(classes: int) -> None:
    generator = np.random.Generator(np.random.PCG64(1))
    target = 2.0 * generator.standard_normal((400, classes))
    noisy = target + generator.standard_normal(target.shape)
    assert divergence(target, target) == pytest.approx(0.0, abs=1e-9)
    assert divergence(0.5 * target + 0.2 * np.arange(classes), target) < 0.02
    assert divergence(0.5 * noisy + 1.0, target) == pytest.approx(divergence(noisy, target), rel=0.05)
    unrelated, reversed_ = divergence(generator.standard_normal(target.shape), target), divergence(-target, target)
    assert divergence(noisy, target) < 0.5 * unrelated
    assert reversed_ == pytest.approx(divergence(np.zeros_like(target), target), rel=1e-6)


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
