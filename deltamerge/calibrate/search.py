"""Minimises an objective over one number, q or η, deterministically and with a bounded number of evaluations. No torch.

The objective takes several points at once, so that candidates can share one walk through a model's blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Evaluate = Callable[[Sequence[float]], Sequence[float]]
COARSE = 8
BUDGET = 20


@dataclass(frozen=True, slots=True)
class Minima:
    """The best point, its objective, and every point evaluated, in order."""

    point: float
    value: float
    path: tuple[tuple[float, float], ...]

    @property
    def evaluations(self) -> int:
        """The number of points evaluated."""
        return len(self.path)

    @property
    def minima(self) -> tuple[float, ...]:
        """Every evaluated point that no neighbour on the axis betters, best first.

        An unlabelled objective can have a second minimum where the delta is drowned or dropped (magnitude at density
        0.001 has): compare these, and the plain choice, by another measure on held-out rows.
        """
        points = sorted(self.path)
        lowest = [points[i] for i in _lowest([value for _, value in points])]
        return tuple(point for point, _ in sorted(lowest, key=lambda p: (p[1], p[0])))


def minimise(
    evaluate: Evaluate,
    low: float,
    high: float,
    *,
    coarse: int = COARSE,
    budget: int = BUDGET,
    tolerance: float = 0.01,
) -> Minima:
    """The minimum over [low, high], 0 < low ≤ high: a coarse grid in log x in one call, then Brent's method.

        evaluate    returns the objective at several points
        low, high   the bounds
        coarse      points of the grid
        budget      evaluations at most
        tolerance   width of the bracket, in log x, at which to stop

    Every local minimum of the grid is refined, the best first, as far as the budget goes. Among equal values the
    smallest point wins, so a flat objective leaves q at `low`, vanilla DARE. `low` itself is always evaluated.
    """
    memo = _Memo(evaluate)
    if high <= low * (1.0 + tolerance):
        memo([low])
        return memo.found()
    span = math.log(high / low)
    points = [low * math.exp(span * i / (coarse - 1)) for i in range(coarse - 1)] + [high]
    memo(points)

    def value(x: float) -> float:
        return memo([math.exp(x)])[0]

    for best in sorted(_lowest([memo.values[x] for x in points]), key=lambda i: (memo.values[points[i]], i)):
        left, right = math.log(points[max(best - 1, 0)]), math.log(points[min(best + 1, coarse - 1)])
        left_over = budget - len(memo.values)
        _brent(value, left, math.log(points[best]), right, memo.values[points[best]], left_over, tolerance)
    return memo.found()


def grid(evaluate: Evaluate, low: float, high: float, *, step: float, patience: int = 4) -> Minima:
    """The DAREx authors' procedure: from `low` by `step` until `patience` values in a row are no better, then by
    step/10.

        evaluate    returns the objective at several points; it is called with one
        low, high   the bounds
        step        of the coarse grid; the fine grid covers ± step around the best point
        patience    values without improvement at which to stop

    The number of evaluations is bounded only by (high − low)/step + 20.
    """
    memo = _Memo(evaluate)
    best, worse, i = low, 0, 0
    while low + i * step <= high * (1.0 + 1e-12) and worse < patience:
        point = low + i * step
        memo([point])
        best, worse = (point, 0) if memo.values[point] < memo.values[best] or i == 0 else (best, worse + 1)
        i += 1
    for k in range(-9, 10):
        point = best + k * step / 10.0
        if low <= point <= high:
            memo([point])
    return memo.found()


class _Memo:
    """Evaluates each point once and keeps the order."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.values: dict[float, float] = {}

    def __call__(self, points: Sequence[float]) -> list[float]:
        new = [x for x in dict.fromkeys(points) if x not in self.values]
        if new:
            self.values |= zip(new, map(_ordered, self.evaluate(new)), strict=True)
        return [self.values[x] for x in points]

    def found(self) -> Minima:
        point = min(self.values, key=lambda x: (self.values[x], x))
        return Minima(point, self.values[point], tuple(self.values.items()))


def _lowest(values: Sequence[float]) -> list[int]:
    """Indices of the local minima; of equal neighbours the first."""
    walled = [math.inf, *values, math.inf]
    return [i - 1 for i in range(1, len(walled) - 1) if walled[i - 1] > walled[i] <= walled[i + 1]]


def _ordered(value: float) -> float:
    return math.inf if math.isnan(value) else float(value)


def _brent(
    f: Callable[[float], float], left: float, x: float, right: float, fx: float, evaluations: int, tolerance: float
) -> None:
    """Brent (1973), chapter 5: parabolas through the three best points, golden section where they do not help."""
    golden = (3.0 - math.sqrt(5.0)) / 2.0
    w = v = x
    fw = fv = fx
    step = before = 0.0
    least = tolerance / 2.0
    for _ in range(evaluations):
        middle = (left + right) / 2.0
        if abs(x - middle) <= 2.0 * least - (right - left) / 2.0:
            return
        r, q = (x - w) * (fx - fv), (x - v) * (fx - fw)
        p, q = (x - v) * q - (x - w) * r, 2.0 * (q - r)
        p, q = (-p, q) if q > 0.0 else (p, -q)
        if abs(before) > least and abs(p) < abs(q * before / 2.0) and q * (left - x) < p < q * (right - x):
            before, step = step, p / q
            if min(x + step - left, right - x - step) < 2.0 * least:
                step = math.copysign(least, middle - x)
        else:
            before = (left if x >= middle else right) - x
            step = golden * before
        u = x + (step if abs(step) >= least else math.copysign(least, step))
        fu = f(u)
        if fu <= fx:
            left, right = (left, x) if u < x else (x, right)
            v, fv, w, fw, x, fx = w, fw, x, fx, u, fu
        else:
            left, right = (u, right) if u < x else (left, u)
            if fu <= fw or w == x:
                v, fv, w, fw = w, fw, u, fu
            elif fu <= fv or v in (x, w):
                v, fv = u, fu
