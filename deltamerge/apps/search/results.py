"""The result of a search: its trials, the best one and the reason.

It leaves the best recipe with its lock, tables, a page, and the merged folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from deltamerge.apps.report.svg import Markup, Point, bars, document, element, figure, front, lines, text
from deltamerge.apps.search.folder import best_path, make_folder, write_recipe
from deltamerge.apps.search.outcome import Bench, Outcome
from deltamerge.errors.shown import as_html, shown
from deltamerge.files.atomic import replace_file
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options

TRIALS, JSON, PAGE = "trials.csv", "study.json", "report.html"
SHOWN = 20


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial: its number in the study, the tried numbers, and the outcome.

    state   complete, pruned (after a part of the rows) or failed
    held    its outcome on held-out rows, if it was compared on them
    """

    number: int
    params: Mapping[str, Any]
    outcome: Outcome
    state: str
    held: Outcome | None = None


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    trials    in the order of the study
    best      the index of the chosen trial
    start     the index of the first trial, the recipe's own start
    models    the models' names
    front     indices of the Pareto front, if there are several objectives
    why       the deciding rows or rule
    """

    folder: Path
    storage: Path
    goals: Mapping[str, bool]
    trials: tuple[Trial, ...]
    best: int
    front: tuple[int, ...]
    why: str
    importance: Mapping[str, float] = field(default_factory=dict)
    rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    references: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "tpe"
    recipe: Path | None = None
    made: Path | None = None
    models: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return shown(f"<SearchResult {self.folder}: {self._conclusion}>")

    def _repr_html_(self) -> str:
        values = {label(name, self.models): _show(value) for name, value in self.chosen.params.items()}
        return as_html(str(self.folder), {"best": self._conclusion, **values, "recipe": str(self.recipe)})

    @property
    def _conclusion(self) -> str:
        goals = zip(self.goals, (self.chosen.held or self.chosen.outcome).values, strict=True)
        found = ", ".join(f"{name} {figure(value)}" for name, value in goals)
        return f"trial {self.chosen.number} of {len(self.trials)}, {found}"

    @property
    def chosen(self) -> Trial:
        """Return the best trial."""
        return self.trials[self.best]

    @cached_property
    def params(self) -> tuple[str, ...]:
        """Return the names of the numbers that were tried."""
        return tuple(dict.fromkeys(name for trial in self.trials for name in trial.params))

    def describe(self) -> dict[str, Any]:
        """Return plain data, for JSON."""
        return {
            "objectives": [{"name": name, "less_is_better": low} for name, low in self.goals.items()],
            "sampler": self.sampler,
            "trials": [_describe(trial) for trial in self.trials],
            "best": self.chosen.number,
            "why": self.why,
            "front": [self.trials[i].number for i in self.front],
            "importance": dict(self.importance),
            "rows": {part: dict(rows) for part, rows in self.rows.items()},
            "references": self.references,
            "storage": str(self.storage),
            "recipe": None if self.recipe is None else str(self.recipe),
            "out": None if self.made is None else str(self.made),
        }


INDEX = re.compile(r"^models\[(\d+)\]\.(?:parameters\.)?")


def label(place: str, models: Sequence[str]) -> str:
    """Return a place of a recipe for people: `models[0].parameters.weight` is `math: weight` of the model math."""
    found = INDEX.match(place)
    if found is None or int(found[1]) >= len(models):
        return place.removeprefix("parameters.")
    return f"{models[int(found[1])].removeprefix('./')}: {place[found.end() :]}"


def _describe(trial: Trial) -> dict[str, Any]:
    held = {} if trial.held is None else {"held_out": list(trial.held.values), "held_out_scores": trial.held.scores}
    error = {} if trial.outcome.error is None else {"error": trial.outcome.error}
    return {
        "number": trial.number,
        "values": dict(trial.params),
        "state": trial.state,
        "objectives": list(trial.outcome.values),
        "scores": trial.outcome.scores,
        **held,
        **error,
    }


def write(
    found: SearchResult, file: TemplateFile, bench: Bench, options: Options, values: Mapping[Loc, Any], keep: str
) -> SearchResult:
    """Write all files of a search. `values` are the best trial's values."""
    plain, said = file.file(values), summary(found)
    calibrated = bench.calibrated(values)
    path = best_path(file.path)
    write_recipe(plain, calibrated, options, path, said)
    found = replace(found, recipe=path)
    if keep == "best":
        made = make_folder(plain, calibrated, options, found.folder / "best", said)
        found = replace(found, made=made.folder)
    replace_file(found.folder / TRIALS, as_csv(found))
    replace_file(found.folder / JSON, json.dumps(found.describe(), indent=1, sort_keys=True) + "\n")
    replace_file(found.folder / PAGE, page(found, file.path.name))
    return found


def summary(found: SearchResult) -> dict[str, Any]:
    """Return how the recipe was found, for its lock and card."""
    best = found.chosen
    values = best.held or best.outcome
    numbers = {name: _round(value) for name, value in zip(found.goals, values.values, strict=True)}
    return {
        "sampler": found.sampler,
        "trials": len(found.trials),
        "trial": best.number,
        "values": {name: _round(value) for name, value in best.params.items()},
        "objectives": numbers,
        "why": found.why,
    }


def _round(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_csv(found: SearchResult) -> str:
    """Return a line for each trial."""
    goals = list(found.goals)
    columns = ["number", "state", *found.params, *goals, *(f"held out {name}" for name in goals), "error"]
    made = io.StringIO()
    table = csv.DictWriter(made, columns, lineterminator="\n")
    table.writeheader()
    for trial in found.trials:
        held = {} if trial.held is None else _by_name((f"held out {name}" for name in goals), trial.held.values)
        row = {"number": trial.number, "state": trial.state, **trial.params, **_by_name(goals, trial.outcome.values)}
        table.writerow({**row, **held, "error": trial.outcome.error or ""})
    return made.getvalue()


def _by_name(names: Any, values: Any) -> dict[str, float]:
    return dict(zip(names, values, strict=False))


def page(found: SearchResult, name: str) -> str:
    """Return the study on a page: the objective over trials, its causes, the front, the best trials."""
    blocks = [element("p", text(_conclusion(found)), class_="conclusion")]
    for number, (goal, low) in enumerate(found.goals.items()):
        blocks += [element("h2", text(goal)), _card(_over_trials(found, number, goal, low))]
    if len(found.goals) == 2:
        blocks += [element("h2", text("Pareto front")), _card(_front(found))]
    if found.importance:
        points = [Point(label(key, found.models), value) for key, value in list(found.importance.items())[:SHOWN]]
        about = "Share of the first objective's variance among the better trials that each number explains (PED-ANOVA)."
        blocks += [element("h2", text("Importance")), element("p", text(about)), _card(bars("importance", points))]
    blocks += [element("h2", text("Best trials")), _table(found)]
    return document(f"Search of {name}", blocks)


def _conclusion(found: SearchResult) -> str:
    best = found.chosen
    values = ", ".join(
        f"{name} {figure(value)}" for name, value in zip(found.goals, (best.held or best.outcome).values, strict=True)
    )
    failed = sum(trial.state == "failed" for trial in found.trials)
    more = f"; {failed} failed" if failed else ""
    return (
        f"Trial {best.number} is the best {found.why}: {values}. {len(found.trials)} trials by {found.sampler}{more}."
    )


def _card(chart: Markup) -> Markup:
    return element("section", chart, class_="card")


def _over_trials(found: SearchResult, number: int, goal: str, low: bool) -> Markup:
    """Return every trial's value, and the best so far."""
    points = [(float(t.number), t.outcome.values[number]) for t in found.trials if t.outcome.values]
    best: list[tuple[float, float]] = []
    for x, y in points:
        last = best[-1][1] if best else y
        best.append((x, min(last, y) if low else max(last, y)))
    held = [(float(t.number), t.held.values[number]) for t in found.trials if t.held is not None and t.held.values]
    series = {"trials": points, "best so far": best, **({"on held-out rows": held} if held else {})}
    return lines(f"{goal} over trials", "trial", goal, series, {}, joined=frozenset({"best so far"}))


def _front(found: SearchResult) -> Markup:
    across, upward = found.goals
    points = [
        (trial.outcome.values[0], trial.outcome.values[1], f"trial {trial.number}", i in found.front)
        for i, trial in enumerate(found.trials)
        if trial.outcome.values
    ]
    return front("Pareto front", across, upward, points)


def _table(found: SearchResult) -> Markup:
    goals = list(found.goals)
    heads = ["trial", "state", *goals, *(f"held out {g}" for g in goals)]
    heads += [label(name, found.models) for name in found.params]
    rows = [element("tr", *(element("th", text(head)) for head in heads))]
    for trial in _by_rank(found)[:SHOWN]:
        numbers = [*_cells(trial.outcome.values, goals), *_cells(trial.held.values if trial.held else (), goals)]
        values = [_show(trial.params.get(name)) for name in found.params]
        mark = ", chosen" if trial.number == found.chosen.number else ""
        cells = [f"{trial.number}{mark}", trial.state, *numbers, *values]
        rows.append(element("tr", *(element("td", text(cell)) for cell in cells)))
    return element("div", element("table", *rows), class_="scroll")


def _by_rank(found: SearchResult) -> list[Trial]:
    low = next(iter(found.goals.values()))
    done = [trial for trial in found.trials if trial.outcome.values]
    return sorted(done, key=lambda t: (t.held is None, t.outcome.values[0] if low else -t.outcome.values[0]))


def _cells(values: Any, goals: list[str]) -> list[str]:
    return [figure(value) for value in values] or [""] * len(goals)


def _show(value: Any) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
