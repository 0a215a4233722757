"""The best recipe of a sweep or a search, with its lock, and the merged folder of a candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltamerge.calibrate.values import Calibrated
from deltamerge.engine.execute import shared_values
from deltamerge.files.ownership import refuse_others, replace_own
from deltamerge.recipe.file import RecipeFile
from deltamerge.run.hashes import describe_inputs
from deltamerge.run.lock import Lock, refuse_foreign_lock
from deltamerge.run.options import Options
from deltamerge.run.plans import Planner
from deltamerge.run.runner import Result, run

Study = Mapping[str, Any]
"""How a search found a recipe, for its lock and card."""


def lock_of(
    file: RecipeFile, calibrated: Mapping[str, Calibrated], options: Options, path: Path, study: Study | None = None
) -> Lock:
    """Return the lock of a recipe with the q's `calibrated`, by the names of its stages. Others are found now."""
    planner = Planner(file, path.parent, options)
    (planned,) = planner.plans()
    planned = planner.fetched(file.output, planned, {})
    found = {node: calibrated[spec.name] for node, spec in planned.specs.items() if spec.name in calibrated}
    if len(found) < len(planned.stages):
        found |= {node: value for node, value in shared_values(planned.stages, found).items() if node in planned.specs}
    return Lock.of(path, planned, describe_inputs(planned, planned.workers), found, study=study)


def best_path(recipe: Path) -> Path:
    """Return the place of the best recipe: beside the template, whose relative paths it has."""
    return recipe.with_name(f"{recipe.stem}.best.yaml")


def check_best(recipe: Path, *, force: bool, rows: bool = False) -> None:
    """Refuse to replace a best recipe or lock that no search of this recipe wrote, or that somebody has changed.

    `rows`: the rows of the lock too. `force` allows it.
    """
    best = best_path(recipe)
    refuse_others(best, recipe.name, force=force)
    refuse_foreign_lock(best.with_suffix(".lock"), recipe.name, rows=rows, force=force)


def write_recipe(
    file: RecipeFile, calibrated: Mapping[str, Calibrated], options: Options, path: Path, study: Study | None = None
) -> RecipeFile:
    """Write a recipe to `path`, in the template's folder, with its lock beside it. OutputError: `check_best`."""
    name = file.path.name
    lock = lock_of(file, calibrated, options, path.with_suffix(".lock"), study)
    check_best(file.path, force=options.force, rows=bool(lock.rows))
    replace_own(path, file.output.text, name)
    lock.write_beside(name)
    return replace(file, path=path)


def make_folder(
    file: RecipeFile,
    calibrated: Mapping[str, Calibrated],
    options: Options,
    folder: Path,
    study: Study | None = None,
) -> Result:
    """Make the result of a recipe in `folder`, with q's that were found before."""
    asked = options = replace(options, force=False)
    if calibrated or study:
        asked = replace(options, lock=lock_of(file, calibrated, options, folder.with_suffix(".lock"), study))
    return run(file, folder, asked)
