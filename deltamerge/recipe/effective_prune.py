"""The effective pruning of one model: its own keys, the recipe's defaults, and what the merge method implies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltamerge.methods.registry import MERGE, PRUNE
from deltamerge.recipe.values import Value, chain
from deltamerge.tensors.names import TASK_HEAD

if TYPE_CHECKING:
    from deltamerge.recipe.prune_keys import CalibratedQ, Protect, Prune
    from deltamerge.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class Pruning:
    """How one model's delta is pruned. Values are evaluated later, per tensor (`recipe.values.value_for`).

    method       name in the table of pruning methods, or "none"
    density      fraction in (0, 1]; None for method none, and where the method's parameters multiply to it unless given
    q            divisor in (0, 1]; None, or a value that evaluates to None: the tensor's density. Unused with `rescale`
    parameters   the method's others
    include, exclude   patterns of tensor names
    """

    method: str
    density: Value | None = None
    q: Value | CalibratedQ | None = None
    rescale: str | None = None
    sampling: str = "uniform"
    group: str | None = None
    parameters: Mapping[str, Value | None] = field(default_factory=dict)
    protect: Protect | None = None
    budget: int | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = (TASK_HEAD,)


def effective_prune(recipe: Recipe, index: int) -> Pruning:
    """The pruning of `recipe.models[index]`; for each key the model's own value comes before the recipe's.

    The method defaults to the one that merge_method implies. The density defaults to mergekit's `parameters.density`
    (the model's, the slice's, then the recipe's), which then no longer trims inside ties; tensors that no filter of a
    density matches are kept whole. Pruning that is only implied applies to every tensor, the task head too, as in
    mergekit.
    """
    model, part, merge = recipe.models[index], recipe.part_of[index], MERGE.get(recipe.method_name or "")
    levels = [prune for prune in (model.prune, recipe.prune) if prune is not None]

    def first(key: str) -> Any:
        return next((value for prune in levels if (value := getattr(prune, key)) is not None), None)

    def value(key: str, *fallbacks: Value | None) -> Value | None:
        return chain(*(getattr(prune, key) for prune in levels), *fallbacks)

    def parameter(key: str) -> Value | None:
        """A parameter that mergekit keeps among the merge's; else the pruning method's default."""
        default = PRUNE[name].parameters[key].default
        if merge is None or key not in merge.parameters or not merge.parameters[key].prunes:
            return value(key, default)
        return value(key, model.parameters.get(key), *(level.get(key) for level in part.levels), default)

    implied = merge.implies_prune if merge is not None else None
    name = first("method") or implied or "none"
    apart = merge is not None and merge.base_apart(part.base)
    if name == "none" or (apart and recipe.is_base(index)):
        return Pruning("none")
    own = model.prune
    method = PRUNE.get(name)
    if method is not None and method.factors:
        # a density meant for other models does not contradict a model's own factors of it
        alone = own is not None and any(getattr(own, key) is not None for key in method.factors)
        density = own.density if own is not None and alone else value("density")
    else:
        density = value("density", *(level.get("density") for level in (model.parameters, *part.levels)))
        if implied or density is not None:
            density = chain(density, 1.0)
    q, rescale = _divisor(part.levels, levels, name)
    exclude = first("exclude")
    heads = () if implied and first("method") is None else (TASK_HEAD,)
    return Pruning(
        method=name,
        density=density,
        q=q,
        rescale=rescale,
        sampling=first("sampling") or "uniform",
        group=first("group") or next(iter(method.groups if method else ()), None),
        parameters={key: parameter(key) for key in (method.own_parameters if method else ())},
        protect=first("protect"),
        budget=first("budget"),
        include=first("include"),
        exclude=heads if exclude is None else exclude,
    )


def _divisor(
    parameters: Sequence[Mapping[str, Value]], levels: list[Prune], name: str
) -> tuple[Value | CalibratedQ | None, str | None]:
    """q and rescale, from the first level that has either; filters of a numeric q fall through to the next level.

    mergekit's `parameters.rescale` comes last: false is q = 1, true is mergekit's rescaling where masks are not random.
    """
    numbers: list[Value] = []
    for prune in levels:
        if not numbers and (prune.rescale or prune.calibrated_q):
            return prune.calibrated_q, prune.rescale
        if prune.number_q is not None:
            numbers.append(prune.number_q)
    importance = name in PRUNE and not PRUNE[name].random
    rescaled = next((level["rescale"] for level in parameters if "rescale" in level), not importance)
    if importance and rescaled and not numbers:
        return None, "l1"
    if importance or (not numbers and not rescaled):
        numbers.append(1.0)
    return chain(*numbers), None
