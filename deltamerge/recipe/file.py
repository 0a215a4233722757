"""The documents of a recipe file, each after the documents that it uses."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamerge.errors import InputError, RecipeError
from deltamerge.recipe import yaml_source
from deltamerge.recipe.checks import references
from deltamerge.recipe.load import load_all
from deltamerge.recipe.open_values import Template, as_yaml, is_open, template_of
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import Loc, YamlSource

FROM_STDIN = "run -"


@dataclass(frozen=True, slots=True)
class Document:
    """One recipe of a file. `text` is the recipe.yaml of its result: this document after the documents that it uses."""

    recipe: Recipe
    text: str

    @property
    def name(self) -> str:
        """The name by which other documents use its result; "" for the output."""
        return self.recipe.name or ""


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe file: its path, and its documents, each after the documents that it needs; the output is the last.

    Relative references start at the folder of `path`. The output's name derives from it, and the lock lies beside it. A
    recipe that is no file has the path that a file would have. `made_for` is the command or the source (stdin, the hub)
    of such a recipe, and "" for a file.
    """

    path: Path
    documents: tuple[Document, ...]
    made_for: str = ""

    @property
    def output(self) -> Document:
        """The document whose result is the file's."""
        return self.documents[-1]

    @property
    def folder(self) -> Path:
        """The folder where relative references start."""
        return self.path.resolve().parent

    @property
    def lock_path(self) -> Path:
        """The path of the lock beside the recipe, which `deltamerge calibrate` writes and `--locked` reads."""
        return self.path.with_suffix(".lock")


def read_recipe(path: Path, *, mergekit_exact: bool = False, settings: Mapping[Loc, str] | None = None) -> RecipeFile:
    """Read the recipe file at `path` (`-`: stdin), with `settings` (place -> YAML value) written into each document.

    The output is the document without a name or, if all have names, the last of the file. `mergekit_exact` sets
    `mergekit: true` and writes mergekit's defaults out. RecipeError: a document is faulty, or documents use each other.
    InputError: a setting cannot be written at its place.
    """
    file = read_text(*_text_of(path, mergekit_exact, settings))
    return replace(file, made_for=FROM_STDIN) if path == yaml_source.STDIN else file


def _text_of(path: Path, mergekit_exact: bool, settings: Mapping[Loc, str] | None) -> tuple[str, Path]:
    """Return the text of a recipe file with the settings from outside, and its path."""
    whole, settings = yaml_source.read(path), dict(settings or {})
    if path == yaml_source.STDIN:  # as if it lay in the current folder
        path = Path("recipe.yaml")
    if mergekit_exact:
        settings[("mergekit",)] = "true"
    if settings:
        from deltamerge.recipe.edits import set_keys

        whole = set_keys(whole, settings, str(path))
    return whole, path


def read_text(whole: str, path: Path) -> RecipeFile:
    """Return the recipe file with the text `whole`, as if it lay at `path`. RecipeError: as for `read_recipe`."""
    return _recipe(whole, path, yaml_source.loads_all(whole, str(path)))


def _recipe(whole: str, path: Path, sources: Sequence[YamlSource]) -> RecipeFile:
    """Return the recipe file with the text `whole` and the documents `sources`."""
    recipes = load_all(sources)
    if any(recipe.mergekit for recipe in recipes):
        from deltamerge.recipe import mergekit

        whole, recipes = mergekit.write_defaults(whole, recipes)
    if len(recipes) == 1:
        return RecipeFile(path, (Document(recipes[0], whole),))
    output = next((recipe for recipe in recipes if recipe.name is None), recipes[-1])
    by_name = {recipe.name: recipe for recipe in recipes}
    needs = {name: [n for n in by_name if n in references(recipe) and n != name] for name, recipe in by_name.items()}
    try:
        order = list(graphlib.TopologicalSorter(needs).static_order())
    except graphlib.CycleError as error:
        circle = [str(name) for name in error.args[1]]
        problem = by_name[circle[0]].problem(("name",), f"documents need each other: {' → '.join(circle)}")
        raise RecipeError(str(path), [problem]) from None
    order = [*(name for name in order if name != output.name), output.name]
    texts = {name: whole if name == output.name else _text(name, needs, by_name) for name in order}
    return RecipeFile(path, tuple(Document(by_name[name], text) for name, text in texts.items()))


@dataclass(frozen=True, slots=True)
class TemplateFile:
    """A recipe file with open values: its path, its text with settings from outside, and the values."""

    path: Path
    text: str
    template: Template

    def recipe(self, values: Mapping[Loc, Any]) -> Recipe:
        """Return the recipe with values in their places. RecipeError: any fault of it, at its place in the file."""
        (recipe,) = load_all([self.template.fill(values)])
        return self.file(values).output.recipe if recipe.mergekit else recipe

    def file(self, values: Mapping[Loc, Any]) -> RecipeFile:
        """Return the recipe with these values as a recipe file with plain text, which is read again."""
        from deltamerge.recipe.edits import set_keys

        return read_text(set_keys(self.text, as_yaml(values), str(self.path)), self.path)


def read_sources(path: Path, settings: Mapping[Loc, str] | None = None) -> tuple[YamlSource, ...]:
    """Return the YAML of the recipe file at `path`, with `settings`, unchecked. RecipeError: it is not YAML."""
    whole, path = _text_of(path, False, settings)
    return yaml_source.loads_all(whole, str(path))


def read_template(path: Path, settings: Mapping[Loc, str] | None = None) -> TemplateFile:
    """Read the recipe file at `path`, which may leave values open, with `settings` written into it.

    RecipeError: an open value is malformed. InputError: the file has several documents.
    """
    whole, path = _text_of(path, False, settings)
    return _template(whole, path, yaml_source.loads_all(whole, str(path)))


def read_either(
    path: Path, *, mergekit_exact: bool = False, settings: Mapping[Loc, str] | None = None
) -> RecipeFile | TemplateFile:
    """Return `read_template` if the recipe leaves values open, otherwise `read_recipe`."""
    whole, path = _text_of(path, mergekit_exact, settings)
    sources = yaml_source.loads_all(whole, str(path))
    return (_template if any(map(is_open, sources)) else _recipe)(whole, path, sources)


def _template(whole: str, path: Path, sources: Sequence[YamlSource]) -> TemplateFile:
    if len(sources) > 1:
        raise InputError(f"{path}: has several documents, and values are left open in one", hint="run the others first")
    return TemplateFile(path, whole, template_of(sources[0]))


def _text(name: str | None, needs: Mapping[Any, list[Any]], by_name: Mapping[Any, Recipe]) -> str:
    wanted: dict[str | None, None] = {}
    pending = [name]
    while pending:
        wanted |= dict.fromkeys(pending)
        pending = [n for one in pending for n in needs[one] if n not in wanted]
    texts = [by_name[n].source.text.rstrip() for n in reversed(wanted)]
    return "\n---\n".join(texts) + "\n"
