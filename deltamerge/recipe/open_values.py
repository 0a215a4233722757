"""Values that a recipe leaves open, `{sweep: [0.1, 0.01]}` and `{search: [0, 1]}`, and the recipes that result.

An open value may stand anywhere in a single document, except in `study`. Putting values in the places makes a recipe.
The JSON schema allows an open value wherever it allows a number, a method or another single value.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deltamerge.errors import Problem, RecipeError
from deltamerge.recipe import yaml_source
from deltamerge.recipe.yaml_source import Loc, YamlSource, place

SWEEP, SEARCH = "sweep", "search"
RANGE_KEYS = frozenset({SEARCH, "log", "step", "start", "groups", "gradient"})
MOST_POINTS = 10_000
MOST_AXES = 1_000


@dataclass(frozen=True, slots=True)
class Sweep:
    """Values of a place that are all tried, with their names in tables."""

    loc: Loc
    labels: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def name(self) -> str:
        """The place, as text."""
        return place(self.loc)


@dataclass(frozen=True, slots=True)
class Range:
    """Values of a place among which the best is searched.

    low, high   bounds of a number; a whole number if both bounds and the step are whole
    log         search the logarithm
    step        search in steps; the last step ends at `high`
    choices     the possible values, instead of bounds
    start       value of the first trial; by default the middle, or the first choice
    groups      number of groups of neighbouring layers, each with its own number
    gradient    count of numbers that are interpolated over the layers
    """

    loc: Loc
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()
    start: Any = None
    groups: int = 0
    gradient: int = 0

    @property
    def name(self) -> str:
        """The place, as text."""
        return place(self.loc)

    @property
    def is_whole(self) -> bool:
        """Whether the numbers are integers."""
        return all(isinstance(x, int) for x in (self.low, self.high, self.step))

    @property
    def _spread(self) -> int:
        return self.groups or self.gradient

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of its numbers in a study."""
        return tuple(f"{self.name}[{i}]" for i in range(self._spread)) if self._spread else (self.name,)

    @property
    def first(self) -> Any:
        """The number or choice of the first trial."""
        if self.start is not None:
            return self.start
        if self.choices:
            return self.choices[0]
        middle = math.sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2
        if self.step is not None:
            middle = self.low + round((middle - self.low) / self.step) * self.step
        return round(middle) if self.is_whole else middle

    def value(self, found: Mapping[str, Any], layers: int) -> Any:
        """Return the value for the numbers `found`, for a model of `layers` layers."""
        numbers = [found[key] for key in self.keys]
        if not self._spread:
            return numbers[0]
        if self.gradient:
            return numbers
        return [numbers[i * self.groups // layers] for i in range(layers)]


Axis = Sweep | Range


@dataclass(frozen=True, slots=True)
class Template:
    """A recipe with open values. `source` is its text as read, with the settings of `--set`."""

    source: YamlSource
    sweeps: tuple[Sweep, ...]
    ranges: tuple[Range, ...]

    @property
    def points(self) -> Iterator[tuple[tuple[str, ...], dict[Loc, Any]]]:
        """Every combination of the swept values: their labels, and the values by place."""
        for chosen in itertools.product(*(range(len(axis.values)) for axis in self.sweeps)):
            pairs = list(zip(self.sweeps, chosen, strict=True))
            yield tuple(axis.labels[i] for axis, i in pairs), {axis.loc: axis.values[i] for axis, i in pairs}

    def examples(self) -> Iterator[dict[Loc, Any]]:
        """Yield values that reveal every fault: all first values, each other value once, both ends of ranges."""
        first = {axis.loc: axis.values[0] for axis in self.sweeps}
        yield first | self.values(self.start(), 1)
        for axis in self.sweeps:
            yield from (first | {axis.loc: value} for value in axis.values[1:])
        for found in self.ends():
            yield first | self.values(found, 1)

    def ends(self) -> Iterator[dict[str, Any]]:
        """Yield both bounds of every number, and every choice, with the other values at their start."""
        for axis in self.ranges:
            for value in axis.choices or (axis.low, axis.high):
                yield self.start() | dict.fromkeys(axis.keys, value)

    def describe(self) -> dict[str, Any]:
        """Return the open values as `deltamerge plan --json` prints them."""
        if self.sweeps:
            return {"sweep": {axis.name: list(axis.labels) for axis in self.sweeps}, "points": self.count}
        return {"search": [key for axis in self.ranges for key in axis.keys]}

    @property
    def count(self) -> int:
        """The number of points."""
        return math.prod(len(axis.values) for axis in self.sweeps)

    def start(self) -> dict[str, Any]:
        """Return the numbers of the first trial, by their names in a study."""
        return {key: axis.first for axis in self.ranges for key in axis.keys}

    def values(self, found: Mapping[str, Any], layers: int) -> dict[Loc, Any]:
        """Return the values for the numbers `found`, by place."""
        return {axis.loc: axis.value(found, layers) for axis in self.ranges}

    def fill(self, values: Mapping[Loc, Any]) -> YamlSource:
        """Return the source with values in their places. Problems keep their positions in the text."""
        data = copy.deepcopy(self.source.data)
        for loc, value in values.items():
            holder = data
            for part in loc[:-1]:
                holder = holder[part]
            holder[loc[-1]] = value
        return replace(self.source, data=data)


def template_of(source: YamlSource) -> Template:
    """Return the open values of a document. RecipeError: one is malformed."""
    problems: list[Problem] = []
    axes = list(_axes(source, problems))
    sweeps = tuple(axis for axis in axes if isinstance(axis, Sweep))
    ranges = tuple(axis for axis in axes if isinstance(axis, Range))
    if sweeps and ranges:
        problems.append(source.problem(ranges[0].loc, "is to be searched, and others to be swept", "one of the two"))
    if len(axes) > MOST_AXES:
        problems.append(source.problem((), f"more than {MOST_AXES} open values"))
    elif (count := math.prod(len(axis.values) for axis in sweeps)) > MOST_POINTS:
        problems.append(source.problem(sweeps[0].loc, f"{count:,} combinations, more than {MOST_POINTS:,}"))
    if problems:
        raise RecipeError(source.path, problems)
    return Template(source, sweeps, ranges)


def refusals(source: YamlSource) -> Iterator[Problem]:
    """Yield a problem at each open value of a recipe that must give one result."""
    name = Path(source.path).name
    for loc, kind in _open(source.data, ()):
        what = "search bounds" if kind == "search" else "several values"
        fixed = f"fix it with --set {'.'.join(map(str, loc))}=VALUE"
        yield source.problem(loc, f"has {what}, not one value", f"deltamerge {kind} {name}, or {fixed}")


def is_open(source: YamlSource) -> bool:
    """Return whether a document leaves values open."""
    return next(_open(source.data, ()), None) is not None


def kind_of(value: Any) -> str | None:
    """Return "sweep" or "search" for an open value, otherwise None. `q: {search: grid}` is no open value."""
    if isinstance(value, dict):
        if SWEEP in value:
            return SWEEP
        if isinstance(value.get(SEARCH), list | dict):
            return SEARCH
    return None


def _open(value: Any, loc: Loc) -> Iterator[tuple[Loc, str]]:
    """Yield the places of all open values that are not inside another."""
    if loc and (kind := kind_of(value)) is not None:
        yield loc, kind
        return
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, one in inner:
        if isinstance(one, dict | list) and (*loc, part) != ("study",):
            yield from _open(one, (*loc, part))


def _axes(source: YamlSource, problems: list[Problem]) -> Iterator[Axis]:
    for loc, kind in _open(source.data, ()):
        value: Any = source.data
        for part in loc:
            value = value[part]
        found = (_sweep if kind == SWEEP else _range)(loc, value)
        if isinstance(found, str):
            problems.append(source.problem(loc, found, HINTS[kind]))
        elif inner := [name for name, _ in _open(value[kind], ())]:
            problems.append(source.problem((*loc, kind, *inner[0]), "an open value inside another", HINTS[kind]))
        else:
            yield found


HINTS = {
    SWEEP: "{sweep: [0.1, 0.01]}, or {sweep: {NAME: value, …}}",
    SEARCH: "{search: [0, 1]}, with log, step, start, groups or gradient; or {search: {choices: [dare, magnitude]}}",
}


def _sweep(loc: Loc, value: Mapping[str, Any]) -> Sweep | str:
    wanted = value[SWEEP]
    if more := [key for key in value if key != SWEEP]:
        return f"has the key {more[0]!r} beside sweep"
    if not isinstance(wanted, list | dict) or not wanted:
        return "sweep needs a list of values, or a mapping of names to values"
    values = list(wanted.values() if isinstance(wanted, dict) else wanted)
    labels = list(wanted) if isinstance(wanted, dict) else [label(one) for one in values]
    if len(set(labels)) < len(labels):
        return "sweep has the same value twice"
    return Sweep(loc, tuple(labels), tuple(values))


def _range(loc: Loc, value: Mapping[str, Any]) -> Range | str:
    wanted = value[SEARCH]
    if more := [key for key in value if key not in RANGE_KEYS]:
        return f"unknown key {more[0]!r} beside search"
    given = {key: value[key] for key in RANGE_KEYS - {SEARCH} if value.get(key) is not None}
    if isinstance(wanted, dict) or not (len(wanted) == 2 and all(map(_is_number, wanted))):
        return _choices(loc, wanted, given)
    low, high = wanted
    if not low < high or not all(math.isfinite(x) for x in wanted):
        return f"must be [low, high] with low < high, got [{low}, {high}]"
    log, step, start = given.get("log", False), given.get("step"), given.get("start")
    if not isinstance(log, bool):
        return "log must be true or false"
    if log and low <= 0:
        return f"log needs bounds above 0, got {low}"
    if step is not None and (not _is_number(step) or not 0 < step <= high - low or log):
        return "step must be above 0, at most high - low, and not beside log"
    if start is not None and (not _is_number(start) or not low <= start <= high):
        return f"start must be within [{low}, {high}]"
    if step is not None:
        if start is not None and not _is_whole((start - low) / step):
            return f"start must be {low} and a whole number of steps"
        if not _is_whole((high - low) / step):
            high = low + math.floor((high - low) / step) * step
    spread = {key: given.get(key, 0) for key in ("groups", "gradient")}
    if any(
        isinstance(n, bool) or not isinstance(n, int) or (key in given and not 1 <= n <= MOST_AXES)
        for key, n in spread.items()
    ):
        return "groups and gradient must be whole numbers of at least 1"
    if all(spread.values()):
        return "groups and gradient exclude each other"
    return Range(loc, low, high, log, step, (), start, **spread)


def _is_whole(count: float) -> bool:
    return abs(count - round(count)) < 1e-6


def _choices(loc: Loc, wanted: Any, given: Mapping[str, Any]) -> Range | str:
    if isinstance(wanted, dict):
        if wanted.keys() != {"choices"}:
            return "search needs [low, high] or {choices: [...]}"
        wanted = wanted["choices"]
    if not isinstance(wanted, list) or len(wanted) < 2:
        return "search needs two bounds, or at least two choices"
    if more := sorted(given.keys() - {"start"}):
        return f"{more[0]} is for numbers between two bounds"
    if len({label(one) for one in wanted}) < len(wanted):
        return "search has the same choice twice"
    start = given.get("start")
    if start is not None and start not in wanted:
        return "start must be one of the choices"
    return Range(loc, choices=tuple(wanted), start=start)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def label(value: Any) -> str:
    """Return a value as tables name it."""
    if isinstance(value, dict) and isinstance(value.get("method"), str):
        more = [f"{key} {label(one)}" for key, one in value.items() if key != "method"]
        return ", ".join([value["method"], *more])
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)


def as_yaml(values: Mapping[Loc, Any]) -> dict[Loc, str]:
    """Return values as YAML, for `edits.set_keys`."""
    return {loc: json.dumps(value, ensure_ascii=False) for loc, value in values.items()}


def settings_by_place(settings: Sequence[tuple[Loc, str]]) -> dict[Loc, str]:
    """Return settings of the command line by place. Several settings of one place become values to sweep."""
    found: dict[Loc, list[str]] = {}
    for loc, value in settings:
        found.setdefault(loc, []).append(value)
    return {loc: some[0] if len(some) == 1 else _sweep_of(some) for loc, some in found.items()}


def _sweep_of(texts: Sequence[str]) -> str:
    """Return a sweep of YAML values, written as JSON, because a comma ends plain text inside a list."""
    values = [yaml_source.loads(f"value: {text}", "--set").data["value"] for text in texts]
    return f"{{sweep: {json.dumps(values, ensure_ascii=False)}}}"


SWEEP_SCHEMA: dict[str, Any] = {
    "title": "Sweep",
    "description": "`deltamerge sweep` tries all of these values; a mapping names them.",
    "type": "object",
    "properties": {
        "sweep": {
            "description": "The values, or names of values.",
            "anyOf": [{"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}],
        }
    },
    "required": ["sweep"],
    "additionalProperties": False,
}
SEARCH_SCHEMA: dict[str, Any] = {
    "title": "Search",
    "description": "`deltamerge search` looks for the best number between two bounds, or the best choice.",
    "type": "object",
    "properties": {
        "search": {
            "description": "[low, high], or choices.",
            "anyOf": [
                {"type": "array", "minItems": 2},
                {
                    "type": "object",
                    "properties": {"choices": {"type": "array", "minItems": 2}},
                    "required": ["choices"],
                    "additionalProperties": False,
                },
            ],
        },
        "log": {"type": "boolean", "description": "Search the logarithm."},
        "step": {"type": "number", "description": "Size of a step."},
        "start": {"description": "Value of the first trial. Default: the middle, or the first choice."},
        "groups": {
            "type": "integer",
            "description": "Number of groups of neighbouring layers, each with its own number.",
        },
        "gradient": {"type": "integer", "description": "Count of numbers that are interpolated over the layers."},
    },
    "required": ["search"],
    "additionalProperties": False,
}
OPEN = {"anyOf": [{"$ref": "#/$defs/Sweep"}, {"$ref": "#/$defs/Search"}]}
HOLDERS = ("Prune", "CalibratedQ", "Protect")
KEYS = ("merge_method", "seed", "dtype", "base_model", "prune")


def allow(schema: dict[str, Any]) -> None:
    """Let open values stand where a value is written: in `parameters`, `prune` and some keys of the recipe itself."""
    definitions = schema["$defs"]
    definitions |= {"Sweep": SWEEP_SCHEMA, "Search": SEARCH_SCHEMA, "Open": OPEN}
    for holder in HOLDERS:
        for key, value in definitions[holder]["properties"].items():
            definitions[holder]["properties"][key] = _or_open(value)
    for key in KEYS:
        schema["properties"][key] = _or_open(schema["properties"][key])
    models = schema["properties"]["models"]
    models["items"] = _or_open(models["items"])
    for key in ("model", "prune"):
        definitions["Model"]["properties"][key] = _or_open(definitions["Model"]["properties"][key])
    for key, value in definitions["Parameters"]["properties"].items():
        definitions["Parameters"]["properties"][key] = _or_open(value)


def _or_open(value: dict[str, Any]) -> dict[str, Any]:
    about: dict[str, Any] = {key: value[key] for key in ("description", "default", "title") if key in value}
    return {"anyOf": [{k: v for k, v in value.items() if k not in about}, {"$ref": "#/$defs/Open"}], **about}
