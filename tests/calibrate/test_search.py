"""The search finds the authors' grid's q within a grid step, with far fewer evaluations; both are deterministic."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from deltamerge.calibrate.search import BUDGET, Minima, grid, minimise
from deltamerge.calibrate.searches import passed

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
    assert found.evaluations <= BUDGET
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
    assert found.evaluations <= BUDGET


def test_not_a_number_never_wins() -> None:
    found = minimise(lambda points: [math.nan if q < 0.1 else q for q in points], 0.01, 1.0)
    assert 0.1 <= found.point < 0.15


def test_one_point() -> None:
    found = minimise(lambda points: list(points), 0.5, 0.5)
    assert (found.point, found.evaluations) == (0.5, 1)


def test_the_authors_grid_stops_after_four_values_without_improvement() -> None:
    visited: list[float] = []

    def evaluate(points: Sequence[float]) -> list[float]:
        visited.extend(points)
        return [abs(q - 0.034) for q in points]

    found = grid(evaluate, 0.01, 1.0, step=0.01)
    coarse = [round(q, 6) for q in visited[:7]]
    assert coarse == [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]
    assert found.point == pytest.approx(0.034)
    assert found.evaluations == 7 + 18


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
