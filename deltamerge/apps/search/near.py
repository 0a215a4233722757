"""Proposals near the best trial so far."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import optuna


def near_best(optuna: Any, seed: int, width: float) -> Any:
    """A sampler of Optuna for a study of one objective: every number is that of the best trial plus a normal one of
    deviation `width` of its range (of its logarithm's, where it has `log`), at most at the bounds and on its steps; a
    choice is the best trial's. At random where no trial is complete."""

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
                    found[name] = moved(axis, found[name], width * float(self.normal.standard_normal()))
            return found

        def sample_independent(self, study: optuna.Study, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self.random.sample_independent(study, trial, param_name, param_distribution)

    return NearBest()


def _best(study: optuna.Study) -> Any:
    """The best complete trial, the first of several; None where there is none."""
    sign = 1 if study.direction.name == "MINIMIZE" else -1
    done = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return min(done, key=lambda trial: sign * trial.values[0], default=None)


def moved(axis: Any, value: float, share: float) -> float:
    """A number of Optuna's distribution `axis`, moved by a share of its range; one of its steps, within its bounds."""
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
