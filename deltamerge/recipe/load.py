"""Loads recipes that this version can run, or reports every problem of the text at once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from deltamerge.errors import InputError, Problem, RecipeError
from deltamerge.formats.components import RUNNING_SUM
from deltamerge.methods.registry import MERGE
from deltamerge.recipe import checks, open_values, yaml_source
from deltamerge.recipe.problems import place_of, problem_of, without
from deltamerge.recipe.schema import Model, Recipe, Section, Slice, SliceSource, model_name
from deltamerge.recipe.series import Matches, Series, find, running, shares
from deltamerge.recipe.values import NO_LAYERS, Value
from deltamerge.recipe.yaml_source import Loc, Position, YamlSource
from deltamerge.tensors import patterns

if TYPE_CHECKING:
    from deltamerge.formats.components import RunningSum

MODELS, TOKENIZER, SOURCE = "models", "tokenizer", "source"
MAX_PROBLEMS = 200  # shown for one recipe


def load(path: Path) -> Recipe:
    """Read a recipe that this version can run. Raises RecipeError with every problem found."""
    return load_all([yaml_source.load(path)])[0]


def loads(text: str, path: str = "recipe.yaml") -> Recipe:
    """Read a recipe from YAML text; `path` is its name in messages. Raises RecipeError as `load` does."""
    return load_all([yaml_source.loads(text, path)])[0]


def in_full(read: YamlSource) -> YamlSource:
    """Return a document with every `models` as a list of mappings, and its `tokenizer` as a mapping.

    New values get the position of their short form.
    """
    data: dict[str, Any] = dict(read.data)
    positions = dict(read.positions)
    for loc, holder in _with_models(data):
        given, at = holder.get(MODELS), (*loc, MODELS)
        if isinstance(given, str | dict):
            given = [given]
            positions |= _moved(read, at, 0)
        if isinstance(given, list):
            holder[MODELS] = [{"model": one} if isinstance(one, str) else one for one in given]
            items = [i for i, one in enumerate(given) if isinstance(one, str) and (*at, i) in positions]
            positions |= {(*at, i, "model"): positions[*at, i] for i in items}
    if isinstance(data.get(TOKENIZER), str):
        data[TOKENIZER] = {SOURCE: data[TOKENIZER]}
        if (TOKENIZER,) in positions:
            positions[TOKENIZER, SOURCE] = positions[TOKENIZER,]
    return replace(read, data=data, positions=positions)


def _with_models(data: dict[str, Any]) -> Iterator[tuple[Loc, dict[str, Any]]]:
    """Yield the mappings that have models: the recipe, and copies of its modules."""
    yield (), data
    if isinstance(data.get("modules"), dict):
        data["modules"] = {name: dict(one) if isinstance(one, dict) else one for name, one in data["modules"].items()}
        yield from ((("modules", name), one) for name, one in data["modules"].items() if isinstance(one, dict))


def _moved(read: YamlSource, at: Loc, index: int) -> dict[Loc, tuple[Position, Position]]:
    """Return the positions at and below a place, moved into an item of a list at that place."""
    n = len(at)
    return {(*at, index, *loc[n:]): position for loc, position in read.positions.items() if loc[:n] == at}


def parse(read: YamlSource, problems: list[Problem]) -> Recipe:
    """Return the recipe of a YAML source. Add problems of its structure to `problems`, and leave faulty values out."""
    read = in_full(read)
    data = read.data
    while True:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            if data is read.data:  # later rounds report only faults that the first did not reach
                problems += [problem_of(one, read, Recipe) for one in errors[:MAX_PROBLEMS]]
            data = without(data, map(place_of, errors))
        else:
            models, parts, series = flatten(recipe, read, problems)
            recipe = recipe.model_copy(update={"models": models})
            recipe._source, recipe._parts, recipe._series = read, parts, series
            return recipe


def load_all(reads: Sequence[YamlSource]) -> tuple[Recipe, ...]:
    """Return the recipes of one file's documents. Raises RecipeError with every problem found in any of them."""
    patterns.start_anew()
    problems: list[Problem] = [problem for read in reads for problem in open_values.refusals(read)]
    if problems:
        raise RecipeError(reads[0].path, problems[:MAX_PROBLEMS])
    recipes = [parse(read, problems) for read in reads]
    beyond = list(checks.beyond_bounds(recipes))
    problems += beyond
    for recipe in () if beyond else recipes:
        problems += islice(checks.problems(recipe), MAX_PROBLEMS)
    problems += () if beyond else checks.problems_across(recipes)
    if problems:
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line or 0, problem.column or 0))
        raise RecipeError(reads[0].path, ordered[:MAX_PROBLEMS])
    return tuple(recipes)


def flatten(
    recipe: Recipe, read: YamlSource, problems: list[Problem]
) -> tuple[tuple[Model, ...], tuple[Section, ...], tuple[Series, ...]]:
    """Return every model of the recipe in order, once for each place; their parts; and their series.

    A pattern, or a range of versions of a chain, is replaced by its models. Faults go to `problems`.
    """
    if recipe.is_moe:
        return _experts(recipe)
    models: list[Model] = []
    parts: list[Section] = []
    series: list[Series] = []
    is_sum = recipe.output.rules.accumulates
    folder = Path(read.path).resolve().parent

    def add(
        loc: Loc, module: str | None, key: str, found: Sequence[Model], base: str | None,
        levels: tuple[Mapping[str, Value], ...], ranges: tuple[tuple[int, int], ...] | None,
    ) -> None:  # fmt: skip
        several: list[Member] = []
        for i, model in enumerate(found):
            several += members(model, i, (*loc, key, i), folder, read, problems)
        several, described = weigh(several, recipe.merge_method, levels, read, problems, is_sum=is_sum)
        series.extend(described)
        indices = tuple(range(len(models), len(models) + len(several)))
        places = tuple(member.place for member in several)
        if ranges is not None:
            ranges = tuple(ranges[member.item] for member in several)
        models.extend(member.model for member in several)
        parts.append(Section(loc, module, indices, places, ranges, base, levels))

    for loc, name, whole, slices, parameters in _holders(recipe):
        levels = (*parameters, recipe.parameters)
        if whole:
            add(loc, name, "models", whole, recipe.base_model, levels, None)
        for i, one in enumerate(slices):
            base = one.base_model or recipe.base_model
            at = (*loc, "slices", i)
            ranges = _ranges(one.sources, at, read, problems, whole=name is not None and len(slices) == 1)
            add(at, name, "sources", one.sources, base, (one.parameters, *levels), ranges)
    return tuple(models), tuple(parts), tuple(series)


def _experts(recipe: Recipe) -> tuple[tuple[Model, ...], tuple[Section, ...], tuple[Series, ...]]:
    """Return the experts of a mixture as models, shared experts last, and the single part that they form."""
    experts = (*recipe.experts, *recipe.shared_experts)
    names = checks.expert_names(experts)
    models = tuple(
        Model.model_validate({"model": one.reference, "name": None if name == one.reference else name})
        for one, name in zip(experts, names, strict=True)
    )
    places: list[Loc] = [("experts", i) for i in range(len(recipe.experts))]
    places += [("shared_experts", i) for i in range(len(recipe.shared_experts))]
    members = tuple(range(len(models)))
    return models, (Section((), None, members, tuple(places), None, recipe.base_model, (recipe.parameters,)),), ()


def _holders(
    recipe: Recipe,
) -> Iterator[tuple[Loc, str | None, Sequence[Model], Sequence[Slice], tuple[Mapping[str, Value], ...]]]:
    """Yield the recipe's or each module's models and slices: place, module, models, slices and own parameters."""
    if recipe.models or recipe.slices:
        yield (), None, recipe.models, () if recipe.models else recipe.slices, ()
    for name, module in () if recipe.models or recipe.slices else recipe.modules.items():
        yield ("modules", name), name, module.models, () if module.models else module.slices, (module.parameters,)


def _ranges(
    sources: Sequence[SliceSource], at: Loc, read: YamlSource, problems: list[Problem], *, whole: bool
) -> tuple[tuple[int, int], ...] | None:
    """Return the layers of each source. None: all layers, as every range of a module's only slice is [0, 0]."""
    ranges = tuple((source.layer_range[0], source.layer_range[1]) for source in sources)
    if whole and set(ranges) == {NO_LAYERS}:
        return None
    for i, layers in enumerate(ranges):
        if layers == NO_LAYERS:
            hint = "only in the single slice of a module, where all sources have it, [0, 0] means the whole module"
            problems.append(read.problem((*at, "sources", i, "layer_range"), "[0, 0] has no layers", hint))
    return ranges


@dataclass(frozen=True, slots=True)
class Member:
    """A model of a recipe: its item's number and place, and its series, of `of` models before the window."""

    model: Model
    item: int
    place: Loc
    found: Matches | None = None
    of: int = 1
    summed: RunningSum | None = None


def _summed(folder: Path) -> RunningSum | None:
    """Return the running sum in a folder. None: it holds none."""
    if not os.path.isfile(folder / RUNNING_SUM):
        return None
    from deltamerge.formats.components import read_running_sum

    return read_running_sum(folder)


def members(
    model: Model, item: int, place: Loc, folder: Path, read: YamlSource, problems: list[Problem]
) -> list[Member]:
    """Return the models that an item of a recipe in `folder` stands for. Faults go to `problems`."""
    try:
        versions = _versions(model.model, folder)
        found = find(model.model, folder) if versions is None else Matches(tuple(versions))
        summed = _summed(folder / model.model) if found is None else None
    except InputError as error:
        problems.append(read.problem((*place, "model"), str(error), error.hint))
        return [Member(model, item, place)]
    problems += _faults(model, found, place, read)
    if found is None:
        return [Member(model, item, place, summed=summed)]
    last = found.references[-(model.window or 0) :]
    named = {} if model.name is None else {one: f"{model.name}:{one.rpartition('/')[2]}" for one in last}
    models = [model.model_copy(update={"model": one, "name": named.get(one)}) for one in last]
    return [Member(one, item, place, found, len(found.references)) for one in models]


def _versions(reference: str, folder: Path) -> list[str] | None:
    """Return the versions of a chain that a reference with a range stands for. None: it has no range."""
    if ".." not in reference.rpartition("/")[2]:
        return None
    from deltamerge.models.chain.folder import expand

    return expand(reference, folder)


def _faults(model: Model, found: Matches | None, place: Loc, read: YamlSource) -> Iterator[Problem]:
    """Check that an item that is no series has no keys of a series, and that `decay` stands beside `ema`."""
    if found is None and model.window is not None:
        hint = "model: run/step-*, with a * for the numbers"
        yield read.problem((*place, "window"), "is of a series of models, this is one", hint, key=True)
    if (model.decay is not None) != (model.schedule == "ema"):
        if model.decay is None:
            message = "ema needs decay, the factor of the average so far"
            yield read.problem((*place, "schedule"), message, "decay: 0.9")
        else:
            yield read.problem((*place, "decay"), "is of schedule: ema", "schedule: ema", key=True)


def weigh(
    several: Sequence[Member],
    merge_method: str | None,
    levels: Sequence[Mapping[str, Value]],
    read: YamlSource,
    problems: list[Problem],
    *,
    is_sum: bool,
) -> tuple[list[Member], list[Series]]:
    """Return the models of one part with the weights of their schedules, and their series.

    Weights add up to the item's own weight. There are two exceptions, in a merge that divides by the sum of its
    weights. A series alone, and models of a running sum (`is_sum`), get the weights of `series.running`, which no later
    checkpoint changes. Models after a running sum continue its weights.
    """
    summed = next((member.summed for member in several if member.summed is not None), None)
    by_item: dict[int, list[Member]] = {}
    for member in several:
        by_item.setdefault(member.item, []).append(member)
    items = [own[-1] for own in by_item.values() if own[0].summed is None]
    method = MERGE.get(merge_method or "")
    given = any("weight" in level for level in levels)
    normalized = _normalized(method, levels)
    made: list[Member] = []
    described: list[Series] = []
    if summed is not None:
        problems += _unlike(summed, items, several, read)
    start = 0 if summed is None else len(summed.models)
    for own in by_item.values():
        first = own[0]
        schedule: str | None = first.model.schedule
        decay = first.model.decay
        if first.summed is None and summed is not None and schedule is None and not given:
            schedule, decay = summed.schedule, summed.decay
        default = (first.found is not None or is_sum) and not given and "weight" not in first.model.parameters
        schedule = schedule or ("constant" if default else None)
        takes = method is None or "weight" in method.parameters
        if first.summed is not None:
            schedule = None
            own = [_with_weight(first, 1.0)] if takes and "weight" not in first.model.parameters else own
        if schedule == "ema" and decay is None:  # reported before
            schedule = "constant"
        weights: tuple[float, ...] | None = None
        part: tuple[float, ...] = ()
        if schedule is not None and takes:
            part = shares(schedule, len(own), decay)
            alone = normalized and (len(items) == 1 or summed is not None or is_sum)
            weights = running(schedule, start, len(own), decay) if alone else None
            if weights is None and summed is not None and schedule == "ema":
                message = f"more than float32's range allows follow a running sum with decay {decay:g}"
                problems.append(read.problem(first.place, message, "average them anew, without the sum"))
            start += len(own)
            weights = weights or part
            scale = first.model.parameters.get("weight", 1.0)
            if not isinstance(scale, bool | int | float):
                at = (*first.place, "parameters", "weight")
                problems.append(
                    read.problem(at, "must be one number beside a schedule", "the schedule is of all layers")
                )
                scale = 1.0
            own = [_with_weight(member, float(scale) * weight) for member, weight in zip(own, weights, strict=True)]
        elif first.model.schedule is not None and method is not None:
            at = (*first.place, "schedule")
            problems.append(
                read.problem(at, f"gives weights, {method.name} has none", "merge_method: linear", key=True)
            )
        made += own
        if first.found is not None:
            names = tuple(model_name(member.model) for member in own)
            written = _read_item(read, first.place) or first.model.model
            described.append(Series(written, names, first.of, schedule, decay, part, first.found))
    return made, described


def _read_item(read: YamlSource, place: Loc) -> str | None:
    """Return the reference of an item as written."""
    value: Any = read.data
    for key in (*place, "model"):
        try:
            value = value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value if isinstance(value, str) else None


def _with_weight(member: Member, weight: float) -> Member:
    parameters = {**member.model.parameters, "weight": weight}
    return replace(member, model=member.model.model_copy(update={"parameters": parameters}))


def _normalized(method: Any, levels: Sequence[Mapping[str, Value]]) -> bool:
    """Return whether a merge divides by the sum of its weights, in every tensor."""
    if method is None or "normalize" not in method.parameters:
        return False
    given = next((level["normalize"] for level in levels if "normalize" in level), None)
    return given == 1 if given is not None else bool(method.parameters["normalize"].default_for(1))


def _unlike(
    summed: RunningSum, items: Sequence[Member], several: Sequence[Member], read: YamlSource
) -> Iterator[Problem]:
    """Check that the models after a running sum can be added to it."""
    known = set(summed.models)
    for member in several:
        if member.summed is None and model_name(member.model) in known:
            message = f"{model_name(member.model)} is in the running sum already"
            yield read.problem((*member.place, "model"), message, "name only the checkpoints that come after")
    for member in items:
        model, ours = member.model, (summed.schedule, summed.decay)
        if model.window is not None:
            yield read.problem(
                (*member.place, "window"),
                "a window leaves out models that the running sum has",
                "average the window anew, without the sum",
                key=True,
            )
        elif model.schedule is not None and (model.schedule, model.decay) != ours:
            how = summed.schedule + (f" {summed.decay:g}" if summed.decay else "")
            message = f"the running sum is of schedule {how}"
            yield read.problem((*member.place, "schedule"), message, "leave schedule and decay out")
