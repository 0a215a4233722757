"""Task metrics of predictions against labels, each in [−1, 1], larger is better. Numpy, no torch.

Definitions are those of scikit-learn and of the GLUE benchmark; a metric that is undefined (one class, constant
predictions) is 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


def accuracy(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the share of equal entries."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def matthews_correlation(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return Matthews' correlation of any number of classes (Gorodkin's R_K)."""
    p, y = np.asarray(predicted), np.asarray(labels)
    classes = np.union1d(p, y)
    p_NC = (p[:, None] == classes).astype(np.float64)
    y_NC = (y[:, None] == classes).astype(np.float64)
    covariance = float(np.sum((p_NC - p_NC.mean(0)) * (y_NC - y_NC.mean(0))))
    return _over(covariance, float(np.sqrt(np.sum((p_NC - p_NC.mean(0)) ** 2) * np.sum((y_NC - y_NC.mean(0)) ** 2))))


def f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return F1 of class 1 where there are two classes; else the mean of the F1 of every class (macro)."""
    p, y = np.asarray(predicted), np.asarray(labels)
    classes = np.union1d(p, y)
    scored = [1] if set(classes.tolist()) <= {0, 1} else classes.tolist()
    return float(
        np.mean([_over(2.0 * np.sum((p == c) & (y == c)), float(np.sum(p == c) + np.sum(y == c))) for c in scored])
    )


def accuracy_f1(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean of accuracy and F1 (GLUE's MRPC and QQP)."""
    return (accuracy(predicted, labels) + f1(predicted, labels)) / 2.0


def pearson_spearman(predicted: ArrayLike, labels: ArrayLike) -> float:
    """Return the mean of Pearson's and Spearman's correlation (GLUE's STS-B); ties have their mean rank."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    return (_pearson(p, y) + _pearson(_ranks(p), _ranks(y))) / 2.0


def exact_match(predicted: Sequence[str], labels: Sequence[str], pattern: str | None = None) -> float:
    """Return the share of texts whose answer equals the label's; see `answer`."""
    pairs = [(answer(a, pattern), answer(b, pattern)) for a, b in zip(predicted, labels, strict=True)]
    return float(np.mean([a is not None and a == b for a, b in pairs]))


def answer(text: str, pattern: str | None = None) -> str | None:
    """Return the last match of `pattern` in the text (its first group, if it has one), stripped; the whole text without
    one.

    None where nothing matches, which equals no answer.
    """
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    return matches[-1][1 if matches[-1].re.groups else 0].strip() if matches else None


Metric = Callable[[Any, Any], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "matthews_correlation": matthews_correlation,
    "f1": f1,
    "accuracy_f1": accuracy_f1,
    "pearson_spearman": pearson_spearman,
}


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return _over(float(a @ b), float(np.sqrt((a @ a) * (b @ b))))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[inverse], dtype=np.float64)


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0.0 else 0.0
