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

    A ridge with the weight of one row, (‖b‖² + (a − 1)²)/2N, keeps the fit stable where rows are few and classes many.
    """
    z = logits_NC - logits_NC.mean(1, keepdims=True)
    logs = _log_softmax(target_NC)
    t = np.exp(logs)
    free = _fitted(z, t)
    scale, shift = free if free[0] >= 0.0 else (0.0, _fitted(np.zeros_like(z), t)[1])
    return float(np.mean(np.sum(t * (logs - _log_softmax(scale * z + shift)), 1)))


def discord(numbers_NK: Matrix, target_NK: Matrix) -> float:
    """1 − Pearson's correlation, mean over outputs; a constant output counts as uncorrelated."""
    x, y = numbers_NK - numbers_NK.mean(0), target_NK - target_NK.mean(0)
    size = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return float(np.mean(1.0 - np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 0.0)))


def _fitted(z: Matrix, t: Matrix) -> tuple[float, Matrix]:
    """The scale a and shift b (C) that fit softmax(a z + b) to t: convex, steps halved where they overshoot."""
    rows, classes = z.shape
    theta = np.concatenate([[1.0], np.zeros(classes)])
    centre = theta.copy()

    def loss(at: Matrix) -> float:
        fit = -np.mean(np.sum(t * _log_softmax(at[0] * z + at[1:]), 1))
        return float(fit + np.sum((at - centre) ** 2) / (2.0 * rows))

    now = loss(theta)
    for _ in range(ROUNDS):
        p = np.exp(_log_softmax(theta[0] * z + theta[1:]))
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
