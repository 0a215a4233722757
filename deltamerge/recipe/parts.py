"""Parts of the output, each merged from its own models: what `models`, `slices` and `modules` have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltamerge.recipe.values import Value
from deltamerge.recipe.yaml_source import Loc


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the output that one set of models makes: a slice's layers, a module, or everything.

    loc       its place in the recipe, () for the recipe itself
    module    its module; None without `modules`
    members   its models, as indices of `recipe.models`
    places    where the recipe has them
    ranges    for each member the layers [first, end) that it contributes; None: all tensors under their own names
    base      the base of its deltas, as written
    levels    parameters of the slice, the module and the recipe, the most specific first (mergekit's precedence)
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
        """The number of layers of the output that a slice makes."""
        assert self.ranges is not None
        return self.ranges[0][1] - self.ranges[0][0]


def written(parts: Sequence[Section], loc: Loc) -> Loc:
    """The place in the text of what `loc` names: models of slices and modules are not at models[i]."""
    if loc[:1] != ("models",) or len(loc) == 1 or not parts:
        return loc
    places = [place for part in parts for place in part.places]
    return (*places[int(loc[1])], *loc[2:])
