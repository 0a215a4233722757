"""A one-page truth: every merge and pruning formula in float64 numpy, written from the papers, not from the package."""

from __future__ import annotations

import numpy as np


def linear(xs, weights, normalize=True):
    total = sum(w * x for w, x in zip(weights, xs, strict=True))
    return total / sum(weights) if normalize else total


def keep_probability(delta, density):
    """min(1, c |Δ|), c by bisection such that its mean is the density."""
    size, low, high = np.abs(delta.astype(np.float64)), 0.0, 1e60
    for _ in range(400):
        c = (max(low, 1e-60) * high) ** 0.5
        low, high = (c, high) if np.minimum(1, c * size).mean() < density else (low, c)
    return np.minimum(1, c * size)


def task_arithmetic(base, deltas, weights, normalize=False, lam=1.0):
    total = sum(w * d for w, d in zip(weights, deltas, strict=True))
    if normalize:
        total = total / sum(weights)
    return base + lam * total


def ties(base, deltas, weights, normalize=True, lam=1.0):
    e = np.stack([w * d for w, d in zip(weights, deltas, strict=True)])
    sign = np.where(e.sum(0) >= 0, 1.0, -1.0)
    agree = np.sign(e) == sign
    total = (e * agree).sum(0)
    if normalize:
        w = np.asarray(weights, float).reshape(-1, *[1] * base.ndim)
        divisor = (w * agree).sum(0)
        total = total / np.where(np.abs(divisor) < 1e-8, 1.0, divisor)
    return base + lam * total


def keep_top(delta, k):
    """The k entries of largest magnitude, earlier ones first among equals."""
    flat = delta.reshape(-1)
    order = np.argsort(-np.abs(flat), kind="stable")[:k]
    kept = np.zeros_like(flat)
    kept[order] = flat[order]
    return kept.reshape(delta.shape)


def magnitude(delta, density):
    return keep_top(delta, round(density * delta.size))


def magnitude_rows(delta, density):
    if not delta.size:
        return delta
    rows = delta.reshape(-1, delta.shape[-1]) if delta.ndim > 1 else delta.reshape(1, -1)
    return np.stack([keep_top(row, round(density * row.size)) for row in rows]).reshape(delta.shape)


def match_norm(kept, delta, norm):
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    a, b = np.linalg.norm(kept.reshape(-1), order), np.linalg.norm(delta.reshape(-1), order)
    return kept * (b / a) if a and b else kept
