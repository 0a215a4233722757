"""What a search found: its trials, the one that was chosen, and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltamerge.inspect.search.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial: its number in the study, the numbers that were tried, and what came of it.

    state   complete, pruned (after a part of the rows) or failed
    held    its outcome on held-out rows, where it was compared on them
    """

    number: int
    params: Mapping[str, Any]
    outcome: Outcome
    state: str
    held: Outcome | None = None


@dataclass(frozen=True)
class Found:
    """A finished search.

    trials    in the order of the study
    best      the index of the one that was chosen
    start     the index of the first trial, the recipe's own start
    front     indices of the Pareto front, where there are several objectives
    why       what decided
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

    @property
    def chosen(self) -> Trial:
        """The best trial."""
        return self.trials[self.best]

    def describe(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {
            "objectives": [{"name": name, "less_is_better": low} for name, low in self.goals.items()],
            "sampler": self.sampler,
            "trials": [_described(trial) for trial in self.trials],
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


def _described(trial: Trial) -> dict[str, Any]:
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
