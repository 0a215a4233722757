"""The goals of a study as numbers, of candidates that are judged in memory or, by a command, as folders."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamerge.calibrate.spec import Calibrated
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.study_keys import Study
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options
from deltamerge.search.candidates import Candidate, Candidates
from deltamerge.search.command import value_of, words_of
from deltamerge.search.judge import Judge, Part, Scores, is_lower, judged_by, worth
from deltamerge.search.kept import make_folder


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a candidate is worth: a number for each goal, every fine-tune's scores, or why it failed."""

    values: tuple[float, ...] = ()
    scores: Scores = field(default_factory=dict)
    error: str | None = None


class Bench:
    """Measures the candidates of a template: values by place -> `Outcome`.

    lower   of each goal whether less is better
    """

    def __init__(
        self,
        file: TemplateFile,
        first: Mapping[Loc, Any],
        candidates: Candidates,
        options: Options,
        *,
        commands: bool = False,
    ) -> None:
        self.file, self.candidates, self.options = file, candidates, options
        recipe = file.recipe(first)
        self.study = recipe.study or Study.model_validate({})
        self.goals = self.study.goals
        for goal in self.goals:
            if goal.command is not None:
                words = words_of(goal.command)
                if not commands:
                    raise InputError(f"{file.path}: the study runs {words[0]}, as this user", hint="--allow-command")
        inside = [goal for goal in self.goals if goal.command is None]
        self.judge = Judge(candidates, recipe, self.study, inside) if inside else None
        self.metrics = judged_by(self.judge) if self.judge is not None else {}
        self.lower = tuple(is_lower(goal, self.metrics) for goal in self.goals)

    def close(self) -> None:
        """Close the files."""
        if self.judge is not None:
            self.judge.__exit__(None, None, None)

    @property
    def folder(self) -> Path:
        """The recipe's."""
        return self.candidates.folder

    def calibrated(self, values: Mapping[Loc, Any]) -> dict[str, Calibrated]:
        """The q's of a candidate that was measured, by the names of their stages."""
        if self.judge is None:
            return {}
        stages = self.candidates.of(self.file.recipe(values)).stages
        known = {node: self.judge.known[node] for node in stages if node in self.judge.known}
        return {node.parameter("spec").name: value for node, value in known.items() if isinstance(value, Calibrated)}

    def measure(self, some: Sequence[Mapping[Loc, Any]], part: Part, work: Path) -> list[Outcome]:
        """The outcomes of candidates; a fault of one is its outcome. `work` is a folder for what commands are given."""
        found: list[Outcome | None] = [None] * len(some)
        made: dict[int, Candidate] = {}
        for i, values in enumerate(some):
            try:
                recipe = self.file.recipe(values)
                if self.judge is not None:
                    made[i] = self.candidates.of(recipe)
                    self.judge.prepare(made[i])
            except DeltamergeError as error:
                found[i] = Outcome(error=one_line(error))
                made.pop(i, None)
        by_place: dict[int, Scores] = {}
        if self.judge is not None and made:
            try:
                by_place = dict(zip(made, self.judge.scores(list(made.values()), part), strict=True))
            except DeltamergeError as error:
                if len(made) == 1:
                    found[next(iter(made))] = Outcome(error=one_line(error))
                else:  # whose fault it is
                    for i in made:
                        (found[i],) = self.measure([some[i]], part, work)
        for i, values in enumerate(some):
            if found[i] is None:
                found[i] = self._outcome(values, by_place.get(i, {}), work)
        return [one for one in found if one is not None]

    def _outcome(self, values: Mapping[Loc, Any], scores: Scores, work: Path) -> Outcome:
        numbers: list[float] = []
        folder: Path | None = None
        try:
            for goal in self.goals:
                if goal.command is None:
                    numbers.append(worth(goal, scores, self.metrics))
                    continue
                if folder is None:
                    folder = work / "candidate"
                    shutil.rmtree(folder, ignore_errors=True)
                    make_folder(self.file.file(values), self.calibrated(values), self.options, folder)
                numbers.append(value_of(goal.command, folder.resolve(), self.folder))
        except DeltamergeError as error:
            return Outcome(scores=scores, error=one_line(error))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        if any(number != number for number in numbers):
            return Outcome(scores=scores, error="the objective is not a number")
        return Outcome(tuple(numbers), scores)


def one_line(error: DeltamergeError) -> str:
    """An error on one line."""
    return " ".join(str(error).split())


def best_of(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> int | None:
    """The first of `ranked`."""
    return next(iter(ranked(outcomes, lower)), None)


def ranked(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> list[int]:
    """Candidates that did not fail, the best first: by the goal or, of several, by the distance from the best of each,
    every goal scaled to [0, 1]."""
    done = [i for i, one in enumerate(outcomes) if one.error is None and one.values]
    costs = {i: [v if low else -v for v, low in zip(outcomes[i].values, lower, strict=True)] for i in done}
    if len(lower) == 1:
        return sorted(done, key=lambda i: (costs[i][0], i))
    least = [min((costs[i][n] for i in done), default=0.0) for n in range(len(lower))]
    most = [max((costs[i][n] for i in done), default=0.0) for n in range(len(lower))]

    def distance(i: int) -> float:
        return sum(((c - a) / (b - a)) ** 2 if b > a else 0.0 for c, a, b in zip(costs[i], least, most, strict=True))

    return sorted(done, key=lambda i: (distance(i), i))


def pareto(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> list[int]:
    """The candidates that no other betters in one goal without being worse in another, in order."""
    done = [i for i, one in enumerate(outcomes) if one.error is None and one.values]
    costs = {i: [v if low else -v for v, low in zip(outcomes[i].values, lower, strict=True)] for i in done}

    def beaten(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(costs[j], costs[i], strict=True)) and costs[j] != costs[i]
            for j in done
            if j != i
        )

    return [i for i in done if not beaten(i)]
