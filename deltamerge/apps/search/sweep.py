"""Sweeps: every combination of the values that a recipe leaves open, judged on the same rows."""

from __future__ import annotations

import csv
import io
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from xxhash import xxh3_128

from deltamerge.apps.report.svg import STYLE, Panel, Point, bars, figure, lines, picture
from deltamerge.apps.search.candidates import candidates_of, fixed
from deltamerge.apps.search.folder import (
    StudyFolder,
    best_path,
    check_best,
    input_facts,
    make_folder,
    refuse_strangers,
    write_recipe,
)
from deltamerge.apps.search.outcome import Bench, Outcome, best_of
from deltamerge.apps.search.results import label
from deltamerge.apps.track import Log, unlogged
from deltamerge.errors import InputError, RecipeError
from deltamerge.errors.shown import as_html, shown
from deltamerge.files import progress
from deltamerge.files.atomic import replace_file
from deltamerge.files.descriptors import writing
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options

Keep = Literal["best", "all", "none"]
RESULTS, TABLE, JSON, PICTURE = "results.jsonl", "sweep.csv", "sweep.json", "sweep.svg"
SEED = "seed"


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One point: the labels of its values by axis, and its outcome."""

    labels: Mapping[str, str]
    outcome: Outcome


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep.

    axes        names of the swept keys
    goals       names of the objectives, and for each whether less is better
    references  scores of the base and the fine-tunes; `reference_goals`: their values by the objectives
    models      the models' names
    best        the best row by the objectives
    recipe      the best row's recipe
    kept        merged folders
    """

    folder: Path
    axes: tuple[str, ...]
    goals: Mapping[str, bool]
    rows: tuple[SweepRow, ...]
    references: Mapping[str, Any] = field(default_factory=dict)
    reference_goals: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    test_rows: Mapping[str, int] = field(default_factory=dict)
    best: int | None = None
    recipe: Path | None = None
    kept: tuple[Path, ...] = ()

    def __repr__(self) -> str:
        return shown(f"<SweepResult {self.folder}: {len(self.rows)} points, best {self._best}>")

    def _repr_html_(self) -> str:
        rows = {"best": self._best, "recipe": str(self.recipe)}
        return as_html(f"{self.folder}: {len(self.rows)} points", rows)

    @property
    def _best(self) -> str:
        if self.best is None:
            return "none"
        row = self.rows[self.best]
        values = [f"{label(axis, self.models)} {value}" for axis, value in row.labels.items()]
        goals = zip(self.goals, row.outcome.values, strict=True)
        return ", ".join([*values, *(f"{name} {figure(value)}" for name, value in goals)])

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of figures: the objectives, then every fine-tune's scores."""
        inner = {
            f"{name}.{measure}": None
            for row in self.rows
            for name, own in row.outcome.scores.items()
            for measure in own
        }
        return (*self.goals, *inner)

    def figures(self, row: SweepRow) -> dict[str, float]:
        """Return the figures of a row, by column."""
        goals = dict(zip(self.goals, row.outcome.values, strict=False))
        return goals | {f"{name}.{m}": v for name, own in row.outcome.scores.items() for m, v in own.items()}

    def describe(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "axes": list(self.axes),
            "objectives": [{"name": name, "less_is_better": low} for name, low in self.goals.items()],
            "test_rows": dict(self.test_rows),
            "references": self.references,
            "reference_objectives": {kind: dict(values) for kind, values in self.reference_goals.items()},
            "rows": [
                {
                    "values": dict(row.labels),
                    "objectives": list(row.outcome.values),
                    "scores": row.outcome.scores,
                    **({"error": row.outcome.error} if row.outcome.error else {}),
                }
                for row in self.rows
            ],
            "best": self.best,
            "recipe": None if self.recipe is None else str(self.recipe),
            "kept": [str(path) for path in self.kept],
        }

    def averaged(self) -> Iterator[tuple[dict[str, str], dict[str, list[float]]]]:
        """Yield rows that differ in their seed alone as one: its labels, and by column the figures of all seeds."""
        groups: dict[tuple[str, ...], list[SweepRow]] = {}
        others = [axis for axis in self.axes if axis != SEED]
        for row in self.rows:
            groups.setdefault(tuple(row.labels[axis] for axis in others), []).append(row)
        for labels, some in groups.items():
            figures = [self.figures(row) for row in some]
            yield (
                dict(zip(others, labels, strict=True)),
                {name: [f[name] for f in figures if name in f] for name in self.columns},
            )


def sweep(
    file: TemplateFile,
    options: Options,
    out: Path | None = None,
    *,
    keep: Keep = "none",
    force: bool = False,
    commands: bool = False,
    log: Log = unlogged,
) -> SweepResult:
    """Judge every point of a template; results go to `out`, by default <recipe>-sweep beside it, as they come.

    An interrupted sweep continues. Points whose recipe, models or rows have changed are measured again. With `commands`
    a program of the study may be run. `log` gets every point's figures and its place. RecipeError: a point is no valid
    recipe, or nothing is swept. InputError: the rows cannot judge it, or every point failed.
    """
    points = list(file.template.points)
    _check(file, points)
    folder = StudyFolder.of(file.path, "sweep", out)
    options = replace(options, force=force)
    check_best(file.path, force=force)
    with folder.locked(force=force) as there:
        candidates = candidates_of(file, options)
        with closing(Bench(file, points[0][1], candidates, options, commands=commands)) as bench:
            names = tuple(axis.name for axis in file.template.sweeps)

            def tell(i: int) -> None:
                outcome, labels = known[keys[i]], dict(zip(names, points[i][0], strict=True))
                goals = dict(zip((goal.name for goal in bench.goals), outcome.values, strict=False))
                log({"": goals, "value": labels, "score": outcome.scores}, i)

            known = _read(there / RESULTS)
            keys = _keys(file, points, options)
            missing = [i for i, key in enumerate(keys) if key not in known]
            with progress.phase(f"sweeping {file.path.name}", len(points), "candidates") as phase:
                phase.step(len(points) - len(missing))
                for i in range(len(points)):
                    if i not in missing:
                        tell(i)
                size = bench.study.together
                for at in range(0, len(missing), size):
                    some = missing[at : at + size]
                    outcomes = bench.measure([points[i][1] for i in some], "held", there)
                    for i, outcome in zip(some, outcomes, strict=True):
                        known[keys[i]] = outcome
                        _append(there / RESULTS, keys[i], outcome)
                        tell(i)
                        phase.step()
            rows = tuple(
                SweepRow(dict(zip(names, labels, strict=True)), known[key])
                for (labels, _), key in zip(points, keys, strict=True)
            )
            best = best_of([row.outcome for row in rows], bench.lower)
            judged, references = bench.rows("held"), bench.references("held")
            goals = dict(zip((goal.name for goal in bench.goals), bench.lower, strict=True))
            found = SweepResult(
                there,
                names,
                goals,
                rows,
                references=references,
                reference_goals=bench.reference_goals("held"),
                models=file.recipe(points[0][1]).names,
                test_rows=judged,
                best=best,
            )
            if best is None:
                raise InputError(f"{file.path}: every point failed: {rows[0].outcome.error}")
            found = _keep(found, file, points, bench, options, keep)
        _write(found)
    return found


def _check(file: TemplateFile, points: Sequence[tuple[tuple[str, ...], Mapping[Loc, Any]]]) -> None:
    """Refuse a template where nothing is swept, a number is open to a search, or a point is no recipe."""
    source = file.template.source
    if file.template.ranges:
        hint = f"deltamerge search {quote(file.path.name)}"
        raise RecipeError(str(file.path), [source.problem(file.template.ranges[0].loc, "is to be searched", hint)])
    if not file.template.sweeps:
        hint = "density: {sweep: [0.1, 0.01]}, or --set KEY=VALUE twice"
        raise RecipeError(str(file.path), [source.problem((), "has no values to sweep", hint)])
    recipes = []
    for labels, values in points:
        try:
            recipes.append(file.recipe(values))
        except RecipeError as error:
            at = ", ".join(f"{axis.name}: {label}" for axis, label in zip(file.template.sweeps, labels, strict=True))
            problems = [
                source.problem((), f"with {at}: {one.location}: {one.message}", one.hint) for one in error.problems
            ]
            raise RecipeError(str(file.path), problems) from None
    refuse_strangers(file, recipes)


def _keys(
    file: TemplateFile, points: Sequence[tuple[tuple[str, ...], Mapping[Loc, Any]]], options: Options
) -> list[str]:
    """Return a hash of the causes of each point's outcome: its recipe, its models' files, the rows."""
    known: dict[str, str] = {}
    keys = []
    for _, values in points:
        data = file.template.fill(values).data
        models = json.dumps(fixed(data), sort_keys=True)
        if models not in known:
            known[models] = json.dumps(input_facts(file, values, options), sort_keys=True)
        keys.append(xxh3_128((known[models] + json.dumps(data, sort_keys=True)).encode()).hexdigest())
    return keys


def _read(path: Path) -> dict[str, Outcome]:
    """Read outcomes by key. A line that was cut short or damaged is left out."""
    found: dict[str, Outcome] = {}
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
            found[entry["key"]] = Outcome(tuple(entry["values"]), entry["scores"], entry.get("error"))
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return {key: outcome for key, outcome in found.items() if outcome.error is None}


def _append(path: Path, key: str, outcome: Outcome) -> None:
    entry = {"key": key, "values": outcome.values, "scores": outcome.scores, "error": outcome.error}
    with writing(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def _keep(
    found: SweepResult,
    file: TemplateFile,
    points: Sequence[tuple[tuple[str, ...], Mapping[Loc, Any]]],
    bench: Bench,
    options: Options,
    keep: Keep,
) -> SweepResult:
    """Write the best recipe, and the merged folders that are to be kept."""
    assert found.best is not None
    values = points[found.best][1]
    best = best_path(file.path)
    write_recipe(file.file(values), bench.calibrated(values), options, best)
    chosen = {"none": [], "best": [found.best], "all": range(len(points))}[keep]
    kept = []
    for i in chosen:
        if found.rows[i].outcome.error is None:
            target = found.folder / ("best" if keep == "best" else f"{i + 1:0{len(str(len(points)))}d}")
            values = points[i][1]
            make_folder(file.file(values), bench.calibrated(values), options, target)
            kept.append(target)
    return replace(found, recipe=best, kept=tuple(kept))


def _write(found: SweepResult) -> None:
    replace_file(found.folder / TABLE, as_csv(found))
    replace_file(found.folder / JSON, json.dumps(found.describe(), indent=1, sort_keys=True) + "\n")
    replace_file(found.folder / PICTURE, draw(found))


def as_csv(found: SweepResult) -> str:
    """Return a line for each point: its values, its figures, its error."""
    text = io.StringIO()
    table = csv.DictWriter(text, [*found.axes, *found.columns, "error"], lineterminator="\n")
    table.writeheader()
    for row in found.rows:
        table.writerow({**row.labels, **found.figures(row), "error": row.outcome.error or ""})
    return text.getvalue()


def draw(found: SweepResult) -> str:
    """Draw a panel for each column.

    It has lines over the first axis of numbers, one for each choice of the others, or bars.
    """
    across = next((axis for axis in found.axes if axis != SEED and _is_numeric(found, axis)), None)
    over = "" if across is None else label(across, found.models)
    rows = list(found.averaged())
    panels = []
    for column in found.columns:
        here = [(labels, numbers[column]) for labels, numbers in rows if numbers[column]]
        if not here:
            continue
        if across is None:
            points = [Point(" · ".join(labels.values()) or column, statistics.fmean(some)) for labels, some in here]
            points += [Point(kind, goals[column]) for kind, goals in found.reference_goals.items() if column in goals]
            panels.append(Panel(column, "", bars(column, points)))
            continue
        series: dict[str, list[tuple[float, float]]] = {}
        spread: dict[str, dict[float, float]] = {}
        for labels, some in here:
            name = " · ".join(label for axis, label in labels.items() if axis != across) or column
            series.setdefault(name, []).append((float(labels[across]), statistics.fmean(some)))
            spread.setdefault(name, {})[float(labels[across])] = statistics.pstdev(some) if len(some) > 1 else 0.0
        chart = lines(f"{column} over {over}", over, column, series, spread)
        panels.append(Panel(column, f"over {over}", chart))
    return picture([panels[i : i + 2] for i in range(0, len(panels), 2)], STYLE)


def _is_numeric(found: SweepResult, axis: str) -> bool:
    values = {row.labels[axis] for row in found.rows}
    try:
        return len({float(value) for value in values}) > 1
    except ValueError:
        return False
