"""Search values between bounds, and judge candidates in memory, here or on a Ray cluster.

Optuna proposes the values. Rows that no trial has seen decide.
"""

from __future__ import annotations

import json
import os
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from xxhash import xxh3_128

from deltamerge.apps.search.candidates import candidates_of
from deltamerge.apps.search.folder import StudyFolder, check_best, input_facts, refuse_strangers
from deltamerge.apps.search.judge import Part
from deltamerge.apps.search.outcome import Bench, Outcome, best_of, pareto, rank
from deltamerge.apps.search.proposals import (
    decode,
    distributions,
    encode,
    importance,
    load_optuna,
    open_study,
    run_again,
    sampler,
    sampler_of,
)
from deltamerge.apps.search.results import SearchResult, Trial, write
from deltamerge.apps.track import Log, unlogged
from deltamerge.errors import DeltamergeError, InputError, OutputError, RecipeError
from deltamerge.files import progress
from deltamerge.recipe.file import TemplateFile
from deltamerge.recipe.schema import Recipe
from deltamerge.recipe.yaml_source import Loc
from deltamerge.run.options import Options, unwatched
from deltamerge.run.ray import RETRIES, connected, ended, gpus_of, interrupts
from deltamerge.tensors.names import layer_index

if TYPE_CHECKING:
    import optuna


Values = Mapping[Loc, Any]


class PoolWorker:
    """The work of an actor: it opens the models once, and measures."""

    def __init__(self, file: TemplateFile, options: Options, commands: bool) -> None:
        first = file.template.values(file.template.start(), 1)
        self.error: DeltamergeError | None = None
        try:
            self.bench = Bench(file, first, candidates_of(file, options), options, commands=commands)
        except DeltamergeError as error:
            self.error = error

    def pid(self) -> int:
        """Return the id of its process."""
        return os.getpid()

    def measure(self, some: Sequence[Values], part: Part) -> list[Outcome] | DeltamergeError:
        """Return the outcomes, or the error for the user."""
        if self.error is not None:
            return self.error
        with tempfile.TemporaryDirectory(prefix="deltamerge-") as work:
            return self.bench.measure(some, part, Path(work))


class Pool:
    """Actors of a cluster; `size` of them work at a time."""

    def __init__(
        self, ray: Any, file: TemplateFile, options: Options, interrupted: threading.Event, *, commands: bool
    ) -> None:
        self.ray, self.interrupted = ray, interrupted
        workers = options.workers or 1
        self.size = max(1, int(ray.cluster_resources().get("CPU", 1)) // workers)
        gpus, device = gpus_of(options.device)
        needs = {"num_cpus": workers, "num_gpus": gpus}
        asked = replace(options, device=device, workers=workers, watch=unwatched, drawing=None)
        actor = ray.remote(scheduling_strategy="SPREAD", **needs)(PoolWorker)
        self._actor, self._given = actor, (file, asked, commands)
        self.actors: list[Any] = []

    def _start(self) -> Any:
        return self._actor.remote(*self._given)

    def measure(self, some: Sequence[Values], part: Part) -> list[Outcome]:
        """Return the outcomes, in order. If an actor dies, a new one measures its candidates again.

        OutputError: actors die again and again.
        """
        count = min(self.size, len(some))
        while len(self.actors) < count:
            self.actors.append(self._start())
        shares = {i: list(range(i, len(some), count)) for i in range(count)}
        found: dict[int, Outcome] = {}
        for i, numbers in self._outcomes(shares, some, part):
            found |= dict(zip(shares[i], numbers, strict=True))
        return [found[i] for i in range(len(some))]

    def _outcomes(
        self, shares: Mapping[int, Sequence[int]], some: Sequence[Values], part: Part
    ) -> Iterator[tuple[int, list[Outcome]]]:
        deaths = dict.fromkeys(shares, 0)

        def begin(i: int) -> Any:
            return self.actors[i].measure.remote([some[n] for n in shares[i]], part)

        running = {begin(i): i for i in shares}
        while running:
            done = ended(self.ray, list(running), self.interrupted)[0]
            i = running.pop(done)
            try:
                answer = self.ray.get(done)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except self.ray.exceptions.RayError as error:
                deaths[i] += 1
                if deaths[i] > RETRIES:
                    raise OutputError(
                        f"a worker died {deaths[i]} times: {str(error).splitlines()[0]}",
                        hint="if it took too much memory, lower study.together",
                    ) from error
                self.actors[i] = self._start()
                running[begin(i)] = i
                continue
            if isinstance(answer, DeltamergeError):
                raise answer
            yield i, answer


@contextmanager
def pool_of(file: TemplateFile, options: Options, address: str | None, *, commands: bool) -> Iterator[Pool | None]:
    """Return the pool of a cluster. None where no address is given."""
    if address is None:
        yield None
        return
    with connected(address) as ray, interrupts() as interrupted:
        yield Pool(ray, replace(file, path=file.path.resolve()), options, interrupted, commands=commands)


STORAGE = "study.db"
SHORTLIST = 8  # trials that are compared on held-out rows
HOPELESS = 10  # first trials that all fail
FACTS, SCORES, ERROR = "facts", "scores", "error"


def check(file: TemplateFile) -> Recipe:
    """Return the recipe of the first trial.

    RecipeError: no number is open to a search, or one is swept; or the recipe is wrong, at its start or with all
    numbers at a bound.
    """
    source, ranges = file.template.source, file.template.ranges
    if file.template.sweeps:
        hint = f"deltamerge sweep {quote(file.path.name)}"
        raise RecipeError(str(file.path), [source.problem(file.template.sweeps[0].loc, "is to be swept", hint)])
    if not ranges:
        hint = "weight: {search: [0, 1]}"
        raise RecipeError(str(file.path), [source.problem((), "has no values to search", hint)])
    for found in file.template.ends():
        file.recipe(file.template.values(found, 1))
    recipe = file.recipe(file.template.values(file.template.start(), 1))
    refuse_strangers(file, [recipe])
    return recipe


def search(
    file: TemplateFile,
    options: Options,
    out: Path | None = None,
    *,
    trials: int | None = None,
    keep: Literal["best", "none"] = "none",
    force: bool = False,
    commands: bool = False,
    ray: str | None = None,
    log: Log = unlogged,
) -> SearchResult:
    """Search the open values of a template; the study is Optuna's, in `out`/study.db, by default <recipe>-search.

    An interrupted study continues if recipe, models and rows are unchanged; trials that were running when it was killed
    run again. `trials` wins over the recipe's number; `ray` is a cluster that judges candidates. The best recipe and
    its lock are written beside the recipe, its merged folder only if kept. `log` gets the figures and the number of
    every trial, also of earlier trials, and the choice at the end.

    RecipeError: see `check`. InputError: Optuna is missing, the rows cannot judge, or all trials fail.
    """
    optuna = load_optuna()
    recipe = check(file)
    folder = StudyFolder.of(file.path, "search", out)
    options = replace(options, force=force)
    check_best(file.path, force=force)
    with folder.locked(force=force) as there:
        candidates = candidates_of(file, options)
        bench = Bench(file, file.template.values(file.template.start(), 1), candidates, options, commands=commands)
        with closing(bench), pool_of(file, options, ray, commands=commands) as pool:
            layers = layers_of(bench, recipe)
            wanted = bench.study.trials if trials is None else trials
            with open_study(optuna, there / STORAGE, bench.study, bench.lower) as study:
                _same(study, file, bench, options)
                run_again(study)
                if not study.get_trials(deepcopy=False):
                    study.enqueue_trial(encode(file.template.ranges, file.template.start()), user_attrs={"start": True})
                runner = _Runner(optuna, study, file, bench, layers, there, pool, log)
                runner.run(wanted)
                found = runner.finish()
                study.set_user_attr("best", found.chosen.number)
            return write(found, file, bench, options, runner.values(found.chosen.params), keep)


def layers_of(bench: Bench, recipe: Recipe) -> int:
    """Return the number of layers of the merged model, over which groups are spread."""
    inputs = bench.candidates.inputs(recipe)
    numbers = [n for name in inputs.template.tensors if (n := layer_index(name)) is not None]
    return 1 + max(numbers, default=0)


def _same(study: optuna.Study, file: TemplateFile, bench: Bench, options: Options) -> None:
    """Refuse a study of another recipe, other models or other rows."""
    data = {key: value for key, value in file.template.source.data.items() if key != "study"}
    judged = {**(file.template.source.data.get("study") or {}), "trials": None, "together": None}
    given = {"the recipe": xxh3_128(json.dumps([data, judged], sort_keys=True).encode()).hexdigest()}
    given |= input_facts(file, file.template.values(file.template.start(), 1), options)
    known = study.user_attrs.get(FACTS)
    if known is None:
        study.set_user_attr(FACTS, json.loads(json.dumps(given)))
        return
    changed = [n for n in {**known, **given} if known.get(n) != json.loads(json.dumps(given.get(n)))]
    if changed:
        raise InputError(
            f"{bench.file.path}: the study was begun with another {changed[0].removeprefix('the ')}",
            hint="--force begins anew, or give --out",
        )


class _Runner:
    """Asks the study for trials, several at once, has them evaluated, and reports their outcomes."""

    def __init__(
        self,
        optuna: Any,
        study: optuna.Study,
        file: TemplateFile,
        bench: Bench,
        layers: int,
        folder: Path,
        pool: Pool | None,
        log: Log,
    ) -> None:
        self.optuna, self.study, self.file, self.bench = optuna, study, file, bench
        self.layers, self.folder, self.pool, self.log = layers, folder, pool, log
        self.distributions = distributions(optuna, file.template.ranges)

    def run(self, wanted: int) -> None:
        """Run trials until there are `wanted`. InputError: the first trials all fail."""
        settings = self.bench.study
        with progress.phase(f"searching {self.file.path.name}", wanted, "trials") as phase:
            phase.step(min(wanted, len(self._finished_trials())))
            self._tell(0)
            most = settings.together * (self.pool.size if self.pool else 1)
            while (done := len(self._finished_trials())) < wanted:
                size = min(most - done % most, wanted - done)  # a batch that was cut short is asked for as it was
                asked = [self._ask() for _ in range(size)]
                self._evaluate(asked)
                self._tell(done)
                phase.step(size)
                self._hope()

    def _tell(self, first: int) -> None:
        """Log the trials from `first` on."""
        for one in self._finished_trials()[first:]:
            trial = self._trial(one)
            if trial is not None:
                goals = dict(zip((goal.name for goal in self.bench.goals), trial.outcome.values, strict=False))
                self.log({"": goals, "value": trial.params, "score": trial.outcome.scores}, trial.number)

    def _ask(self) -> optuna.Trial:
        """Return the next trial. It follows from the study's seed, the number of trials and their outcomes."""
        study, settings = self.study, self.bench.study
        number = len(study.get_trials(deepcopy=False))
        study.sampler = sampler(self.optuna, settings, number)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return study.ask(self.distributions)

    def _finished_trials(self) -> list[optuna.trial.FrozenTrial]:
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def _hope(self) -> None:
        trials = self._finished_trials()
        if len(trials) >= min(HOPELESS, self.bench.study.trials) and all(t.state.name == "FAIL" for t in trials):
            said = trials[-1].user_attrs.get(ERROR, "no reason given")
            raise InputError(f"{self.file.path}: the first {len(trials)} trials all failed: {said}")

    def values(self, params: Mapping[str, Any]) -> dict[Loc, Any]:
        """Return the values that a trial's numbers put into the recipe."""
        return self.file.template.values(params, self.layers)

    def _evaluate(self, asked: Sequence[optuna.Trial]) -> None:
        alive = list(asked)
        if self.bench.study.pruner != "none":
            alive = self._survivors(alive)
        for trial, outcome in zip(alive, self._outcomes(alive, "search"), strict=True):
            trial.set_user_attr(SCORES, outcome.scores)
            if outcome.error is not None:
                trial.set_user_attr(ERROR, outcome.error)
                self.study.tell(trial, state=self.optuna.trial.TrialState.FAIL)
            else:
                self.study.tell(trial, list(outcome.values))

    def _survivors(self, asked: Sequence[optuna.Trial]) -> list[optuna.Trial]:
        """Return the trials that are not pruned after a quarter of the rows."""
        alive = []
        for trial, outcome in zip(asked, self._outcomes(asked, "first"), strict=True):
            if outcome.error is None:
                trial.report(outcome.values[0], 1)
                if trial.should_prune():
                    trial.set_user_attr(SCORES, outcome.scores)
                    self.study.tell(trial, state=self.optuna.trial.TrialState.PRUNED)
                    continue
            alive.append(trial)
        return alive

    def _outcomes(self, asked: Sequence[optuna.Trial], part: Any) -> list[Outcome]:
        some = [self.values(decode(self.file.template.ranges, trial.params)) for trial in asked]
        if self.pool is not None:
            return list(self.pool.measure(some, part))
        return self.bench.measure(some, part, self.folder)

    def finish(self) -> SearchResult:
        """Return the study's trials, and the best of them on held-out rows."""
        made = (self._trial(one) for one in self.study.get_trials(deepcopy=False))
        trials = [trial for trial in made if trial is not None]
        lower = self.bench.lower
        outcomes = [t.outcome if t.state == "complete" else Outcome(error=t.outcome.error or t.state) for t in trials]
        front = tuple(pareto(outcomes, lower)) if len(lower) > 1 else ()
        best = best_of(outcomes, lower)
        if best is None:
            raise InputError(f"{self.file.path}: no trial is complete: {outcomes[0].error if outcomes else 'none ran'}")
        why = "of all trials"
        if self.bench.inside and not any(goal.of_folder for goal in self.bench.goals):
            trials, best, why = self._decide(trials, outcomes, front)
        goals = dict(zip((goal.name for goal in self.bench.goals), lower, strict=True))
        parts: list[Part] = ["search", "held"] if self.bench.inside else []
        chosen = trials[best].held or trials[best].outcome
        self.log({"best": {"trial": trials[best].number, **dict(zip(goals, chosen.values, strict=True))}}, len(trials))
        return SearchResult(
            folder=self.folder,
            storage=self.folder / STORAGE,
            goals=goals,
            trials=tuple(trials),
            best=best,
            front=front,
            why=why,
            importance=importance(self.optuna, self.study),
            rows={part: self.bench.rows(part) for part in parts},
            references={part: self.bench.references(part) for part in parts},
            sampler=sampler_of(self.bench.study),
            models=self.file.recipe(self.values(trials[best].params)).names,
        )

    def _trial(self, one: optuna.trial.FrozenTrial) -> Trial | None:
        names = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        if one.state.name not in names:
            return None
        params = decode(self.file.template.ranges, one.params)
        values = tuple(one.values or ()) if one.state.name == "COMPLETE" else ()
        outcome = Outcome(values, one.user_attrs.get(SCORES, {}), one.user_attrs.get(ERROR))
        return Trial(one.number, params, outcome, names[one.state.name])

    def _decide(
        self, trials: list[Trial], outcomes: Sequence[Outcome], front: Sequence[int]
    ) -> tuple[list[Trial], int, str]:
        """Return the trials, with held-out outcomes where they were compared, and the index of the best there."""
        lower = self.bench.lower
        order = rank(outcomes, lower)
        if front:
            order = [i for i in order if i in front]
        distinct: dict[str, int] = {}
        for i in order:
            distinct.setdefault(str(sorted(trials[i].params.items())), i)
        some = list(distinct.values())[:SHORTLIST]
        compared = f"of the {len(some)} best trials"
        if outcomes[0].error is None:
            compared += " and the start"
            some += [0] if 0 not in some else []
        values = [self.values(trials[i].params) for i in some]
        held = self.bench.measure(values, "held", self.folder)
        chosen = best_of(held, lower)
        if chosen is None:
            raise InputError(f"{self.file.path}: the best trials fail on held-out rows: {held[0].error}")
        for i, outcome in zip(some, held, strict=True):
            trials[i] = replace(trials[i], held=outcome)
        rows = self.bench.rows("held")
        counted = ", ".join(f"{count} of {name.removeprefix('./')}" for name, count in rows.items())
        return trials, some[chosen], f"{compared} on held-out rows ({counted})"
