"""What a search leaves: the best recipe with its lock, tables of the trials, a page, the merged folder."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from deltamerge.inspect.lines import front, lines
from deltamerge.inspect.report import POLICY
from deltamerge.inspect.search.found import Found, Trial
from deltamerge.inspect.search.kept import best_path, make_folder, write_recipe
from deltamerge.inspect.search.outcome import Bench
from deltamerge.inspect.style import STYLE
from deltamerge.inspect.svg import Markup, Point, bars, element, figure, text
from deltamerge.io.atomic import replace_file
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options

TRIALS, JSON, PAGE = "trials.csv", "study.json", "report.html"
SHOWN = 20


def write(
    found: Found, file: TemplateFile, bench: Bench, options: Options, values: Mapping[Loc, Any], keep: str
) -> Found:
    """Write all that a search leaves; `values` are those of the best trial."""
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


def summary(found: Found) -> dict[str, Any]:
    """How the recipe was found, for its lock and card."""
    best = found.chosen
    values = best.held or best.outcome
    numbers = {name: _rounded(value) for name, value in zip(found.goals, values.values, strict=True)}
    return {
        "sampler": found.sampler,
        "trials": len(found.trials),
        "trial": best.number,
        "values": {name: _rounded(value) for name, value in best.params.items()},
        "objectives": numbers,
        "why": found.why,
    }


def _rounded(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def as_csv(found: Found) -> str:
    """A line for each trial."""
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.params))
    goals = list(found.goals)
    columns = ["number", "state", *names, *goals, *(f"held out {name}" for name in goals), "error"]
    made = io.StringIO()
    table = csv.DictWriter(made, columns, lineterminator="\n")
    table.writeheader()
    for trial in found.trials:
        held = {} if trial.held is None else _named((f"held out {name}" for name in goals), trial.held.values)
        row = {"number": trial.number, "state": trial.state, **trial.params, **_named(goals, trial.outcome.values)}
        table.writerow({**row, **held, "error": trial.outcome.error or ""})
    return made.getvalue()


def _named(names: Any, values: Any) -> dict[str, float]:
    return dict(zip(names, values, strict=False))


def page(found: Found, name: str) -> str:
    """The study on a page, without scripts: the objective over trials, what explains it, the front, the best trials."""
    title = f"Search of {name}"
    blocks = [element("h1", text(title)), element("p", text(_conclusion(found)), class_="conclusion")]
    for number, (goal, low) in enumerate(found.goals.items()):
        blocks += [element("h2", text(goal)), _card(_over_trials(found, number, goal, low))]
    if len(found.goals) == 2:
        blocks += [element("h2", text("Pareto front")), _card(_front(found))]
    if found.importance:
        points = [Point(key, value) for key, value in list(found.importance.items())[:SHOWN]]
        about = "Share of the first objective's variance among the better trials that each number explains (PED-ANOVA)."
        blocks += [element("h2", text("Importance")), element("p", text(about)), _card(bars("importance", points))]
    blocks += [element("h2", text("Best trials")), _table(found)]
    head = element("title", text(title)), element("style", Markup(STYLE))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{''.join(head)}</head>\n<body>\n" + "\n".join(blocks) + "\n</body></html>\n"
    )


def _conclusion(found: Found) -> str:
    best = found.chosen
    values = ", ".join(
        f"{name} {figure(value, '.4g')}"
        for name, value in zip(found.goals, (best.held or best.outcome).values, strict=True)
    )
    failed = sum(trial.state == "failed" for trial in found.trials)
    more = f"; {failed} failed" if failed else ""
    return (
        f"Trial {best.number} is the best {found.why}: {values}. {len(found.trials)} trials by {found.sampler}{more}."
    )


def _card(chart: Markup) -> Markup:
    return element("section", chart, class_="card")


def _over_trials(found: Found, number: int, goal: str, low: bool) -> Markup:
    """Every trial's value, and the best so far."""
    points = [(float(t.number), t.outcome.values[number]) for t in found.trials if t.outcome.values]
    best: list[tuple[float, float]] = []
    for x, y in points:
        last = best[-1][1] if best else y
        best.append((x, min(last, y) if low else max(last, y)))
    held = [(float(t.number), t.held.values[number]) for t in found.trials if t.held is not None and t.held.values]
    series = {"trials": points, "best so far": best, **({"on held-out rows": held} if held else {})}
    return lines(f"{goal} over trials", "trial", goal, series, {}, joined=frozenset({"best so far"}))


def _front(found: Found) -> Markup:
    across, upward = found.goals
    points = [
        (*trial.outcome.values, f"trial {trial.number}", i in found.front)
        for i, trial in enumerate(found.trials)
        if trial.outcome.values
    ]
    return front("Pareto front", across, upward, points)  # type: ignore[arg-type]  # two values


def _table(found: Found) -> Markup:
    names = list(dict.fromkeys(name for trial in found.trials for name in trial.params))
    goals = list(found.goals)
    heads = ["trial", "state", *goals, *(f"held out {g}" for g in goals), *names]
    rows = [element("tr", *(element("th", text(head)) for head in heads))]
    for trial in _ordered(found)[:SHOWN]:
        numbers = [*_cells(trial.outcome.values, goals), *_cells(trial.held.values if trial.held else (), goals)]
        values = [_shown(trial.params.get(name)) for name in names]
        mark = " ←" if trial.number == found.chosen.number else ""
        cells = [f"{trial.number}{mark}", trial.state, *numbers, *values]
        rows.append(element("tr", *(element("td", text(cell)) for cell in cells)))
    return element("div", element("table", *rows), class_="scroll")


def _ordered(found: Found) -> list[Trial]:
    low = next(iter(found.goals.values()))
    done = [trial for trial in found.trials if trial.outcome.values]
    return sorted(done, key=lambda t: (t.held is None, t.outcome.values[0] if low else -t.outcome.values[0]))


def _cells(values: Any, goals: list[str]) -> list[str]:
    return [figure(value, ".4g") for value in values] or [""] * len(goals)


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
