"""A command reads its recipe once, opens its models once and reads a lock once."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from calls import call
from interrupted import RECIPE, calibrated, models

READ = "deltamerge.recipe.yaml_source.read"
PARSED = "deltamerge.recipe.load.parse"
OPENED = "deltamerge.plan.planner.open_inputs"
LOCK = "deltamerge.run.lock.read_lock"
EARLIER_LOCK = "deltamerge.run.runner.read_lock"
ROWS = "deltamerge.run.lock.read_header"

Count = Callable[[], dict[str, int]]


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Count:
    """How often each of them was called."""
    counts = dict.fromkeys((READ, PARSED, OPENED, LOCK, EARLIER_LOCK, ROWS), 0)

    def watch(name: str) -> None:
        module, _, function = name.rpartition(".")
        original = getattr(importlib.import_module(module), function)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            counts[name] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(name, counted)

    for name in counts:
        watch(name)
    return lambda: {name: number for name, number in counts.items() if number}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    models(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.format(method="dare_ties", shard="250KB"))
    return path


@pytest.mark.parametrize("command", ["check", "plan", "run"])
def test_a_command(recipe: Path, count: Count, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert call(capsys, command, recipe)[0] == 0
    assert count() == {READ: 1, PARSED: 1, OPENED: 1}


def test_a_part_and_the_end(recipe: Path, count: Count, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, "run", recipe, "--part", "1/1")[0] == 0
    assert call(capsys, "run", recipe, "--finish")[0] == 0
    assert count() == {READ: 2, PARSED: 2, OPENED: 2}


def test_a_budget_tries_densities_on_the_same_models(
    recipe: Path, count: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(
        "base_model: ./base\nmodels: [{model: ./a, prune: {method: magnitude, budget: 120000, include: [layers]}}]\n"
        "output: {kind: delta}\n"
    )
    code, _, err = call(capsys, "run", recipe)
    assert code == 0, err
    assert count() == {READ: 1, PARSED: 1, OPENED: 1}


def test_a_lock_with_its_rows(tmp_path: Path, count: Count, capsys: pytest.CaptureFixture[str]) -> None:
    path = calibrated(tmp_path)
    path.write_text(path.read_text().replace("q: output_change", "q: {objective: layer_mse, scope: row}"))
    assert call(capsys, "calibrate", path)[0] == 0
    assert count() == {READ: 1, PARSED: 1, OPENED: 1}
    assert call(capsys, "run", path, "--locked")[0] == 0
    assert count() == {READ: 2, PARSED: 2, OPENED: 2, LOCK: 1, ROWS: 1}


def test_documents_are_planned_again_when_what_they_need_is_there(
    recipe: Path, count: Count, capsys: pytest.CaptureFixture[str]
) -> None:
    first = "name: first\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./base}, {model: ./a}]\n"
    last = "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: first}, {model: ./b}]\n"
    recipe.write_text(f"{first}---\n{last}")
    assert call(capsys, "run", recipe)[0] == 0
    assert count() == {READ: 1, PARSED: 2, OPENED: 3, EARLIER_LOCK: 1}  # a lock of an earlier run is looked for
