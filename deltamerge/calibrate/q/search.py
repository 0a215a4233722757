"""Minimises an objective over one number, q or η, deterministically and with a bounded number of evaluations. No torch.

The objective takes several points at once, so that candidates can share one walk through a model's blocks. `model` is
for objectives that are smooth in 1/x, the output change; `minimise` for any, such as a metric; `grid` is the authors'.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltamerge.calibrate.spec import EVALUATIONS, MINIMA, SCANNED, SHORTLIST, rounded

Evaluate = Callable[[Sequence[float]], Sequence[float]]
OfMasks = Callable[[Sequence[float], range], Sequence[Sequence[float]]]
Point = tuple[float, float]
COARSE = SCANNED
BUDGET = EVALUATIONS
FIRST = 2  # masks that a model is fitted to before it is known whether they agree
AGREE = 0.1  # share of the bracket in log x: masks whose minima differ by less agree
NEAR = 0.05  # in log x: a point no farther from another is not worth a pass
HUMP = 0.02  # share of the range of values: the least hump between two minima


@dataclass(frozen=True, slots=True)
class Minima:
    """The best point, its objective, and every point evaluated, in order.

    scan    from `model`: the points of the first round, on a part of the rows
    scale   factor from their values to values on all rows, taken at the best point
    others  from `model`: the next best minimum of the first round, if there is one
    masks   from `model`: the masks in the means
    """

    point: float
    value: float
    path: tuple[Point, ...]
    scan: tuple[Point, ...] = ()
    scale: float = 1.0
    others: tuple[Point, ...] = ()
    masks: int = 1

    @property
    def minima(self) -> tuple[float, ...]:
        """Return every evaluated point that no neighbour on the axis betters, best first.

        An unlabelled objective can have a second minimum where the delta is drowned or dropped (magnitude at density
        0.001 has): compare these, and the plain choice, by another measure on held-out rows.
        """
        if self.scan:
            return (self.point, *(x for x, _ in self.others))
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
    """Return the minimum over [low, high], 0 < low ≤ high: a coarse grid in log x in one call, then Brent's method.

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


@dataclass(frozen=True, slots=True)
class Scan:
    """The first round of `model`: a grid in log x on a part of the rows, and its local minima, the best first."""

    points: tuple[float, ...]
    values: tuple[float, ...]
    minima: tuple[int, ...]

    @property
    def best(self) -> float:
        """Return the point of the smallest value."""
        return self.points[self.minima[0]]

    @property
    def path(self) -> tuple[Point, ...]:
        """Return the points and values."""
        return tuple(zip(self.points, self.values, strict=True))


def scan(evaluate: Evaluate, low: float, high: float, *, coarse: int = COARSE, tolerance: float = 0.01) -> Scan:
    """Return the objective on a grid in log x over [low, high], 0 < low ≤ high; one point if they are within the
    tolerance.

    A local minimum counts if a hump of `HUMP` of the values' range parts it from each better one.
    """
    if high <= low * (1.0 + tolerance):
        return Scan((low,), (_ordered(evaluate([low])[0]),), (0,))
    step = math.log(high / low) / (coarse - 1)
    points = [low * math.exp(step * i) for i in range(coarse - 1)] + [high]
    values = [_ordered(value) for value in evaluate(points)]
    return Scan(tuple(points), tuple(values), tuple(_apart(values)))


def model(scanned: Scan, of_masks: OfMasks, masks: int) -> Minima:
    """Return the minimum, near the best point of a scan, of an objective that is smooth in 1/x.

        scanned     the scan with the first mask, on a part of the rows
        of_masks    returns the objective at several points for each of a range of masks, on all rows
        masks       the number of masks

    Three points around the scan's minimum, a third of its step apart, are evaluated for the first two masks, and a
    fourth if an outer point is the best. The other masks follow only if the minima of these two differ by more than
    `AGREE` of the three points' width. With three or more masks, the mask farthest from the mean is left out, as in the
    paper. The result is the minimum of the parabola in 1/x through the means, with the parabola's value. If that
    minimum is not between the three points, the best point is returned; among equal values the smallest point wins.
    """
    points, seen = scanned.points, scanned.values
    low, high = points[0], points[-1]
    best, *others = scanned.minima
    if len(points) == 1:
        (value,) = _means(_columns(of_masks([low], range(masks))))
        return Minima(low, value, ((low, value),), scanned.path, _ratio(value, seen[0]), masks=masks)
    step = math.log(high / low) / (len(points) - 1)
    centre = min(max(vertex(points, seen, best), low * math.exp(step / 3)), high * math.exp(-step / 3))
    three = [_within(centre * math.exp(shift), low, high) for shift in (-step / 3, 0.0, step / 3)]
    some = range(min(FIRST, masks))
    found = _columns(of_masks(three, some))
    three, found = _followed(three, found, low, high, step / 3, lambda x: of_masks([x], some)[0])
    if masks > FIRST:
        minima = [_parabola(three, column)[0] for column in found]
        if math.log(max(minima) / min(minima)) > AGREE * 2 * step / 3:
            found += _columns(of_masks(three, range(FIRST, masks)))
    means = _means(found)
    point, value = _parabola(three, means)
    scale = _ratio(value, seen[best])
    return Minima(
        point,
        value,
        tuple(zip(three, means, strict=True)),
        scanned.path,
        scale,
        tuple((points[i], seen[i] * scale) for i in others[: MINIMA - 1]),
        len(found),
    )


def _followed(
    three: list[float],
    columns: list[list[float]],
    low: float,
    high: float,
    step: float,
    value: Callable[[float], Sequence[float]],
) -> tuple[list[float], list[list[float]]]:
    """Return the three points and their values by mask. If an outer point is the best, all move one step that way."""
    means = _means(columns)
    best = min(range(3), key=lambda i: (means[i], i))
    if best == 1 or three[best] in (low, high):
        return three, columns
    after = _within(three[best] * math.exp(step if best else -step), low, high)
    more = [_ordered(one) for one in value(after)]
    if best:
        return [*three[1:], after], [[*column[1:], one] for column, one in zip(columns, more, strict=True)]
    return [after, *three[:-1]], [[one, *column[:-1]] for column, one in zip(columns, more, strict=True)]


def _means(columns: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each row over columns (a column for each mask).

    With three or more columns, the column whose mean is farthest from the others' is left out.
    """
    some = list(columns)
    if len(some) > 2:
        own = [sum(column) / len(column) for column in some]
        mean = sum(own) / len(own)
        del some[max(range(len(own)), key=lambda i: abs(own[i] - mean))]
    return [sum(row) / len(row) for row in zip(*some, strict=True)]


def _ratio(value: float, seen: float) -> float:
    return value / seen if 0.0 < seen < math.inf else 1.0


def _within(x: float, low: float, high: float) -> float:
    """Return x, or the bound that it equals up to rounding."""
    return low if x <= low * (1.0 + 1e-9) else high if x >= high * (1.0 - 1e-9) else x


def _columns(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[_ordered(value) for value in column] for column in zip(*rows, strict=True)]


def _parabola(three: Sequence[float], values: Sequence[float]) -> Point:
    """Return the minimum of the parabola in 1/x through three ascending points, or the best point if outside."""
    best = min(range(3), key=lambda i: (values[i], i))
    u = [three[1] / x - 1.0 for x in three]
    if not all(map(math.isfinite, values)) or u[0] == 0.0 or u[2] == 0.0:
        return three[best], values[best]
    left, right = (values[0] - values[1]) / u[0], (values[2] - values[1]) / u[2]
    curve = (left - right) / (u[0] - u[2])
    slope = left - curve * u[0]
    if curve <= 0.0 or not u[2] <= (at := -slope / (2.0 * curve)) <= u[0]:
        return three[best], values[best]
    return three[1] / (1.0 + at), values[1] + slope * at / 2.0


def vertex(points: Sequence[float], values: Sequence[float], i: int) -> float:
    """Return the minimum of the parabola in log x through a point and its two neighbours; the point itself at an
    end."""
    if not 0 < i < len(points) - 1 or not all(map(math.isfinite, values[i - 1 : i + 2])):
        return points[i]
    left, right = math.log(points[i] / points[i - 1]), math.log(points[i + 1] / points[i])
    fall, rise = (values[i] - values[i - 1]) / left, (values[i + 1] - values[i]) / right
    at = (-fall * right - rise * left) / (2.0 * (rise - fall)) if rise > fall else 0.0
    return points[i] * math.exp(at)


def closer(some: Sequence[Point]) -> float | None:
    """Return the vertex at the best of ascending points; None where it is hardly another point."""
    points, values = [x for x, _ in some], [value for _, value in some]
    at = rounded(vertex(points, values, values.index(min(values))))
    return None if any(abs(math.log(at / x)) < NEAR for x in points) else at


def _apart(values: Sequence[float]) -> list[int]:
    """Return the indices of the local minima, best first. A minimum without a hump before a better one is left out."""
    finite = [value for value in values if value < math.inf]
    least = HUMP * (max(finite) - min(finite)) if finite else 0.0
    kept: list[int] = []
    for i in sorted(_lowest(values) or [0], key=lambda i: (values[i], i)):
        walls = (max(values[min(i, k) : max(i, k) + 1]) for k in kept)
        if all(wall - values[i] > least for wall in walls):
            kept.append(i)
    return kept


def shortlist(found: Minima, low: float, high: float) -> list[tuple[float, float, bool]]:
    """Return (point, value, whether it lies on a bound) of the best local minima."""
    values = dict([*found.path, *found.others, (found.point, found.value)])
    points = found.minima[:SHORTLIST] or (found.point,)
    return [(x, values[x], x <= low * (1.0 + 1e-9) or x >= high * (1.0 - 1e-9)) for x in points]


def passed(found: Minima, low: float, high: float) -> list[tuple[float, float]]:
    """Return the points inside the bounds that a search has evaluated, no closer than a twentieth of the log axis.

    If the least objective is hardly below the base's, it may prefer the base, or a drowned delta, to all points
    between. On sentiment at density 0.001 the output change of magnitude is smallest at q = 0.019, whose accuracy is
    66; the predictions are nearest from 0.037 to 0.072, with 72.
    """
    inside = [(x, value) for x, value in (found.scan or found.path) if low * (1.0 + 1e-9) < x < high * (1.0 - 1e-9)]
    least, spread = (high / low) ** (1 / EVALUATIONS), sorted(inside)[:1]
    for point in sorted(inside):
        if point[0] >= spread[-1][0] * least:
            spread.append(point)
    return spread


def grid(evaluate: Evaluate, low: float, high: float, *, step: float, patience: int = 4) -> Minima:
    """Return the DAREx authors' procedure: from `low` by `step` until `patience` values in a row are no better, then by
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
    """Return the indices of the local minima, and the first of equal neighbours."""
    walled = [math.inf, *values, math.inf]
    return [i - 1 for i in range(1, len(walled) - 1) if walled[i - 1] > walled[i] <= walled[i + 1]]


def _ordered(value: float) -> float:
    return math.inf if math.isnan(value) else float(value)


def _brent(
    f: Callable[[float], float], left: float, x: float, right: float, fx: float, evaluations: int, tolerance: float
) -> None:
    """Search as Brent does (1973, chapter 5): by parabolas through the three best points, golden section where they do
    not help."""
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
