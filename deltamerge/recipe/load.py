"""Loads recipes: returns recipes that this version can run, or reports every problem of the text at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from pydantic import ValidationError

from deltamerge.errors import Problem, RecipeError
from deltamerge.recipe import checks, documents, messages, moe_checks, open_values, yaml_source
from deltamerge.recipe.expand import Member, members, weighed
from deltamerge.recipe.parts import Section
from deltamerge.recipe.schema import Model, Recipe, Slice, SliceSource
from deltamerge.recipe.series import Series
from deltamerge.recipe.short_form import in_full
from deltamerge.recipe.values import Value
from deltamerge.recipe.yaml_source import Loc, YamlSource
from deltamerge.tensors import patterns

MAX_PROBLEMS = 200  # shown for one recipe


def load(path: Path) -> Recipe:
    """Read a recipe that this version can run. Raises RecipeError with every problem found."""
    return load_all([yaml_source.load(path)])[0]


def loads(text: str, path: str = "recipe.yaml") -> Recipe:
    """Read a recipe from YAML text; `path` is its name in messages. Raises RecipeError as `load` does."""
    return load_all([yaml_source.loads(text, path)])[0]


def parse(read: YamlSource, problems: list[Problem]) -> Recipe:
    """The recipe of a YAML source. Problems of its structure are added to `problems`, and the values at
    fault left out."""
    read = in_full(read)
    data = read.data
    while True:
        try:
            recipe = Recipe.model_validate(data)
        except ValidationError as error:
            errors = error.errors(include_url=False)
            if data is read.data:  # later rounds report only what the first left out
                problems += [messages.problem_of(one, read, Recipe) for one in errors[:MAX_PROBLEMS]]
            data = messages.without(data, map(messages.place_of, errors))
        else:
            models, parts, series = flatten(recipe, read, problems)
            recipe = recipe.model_copy(update={"models": models})
            recipe._source, recipe._parts, recipe._series = read, parts, series
            return recipe


def load_all(reads: Sequence[YamlSource]) -> tuple[Recipe, ...]:
    """The recipes of one file's documents. Raises RecipeError with every problem found in any of them."""
    patterns.start_anew()
    problems: list[Problem] = [problem for read in reads for problem in open_values.refused(read)]
    if problems:
        raise RecipeError(reads[0].path, problems[:MAX_PROBLEMS])
    recipes = [parse(read, problems) for read in reads]
    beyond = list(documents.beyond_bounds(recipes))
    problems += beyond
    for recipe in () if beyond else recipes:
        problems += islice(checks.problems(recipe), MAX_PROBLEMS)
    problems += () if beyond else documents.problems(recipes)
    if problems:
        ordered = sorted(dict.fromkeys(problems), key=lambda problem: (problem.line or 0, problem.column or 0))
        raise RecipeError(reads[0].path, ordered[:MAX_PROBLEMS])
    return tuple(recipes)


def flatten(
    recipe: Recipe, read: YamlSource, problems: list[Problem]
) -> tuple[tuple[Model, ...], tuple[Section, ...], tuple[Series, ...]]:
    """Every model of the recipe in order, once for each place, the parts that they form, and the series among them; a
    pattern, or a range of versions of a chain, is as many models as it stands for. Those at fault are added to
    `problems`."""
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
        several, described = weighed(several, recipe.merge_method, levels, read, problems, is_sum=is_sum)
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
            add(
                (*loc, "slices", i), name, "sources", one.sources, base, (one.parameters, *levels), _ranges(one.sources)
            )
    return tuple(models), tuple(parts), tuple(series)


def _experts(recipe: Recipe) -> tuple[tuple[Model, ...], tuple[Section, ...], tuple[Series, ...]]:
    """The experts of a mixture as models, the shared ones last, and the one part that they form."""
    experts = (*recipe.experts, *recipe.shared_experts)
    names = moe_checks.names(experts)
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
    """Everything that holds models or slices: its place, module, models, slices and own parameters."""
    if recipe.models or recipe.slices:
        yield (), None, recipe.models, () if recipe.models else recipe.slices, ()
    for name, module in () if recipe.models or recipe.slices else recipe.modules.items():
        yield ("modules", name), name, module.models, () if module.models else module.slices, (module.parameters,)


def _ranges(sources: Sequence[SliceSource]) -> tuple[tuple[int, int], ...]:
    return tuple((source.layer_range[0], source.layer_range[1]) for source in sources)
