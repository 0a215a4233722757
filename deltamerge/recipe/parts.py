"""What `models`, `slices` and `modules` have in common: parts of the output, each merged from its own models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deltamerge.recipe.values import Value
from deltamerge.recipe.yaml_source import Loc

if TYPE_CHECKING:
    from deltamerge.recipe.schema import Model, Recipe, Slice, SliceSource


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the output that one set of models makes: a slice's layers, a module, or everything.

    loc       where the recipe describes it, () for the recipe itself
    module    its module, None without `modules`
    members   its models, as indices of `recipe.models`; `places` say where the recipe has them
    ranges    of each member the layers [first, end) that it lends; None: all tensors under their own names
    base      the base of its deltas, as written
    levels    parameters of the slice, the module and the recipe: the most specific first (mergekit's precedence)
    """

    loc: Loc
    module: str | None
    members: tuple[int, ...]
    places: tuple[Loc, ...]
    ranges: tuple[tuple[int, int], ...] | None
    base: str | None
    levels: tuple[Mapping[str, Value], ...]

    @property
    def layers(self) -> int:
        """How many layers of the output a slice makes."""
        assert self.ranges is not None
        return self.ranges[0][1] - self.ranges[0][0]


def flatten(recipe: Recipe) -> tuple[tuple[Model, ...], tuple[Part, ...]]:
    """Every model of the recipe in order, once for each place where it stands, and the parts that they make."""
    models: list[Model] = []
    parts: list[Part] = []

    def add(
        loc: Loc, module: str | None, key: str, found: Sequence[Model], base: str | None,
        levels: tuple[Mapping[str, Value], ...], ranges: tuple[tuple[int, int], ...] | None,
    ) -> None:  # fmt: skip
        members = tuple(range(len(models), len(models) + len(found)))
        places = tuple((*loc, key, i) for i in range(len(found)))
        models.extend(found)
        parts.append(Part(loc, module, members, places, ranges, base, levels))

    for loc, name, whole, slices, parameters in _holders(recipe):
        levels = (*parameters, recipe.parameters)
        if whole:
            add(loc, name, "models", whole, recipe.base_model, levels, None)
        for i, one in enumerate(slices):
            base = one.base_model or recipe.base_model
            add(
                (*loc, "slices", i), name, "sources", one.sources, base, (one.parameters, *levels), _ranges(one.sources)
            )
    return tuple(models), tuple(parts)


def written(parts: Sequence[Part], loc: Loc) -> Loc:
    """Where the text has what `loc` names: the models of slices and modules stand elsewhere than at models[i]."""
    if loc[:1] != ("models",) or len(loc) == 1 or not parts:
        return loc
    places = [place for part in parts for place in part.places]
    return (*places[int(loc[1])], *loc[2:])


def _holders(
    recipe: Recipe,
) -> Iterator[tuple[Loc, str | None, Sequence[Model], Sequence[Slice], tuple[Mapping[str, Value], ...]]]:
    """Whatever holds models or slices: its place, module, models, slices and own parameters."""
    if recipe.models or recipe.slices:
        yield (), None, recipe.models, () if recipe.models else recipe.slices, ()
    for name, module in () if recipe.models or recipe.slices else recipe.modules.items():
        yield ("modules", name), name, module.models, () if module.models else module.slices, (module.parameters,)


def _ranges(sources: Sequence[SliceSource]) -> tuple[tuple[int, int], ...]:
    return tuple((source.layer_range[0], source.layer_range[1]) for source in sources)
