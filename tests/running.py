"""Plans and runs of recipe files by their path, with the options of a run as keywords."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamerge.apps.report.pictures import drawing
from deltamerge.engine.execute import shared_values
from deltamerge.plan.planner import Plan
from deltamerge.recipe.file import RecipeFile, read_recipe
from deltamerge.run import plans, runner
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options
from deltamerge.run.partition import Part
from deltamerge.run.runner import Result
from deltamerge.tensors.schedule import depth_first


def _read(
    path: Path, *, mergekit_exact: bool = False, locked: bool = False, pictures: bool = False, **options: Any
) -> tuple[RecipeFile, Options]:
    file = read_recipe(path, mergekit_exact=mergekit_exact)
    lock = Lock.read(file.lock_path) if locked else options.pop("lock", None)
    return file, Options(lock=lock, drawing=drawing if pictures else None, **options)


def run(path: Path, out: Path | None = None, *, part: Part | None = None, **options: Any) -> Result:
    file, asked = _read(path, **options)
    return runner.run(file, out, asked, part=part)


def finish(path: Path, out: Path | None = None, **options: Any) -> Result:
    file, asked = _read(path, **options)
    return runner.finish(file, out, asked)


def calibrate(path: Path, **options: Any) -> Mapping[str, Any]:
    file, asked = _read(path, **options)
    return runner.calibrate(file, asked)


def make_plans(path: Path, out: Path | None = None, *, data: bool = True, **options: Any) -> tuple[Plan, ...]:
    """Without `data` calibration rows are not read, as if their q's were in a lock."""
    file, asked = _read(path, **options)
    return plans.make_plans(file, out, asked if data else replace(asked, lock=Lock(file.lock_path, {})))


def activations_of(path: Path) -> dict[str, Any]:
    """What the stage of a recipe that measures activations finds, by the fine-tune's tensor names."""
    tasks = make_plan(path, device="cpu", workers=1).tasks
    stage = next(node for task in tasks for node in depth_first(task.root) if node.function.endswith(":activations"))
    found: dict[str, Any] = shared_values([stage], {})[stage]
    return found


def make_plan(path: Path, out: Path | None = None, **options: Any) -> Plan:
    return make_plans(path, out, **options)[-1]
