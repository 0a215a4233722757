"""How well a pruned model's predictions agree with the fine-tune's, whatever the scale of its logits. Numpy.

Pruning shrinks logits, and shrinks and moves numbers. No accuracy and no correlation sees this, but it can dominate a
plain distance: on the intensity task at density 0.01 plain DARE has a smaller squared error to the fine-tune's
predictions than DAREx-q (0.37 against 0.41), and a score of 35 against 65. So logits are fitted to the fine-tune's.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
ROUNDS = 50


def divergence(logits_NC: Matrix, target_NC: Matrix) -> float:
    """min over a ≥ 0 of the mean KL(softmax(t) ‖ softmax(a z)), by Newton's method.

        z     logits, t the fine-tune's, each less its mean over classes

    No accuracy sees the scale a, whatever it is: at density 0.001 pruned logits are 100 times smaller and rank the rows
    as well. So z first gets the mean square of t, and about that a ridge with the weight of one row, (a − 1)²/2N, keeps
    the fit stable where rows are few. A shift between classes is not fitted, since accuracy sees it.
    """
    z, t = (logits - logits.mean(1, keepdims=True) for logits in (logits_NC, target_NC))
    own = float(np.mean(z * z))
    z = z * np.sqrt(np.mean(t * t) / own) if own > 0.0 else z
    logs = _log_softmax(t)
    scale = max(0.0, _scale(z, np.exp(logs)))
    return float(np.mean(np.sum(np.exp(logs) * (logs - _log_softmax(scale * z)), 1)))


def discord(numbers_NK: Matrix, target_NK: Matrix) -> float:
    """1 − Pearson's correlation, mean over outputs; a constant output counts as uncorrelated."""
    x, y = numbers_NK - numbers_NK.mean(0), target_NK - target_NK.mean(0)
    size = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return float(np.mean(1.0 - np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 0.0)))


def _scale(z: Matrix, t: Matrix) -> float:
    """The scale a that fits softmax(a z) to t, with the ridge about 1: convex, steps halved where they overshoot."""

    def loss(a: float) -> float:
        return float((a - 1.0) ** 2 / (2.0 * len(z)) - np.mean(np.sum(t * _log_softmax(a * z), 1)))

    a, now = 1.0, loss(1.0)
    for _ in range(ROUNDS):
        p = np.exp(_log_softmax(a * z))
        mean = (p * z).sum(1)
        slope = float(np.mean(np.sum((p - t) * z, 1))) + (a - 1.0) / len(z)
        step = slope / (float(np.mean(np.sum(p * z * z, 1) - mean**2)) + 1.0 / len(z))
        while (after := loss(a - step)) > now and abs(step) > 1e-9:
            step /= 2.0
        if now - after <= 1e-12 * abs(now):
            break
        a, now = a - step, after
    return a


def _log_softmax(values: Matrix) -> Matrix:
    shifted = values - values.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), dtype=np.float64)
