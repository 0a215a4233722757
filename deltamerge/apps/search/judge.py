"""Judges candidates on the rows of their fine-tunes, each by its own head, without writing any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch

from deltamerge import errors
from deltamerge.apps.search.candidates import RecipeCandidate, RecipeCandidates
from deltamerge.apps.search.evaluate import ALL_ROWS
from deltamerge.apps.search.tasks import (
    AGREEMENT,
    DISTANCE,
    LOWER,
    UNLABELLED,
    ScoredTask,
    Sheet,
    measured,
    refuse_unknown,
)
from deltamerge.apps.search.walk import Walk
from deltamerge.calibrate.model.blocks import Weights
from deltamerge.calibrate.rows.rows import DataRow, rows_of, select, split
from deltamerge.calibrate.values import Spooled
from deltamerge.engine import backends
from deltamerge.engine.execute import shared_values
from deltamerge.errors import InputError
from deltamerge.recipe.schema import Goal, Recipe, Study
from deltamerge.tensors.names import resident_size
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

Part = Literal["first", "search", "held"]
"""Rows: a quarter of those that are searched on, all of them, those that decide."""
Scores = Mapping[str, Mapping[str, float]]
"""By fine-tune and measure."""
QUARTER = 4


class StudyJudge:
    """Judges the candidates of a recipe by the measures of its `study`.

    start       a candidate; all others are of the same fine-tunes
    references  what the base and the fine-tunes themselves score, by part of the rows
    """

    def __init__(self, candidates: RecipeCandidates, recipe: Recipe, study: Study, goals: Sequence[Goal]) -> None:
        self.candidates, self.study = candidates, study
        self.device = candidates.options.device
        self._held = ExitStack()
        self.reader = self._held.enter_context(Reader())
        self.known: dict[Node, Any] = {}
        self.start = candidates.of(recipe)
        inputs = candidates.inputs(recipe)
        self.tasks: dict[int, ScoredTask] = {}
        for tune in inputs.tunes:
            if tune.index is None or tune.index not in recipe.fine_tunes:
                continue
            calibration = recipe.calibration_of(tune.index)
            if calibration is None:
                hint = "calibration: {data: rows.jsonl}, or beside the model"
                raise InputError(f"{tune.name}: has no rows to be judged on", hint=hint)
            self.tasks[tune.index] = ScoredTask(
                tune.name,
                tune.checkpoint,
                calibration,
                candidates.folder,
                self.reader,
                self.device,
            )
        self.seed = recipe.seed
        self.wanted = {index: self._measures(task, goals) for index, task in self.tasks.items()}
        self._rows: dict[int, dict[Part, list[DataRow]]] = {}
        self._sheets: dict[Part, dict[int, Sheet]] = {}
        self.references: dict[Part, dict[str, Scores]] = {}
        self.budget = self._resident()

    def close(self) -> None:
        """Close the files."""
        self._held.close()
        for value in self.known.values():
            if isinstance(value, Spooled):
                value.remove()

    @property
    def dtype(self) -> torch.dtype | None:
        """Return the dtype of candidates' tensors: float32 where every product is in it, else as they are."""
        precise = all(task.model.precision == "float32" for task in self.tasks.values())
        return torch.float32 if precise else None

    def rows(self, part: Part) -> dict[str, int]:
        """Return the number of rows of each fine-tune."""
        return {self.tasks[index].name: sheet.rows for index, sheet in self._sheet(part).items()}

    def scores(self, candidates: Sequence[RecipeCandidate], part: Part) -> list[Scores]:
        """Return the measures of every candidate. `study.together` of them share a walk."""
        found: list[Scores] = []
        for at in range(0, len(candidates), self.study.together):
            found += self._walk(candidates[at : at + self.study.together], part)
        return found

    def _walk(self, some: Sequence[RecipeCandidate], part: Part) -> list[Scores]:
        sheets = self._sheet(part)
        for candidate in some:
            self.prepare(candidate)
        walk = Walk(some, self.reader, self.known, self.device, self.budget, self.dtype)
        variants = [[walk.weights(k, index, self.tasks[index]) for k in range(len(some))] for index in sheets]
        with backends.quiet_allocator(whole=True):
            by_task = measured([(self.tasks[index], sheet) for index, sheet in sheets.items()], variants)
        worth = self.references[part]["base"]
        found: list[Scores] = []
        for k in range(len(some)):
            own = {self.tasks[i].name: of_task[k] for i, of_task in zip(sheets, by_task, strict=True)}
            found.append({name: _relative(scores, worth[name]) for name, scores in own.items()})
        return found

    def prepare(self, candidate: RecipeCandidate) -> None:
        """Run the stages of a candidate that no other has run: activations, q's."""
        if any(node not in self.known for node in candidate.stages):
            found = shared_values(candidate.stages, self.known)
            self.known |= {node: found[node] for node in candidate.stages}

    def _sheet(self, part: Part) -> dict[int, Sheet]:
        """Return the rows of a part, and the fine-tunes' own outputs on them."""
        if part not in self._sheets:
            made = {}
            for index, task in self.tasks.items():
                metrics, compared = self.wanted[index]
                made[index] = task.sheet(self._of(index)[part], metrics, compared)
            self._sheets[part] = made
            self.references[part] = self._references(made)
        return self._sheets[part]

    def _references(self, sheets: Mapping[int, Sheet]) -> dict[str, Scores]:
        """Return the scores of the base, with the fine-tune's head, and of the fine-tune."""
        found: dict[str, dict[str, Mapping[str, float]]] = {"base": {}, "fine-tune": {}}
        for index, sheet in sheets.items():
            task = self.tasks[index]
            ((base, own),) = measured([(task, sheet)], [[self._base(index), task.own]])
            found["base"][task.name], found["fine-tune"][task.name] = base, own
        return dict(found)

    def _base(self, index: int) -> Weights:
        task, places = self.tasks[index], self.start.places[index]

        def of(names: Sequence[str]) -> dict[str, Any]:
            bases = {name: self.start.merges[places[name]].base for name in names if name in places}
            infos = {name: bases.get(name) or task.checkpoint.tensors[name] for name in names}
            return {name: task.stored(info) for name, info in infos.items()}

        return of

    def _of(self, index: int) -> dict[Part, list[DataRow]]:
        """Return the rows of a fine-tune."""
        if index not in self._rows:
            task, test = self.tasks[index], self.study.test
            labelled = bool(self.wanted[index][0])
            with errors.context(task.name):
                search, held = split(task.calibration, task.folder, self.seed, task.settings, labelled=labelled)
                file = test if isinstance(test, str) or test is None else test.get(task.name)
                if file is not None:
                    calibration = task.calibration.model_copy(update={"data": file})
                    held = rows_of(calibration, task.folder, task.settings, labelled=labelled, limit=ALL_ROWS)
            few = select(search, max(1, math.ceil(len(search) / QUARTER)), self.seed)
            self._rows[index] = {"first": few, "search": search, "held": held}
        return self._rows[index]

    @staticmethod
    def _measures(task: ScoredTask, goals: Sequence[Goal]) -> tuple[list[str], frozenset[str]]:
        """Return the metrics that a fine-tune is judged by, and the measures without labels."""
        asked = [goal.by for goal in goals if goal.command is None and goal.of in (None, task.name)]
        named = (task.metric if by == "metric" else by for by in asked if by not in UNLABELLED)
        metrics = list(dict.fromkeys(named))
        refuse_unknown(metrics, task)
        return metrics, UNLABELLED & set(asked)

    def _resident(self) -> int:
        """Return the bytes of the stored tensors and deltas of one part, and of those outside blocks."""
        sizes: dict[str, int] = {}
        for name, merge in self.start.merges.items():
            infos = [info for info in (merge.base, *(tensor for _, tensor in merge.sources)) if info is not None]
            sizes[name] = sum(info.nbytes for info in infos) + 4 * len(merge.sources) * math.prod(merge.shape)
        shapes = {name: merge.shape for name, merge in self.start.merges.items()}
        return resident_size(shapes, sizes)


def _relative(scores: Mapping[str, float], base: Mapping[str, float]) -> dict[str, float]:
    """Return scores with the agreement as a share of the base's distance: 0 is the fine-tune, 1 is the base."""
    found = dict(scores)
    if DISTANCE in found:
        found[DISTANCE] = found[DISTANCE] / base[DISTANCE] if base[DISTANCE] > 0 else found[DISTANCE]
    return found


def worth(goal: Goal, scores: Scores, metrics: Mapping[str, str]) -> float:
    """Return the value of a goal: one fine-tune's, or the weighted mean or the worst of all.

    `metrics` are the fine-tunes' own.
    """
    of = {name: own[_key(goal, metrics[name])] for name, own in scores.items() if goal.of in (None, name)}
    if goal.over == "minimum":
        return max(of.values()) if is_lower(goal, metrics) else min(of.values())
    weights = {name: goal.weights.get(name, 1.0) for name in of}
    return sum(weights[name] * value for name, value in of.items()) / sum(weights.values())


def _key(goal: Goal, metric: str) -> str:
    """Return the name of a fine-tune's score in a goal. `metric` is the fine-tune's own."""
    return {"metric": metric, AGREEMENT: DISTANCE}.get(goal.by, goal.by)


def is_lower(goal: Goal, metrics: Mapping[str, str]) -> bool:
    """Return whether less of a goal is better. InputError: the fine-tunes' metrics point in different ways."""
    if goal.command is not None:
        return goal.command.direction == "minimize"
    if goal.by != "metric":
        return goal.by in LOWER
    ways = {metrics[name] in LOWER for name in metrics if goal.of in (None, name)}
    if len(ways) > 1:
        raise InputError(
            "study.objective: the fine-tunes' metrics differ, of some of which more is better and of others less",
            hint="give each `of:` it, or set calibration.metric",
        )
    return ways.pop()


def judged_by(judge: StudyJudge) -> dict[str, str]:
    """Return the fine-tunes' own metrics. "": none is needed."""
    return {task.name: (task.metric if judge.wanted[i][0] else "") for i, task in judge.tasks.items()}
