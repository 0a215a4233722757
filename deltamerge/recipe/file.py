"""The documents of a recipe file, ordered so that each follows those that it uses."""

from __future__ import annotations

import graphlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge.errors import RecipeError
from deltamerge.recipe import mergekit, yaml_source
from deltamerge.recipe.documents import references
from deltamerge.recipe.load import load_all, loads
from deltamerge.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Document:
    """One recipe of a file; `text` is the recipe.yaml of its result: the documents that it uses, and itself."""

    recipe: Recipe
    text: str

    @property
    def name(self) -> str:
        """The name by which other documents use its result; "" for the output."""
        return self.recipe.name or ""


def documents(path: Path, text: str | None = None, *, mergekit_exact: bool = False) -> tuple[Document, ...]:
    """The documents of the file `path`, or of `text` as if it were that file, ordered by use; the output is the last.

    The output is the document without a name or, if all have one, the last of the file. `mergekit_exact` first writes
    mergekit's defaults into them. RecipeError: a fault of any document, or documents that use each other.
    """
    if text is not None:
        return (Document(loads(text, str(path)), text),)
    whole = yaml_source.read(path)
    recipes = load_all(yaml_source.loads_all(whole, str(path)))
    if mergekit_exact:
        whole, recipes = mergekit.written_out(whole, recipes)
    if len(recipes) == 1:
        return (Document(recipes[0], whole),)
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
    return tuple(Document(by_name[n], whole if n == output.name else _text(n, needs, by_name)) for n in order)


def _text(name: str | None, needs: Mapping[Any, list[Any]], by_name: Mapping[Any, Recipe]) -> str:
    wanted: dict[str | None, None] = {}
    pending = [name]
    while pending:
        wanted |= dict.fromkeys(pending)
        pending = [n for one in pending for n in needs[one] if n not in wanted]
    texts = [by_name[n].source.text.rstrip() for n in reversed(wanted)]
    return "\n---\n".join(texts) + "\n"
