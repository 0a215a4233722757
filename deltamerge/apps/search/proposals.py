"""Optuna's part of a search: the study in its file, samplers, pruners, and the importance of each number."""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.recipe.open_values import Range
from deltamerge.recipe.schema import Study

if TYPE_CHECKING:
    import optuna

NAME = "deltamerge"
STARTUP = {"cmaes": 8, "gp": 16, "tpe": 8}  # first trials, which spread
WIDTH = 0.15  # of a range: the deviation of the first trials near the best


def load_optuna() -> Any:
    try:
        import optuna
    except ModuleNotFoundError:
        raise InputError("a search needs Optuna", hint="pip install 'deltamerge[search]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    return optuna


@contextmanager
def open_study(optuna: Any, path: Path, study: Study, lower: Sequence[bool]) -> Iterator[optuna.Study]:
    """Open the study in a SQLite file, which is made if missing.

    InputError: the file is no study, or has other objectives.
    """
    directions = ["minimize" if low else "maximize" for low in lower]
    storage = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna warns that half its arguments are experimental
            storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
            made = optuna.create_study(
                storage=storage,
                study_name=NAME,
                directions=directions,
                load_if_exists=True,
                pruner=_pruner(optuna, study),
            )
    except Exception as error:
        raise InputError(f"{path}: cannot be opened as a study: {str(error).splitlines()[0]}", hint="--force") from None
    try:
        if [direction.name.lower() for direction in made.directions] != directions:
            raise InputError(f"{path}: is the study of other objectives", hint="--force makes it anew, or give --out")
        yield made
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _pruner(optuna: Any, study: Study) -> Any:
    if study.pruner == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=8)
    if study.pruner == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=4)
    return optuna.pruners.NopPruner()


def sampler_of(study: Study) -> str:
    """Return the name of the sampler."""
    return study.sampler or ("nsga2" if len(study.goals) > 1 else "tpe")


def sampler(optuna: Any, study: Study, number: int) -> Any:
    """Return Optuna's sampler of the trial `number`.

    The first trials are spread by Sobol's sequence. Of tpe's trials then every second is near the best. The sampler
    depends on the study's seed, the number and the trials before it alone, so a study that goes on proposes the same.
    """
    samplers = optuna.samplers
    seed, name = (study.seed + 1000003 * number) % 2**31, sampler_of(study)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if number < STARTUP.get(name, 0):
            others = samplers.RandomSampler(seed=seed)
            return samplers.QMCSampler(scramble=True, seed=study.seed, independent_sampler=others)
        match name:
            case "gp":
                return samplers.GPSampler(seed=seed, n_startup_trials=1, deterministic_objective=True)
            case "cmaes":
                try:
                    import cmaes  # noqa: F401  # only whether it is there
                except ModuleNotFoundError:
                    raise InputError("sampler cmaes needs cmaes", hint="pip install 'deltamerge[search]'") from None
                return samplers.CmaEsSampler(seed=seed, n_startup_trials=1, warn_independent_sampling=False)
            case "nsga2":
                return samplers.NSGAIISampler(seed=seed, population_size=max(8, study.together))
            case "random":
                return samplers.RandomSampler(seed=seed)
        if number % 2 and len(study.goals) == 1:
            return near_best(optuna, seed, WIDTH / (1 + (number - STARTUP["tpe"]) / 4))
        return samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True, n_startup_trials=1)


def distributions(optuna: Any, ranges: Sequence[Range]) -> dict[str, Any]:
    """Return Optuna's distribution of every number. A choice that is no scalar is known by its number."""
    made = optuna.distributions
    found: dict[str, Any] = {}
    for axis in ranges:
        for key in axis.keys:
            if axis.choices:
                found[key] = made.CategoricalDistribution([json.dumps(choice) for choice in axis.choices])
            elif axis.is_whole:
                found[key] = made.IntDistribution(axis.low, axis.high, step=int(axis.step or 1))
            else:
                found[key] = made.FloatDistribution(axis.low, axis.high, log=axis.log, step=axis.step)
    return found


def encode(ranges: Sequence[Range], found: Mapping[str, Any]) -> dict[str, Any]:
    """Return numbers as Optuna has them: choices as JSON."""
    choices = {key for axis in ranges if axis.choices for key in axis.keys}
    return {key: json.dumps(value) if key in choices else value for key, value in found.items()}


def decode(ranges: Sequence[Range], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return Optuna's numbers for a recipe: three significant digits, unless a step or start needs more.

    Candidates are judged with these numbers, so the best recipe is exactly the judged recipe.
    """
    axes = {key: axis for axis in ranges for key in axis.keys}
    return {
        key: json.loads(value) if isinstance(value, str) else _short(axes[key], value) if key in axes else value
        for key, value in params.items()
    }


def _short(axis: Range, value: Any) -> Any:
    if not isinstance(value, float) or axis.step is not None or value == axis.start:
        return value
    found = float(f"{value:.3g}")
    return found if axis.low <= found <= axis.high else value


def run_again(study: optuna.Study) -> None:
    """Have the trials that ran when a search was killed run again, under the same numbers."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name == "RUNNING":
            study._storage.set_trial_state_values(trial._trial_id, type(trial.state).WAITING)


def importance(optuna: Any, study: optuna.Study) -> dict[str, float]:
    """Return the share of the first objective's variance that each number explains. {}: there are too few trials."""
    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    numbers = {name for trial in complete for name in trial.params}
    if len(complete) < 8 or len(numbers) < 2 or len({t.values[0] for t in complete}) < 2:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator, target=lambda t: t.values[0])
        except (ValueError, RuntimeError):
            return {}
    return {name: float(value) for name, value in found.items()}


def near_best(optuna: Any, seed: int, width: float) -> Any:
    """Return a sampler of Optuna that proposes near the best trial of a study of one objective.

    Every number is the best trial's plus a normal one, within the bounds and on its steps. The deviation is `width` of
    its range, or of its logarithm's with `log`. A choice is the best trial's. Without a complete trial it is random.
    """

    class NearBest(optuna.samplers.BaseSampler):  # type: ignore[misc, name-defined, unused-ignore]  # Optuna is optional
        def __init__(self) -> None:
            self.random = optuna.samplers.RandomSampler(seed=seed)
            self.normal = np.random.Generator(np.random.PCG64(seed))

        def infer_relative_search_space(self, study: optuna.Study, trial: Any) -> dict[str, Any]:
            best = _best(study)
            return dict(best.distributions) if best is not None else {}

        def sample_relative(self, study: optuna.Study, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
            best = _best(study)
            if best is None:
                return {}
            found = dict(best.params)
            for name, axis in sorted(search_space.items()):
                if hasattr(axis, "low"):
                    found[name] = move(axis, found[name], width * float(self.normal.standard_normal()))
            return found

        def sample_independent(self, study: optuna.Study, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.random.sample_independent(study, trial, param_name, param_distribution)

    return NearBest()


def _best(study: optuna.Study) -> Any:
    """Return the best complete trial, the first of several. None: no trial is complete."""
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return min(done, key=lambda trial: sign * trial.values[0], default=None)


def move(axis: Any, value: float, share: float) -> float:
    """Return a number of Optuna's distribution `axis`, moved by a share of its range.

    One of its steps, within its bounds.
    """
    low, high = float(axis.low), float(axis.high)
    if axis.log:
        found = math.exp(math.log(value) + share * (math.log(high) - math.log(low)))
    else:
        found = value + share * (high - low)
    found = min(max(found, low), high)
    if axis.step is None:
        return found
    step = float(axis.step)
    found = min(low + round((found - low) / step) * step, high)
    return round(found) if isinstance(axis.low, int) else found
