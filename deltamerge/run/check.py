"""Checks recipes and the headers of their models: the output of a run, or the reason that it cannot run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge.errors import DeltamergeError, InputError, RecipeError
from deltamerge.files.ownership import LOCK_NAME, read_lock
from deltamerge.recipe import checks, yaml_source
from deltamerge.recipe.file import RecipeFile, TemplateFile, read_either, read_sources
from deltamerge.recipe.open_values import Template
from deltamerge.recipe.yaml_source import Loc

if TYPE_CHECKING:
    from deltamerge.run.options import Options

# A YAML file of a folder with one of these is taken for a recipe.
KEYS = frozenset({"base_model", "merge_method", "models", "slices", "modules"})


@dataclass(frozen=True, slots=True)
class RecipeCheck:
    """The check of one recipe: `nbytes` of its output (None offline), and `error` if it cannot run."""

    name: str
    error: DeltamergeError | None = None
    documents: int = 1
    tensors: int | None = None
    nbytes: int | None = None
    is_delta: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def describe(self) -> dict[str, Any]:
        """Return the check as plain data, for JSON."""
        return {
            "recipe": self.name,
            "ok": self.error is None,
            "documents": self.documents,
            "tensors": self.tensors,
            "bytes": self.nbytes,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }


def check_recipe(
    path: Path,
    options: Options | None,
    *,
    mergekit_exact: bool = False,
    settings: Mapping[Loc, str] | None = None,
) -> RecipeCheck:
    """Check the recipe at `path` and the headers of its models. Without `options`, check the recipe alone."""
    try:
        try:
            file = read_either(path, mergekit_exact=mergekit_exact, settings=settings)
        except RecipeError as error:
            raise error if options is None else _with_absent(error, path, settings) from None
        left_open = ""
        if isinstance(file, TemplateFile):
            left_open = in_words(file.template)
            file = _tried(file)
        said = (left_open,) if left_open else ()
        if options is None:
            warnings = tuple(line for one in file.documents for line in checks.warnings(one.recipe))
            return RecipeCheck(str(path), documents=len(file.documents), warnings=warnings, notes=said)
        from deltamerge.outputs.output import output_of
        from deltamerge.run.plans import make_plans

        plan = make_plans(file, options=options)[-1]
    except DeltamergeError as error:
        return RecipeCheck(str(path), error)
    return RecipeCheck(
        str(path),
        None,
        len(file.documents),
        len(plan.outputs),
        output_of(plan).expected_bytes(plan),
        plan.recipe.output.rules.patches,
        plan.warnings,
        (*said, *plan.notes),
    )


def _with_absent(error: RecipeError, path: Path, settings: Mapping[Loc, str] | None) -> RecipeError:
    """Return a recipe's error, with its missing models added in the order of the file."""
    if path == yaml_source.STDIN:
        return error
    try:
        sources = read_sources(path, settings)
    except DeltamergeError:
        return error
    from deltamerge.run.plans import absent_models

    known = {(one.line, one.location) for one in error.problems}
    missing = [one for one in absent_models(sources, path.resolve().parent) if (one.line, one.location) not in known]
    problems = sorted([*error.problems, *missing], key=lambda one: (one.line or 0, one.column or 0))
    return RecipeError(error.path, problems)


def _tried(file: TemplateFile) -> RecipeFile:
    """Return the first recipe of a template. RecipeError: one of its examples is no valid recipe."""
    first, *others = file.template.examples()
    for values in others:
        file.recipe(values)
    return file.file(first)


def in_words(template: Template) -> str:
    """Return the open values of a template in a sentence."""
    if template.sweeps:
        names = " × ".join(f"{axis.name} ({len(axis.values)})" for axis in template.sweeps)
        return f"`deltamerge sweep` tries {template.count} recipes: {names}; checked and planned with the first values"
    names = ", ".join(axis.name for axis in template.ranges)
    count = sum(len(axis.keys) for axis in template.ranges)
    return f"`deltamerge search` looks for {count} values: {names}; planned with the values of the first trial"


def recipes_in(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the given recipes, and the recipes in each given folder, sorted by name.

    Copies that runs left in their outputs are skipped, because their paths lead elsewhere. InputError: a folder has no
    recipe.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        files = sorted(p for p in path.rglob("*.y*ml") if p.suffix in (".yaml", ".yml") and not _is_hidden(p, path))
        found = [file for file in files if not (file.parent != path and _is_copy(file)) and _is_recipe(file)]
        if not found:
            raise InputError(f"{path}: no recipe in this folder", hint="a .yaml file with models, or slices")
        yield from found


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _is_copy(path: Path) -> bool:
    """Return whether a file is a run's copy of its recipe: a lock of outputs lies beside it."""
    lock = path.parent / LOCK_NAME
    try:
        return path.name == "recipe.yaml" and lock.is_file() and bool(read_lock(lock).get("outputs"))
    except DeltamergeError:
        return False


def _is_recipe(path: Path) -> bool:
    """Return whether a file looks like a recipe. A file that is not YAML counts, so that its fault is reported."""
    try:
        return any(KEYS & one.data.keys() for one in yaml_source.loads_all(yaml_source.read(path), str(path)))
    except DeltamergeError:
        return True
