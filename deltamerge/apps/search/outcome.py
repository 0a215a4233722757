"""Measure the goals of a study: of candidates in memory or, by a command, of merged folders."""

from __future__ import annotations

import io
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamerge.apps.search.candidates import RecipeCandidate, RecipeCandidates
from deltamerge.apps.search.folder import make_folder
from deltamerge.apps.search.judge import Part, Scores, StudyJudge, is_lower, judged_by, relative, worth
from deltamerge.calibrate.model.transformers_code import quiet
from deltamerge.calibrate.spec import Calibrated
from deltamerge.engine.devices import torch_device
from deltamerge.errors import DeltamergeError, InputError
from deltamerge.errors.shown import shown
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.schema import Command, LmEval, Recipe, Study
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options

LONGEST = 1 << 24
SAID = 200


def words_of(command: Command) -> list[str]:
    """Return the program and its arguments. InputError: none has {folder}, or quotes are open."""
    try:
        words = shlex.split(command.run) if isinstance(command.run, str) else list(command.run)
    except ValueError as error:
        raise InputError(f"study.objective.command.run: {error}", hint="close the quote, or give a list") from None
    if not any("{folder}" in word for word in words):
        raise InputError("study.objective.command.run: has no {folder}", hint="lm_eval … pretrained={folder}")
    return words


def value_of(command: Command, folder: Path, here: Path) -> float:
    """Return the number that a command prints about `folder`. It runs in `here`.

    InputError, in one line: it cannot be started, fails, takes too long, or prints no such number.
    """
    words = [word.replace("{folder}", str(folder)) for word in words_of(command)]
    name = shown(words[0])
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=here, start_new_session=True
            )
        except OSError as error:
            raise InputError(f"{name}: cannot be started: {error.strerror}") from None
        try:
            code = process.wait(command.timeout)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{name}: ended after {command.timeout} s", hint="study.objective.command.timeout"
            ) from None
        finally:
            _end(process)
        said, complained = _text(out), _text(err)
    if code:
        last = next((line for line in reversed(complained.splitlines()) if line.strip()), "it says nothing")
        raise InputError(f"{name}: exit code {code}: {shown(last.strip(), SAID)}")
    return _number(said, command.value.split("."), name)


def load_lm_eval() -> Any:
    """Import lm-evaluation-harness. InputError: it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise InputError("lm-evaluation-harness is not installed", hint="pip install 'deltamerge[lm-eval]'") from None
    return lm_eval


def lm_eval_value(asked: LmEval, folder: Path, here: Path, device: str) -> float:
    """Return the mean over tasks of the figures that lm-evaluation-harness gives the model in `folder`.

    `here` is the folder with the user's own tasks. InputError, in one line: a task is not known, or fails, or has no
    such metric.
    """
    harness = load_lm_eval()
    own = None if asked.folder is None else str(here / asked.folder)
    try:
        with quiet(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            found = harness.simple_evaluate(
                model="hf",
                model_args={"pretrained": str(folder), "device": device},
                tasks=list(asked.tasks),
                task_manager=harness.tasks.TaskManager(include_path=own, verbosity="ERROR"),
                num_fewshot=asked.few_shot,
                limit=asked.limit,
                batch_size=asked.batch,
                log_samples=False,
                bootstrap_iters=0,
            )
    except Exception as error:
        raise InputError(f"lm_eval: {shown(' '.join(str(error).split()) or type(error).__name__, SAID)}") from None
    values = []
    for task in asked.tasks:
        scores = {**found.get("groups", {}), **found["results"]}.get(task, {})
        by_name = {key.partition(",")[0]: value for key, value in scores.items()}
        value = by_name.get(asked.metric)
        if not isinstance(value, int | float):
            known = ", ".join(n for n, v in by_name.items() if isinstance(v, int | float) and "stderr" not in n)
            raise InputError(f"lm_eval: {task} has no {asked.metric}", hint=f"study.objective.lm_eval.metric: {known}")
        values.append(float(value))
    return sum(values) / len(values)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a program and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _text(file: Any) -> str:
    file.seek(0, os.SEEK_END)
    file.seek(max(0, file.tell() - LONGEST))
    return str(file.read().decode("utf-8", "replace"))


def _number(said: str, keys: Sequence[str], name: str) -> float:
    found = _last_json(said)
    if found is None:
        raise InputError(f"{name}: prints no JSON object: {shown(said.strip()[-80:] or 'nothing', SAID)}")
    value: Any = found
    at: list[str] = []
    rest = list(keys)
    while rest:
        if not isinstance(value, dict):
            break
        # a key may hold dots itself, or commas: lm-eval's "acc,none"
        here = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in value), 0)
        if not here:
            known = ", ".join(map(shown, list(value)[:8]))
            raise InputError(f"{name}: its JSON has no {'.'.join([*at, rest[0]])}", hint=f"there: {known}")
        at.append(".".join(rest[:here]))
        value, rest = value[at[-1]], rest[here:]
    if rest or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}: {'.'.join(keys)} is no finite number: {shown(json.dumps(value), 80)}")
    return float(value)


def _last_json(said: str) -> dict[str, Any] | None:
    """Return the last JSON object that begins a line."""
    decoder = json.JSONDecoder()
    at = len(said)
    while (at := said.rfind("{", 0, at)) >= 0:
        if at and said[at - 1] != "\n":
            continue
        with suppress(ValueError, RecursionError):
            value, _ = decoder.raw_decode(said, at)
            if isinstance(value, dict):
                return value
    return None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The worth of a candidate: a number for each goal, every fine-tune's scores, or the reason of its failure."""

    values: tuple[float, ...] = ()
    scores: Scores = field(default_factory=dict)
    error: str | None = None


class Bench:
    """Measures the candidates of a template: values by place -> `Outcome`.

    lower   of each goal whether less is better
    judges  of each choice of fine-tunes, base and rows; most templates have one
    """

    def __init__(
        self,
        file: TemplateFile,
        first: Mapping[Loc, Any],
        candidates: RecipeCandidates,
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
            if goal.lm_eval is not None:
                load_lm_eval()
                if goal.lm_eval.folder is not None and not commands:
                    said = f"the study's tasks in {goal.lm_eval.folder} may run programs, as this user"
                    raise InputError(f"{file.path}: {said}", hint="--allow-command")
        self.inside = [goal for goal in self.goals if goal.of_folder is None]
        self.judges: dict[str, StudyJudge] = {}
        judge = self.judge(recipe)
        self.lower = tuple(is_lower(goal, judged_by(judge) if judge else {}) for goal in self.goals)

    def judge(self, recipe: Recipe) -> StudyJudge | None:
        """Return the judge of a recipe's fine-tunes. None where commands alone judge."""
        if not self.inside:
            return None
        rows = {i: calibration for i in recipe.fine_tunes if (calibration := recipe.calibration_of(i)) is not None}
        tunes = [[recipe.names[i], recipe.models[i].model, rows[i].model_dump() if i in rows else None]
                 for i in recipe.fine_tunes]  # fmt: skip
        key = json.dumps([recipe.base_model, tunes], sort_keys=True)
        if key not in self.judges:
            self.judges[key] = StudyJudge(self.candidates, recipe, self.study, self.inside)
        return self.judges[key]

    def close(self) -> None:
        """Close the files."""
        for judge in self.judges.values():
            judge.close()

    def rows(self, part: Part) -> dict[str, int]:
        """Return the number of rows of each fine-tune."""
        return {name: count for judge in self.judges.values() for name, count in judge.rows(part).items()}

    def references(self, part: Part) -> dict[str, dict[str, Mapping[str, float]]]:
        """Return the scores of the base and the fine-tunes."""
        found: dict[str, dict[str, Mapping[str, float]]] = {}
        for judge in self.judges.values():
            for kind, scores in judge.references(part).items():
                found.setdefault(kind, {}).update(scores)
        return found

    def reference_goals(self, part: Part) -> dict[str, dict[str, float]]:
        """Return the values of the base and the fine-tunes by each goal that is judged in memory."""
        found: dict[str, dict[str, float]] = {}
        for judge in self.judges.values():
            known = judge.references(part)
            for kind, scores in known.items():
                own = {name: relative(one, known["base"][name]) for name, one in scores.items()}
                values = {goal.name: worth(goal, own, judged_by(judge)) for goal in self.inside}
                found.setdefault(kind, {}).update(values)
        return found

    def calibrated(self, values: Mapping[Loc, Any]) -> dict[str, Calibrated]:
        """Return the q's of a candidate that was measured, by the names of their stages."""
        recipe = self.file.recipe(values)
        judge = self.judge(recipe)
        return {} if judge is None else judge.calibrated(recipe)

    def measure(self, some: Sequence[Mapping[Loc, Any]], part: Part, work: Path) -> list[Outcome]:
        """Return the outcomes of candidates.

        The fault of a candidate is its outcome. `work` is a folder for the folders of commands.
        """
        found: list[Outcome | None] = [None] * len(some)
        made: dict[StudyJudge, dict[int, RecipeCandidate]] = {}
        for i, values in enumerate(some):
            try:
                recipe = self.file.recipe(values)
                judge = self.judge(recipe)
                if judge is not None:
                    candidate = self.candidates.of(recipe)
                    judge.prepare(candidate)
                    made.setdefault(judge, {})[i] = candidate
            except DeltamergeError as error:
                found[i] = Outcome(error=one_line(error))
        scores: dict[int, Scores] = {}
        metrics: dict[int, Mapping[str, str]] = {}
        for judge, own in made.items():
            metrics |= dict.fromkeys(own, judged_by(judge))
            try:
                scores |= zip(own, judge.scores(list(own.values()), part), strict=True)
            except DeltamergeError as error:
                for i in own:  # one by one, to find the faulty candidate
                    alone = len(own) == 1
                    found[i] = Outcome(error=one_line(error)) if alone else self.measure([some[i]], part, work)[0]
        for i, values in enumerate(some):
            if found[i] is None:
                found[i] = self._outcome(values, scores.get(i, {}), metrics.get(i, {}), work)
        return [one for one in found if one is not None]

    def _outcome(self, values: Mapping[Loc, Any], scores: Scores, metrics: Mapping[str, str], work: Path) -> Outcome:
        numbers: list[float] = []
        folder: Path | None = None
        try:
            for goal in self.goals:
                judge = goal.of_folder
                if judge is None:
                    numbers.append(worth(goal, scores, metrics))
                    continue
                if folder is None:
                    folder = work / "candidate"
                    shutil.rmtree(folder, ignore_errors=True)
                    make_folder(self.file.file(values), self.calibrated(values), self.options, folder)
                where, here = folder.resolve(), self.candidates.folder
                if isinstance(judge, Command):
                    numbers.append(value_of(judge, where, here))
                else:
                    numbers.append(lm_eval_value(judge, where, here, str(torch_device(self.candidates.options.device))))
        except DeltamergeError as error:
            return Outcome(scores=scores, error=one_line(error))
        finally:
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
        if any(number != number for number in numbers):
            return Outcome(scores=scores, error="the objective is not a number")
        return Outcome(tuple(numbers), scores)


def one_line(error: DeltamergeError) -> str:
    """Return an error on one line."""
    return " ".join(str(error).split())


def best_of(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> int | None:
    """Return the first of `ranked`."""
    return next(iter(rank(outcomes, lower)), None)


def rank(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> list[int]:
    """Return candidates that did not fail, the best first.

    One goal ranks by itself. Several rank by the distance from the best of each, every goal scaled to [0, 1].
    """
    costs = _costs(outcomes, lower)
    if len(lower) == 1:
        return sorted(costs, key=lambda i: (costs[i][0], i))
    least = [min(several) for several in zip(*costs.values(), strict=True)]
    most = [max(several) for several in zip(*costs.values(), strict=True)]

    def distance(i: int) -> float:
        return sum(((c - a) / (b - a)) ** 2 if b > a else 0.0 for c, a, b in zip(costs[i], least, most, strict=True))

    return sorted(costs, key=lambda i: (distance(i), i))


def pareto(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> list[int]:
    """Return the Pareto front: no other candidate betters one in a goal without being worse in another."""
    costs = _costs(outcomes, lower)

    def beaten(i: int) -> bool:
        return any(
            all(a <= b for a, b in zip(other, costs[i], strict=True)) and other != costs[i] for other in costs.values()
        )

    return [i for i in costs if not beaten(i)]


def _costs(outcomes: Sequence[Outcome], lower: Sequence[bool]) -> dict[int, list[float]]:
    """Return the goals of every candidate that did not fail. Less is better."""
    done = {i: one.values for i, one in enumerate(outcomes) if one.error is None and one.values}
    return {i: [v if low else -v for v, low in zip(values, lower, strict=True)] for i, values in done.items()}
