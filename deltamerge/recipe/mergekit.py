"""`--mergekit-exact`: write mergekit's defaults into a recipe where they differ from ours."""

from __future__ import annotations

import copy
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from deltamerge.errors import RecipeError
from deltamerge.methods.registry import PRUNE
from deltamerge.recipe import yaml_source
from deltamerge.recipe.edits import text_in_full
from deltamerge.recipe.load import MODELS, in_full, load_all
from deltamerge.recipe.prune import effective_prune
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import Loc, Position, YamlSource

L1 = {"rescale": "l1"}


def write_defaults(text: str, recipes: Sequence[Recipe]) -> tuple[str, tuple[Recipe, ...]]:
    """Write mergekit's defaults into `text`. Return the new text and its recipes; their errors name lines of `text`.

    The defaults are `prune: {rescale: l1}` where dare and della leave their divisor open, an unlisted base among the
    models of linear, and `template: base`. RecipeError: a default cannot be inserted.
    """
    path = recipes[0].source.path
    wanted = [recipe.source.data for recipe in recipes]
    defaults = [list(_defaults(recipe)) for recipe in recipes]
    if any(MODELS in loc for several in defaults for loc, _ in several):
        text = text_in_full(text)
    edits: list[tuple[Position, dict[str, Any]]] = []
    for i, read in enumerate(yaml_source.loads_all(text, path)):
        for loc, value in defaults[i]:
            wanted[i] = _inserted(wanted[i], loc, value)
            edits.append((read.locate(loc), value))
    lines = text.splitlines(keepends=True)
    added: list[int] = []
    for (row, column), value in sorted(edits, key=lambda edit: edit[0], reverse=True):
        start, rest = lines[row - 1][: column - 1], lines[row - 1][column - 1 :]
        shown = yaml_source.dumped(value, flow=True, width=float("inf")).strip()
        own = shown[1:-1]
        if rest[0] in "[{":
            lines[row - 1] = f"{start}{rest[0]}{shown if rest[0] == '[' else own}, {rest[1:]}"
        else:
            lines[row - 1] = f"{start}{f'- {shown}' if rest[0] == '-' else own}\n{' ' * len(start)}{rest}"
            added = [row, *(line + 1 for line in added)]
    result = "".join(lines)
    try:
        reads = yaml_source.loads_all(result, path)
    except RecipeError:
        reads = ()
    if [in_full(read).data for read in reads] != wanted:  # an anchor before the place, or an alias used twice
        problem = recipes[0].problem((), "mergekit's defaults cannot be written into this text")
        raise RecipeError(path, [replace(problem, hint="write anchors and aliases out, or leave --mergekit-exact out")])
    return result, load_all([_as_before(read, added) for read in reads])


def _defaults(recipe: Recipe) -> Iterator[tuple[Loc, dict[str, Any]]]:
    """Yield the defaults that a recipe lacks: a place, and a key for its mapping or a first item for its list."""
    if recipe.is_moe:
        return
    method, base = recipe.method, recipe.base_model
    listed = base is not None and any(map(recipe.is_base, range(len(recipe.models))))
    for part in recipe.parts if method.name == "linear" else ():
        if not part.is_slice and part.base is not None and not any(map(recipe.is_base, part.members)):
            if not any("weight" in level for level in part.levels):
                what = "is one more model of linear, as in mergekit, and has no weight"
                hint = "list it among the models with a weight, or leave it out"
                raise RecipeError(recipe.source.path, [recipe.problem(("base_model",), what, hint)])
            yield part.places[0][:-1], {"model": part.base}
            listed = True
    if recipe.template is None and (listed or method.base_apart(base)) and base is not None:
        yield (), {"template": "base"}
    open_ = [i for i in recipe.fine_tunes if _leaves_divisor_open(recipe, i)]
    if open_ and len(open_) == len(recipe.fine_tunes) and recipe.prune is None:
        yield (), {"prune": L1}
    else:
        for at, i in {recipe.place(("models", i)): i for i in open_}.items():  # a series has one place
            yield (at, {"prune": L1}) if recipe.models[i].prune is None else ((*at, "prune"), L1)


def _leaves_divisor_open(recipe: Recipe, index: int) -> bool:
    """Return whether the merge method implies random pruning of a model without q and rescale."""
    implied, prune = recipe.method.implies_prune, effective_prune(recipe, index)
    return prune.method == implied and PRUNE[prune.method].random and prune.q is None and prune.rescale is None


def _inserted(data: Any, loc: Loc, value: dict[str, Any]) -> Any:
    result = copy.deepcopy(data)
    place = result
    for part in loc:
        place = place[part]
    if isinstance(place, list):
        place.insert(0, value)
    else:
        place |= value
    return result


def _as_before(read: YamlSource, added: Sequence[int]) -> YamlSource:
    """Return the source with its line numbers from before the lines `added` were inserted."""

    def before(at: Position) -> Position:
        return at[0] - bisect_left(added, at[0]), at[1]

    return replace(read, positions={loc: (before(of), before(key)) for loc, (of, key) in read.positions.items()})
