"""Metrics against worked values and scipy."""

from __future__ import annotations

import numpy as np
import pytest

from deltamerge.calibrate.q import objectives as metrics

P, Y = [1, 0, 1, 1, 0, 1], [1, 0, 0, 1, 1, 1]  # tp 3, tn 1, fp 1, fn 1


@pytest.mark.parametrize(
    ("metric", "predicted", "labels", "want"),
    [
        ("accuracy", P, Y, 4 / 6),
        ("f1", P, Y, 0.75),
        ("accuracy_f1", P, Y, (4 / 6 + 0.75) / 2),
        ("matthews_correlation", P, Y, (3 * 1 - 1 * 1) / np.sqrt(4 * 4 * 2 * 2)),
        ("matthews_correlation", [1, 1, 1], [0, 1, 1], 0.0),
        ("f1", [0, 0], [0, 0], 0.0),
        ("f1", [0, 1, 2, 2], [0, 1, 1, 2], (1 + 2 / 3 + 2 / 3) / 3),
        ("matthews_correlation", [0, 1, 2, 2], [0, 1, 2, 2], 1.0),
        ("pearson_spearman", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0], 0.0),
    ],
)  # fmt: skip
def test_worked_values(metric: str, predicted: list[float], labels: list[float], want: float) -> None:
    assert metrics.METRICS[metric](predicted, labels, max(2, len({*labels}))) == pytest.approx(want)


def test_f1_of_three_classes_does_not_become_that_of_two() -> None:
    """Where neither labels nor predictions have the third class."""
    for predicted, macro in (([0, 0, 1, 1], (2 / 4 + 2 / 4) / 2), ([0, 0, 0, 0], (4 / 6 + 0) / 2)):
        assert metrics.f1(predicted, [0, 1, 0, 1], 3) == pytest.approx(macro)
    assert metrics.f1([0, 0, 0, 0], [0, 1, 0, 1], 2) == 0.0


def test_matthews_of_several_classes_is_gorodkins() -> None:
    """R_K from the confusion matrix: (c s − Σ p_k t_k) / sqrt((s² − Σ p_k²)(s² − Σ t_k²))."""
    random = np.random.default_rng(0)
    p, y = random.integers(0, 4, 200), random.integers(0, 4, 200)
    p[:90] = y[:90]
    pk, tk, s = np.bincount(p), np.bincount(y), 200
    want = ((p == y).sum() * s - pk @ tk) / np.sqrt((s**2 - pk @ pk) * (s**2 - tk @ tk))
    assert metrics.matthews_correlation(p, y) == pytest.approx(want)


def test_correlations_are_scipys() -> None:
    from scipy import stats

    random = np.random.default_rng(0)
    p = random.normal(size=100)
    y = np.round(p + random.normal(size=100), 1)  # with ties
    want = (stats.pearsonr(p, y)[0] + stats.spearmanr(p, y)[0]) / 2
    assert metrics.pearson_spearman(p, y) == pytest.approx(want)


@pytest.mark.parametrize(
    ("text", "pattern", "want"),
    [
        (" 42 ", None, "42"),
        ("first 3, then 12.", r"-?\d+", "12"),
        ("so 7\n#### 18\n", r"#### (-?\d+)", "18"),
        ("nothing", r"\d", None),
    ],
)
def test_answer(text: str, pattern: str | None, want: str | None) -> None:
    assert metrics.answer(text, pattern) == want


def test_exact_match() -> None:
    assert metrics.exact_match(["so 12", "x 3", "no"], ["12", "4", "5"], r"\d+") == pytest.approx(1 / 3)
    assert metrics.exact_match(["no", "12"], ["none", "12"], r"\d+") == 0.5
