"""Keep the folder of a sweep or a search, write the best recipe with its lock, and merge a candidate's folder.

One process works in a folder. Results follow from models and rows, whose facts are compared.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamerge.calibrate.rows.files import is_of_hub, local_files
from deltamerge.calibrate.rows.hub import commit
from deltamerge.calibrate.spec import Calibrated
from deltamerge.engine.execute import shared_values
from deltamerge.errors import GO_ON, DeltamergeError, OutputError, RecipeError, interruptible
from deltamerge.errors.shown import shown, some
from deltamerge.files.atomic import PASSING
from deltamerge.files.descriptors import check_folder, lock, writing
from deltamerge.files.hashes import seal
from deltamerge.files.ownership import foreign_entries, refuse_others, replace_own
from deltamerge.files.work_folder import look
from deltamerge.recipe.file import RecipeFile, TemplateFile
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.hashes import describe_inputs, facts
from deltamerge.run.lock import Lock, refuse_foreign_lock
from deltamerge.run.options import Options
from deltamerge.run.plans import Planner
from deltamerge.run.runner import Result, run

MARK = ".deltamerge-study"
WRITTEN = re.compile(
    r"study\.(db(-journal|-wal|-shm)?|json)|(trials|sweep)\.csv|report\.html|results\.jsonl|sweep\.(json|svg)"
    rf"|{PASSING.pattern}",
    re.DOTALL,
)
MADE = re.compile(r"candidate|best|\d+|\.(candidate|best|\d+)\.partial")


@dataclass(frozen=True, slots=True)
class StudyFolder:
    """The folder for results as they come. `name` tells the command and the recipe."""

    path: Path
    name: str = ""

    @classmethod
    def of(cls, recipe: Path, kind: str, out: Path | None) -> StudyFolder:
        """Return the folder `out`, or <recipe>-<kind> beside the recipe."""
        path = out if out is not None else recipe.resolve().parent / f"{recipe.stem}-{kind}"
        return cls(path, f"{kind} {shown(recipe.name)}")

    @contextmanager
    def locked(self, *, force: bool) -> Iterator[Path]:
        """Lock the folder. Make it if it is missing, and empty it with `force`.

        OutputError: it is no folder of a study, another process works in it, or it cannot be written. Without `force`:
        it belongs to another recipe. With `force`: it holds a file that no study wrote. KeyboardInterrupt: the message
        says that the folder stays.
        """
        path, mark = self.path, self.path / MARK
        with ExitStack() as held:
            with writing(path):
                if path.is_dir() and any(path.iterdir()) and not mark.is_file():
                    raise OutputError(f"{path}: holds something else", hint="another name with --out")
                path.mkdir(parents=True, exist_ok=True)
                file = held.enter_context(mark.open("a"))
                if not lock(file.fileno()):
                    raise OutputError(f"{path}: another process works in it", hint="wait, or give --out")
                made_for = mark.read_text("utf-8", "replace").strip()
                if made_for not in ("", self.name) and not force:
                    raise OutputError(f"{path}: is of {shown(made_for)}", hint="another name with --out")
                if force:
                    self._empty()
                if made_for != self.name:
                    file.truncate(0)
                    file.write(f"{self.name}\n")
                    file.flush()
            with interruptible(lambda said: f"{f'{said}; ' if said else ''}finished work is kept in {path}: {GO_ON}"):
                yield path

    def _empty(self) -> None:
        """Remove files of studies. OutputError: there are other files, and nothing was removed."""
        entries = [entry for entry in os.scandir(self.path) if entry.name != MARK]
        if strange := sorted(entry.name for entry in entries if not _is_written(entry)):
            raise OutputError(f"{self.path}: holds files that no study wrote: {some(strange)}", hint="move that away")
        for entry in entries:
            shutil.rmtree(entry) if entry.is_dir(follow_symlinks=False) else os.unlink(entry)


def _is_written(entry: os.DirEntry[str]) -> bool:
    """Return whether a study, or a run that it kept the result of, wrote an entry of its folder, and all inside it."""
    path = Path(entry.path)
    if not entry.is_dir(follow_symlinks=False):
        return entry.is_file(follow_symlinks=False) and WRITTEN.fullmatch(entry.name) is not None
    if not MADE.fullmatch(entry.name):
        return False
    try:
        return look(path) is not None if entry.name.startswith(".") else not foreign_entries(path)
    except (OSError, DeltamergeError):
        return False


def refuse_strangers(file: TemplateFile, recipes: Iterable[Recipe]) -> None:
    """Refuse a `study.test` that names a fine-tune that no recipe of the template has."""
    some = list(recipes)
    known = {recipe.names[i] for recipe in some for i in recipe.fine_tunes}
    test = some[0].study.test if some[0].study is not None else None
    for name in test if isinstance(test, Mapping) else ():
        if name not in known:
            problem = file.template.source.problem(("study", "test", name), "is no fine-tune here", key=True)
            raise RecipeError(str(file.path), [problem])


def input_facts(file: TemplateFile, values: Mapping[Loc, Any], options: Options) -> dict[str, Any]:
    """Return the causes of a candidate's outcome beside its recipe, by names for people: models' files and rows."""
    one = file.file(values)
    (planned,) = Planner(one, one.path, options).plans()
    given = {name: value for name, value in facts(planned, "").items() if name != "the recipe"}
    return given | _rows_facts(planned.recipe, one.folder)


def _rows_facts(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Return the rows of a recipe and its study by their files: name, size and time, or a commit of the hub."""
    found: dict[str, Any] = {}
    kept = [] if recipe.kept is None else [recipe.kept]
    rows = (recipe.calibration_of(i) for i in (*recipe.fine_tunes, *kept))
    data = [calibration.data for calibration in rows if calibration is not None]
    test = recipe.study.test if recipe.study is not None else None
    data += [test] if isinstance(test, str) else list(test.values()) if test is not None else []
    for one in dict.fromkeys(data):
        found |= {str(path): list(seal(path)) for path in local_files(one, folder)}
        if is_of_hub(one, folder):
            found[one] = commit(one)
    return found


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
    """Return the path of the best recipe: beside the template, because it has the same relative paths."""
    return recipe.with_name(f"{recipe.stem}.best.yaml")


def check_best(recipe: Path, *, force: bool, rows: bool = False) -> None:
    """Refuse to replace a best recipe or lock that no search of this recipe wrote, or that somebody has changed.

    `rows`: the rows of the lock too. `force` allows it.
    """
    best = best_path(recipe)
    check_folder(
        best.parent, "the best recipe lies beside RECIPE, for its relative paths: copy RECIPE to another folder"
    )
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
