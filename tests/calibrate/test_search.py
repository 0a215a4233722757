"""The searches find the authors' grid's q within a grid step, with far fewer evaluations; all are deterministic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from deltamerge.calibrate.q.search import BUDGET, Minima, closer, grid, minimise, model, passed, scan
from deltamerge.calibrate.spec import CLOSER

SHAPES: dict[str, Callable[[float, float], float]] = {
    "square": lambda q, best: (q - best) ** 2,
    "square of log": lambda q, best: math.log(q / best) ** 2,
    "corner": lambda q, best: abs(math.log(q / best)),
    "least squares": lambda q, best: (1 - best / q) ** 2,
    "flat far away": lambda q, best: -math.exp(-(math.log(q / best) ** 2)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("best", [0.01, 0.0123, 0.033, 0.07, 0.31, 0.9, 1.0])
def test_finds_the_minimum_of_the_grid(shape: str, best: float) -> None:
    def evaluate(points: Sequence[float]) -> list[float]:
        return [SHAPES[shape](q, best) for q in points]

    found = minimise(evaluate, 0.01, 1.0)
    theirs = grid(evaluate, 0.01, 1.0, step=0.01)
    assert len(found.path) <= BUDGET
    assert 0.01 <= found.point <= 1.0
    assert abs(found.point - theirs.point) <= max(0.001, 0.01 * best)
    assert found.value == min(value for _, value in found.path)
    assert found.path[0][0] == 0.01
    assert minimise(evaluate, 0.01, 1.0) == found


def test_points_of_the_coarse_grid_come_in_one_call() -> None:
    calls: list[int] = []

    def evaluate(points: Sequence[float]) -> list[float]:
        calls.append(len(points))
        return [(math.log(q) + 3.0) ** 2 for q in points]

    minimise(evaluate, 0.01, 1.0, coarse=6)
    assert calls[0] == 6
    assert set(calls[1:]) == {1}


def test_a_flat_objective_leaves_the_lower_end() -> None:
    assert minimise(lambda points: [1.0] * len(points), 0.01, 1.0).point == 0.01
    assert grid(lambda points: [1.0] * len(points), 0.01, 1.0, step=0.01).point == 0.01


def test_a_step_function_keeps_within_its_best_step() -> None:
    """A validation metric is flat in places."""
    found = minimise(lambda points: [round(abs(math.log(q / 0.05)), 1) for q in points], 0.01, 1.0)
    assert found.value == 0.0
    assert len(found.path) <= BUDGET


def test_not_a_number_never_wins() -> None:
    found = minimise(lambda points: [math.nan if q < 0.1 else q for q in points], 0.01, 1.0)
    assert 0.1 <= found.point < 0.15


def test_one_point() -> None:
    found = minimise(lambda points: list(points), 0.5, 0.5)
    assert (found.point, len(found.path)) == (0.5, 1)


def test_the_authors_grid_stops_after_four_values_without_improvement() -> None:
    visited: list[float] = []

    def evaluate(points: Sequence[float]) -> list[float]:
        visited.extend(points)
        return [abs(q - 0.034) for q in points]

    found = grid(evaluate, 0.01, 1.0, step=0.01)
    coarse = [round(q, 6) for q in visited[:7]]
    assert coarse == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    assert found.point == pytest.approx(0.034)
    assert len(found.path) == 7 + 18


def test_minima_are_listed_best_first() -> None:
    path = ((1.0, 5.0), (2.0, 3.0), (4.0, 4.0), (8.0, 1.0), (16.0, 6.0), (3.0, 3.0), (32.0, 5.5))
    assert Minima(8.0, 1.0, path).minima == (8.0, 2.0, 32.0)
    assert Minima(1.0, 0.0, ((1.0, 0.0),)).minima == (1.0,)


def test_a_flat_path_has_one_minimum_its_lower_end() -> None:
    assert Minima(1.0, 2.0, tuple((q, 2.0) for q in (1.0, 2.0, 3.0))).minima == (1.0,)


@pytest.mark.parametrize("slope", [1.0, -1.0, 0.0])
def test_points_that_a_search_has_passed_are_spread(slope: float) -> None:
    found = minimise(lambda points: [slope * math.log(x) for x in points], 0.001, 1.0)
    points = [x for x, _ in passed(found, 0.001, 1.0)]
    assert all(0.001 < x < 1.0 for x in points)
    assert len(points) <= 20
    assert all(b >= a * 1000 ** (1 / 20) for a, b in itertools.pairwise(points))
    for coarse in (10 ** (-3 + 3 * i / 7) for i in range(1, 7)):  # and nothing that was looked at is far from them
        assert min(abs(math.log(x / coarse)) for x in points) <= math.log(1000) / 20


def of_u(best: float, q: float, noise: float = 0.0) -> float:
    """A change of outputs as real ones are: flat where the delta is dropped (q large) and where it is drowned."""
    u = math.log(best / q)
    return 1.0 - 0.5 * math.exp(-(u**2)) + 0.1 * math.tanh(u) + noise


class Counted:
    """An objective with masks whose minima lie at `bests`; counts points of the first round and of all rows."""

    def __init__(self, *bests: float, noise: float = 0.01) -> None:
        self.bests, self.noise, self.few, self.all = bests, noise, 0, 0

    def scan(self, points: Sequence[float]) -> list[float]:
        self.few += len(points)
        return [1.1 * of_u(self.bests[0], q) for q in points]

    def of_masks(self, points: Sequence[float], masks: range) -> list[list[float]]:
        self.all += len(points) * len(masks)
        return [[of_u(self.bests[mask], q, self.noise * mask) for mask in masks] for q in points]

    def found(self, low: float = 0.01, high: float = 1.0) -> Minima:
        return model(scan(self.scan, low, high), self.of_masks, len(self.bests))


@pytest.mark.parametrize("low", [0.1, 0.01, 0.001])
@pytest.mark.parametrize("best", [0.0123, 0.033, 0.12, 0.31])
def test_a_model_of_the_change_finds_its_minimum_in_six_points(best: float, low: float) -> None:
    objective = Counted(best)
    found = objective.found(low)
    wanted = min(max(best * math.exp(0.1), low), 1.0)  # the tilt moves it a little
    truth = min((low * (1 / low) ** (i / 4000) for i in range(4001)), key=lambda q: of_u(best, q))
    assert wanted == pytest.approx(truth, rel=0.15)
    assert of_u(best, found.point) - of_u(best, truth) < 0.002
    assert low <= found.point <= 1.0
    assert objective.few == 8
    assert objective.all <= 4
    assert objective.found(low) == found


@pytest.mark.parametrize(
    ("bests", "points", "masks"),
    [
        ((0.03, 0.0302, 0.9, 0.9), 6, 2),  # the first two agree: the others are not asked
        ((0.03, 0.036, 0.033, 0.033), 12, 4),
        ((0.03, 0.033), 6, 2),
        ((0.03,), 3, 1),
    ],
)
def test_other_masks_are_asked_where_the_first_two_disagree(bests: tuple[float, ...], points: int, masks: int) -> None:
    objective = Counted(*bests)
    found = objective.found()
    assert (objective.all, found.masks) == (points, masks)
    assert 0.03 < found.point < 0.038


def test_the_mask_farthest_from_the_mean_is_left_out() -> None:
    alone, four = Counted(0.03, 0.036, 0.033), Counted(0.03, 0.036, 0.033, 0.033)
    four.of_masks = lambda points, masks: [  # type: ignore[method-assign]
        [9.0 if mask == 3 else Counted(*alone.bests).of_masks([q], range(mask, mask + 1))[0][0] for mask in masks]
        for q in points
    ]
    assert four.found().value < 1.0
    means = [sum(column) / 3 for column in alone.of_masks([x for x, _ in four.found().path], range(3))]
    assert [value for _, value in four.found().path] == pytest.approx(means)


def test_a_model_of_a_flat_objective_and_of_one_that_is_not_a_number() -> None:
    def of_masks(value: Callable[[float], float]) -> Callable[[Sequence[float], range], list[list[float]]]:
        return lambda points, masks: [[value(q) for _ in masks] for q in points]

    flat = model(scan(lambda points: [1.0] * len(points), 0.01, 1.0), of_masks(lambda q: 1.0), 4)
    assert (flat.point, flat.value) == (0.01, 1.0)

    def broken(q: float) -> float:
        return math.nan if q < 0.1 else q

    found = model(scan(lambda points: [*map(broken, points)], 0.01, 1.0), of_masks(broken), 2)
    assert 0.1 <= found.point < 0.3
    assert math.isfinite(found.value)
    nothing = model(scan(lambda points: [math.nan] * len(points), 0.01, 1.0), of_masks(lambda q: math.nan), 1)
    assert nothing.point == 0.01
    one = model(scan(lambda points: [*points], 0.5, 0.5), of_masks(lambda q: q), 3)
    assert (one.point, one.value, one.minima) == (0.5, 0.5, (0.5,))


def test_a_second_minimum_is_a_candidate_if_a_hump_parts_it_from_the_first() -> None:
    def two(q: float, hump: float) -> float:
        return 1.0 - math.exp(-(math.log(q / 0.2) ** 2)) - hump * math.exp(-16 * math.log(q / 0.0101) ** 2)

    def minima(hump: float) -> tuple[float, ...]:
        seen = scan(lambda points: [two(q, hump) for q in points], 0.01, 1.0)
        return model(seen, lambda points, masks: [[two(q, hump)] for q in points], 1).minima

    waves = scan(lambda points: [math.cos(3.0 * math.log(q)) + math.log(q) / 50 for q in points], 0.001, 1.0)
    assert len(waves.minima) > 2
    assert len(model(waves, lambda points, masks: [[1.0] for _ in points], 1).minima) == 2  # the best two are compared
    assert len(minima(0.005)) == 1
    first, second = minima(0.4)
    assert (first, second) == (pytest.approx(0.2, rel=0.05), 0.01)


@pytest.mark.parametrize("best", [0.021, 0.026, 0.031, 0.036, 0.044])
def test_candidates_come_closer_to_a_valley_between_two_points_of_the_grid(best: float) -> None:
    """As predictions have it at density 0.001: a valley in log q as wide as the grid's step, a plain on both sides."""
    step = math.log(1000.0) / 7

    def value(q: float) -> float:
        return 1.0 - math.exp(-2.0 * (math.log(q / best) / step) ** 2)

    some = {q: value(q) for q in (0.001 * math.exp(step * i) for i in range(1, 7))}
    for _ in range(CLOSER):
        if (q := closer(sorted(some.items()))) is not None:
            some[q] = value(q)
    found = min(some, key=lambda q: some[q])
    assert abs(math.log(found / best)) < 0.1
    assert len(some) <= 6 + CLOSER
    assert closer([(1.0, 0.0)]) is None
