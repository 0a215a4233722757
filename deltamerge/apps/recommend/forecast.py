"""Forecast how much of each fine-tune's skill a merge keeps: from the weights alone, or from answers on rows.

A share is the merge's score over the fine-tune's own. docs/measurements/merging.md has the errors of forecasts.

Weights do not tell the share of a single skill. The forecast is the share that the method kept in benchmarks. But a
skill is in danger if another delta changes its inputs more than its own delta does (`Conflict.disturbance`), and goes
another way. Deltas are compared as if their lengths were equal: `balance: norm` makes them so, and `wudi` divides each
by its square.

From answers: a classifier that differs from its fine-tune is often as right where the fine-tune is not sure, so its
probabilities count (`lost_score`). Of numbers the correlation is the share. A language model keeps a row if every token
of its completion is the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field

from deltamerge.apps.inspect.statistics import Figures
from deltamerge.apps.recommend.meeting import ALIKE, Conflict

LOST = 0.5  # of a share: below it a skill is called lost
SURE = 1.96  # standard deviations
UNSEEN = 4  # more rows that a spread counts, half of them kept: of few rows none is sure (Agresti and Coull 1998)
Rival = tuple[str | None, float | None]
DROWNED, DANGER = 1.0, 0.6  # disturbances from which on a skill will probably, or may, be lost
KEPT = {"tsv_m": (0.88, 0.76, 0.98), "svc": (0.86, 0.73, 0.97), "wudi": (0.72, 0.34, 0.95)}
"""Mean share of the benchmarks' skills, and where 8 in 10 lay: tsv_m of two encoders, svc of more, wudi of decoders."""
ANSWERS_MARGIN = 0.05  # beside the margin of sampling rows


class SkillForecast(Figures):
    """The forecast of one fine-tune in a merge."""

    model: str
    share: float | None = Field(
        description="Its score over the fine-tune's own; null: these rows do not tell (give prompt and completion)."
    )
    low: float | None = Field(description="Nine in ten lie above, as far as the benchmarks show.")
    high: float | None = Field(description="Nine in ten lie below.")
    by: Literal["weights", "answers", "numbers", "texts"] = Field(description="Evidence: see docs/howto/inspect.md.")
    loss: Literal["none", "possible", "probable", "unknown"] = Field(
        description="Of its skill, less than half kept: probable by the share, possible by `low`; without rows by a "
        "disturbance from 1 and from 0.6 on. unknown: the evidence does not tell."
    )
    rival: str | None = Field(
        description="The model whose delta changes its inputs most, of those at a cosine below 0.5 to its own."
    )
    disturbance: float | None = Field(description="By how much, beside its own change, of deltas as long.")


def of_weights(names: Sequence[str], conflict: Conflict, method: str) -> list[SkillForecast]:
    """Return the forecasts for a merge by `method` without rows."""
    made = []
    for i, name in enumerate(names):
        rival = _rival(names, conflict, i)
        share, low, high = KEPT.get(method, (None, None, None))
        by = rival[1] or 0.0
        loss = "probable" if by >= DROWNED else "possible" if by >= DANGER else "unknown"
        if loss == "unknown" and low is not None and low >= LOST:
            loss = "none"
        made.append(_made(name, (share, low, high), "weights", loss, rival))
    return made


def of_answers(
    names: Sequence[str],
    conflict: Conflict,
    kept: Mapping[str, float],
    classes: Mapping[str, int | None],
    rows: Mapping[str, int],
) -> list[SkillForecast]:
    """Return the forecasts from answers on held-out rows.

    kept      by model: the expected share of its score; a model is left out whose answers do not tell
    classes   number of a classifier's classes; 1: numbers; None: a language model
    rows      that were compared
    """
    made = []
    for i, name in enumerate(names):
        rival, share = _rival(names, conflict, i), kept.get(name)
        by = {None: "texts", 1: "numbers"}.get(classes.get(name), "answers")
        if share is None:
            made.append(_forecast(name, None, 0.0, by, rival))
            continue
        made.append(_forecast(name, share, SURE * _spread(share, rows[name], by) + ANSWERS_MARGIN, by, rival))
    return made


def _spread(share: float, rows: int, by: str) -> float:
    """Return the standard deviation of a share over so many rows."""
    kept, seen = share * rows, rows + UNSEEN
    if by == "numbers":
        return (1 - (kept / seen) ** 2) / math.sqrt(max(1, rows))
    middle = min(1.0, max(0.0, (kept + UNSEEN / 2) / seen))
    return math.sqrt(middle * (1 - middle) / max(1, rows))


def _forecast(name: str, share: float | None, margin: float, by: str, rival: Rival) -> SkillForecast:
    """Return the forecast of a share with its margin on both sides. None: the rows do not tell."""
    if share is None:
        return _made(name, (None, None, None), by, "unknown", rival)
    share = min(1.0, max(0.0, share))
    low, high = max(0.0, share - margin), min(1.0, share + margin)
    loss = "probable" if share < LOST else "possible" if low < LOST else "none"
    return _made(name, (share, low, high), by, loss, rival)


def _made(name: str, shares: Sequence[float | None], by: str, loss: str, rival: Rival) -> SkillForecast:
    figures = dict(zip(("share", "low", "high"), shares, strict=True))
    told = {"by": by, "loss": loss, "rival": rival[0], "disturbance": rival[1]}
    return SkillForecast.model_validate({"model": name, **figures, **told})


def _rival(names: Sequence[str], conflict: Conflict, i: int) -> Rival:
    """Return the model that would disturb model i most were all deltas as long, and by how much.

    A delta that goes the same way does what model i does, and disturbs nothing.
    """
    others: dict[int, float] = {}
    for j, (value, norm) in enumerate(zip(conflict.disturbance[i], conflict.relative_norm, strict=True)):
        if j != i and value is not None and conflict.cosine[i][j] < ALIKE:
            own = conflict.relative_norm[i]
            others[j] = value * (own / norm) ** 2 if own and norm else value
    if not others:
        return None, None
    j = max(others, key=lambda one: others[one])
    return names[j], others[j]
