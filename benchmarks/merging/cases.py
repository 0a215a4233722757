"""Whether `recommend` names the best merge: every two, three and four experts of the families of words.py, two seeds.

    python -m benchmarks.merging.cases            every case that is not measured; about a minute each
    python -m benchmarks.merging.cases report     of one family
    python -m benchmarks.merging.cases --docs     only the tables of docs/measurements/merging.md

A case is some experts of one family and seed. Each method of METHODS merges them once, and λ is tried in memory: on
test rows for the truth, on 50 validation rows for the advice that sees rows, without their labels. What `recommend`
would say of a case is asked of its own functions. Outputs are kept under WORK, so that the advice can be judged anew.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import RESULTS
from benchmarks.merging import word_tasks, words
from deltamerge.calibrate.q.objectives import discord, divergence
from deltamerge.methods.merge.core_space import Held
from deltamerge.methods.registry import MERGE
from deltamerge.plan.delta_graph import matrix_form
from deltamerge.tensors.traits import function_of

FILE = RESULTS / "merging_cases.json"
FAMILIES = words.FAMILIES | {"words": (*words.FAMILIES["report"], "name", "part-of-speech")}
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

    def keep(what: str, factor: float, weights: words.Weights, task: str) -> None:
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
            weights = {key: tensor + rule * factor * added[key] for key, tensor in family.weights.items()}
            for task in case.tasks:
                keep(name, factor, weights, task)
    case.path.parent.mkdir(parents=True, exist_ok=True)
    part = case.path.with_suffix(".part.npz")
    np.savez_compressed(part, **found)
    part.replace(case.path)


def merged(family: words.Family, merge: words.Merge, names: Sequence[str]) -> words.Weights:
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
        return self.outputs["|".join((merge[0], str(merge[1]), task, part))]

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


def told(scores: Scores, rows: int) -> tuple[tuple[str, float], list[SkillForecast]]:
    """The merge that `recommend` names with so many rows a model, and what it expects of it.

    A third of the rows decides, as where a file has no more; λ of each method is chosen on the others.
    """
    names, search, held = scores.case.tasks, slice(rows // 3, rows), slice(rows // 3)
    classes = {task: words.task_of(task).labels for task in names}
    judged = {}
    for method in METHODS:
        lost = {f: fmean(scores.lost((method, f), t, search) for t in names) for f in FACTORS}
        merge = method, min(lost, key=lambda f: lost[f])
        alike = {task: scores.alike(merge, task, held) for task in names}
        own = {task: scores.lost(merge, task, held) for task in names}
        skills = of_answers(names, ALONE, alike, classes, dict.fromkeys(names, held.stop), {})
        judged[merge] = candidate(method, merge[1], own, alike, skills)
    chosen, _, _ = with_rows(judged)
    return chosen, judged[chosen].forecast


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all")
    parser.add_argument("--docs", action="store_true", help="only write docs/ from the results")
    asked = parser.parse_args()
    from benchmarks.pruning.quality import quiet

    quiet()
    torch.set_num_threads(1)
    families: dict[tuple[str, int], words.Family] = {}
    for case in cases(asked.families or list(FAMILIES)):
        if case.path.exists():
            continue
        key = case.family, case.seed
        if key not in families:
            families[key] = words.Family(FAMILIES[case.family], "test", TEST, case.seed)
        measure(families[key], case)
        print(case.name, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
