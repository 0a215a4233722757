"""What a sweep and a search begin with: opened models, and the identity of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltamerge.calibrate.hub_rows import commit
from deltamerge.calibrate.rows import is_of_hub, local_files
from deltamerge.errors import RecipeError
from deltamerge.inspect.search.candidates import Candidates
from deltamerge.io import hub
from deltamerge.io.checkpoint import Checkpoint
from deltamerge.io.seals import seal
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.schema import Recipe
from deltamerge.run.options import Options


def candidates_of(file: TemplateFile, options: Options) -> Candidates:
    """The candidates of a template."""
    pickles = bool(file.template.source.data.get("pickles")) or options.pickles
    return candidates_in(file.path.resolve().parent, options, pickles=pickles)


def candidates_in(folder: Path, options: Options, *, pickles: bool) -> Candidates:
    """Candidates of recipes in `folder`; every model is opened once."""
    opened: dict[str, Checkpoint] = {}

    def opener(reference: str, folder: Path) -> Checkpoint:
        if reference not in opened:
            opened[reference] = hub.open_model(reference, folder, weights=True, pickles=pickles)
        return opened[reference]

    return Candidates(folder, opener, options.planning)


def refuse_strangers(file: TemplateFile, recipes: Iterable[Recipe]) -> None:
    """RecipeError: `study.test` names a fine-tune that no recipe of the template has."""
    some = list(recipes)
    known = {recipe.names[i] for recipe in some for i in recipe.fine_tunes}
    test = some[0].study.test if some[0].study is not None else None
    for name in test if isinstance(test, Mapping) else ():
        if name not in known:
            problem = file.template.source.problem(("study", "test", name), "is no fine-tune here", key=True)
            raise RecipeError(str(file.path), [problem])


def rows_facts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """What the rows of a recipe and its study are, by their files: name, size and time, or a commit of the hub."""
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
