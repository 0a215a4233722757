"""The comparison of a search's candidates with the plain choice, on held-out rows that are taken as they are needed.

Where there are labels the metric decides, on all held-out rows. Else rows come in rounds of `ROUND`, and a comparison
ends after the first round whose values differ clearly: by more than a factor exp(2/sqrt(rows)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from deltamerge.calibrate.model.candidates import Q
from deltamerge.calibrate.q import objectives as O
from deltamerge.calibrate.q.subject import HeldOutMeasure, Subject
from deltamerge.calibrate.spec import CLOSER, ROUND

Qs = dict[str, Q]
LEAST_KEPT = 2  # candidates at most that go on to a further round; 3 of them to the second
LITTLE = 0.9  # share of the base's metric, 1 − score or loss; a candidate beyond it is hardly better than the base


@dataclass(frozen=True, slots=True)
class QPoint:
    """A point of a search.

    q         q's by the fine-tune's names
    value     their objective
    numbers   the searched numbers by name
    edge      whether it lies on a bound of the search
    own       the tensors whose q was searched for them; the others have it from `Searches.rest`
    """

    q: Qs
    value: float
    numbers: dict[str, float | str]
    edge: bool = False
    own: frozenset[str] = frozenset()

    @property
    def label(self) -> str:
        """Return the searched numbers in words."""
        return " ".join(f"{name} {x:.4g}" if isinstance(x, float) else f"{x}" for name, x in self.numbers.items())


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of a comparison on held-out rows.

    judge    with the number of rows that were looked at
    some     the candidates that were compared to the end
    held     their values, and last that of the plain choice
    dropped  candidates that were worse after an earlier round, their values, and the number of rows that these are of
    """

    judge: HeldOutMeasure
    some: list[QPoint]
    held: list[float]
    dropped: list[tuple[QPoint, float, int]] = field(default_factory=list)


def compare(
    rounds: Rounds,
    found: Sequence[QPoint],
    *,
    most: int | None,
    closer: Callable[[Sequence[QPoint], Sequence[float]], QPoint | None] = lambda found, values: None,
    times: int = CLOSER,
) -> Verdict:
    """Compare candidates with the plain choice, for the mask that is written.

    rounds   of the fine-tune
    found    the candidates
    most     rounds at most; None: all
    closer   proposes one more candidate, from the values of all in the first round
    times    that it is asked
    """
    some = [rounds.entry(one.q, one) for one in rounds.judge.eligible(found)]
    without = rounds.entry(rounds.plain)
    rounds.look([*some, without])
    for _ in range(times):
        more = closer([one.found for one in some if one.found is not None], [one.value for one in some])
        if more is None:
            break
        some.append(rounds.entry(more.q, more))
        rounds.look(some)
    dropped: list[Contender] = []
    while some:
        factor = math.exp(2.0 / math.sqrt(rounds.rows))
        ranked = sorted(some, key=lambda one: one.value)
        best = ranked[0].value
        some = [one for one in ranked[: max(LEAST_KEPT, 4 - rounds.number)] if one.value <= factor * best]
        dropped += ranked[len(some) :]
        same = all(one is without for one in some)
        clear = max(best, without.value) > factor * min(best, without.value)
        if same or (clear and len(some) == 1) or rounds.number == most or not rounds.another():
            break
        rounds.look([*some, without])
    return Verdict(
        replace(rounds.judge, rows=rounds.rows),
        [one.found for one in some if one.found is not None],
        [*(one.value for one in some), without.value],
        [(one.found, one.value, one.rows) for one in dropped if one.found is not None],
    )


def by_metric(subject: Subject, found: Sequence[QPoint], passed: Sequence[QPoint], plain: Mapping[str, Q]) -> Verdict:
    """Compare candidates with the plain choice by the metric, on all held-out rows.

    passed   more of them, which are looked at where all others are hardly better than the base
    """
    judge = subject.judge()
    some = judge.eligible(found)
    *held, without = subject.values(judge.objective, [*(one.q for one in some), plain], seeds=1)
    if judge.trusted and passed and min(held, default=math.inf) > LITTLE * subject.nothing(judge.objective):
        held += subject.values(judge.objective, [one.q for one in passed], seeds=1)
        some = [*some, *passed]
    return Verdict(judge, some, [*held, without])


@dataclass(eq=False)
class Contender:
    """A candidate or the plain choice: its parts so far, and its value on so many rows."""

    q: Mapping[str, Q]
    found: QPoint | None = None
    parts: list[Any] = field(default_factory=list)
    value: float = math.inf
    rows: int = 0


class Rounds:
    """The rounds of held-out rows: `number` of them so far, with `rows`, by the measure of `judge`."""

    def __init__(self, subject: Subject, plain: Mapping[str, Q]) -> None:
        self.subject, self.plain = subject, plain
        self._left = subject.rounds(ROUND)
        self._seen: list[Contender] = []
        self._objectives: list[Any] = []

    @cached_property
    def judge(self) -> HeldOutMeasure:
        """Return the judge of the first round, in which the fine-tune runs."""
        judge = self.subject.agreement(self._left.pop(0))
        self._objectives.append(judge.objective)
        self.rows = judge.rows
        return judge

    @property
    def number(self) -> int:
        """Return the rounds that there have been."""
        return len(self._objectives)

    def entry(self, q: Mapping[str, Q], found: QPoint | None = None) -> Contender:
        """Return the entry of a choice of q's; the same numbers have the same one."""
        known = next((one for one in self._seen if one.q is q or same(one.q, q)), None)
        if known is None:
            known = Contender(q, found)
            self._seen.append(known)
        known.found = found or known.found
        return known

    def another(self) -> bool:
        """Go on to the next round; False where there is none."""
        if not self._left:
            return False
        judge = self.subject.agreement(self._left.pop(0))
        self._objectives.append(judge.objective)
        self.rows += judge.rows
        return True

    def look(self, entries: Sequence[Contender]) -> None:
        """Value the entries that the latest round has not valued, together with the rounds that they have been
        through."""
        new = [one for i, one in enumerate(entries) if one.rows < self.rows and one not in entries[:i]]
        if not new:
            return
        whole = O.joined(self._objectives)
        found = self.subject.parts(self._objectives[-1], [one.q for one in new])
        for one, parts in zip(new, found, strict=True):
            one.parts += parts
            one.value, one.rows = whole.value(one.parts), self.rows


def same(a: Mapping[str, Q], b: Mapping[str, Q]) -> bool:
    """Tell whether two choices of numbers are the same."""
    if any(not isinstance(q, float) for q in (*a.values(), *b.values())):
        return False
    return a == b
