"""Whether `recommend` names the best merge: every two, three and four experts of the families of words.py, two seeds.

    python -m benchmarks.merging.cases            every case that is not measured; about a minute each
    python -m benchmarks.merging.cases report     of one family
    python -m benchmarks.merging.cases report --fits       and what `recommend` makes with 50 rows, its fits among it
    python -m benchmarks.merging.cases --docs     only the tables of docs/measurements/merging.md

A case is some experts of one family and seed. Each method of METHODS merges them once, and λ is tried in memory: on
test rows for the truth, on 50 validation rows for the advice that sees rows, without their labels. What `recommend`
would say of a case is asked of its own functions, which fit nothing. Outputs are kept under WORK, so that the advice
can be judged anew.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import RESULTS
from benchmarks.merging import pages, word_tasks, words
from benchmarks.merging.scores import Weights, write
from benchmarks.process import surroundings
from deltamerge.apps.recommend.forecast import SkillForecast, of_answers, of_weights
from deltamerge.apps.recommend.meeting import Conflict
from deltamerge.apps.recommend.merge import (
    DIFFERS,
    FINALISTS,
    WAYS,
    MergeCandidate,
    Way,
    best_first,
    with_rows,
    without_rows,
)
from deltamerge.calibrate.q.objectives import discord, divergence, lost_score
from deltamerge.methods.merge.core_space import Held
from deltamerge.methods.registry import MERGE
from deltamerge.plan.delta_graph import matrix_form
from deltamerge.tensors.traits import function_of

FILE = RESULTS / "merging_cases.json"
FAMILIES = {name: words.FAMILIES[name] for name in ("choose", "report")} | {
    "words": (*words.FAMILIES["report"], "name", "part-of-speech")
}
SIZES = {"choose": (4, 3, 2), "report": (4, 3, 2), "words": (6,)}
SEEDS = (0, 1)
METHODS = ("task_arithmetic, balanced", "iso_c, balanced", "tsv_m, balanced", "wudi, balanced", "svc, balanced")
FACTORS = (0.7, 1.0, 1.4)  # times the rule's λ
TEST, ROWS = 300, 50  # rows of a task


class Case(NamedTuple):
    """Experts of one family and seed that are merged."""

    family: str
    seed: int
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.family} {self.seed}: {', '.join(self.tasks)}"

    @property
    def path(self) -> Path:
        """The file of its outputs."""
        return word_tasks.HOME / "cases" / f"{self.family}-{self.seed}-{'-'.join(self.tasks)}.npz"


def cases(families: Sequence[str]) -> Iterator[Case]:
    """Those of the first seed first, the largest first; those of nothing but one seed's experts once."""
    fixed = set(FAMILIES["choose"]) - set(word_tasks.TASKS)
    for seed in SEEDS:
        for size in (4, 3, 2, 6):
            for family in families:
                for tasks in combinations(FAMILIES[family], size) if size in SIZES[family] else ():
                    if not (seed and fixed.issuperset(tasks)):
                        yield Case(family, seed, tasks)


def measure(family: words.Family, case: Case) -> None:
    """Keep the logits of base, experts and merges, by "WHAT|FACTOR|TASK|PART"."""
    found: dict[str, NDArray[np.float32]] = {}
    rows = {t: {"test": words.rows_of(t, "test")[:TEST], "rows": words.rows_of(t, "validation")[:ROWS]}
            for t in case.tasks}  # fmt: skip

    def keep(what: str, factor: float, weights: Weights, task: str) -> None:
        for part, some in rows[task].items():
            found[f"{what}|{factor}|{task}|{part}"] = family.outputs(weights, task, some).numpy()

    for task in case.tasks:
        keep("base", 0.0, family.weights, task)
        own = family.deltas[task]
        keep("own", 0.0, {key: tensor + own[key] for key, tensor in family.weights.items()}, task)
    for name in METHODS:
        merge = next(one for one in words.MERGES if one.name == name)
        added, rule = merged(family, merge, case.tasks), merge.rule(len(case.tasks))
        for factor in FACTORS:
            weights = family.at(rule * factor, merge, added, len(case.tasks))
            for task in case.tasks:
                keep(name, factor, weights, task)
    case.path.parent.mkdir(parents=True, exist_ok=True)
    part = case.path.with_suffix(".part.npz")
    np.savez_compressed(part, **found)  # type: ignore[arg-type]  # numpy's own flag is another keyword
    part.replace(case.path)


def merged(family: words.Family, merge: words.Merge, names: Sequence[str]) -> Weights:
    """What `Family.merged` makes by a run, by the methods' functions alone: a third of the time."""
    assert merge.recipe is not None
    function, count = MERGE[merge.recipe["merge_method"]].function, len(names)
    made = {}
    for key in family.weights:
        deltas = [family.deltas[name][key] for name in names]
        if "balance" in merge.recipe:
            lengths = [float(delta.double().norm()) for delta in deltas]
            deltas = [delta * (fmean(lengths) / length) for delta, length in zip(deltas, lengths, strict=True)]
        form = matrix_form(key, tuple(deltas[0].shape), count)
        if merge.recipe["merge_method"] == "task_arithmetic":
            made[key] = torch.stack(deltas).sum(0)
        elif form is None:
            made[key] = torch.stack(deltas).mean(0)
        else:
            found = function_of(function)(*map(Held, deltas), form=form, weights=(1.0,) * count)
            made[key] = found.view(deltas[0].shape)
    return made


class Scores:
    """What a case's kept outputs say of each merge: (method, factor) -> by task, in % or as shares."""

    def __init__(self, case: Case) -> None:
        self.case = case
        with np.load(case.path) as kept:
            self.outputs = {name: kept[name].astype(np.float64) for name in kept.files}
        self.merges = [(method, factor) for method in METHODS for factor in FACTORS]

    def of(self, merge: tuple[str, float], task: str, part: str) -> NDArray[np.float64]:
        found: NDArray[np.float64] = self.outputs["|".join((merge[0], str(merge[1]), task, part))]
        return found

    def share(self, merge: tuple[str, float], task: str) -> float:
        """The score on the test rows in % of the expert's own."""
        rows = words.rows_of(task, "test")[:TEST]
        ours, own = (
            words.score_of(task, torch.from_numpy(self.of(one, task, "test")), rows) for one in (merge, ("own", 0.0))
        )
        return 100 * ours / own

    def mean(self, merge: tuple[str, float]) -> float:
        return fmean(self.share(merge, task) for task in self.case.tasks)

    def lost(self, merge: tuple[str, float], task: str, rows: slice) -> float:
        """The distance of the outputs from the expert's over the base's, as `recommend` has it."""
        measure = discord if words.task_of(task).labels == 1 else divergence
        own = self.of(("own", 0.0), task, "rows")[rows]
        ours, base = (measure(self.of(one, task, "rows")[rows], own) for one in (merge, ("base", 0.0)))
        return ours / base if base > 0 else ours

    def alike(self, merge: tuple[str, float], task: str, rows: slice) -> float:
        """How often it answers as the expert does; of numbers the correlation."""
        ours, own = (self.of(one, task, "rows")[rows] for one in (merge, ("own", 0.0)))
        if words.task_of(task).labels == 1:
            return 1 - discord(ours, own)
        return float(np.mean(ours.argmax(1) == own.argmax(1)))

    def kept(self, merge: tuple[str, float], task: str, rows: slice) -> float:
        """The share of the expert's score that `recommend` expects."""
        ours, own = (self.of(one, task, "rows")[rows] for one in (merge, ("own", 0.0)))
        measure = discord if words.task_of(task).labels == 1 else lost_score
        return 1 - measure(ours, own)


def told(scores: Scores, rows: int) -> tuple[tuple[str, float], list[SkillForecast]]:
    """The merge that `recommend` names with so many rows a model, and what it expects of it."""
    ways = [way for way in WAYS if way.name in METHODS]
    judged = {way: candidate(scores, way, 1.0, rows) for way in ways}
    leaders = best_first(judged)[:FINALISTS]
    for way in [one for one in leaders if one.is_searched]:
        lost = {f: fmean(scores.lost((way.name, f), task, slice(rows)) for task in scores.case.tasks) for f in FACTORS}
        judged[way] = candidate(scores, way, way.better(lost, 1.0), rows)
    way, factor, _ = with_rows(judged, leaders)
    return (way.name, factor), judged[way].forecast


def candidate(scores: Scores, way: Way, factor: float, rows: int) -> MergeCandidate:
    """A method at a λ, as so many rows a model tell."""
    names, merge = scores.case.tasks, (way.name, factor)
    alike, kept = ({task: of(merge, task, slice(rows)) for task in names} for of in (scores.alike, scores.kept))
    own = {task: scores.lost(merge, task, slice(rows)) for task in names}
    classes = {task: words.task_of(task).labels for task in names}
    skills = of_answers(names, apart(names), kept, classes, dict.fromkeys(names, rows))
    return MergeCandidate(
        name=way.name, method=way.method, parameters={}, factor=factor, coefficients=None, lost=own,
        lost_mean=fmean(own.values()), lost_worst=max(own.values()), agreement=alike, forecast=skills, tried=[],
        error=None, balance="norm",
    )  # fmt: skip


def fitted(family: words.Family, case: Case) -> dict[str, Any]:
    """What `recommend` makes of the case with ROWS rows a model; some choose coefficients, others decide."""
    merge = next(one for one in words.ADVISED if one.rows + one.decide == ROWS)
    added = family.merged(merge, case.tasks)
    shares = family.shares({key: tensor + added[key] for key, tensor in family.weights.items()}, case.tasks)
    told = family.advice[merge.name]
    return _compared(told["chosen"], told["lambda"], shares, told["expected"])


def apart(names: Sequence[str]) -> Conflict:
    """Deltas that go different ways: as these do, whose cosines are below 0.2."""
    size = len(names)
    unit: list[list[float]] = np.eye(size).tolist()
    none: list[list[float | None]] = [[None] * size] * size
    return Conflict(
        relative_norm=[None] * size, cosine=unit, opposed=unit, overlap=none, chance=None, disturbance=none,
        most_alike=[0, 1], most_opposed=[0, 1], cosine_mean=0.0, opposed_mean=0.5, overlap_mean=None,
    )  # fmt: skip


def summary(case: Case) -> dict[str, Any]:
    """What each merge keeps of the case, what is advised with and without rows, and what is expected."""
    scores = Scores(case)
    shares = {method: {task: scores.share((method, 1.0), task) for task in case.tasks} for method in METHODS}
    means = {merge: scores.mean(merge) for merge in scores.merges}
    way, _, _ = without_rows(apart(case.tasks), len(case.tasks), talks=False)
    chosen, forecast = told(scores, ROWS)
    expected = of_weights(case.tasks, apart(case.tasks), way.method)
    return {
        "family": case.family,
        "seed": case.seed,
        "tasks": list(case.tasks),
        "mean": {method: round(means[method, 1.0], 1) for method in METHODS},
        "worst": {method: round(min(of.values()), 1) for method, of in shares.items()},
        "best": round(max(means[method, 1.0] for method in METHODS), 1),
        "best at any λ": round(max(means.values()), 1),
        "without rows": _advised(scores, (way.name, 1.0), expected),
        "with rows": _advised(scores, chosen, forecast),
        "behind by sign": by_other_signs(scores, ROWS),
    }


def by_other_signs(scores: Scores, rows: int) -> dict[str, float]:
    """Points behind the best of METHODS, at the λ of their rules, of the one that each sign in the rows would name."""
    some = slice(rows)

    def standing(merge: tuple[str, float], task: str) -> float:
        alike = scores.alike(merge, task, some)
        return alike if words.task_of(task).labels == 1 else DIFFERS + (1 - DIFFERS) * alike

    signs = {
        "answers alike, others count 0.7": standing,
        "expected share": lambda merge, task: scores.kept(merge, task, some),
        "answers alike": lambda merge, task: scores.alike(merge, task, some),
        "distance of outputs": lambda merge, task: -scores.lost(merge, task, some),
    }
    means = {method: scores.mean((method, 1.0)) for method in METHODS}
    named = {
        sign: max(METHODS, key=lambda method: fmean(of((method, 1.0), task) for task in scores.case.tasks))
        for sign, of in signs.items()
    }
    return {sign: round(max(means.values()) - means[method], 1) for sign, method in named.items()}


def _advised(scores: Scores, merge: tuple[str, float], forecast: Sequence[SkillForecast]) -> dict[str, Any]:
    shares = [scores.share(merge, task) for task in scores.case.tasks]
    return _compared(*merge, shares, [100 * (one.share or 0.0) for one in forecast])


def _compared(merge: str, factor: float, shares: Sequence[float], expected: Sequence[float]) -> dict[str, Any]:
    return {
        "merge": merge,
        "factor": factor,
        "mean": round(fmean(shares), 1),
        "expected": round(fmean(expected), 1),
        "errors": [round(ours - own, 1) for ours, own in zip(expected, shares, strict=True)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--fits", action="store_true", help="run what `recommend` advises with rows; minutes each")
    parser.add_argument("--docs", action="store_true", help="only write docs/ from the results")
    asked = parser.parse_args()
    from benchmarks.pruning.quality import quiet

    quiet()
    torch.set_num_threads(1)
    every = list(cases(list(FAMILIES)))
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    fits: dict[str, Any] = known.get("fits", {})

    @cache
    def family(name: str, seed: int) -> words.Family:
        return words.Family(FAMILIES[name], "test", TEST, seed)

    judged = cache(summary)

    def keep() -> None:
        some = [judged(case) | fits.get(case.name, {}) for case in every if case.path.exists()]
        write(FILE, surroundings({"python": sys.executable}) | {"fits": fits, "cases": some})
        pages.write_cases(some)

    for case in every:
        if asked.docs or (asked.families and case.family not in asked.families):
            continue
        if not case.path.exists():
            measure(family(case.family, case.seed), case)
            print(case.name, file=sys.stderr, flush=True)
        if asked.fits and case.name not in fits:
            fits[case.name] = {"with rows, fits": fitted(family(case.family, case.seed), case)}
            print(case.name, fits[case.name], file=sys.stderr, flush=True)
            keep()
    keep()


if __name__ == "__main__":
    main()
