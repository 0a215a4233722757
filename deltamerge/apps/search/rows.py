"""The rows of a study: whose they are, and what identifies them and the models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltamerge.calibrate.rows.hub import commit
from deltamerge.calibrate.rows.rows import is_of_hub, local_files
from deltamerge.errors import RecipeError
from deltamerge.files.seals import seal
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.hashes import facts
from deltamerge.run.options import Options
from deltamerge.run.plans import Planner


def refuse_strangers(file: TemplateFile, recipes: Iterable[Recipe]) -> None:
    """RecipeError: `study.test` names a fine-tune that no recipe of the template has."""
    some = list(recipes)
    known = {recipe.names[i] for recipe in some for i in recipe.fine_tunes}
    test = some[0].study.test if some[0].study is not None else None
    for name in test if isinstance(test, Mapping) else ():
        if name not in known:
            problem = file.template.source.problem(("study", "test", name), "is no fine-tune here", key=True)
            raise RecipeError(str(file.path), [problem])


def input_facts(file: TemplateFile, values: Mapping[Loc, Any], options: Options) -> dict[str, Any]:
    """What a candidate's outcome follows from beside its recipe, by names for people: models' files and rows."""
    one = file.file(values)
    (planned,) = Planner(one, one.path, options).plans()
    given = {name: value for name, value in facts(planned, "").items() if name != "the recipe"}
    return given | _rows_facts(planned.recipe, one.folder)


def _rows_facts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """The rows of a recipe and its study by their files: name, size and time, or a commit of the hub."""
    found: dict[str, Any] = {}
    rows = (recipe.calibration_of(i) for i in recipe.fine_tunes)
    data = [calibration.data for calibration in rows if calibration is not None]
    test = recipe.study.test if recipe.study is not None else None
    data += [test] if isinstance(test, str) else list(test.values()) if test is not None else []
    for one in dict.fromkeys(data):
        found |= {str(path): list(seal(path)) for path in local_files(one, folder)}
        if is_of_hub(one, folder):
            found[one] = commit(one)
    return found
