"""How well a pruned model's predictions agree with the fine-tune's, whatever the scale and shift of its logits. Numpy.

Pruning shrinks logits and moves their mean. No accuracy or correlation sees this, but it can dominate a plain distance:
on the intensity task at density 0.01 plain DARE has a smaller squared error to the fine-tune's predictions than DAREx-q
(0.37 against 0.41), and a score of 35 against 65. So logits are first fitted to the fine-tune's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
ROUNDS = 50


def divergence(logits_NC: Matrix, target_NC: Matrix) -> float:
    """min over a ≥ 0, b of the mean KL(softmax(t) ‖ softmax(a z + b)), by Newton's method.

        z     logits, t the fine-tune's, each less its mean over classes

    z first gets the columns' means and the spread of t, so that no scale or shift of z changes the result. A ridge with
    the weight of one row, (‖b‖² + (a − 1)²)/2N, is about this fit of two moments and keeps the other stable where rows
    are few and classes many. About z as it is it would hold shrunk logits back: at density 0.001 they are 100 times
    smaller and rank the rows as well.
    """
    z, t = (logits - logits.mean(1, keepdims=True) for logits in (logits_NC, target_NC))
    level = t.mean(0)
    z, spread = z - z.mean(0), float(np.sqrt(np.mean((t - level) ** 2)))
    own = float(np.sqrt(np.mean(z * z)))
    z = z * (spread / own) if own > 0.0 else z
    logs = _log_softmax(t)
    free = _fitted(z, level, np.exp(logs))
    if free[0] < 0.0:
        z = np.zeros_like(z)
        free = _fitted(z, level, np.exp(logs))
    return float(np.mean(np.sum(np.exp(logs) * (logs - _log_softmax(free[0] * z + level + free[1])), 1)))


def discord(numbers_NK: Matrix, target_NK: Matrix) -> float:
    """1 − Pearson's correlation, mean over outputs; a constant output counts as uncorrelated."""
    x, y = numbers_NK - numbers_NK.mean(0), target_NK - target_NK.mean(0)
    size = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return float(np.mean(1.0 - np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 0.0)))


def _fitted(z: Matrix, level: Matrix, t: Matrix) -> tuple[float, Matrix]:
    """The scale a and shift b (C) that fit softmax(a z + level + b) to t, with the ridge about a = 1 and b = 0: convex,
    steps halved where they overshoot."""
    rows, classes = z.shape
    theta = np.concatenate([[1.0], np.zeros(classes)])
    centre = theta.copy()

    def logs(at: Matrix) -> Matrix:
        return _log_softmax(at[0] * z + level + at[1:])

    def loss(at: Matrix) -> float:
        return float(-np.mean(np.sum(t * logs(at), 1)) + np.sum((at - centre) ** 2) / (2.0 * rows))

    now = loss(theta)
    for _ in range(ROUNDS):
        p = np.exp(logs(theta))
        mean = (p * z).sum(1, keepdims=True)
        gradient = np.concatenate([[np.mean(np.sum((p - t) * z, 1))], (p - t).mean(0)]) + (theta - centre) / rows
        hessian = np.eye(1 + classes) / rows
        hessian[0, 0] += np.mean(np.sum(p * z * z, 1) - mean[:, 0] ** 2)
        hessian[0, 1:] += np.mean(p * (z - mean), 0)
        hessian[1:, 0] = hessian[0, 1:]
        hessian[1:, 1:] += np.diag(p.mean(0)) - p.T @ p / rows
        step, size = np.linalg.solve(hessian, gradient), 1.0
        while (after := loss(theta - size * step)) > now and size > 1e-6:
            size /= 2.0
        if now - after <= 1e-12 * abs(now):
            break
        theta, now = theta - size * step, after
    return float(theta[0]), theta[1:]


def _log_softmax(values: Matrix) -> Matrix:
    shifted = values - values.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), dtype=np.float64)
