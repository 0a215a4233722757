"""What a sweep or a search keeps beside its results: recipes, their locks, merged folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from deltamerge.calibrate.spec import Calibrated
from deltamerge.io.atomic import replace_file
from deltamerge.recipe.file import RecipeFile
from deltamerge.run.hashes import describe_inputs
from deltamerge.run.lock import Lock
from deltamerge.run.options import Options
from deltamerge.run.plans import Planner
from deltamerge.run.runner import Result, run


def lock_of(file: RecipeFile, calibrated: Mapping[str, Calibrated], options: Options, path: Path) -> Lock:
    """The lock of a recipe whose q's were found as `calibrated`, by the names of its stages."""
    planner = Planner(file, path.parent, options)
    (planned,) = planner.plans()
    planned = planner.fetched(file.output, planned, {})
    found = {node: calibrated[spec.name] for node, spec in planned.specs.items()}
    return Lock.of(path, planned, describe_inputs(planned, planned.workers), found)


def write_recipe(file: RecipeFile, calibrated: Mapping[str, Calibrated], options: Options, path: Path) -> RecipeFile:
    """Write a recipe to `path`, as it stands where the template does, with its lock beside it."""
    replace_file(path, file.output.text)
    lock = lock_of(file, calibrated, options, path.with_suffix(".lock"))
    lock.write_rows()
    lock.write()
    return replace(file, path=path)


def make_folder(file: RecipeFile, calibrated: Mapping[str, Calibrated], options: Options, folder: Path) -> Result:
    """Make the result of a recipe in `folder`, with q's that were found before."""
    asked = options
    if calibrated:
        asked = replace(options, lock=lock_of(file, calibrated, options, folder.with_suffix(".lock")))
    return run(file, folder, asked)
