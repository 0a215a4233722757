"""The comparison of a search's candidates with the plain choice, on held-out rows that are taken as they are needed.

Where there are labels the metric decides, on all held-out rows. Else rows come in rounds of `ROUND`, and a comparison
ends after the first round whose values differ clearly: by more than a factor exp(2/sqrt(rows)).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from deltamerge.calibrate import objectives as O  # short for a namespace
from deltamerge.calibrate.candidates import Q
from deltamerge.calibrate.spec import LAST_ROUND, ROUND
from deltamerge.calibrate.subject import Judge, Subject

if TYPE_CHECKING:
    from deltamerge.calibrate.searches import Found

KEPT = 2  # candidates at most that go on to a further round
LITTLE = 0.9  # share of the base's distance from the fine-tune; a candidate beyond it is hardly better than the base


@dataclass(frozen=True, slots=True)
class Verdict:
    """What held-out rows say.

    judge    with the number of rows that were looked at
    some     the candidates that were compared to the end
    held     their values, and last that of the plain choice
    dropped  candidates that were worse after an earlier round, their values, and the number of rows that these are of
    """

    judge: Judge
    some: list[Found]
    held: list[float]
    dropped: list[tuple[Found, float, int]] = field(default_factory=list)


def compare(
    subject: Subject, found: Sequence[Found], passed: Sequence[Found], plain: Mapping[str, Q], *, one_number: bool
) -> Verdict:
    """Compare candidates with the plain choice, for the mask that is written.

    found       the candidates
    passed      more of them, which are looked at where all others are hardly better than the base; then the first
                round is the last
    plain       the q's without calibration
    one_number  whether q is one number: then `LAST_ROUND` rounds are the most
    """
    if subject.metric is not None:
        return _by_metric(subject, found, passed, plain)
    rounds = _Rounds(subject, LAST_ROUND if one_number else None)
    some = [_Entry(one.q, one) for one in rounds.judge.eligible(found)]
    without, base = _Entry(plain), _Entry(None)
    more = [base] if passed and rounds.judge.trusted else []
    rounds.look([*some, *more, without])
    if more and min((one.value for one in some), default=math.inf) > LITTLE * base.value:
        others = [_Entry(one.q, one) for one in passed]
        rounds.look(others)
        some += others
        rounds.end()
    dropped: list[_Entry] = []
    while some:
        factor = math.exp(2.0 / math.sqrt(rounds.rows))
        best = min(one.value for one in some)
        ranked = sorted(some, key=lambda one: one.value)
        some = [one for one in ranked[:KEPT] if one.value <= factor * best]
        dropped += ranked[len(some) :]
        clear = max(best, without.value) > factor * min(best, without.value)
        if (clear and len(some) == 1) or not rounds.another():
            break
        rounds.look([*some, without])
    return Verdict(
        replace(rounds.judge, rows=rounds.rows),
        [one.found for one in some if one.found is not None],
        [*(one.value for one in some), without.value],
        [(one.found, one.value, one.rows) for one in dropped if one.found is not None],
    )


def _by_metric(subject: Subject, found: Sequence[Found], passed: Sequence[Found], plain: Mapping[str, Q]) -> Verdict:
    judge = subject.judge()
    some = judge.eligible(found)
    *held, without = subject.values(judge.objective, [*(one.q for one in some), plain], seeds=1)
    if judge.trusted and passed and min(held, default=math.inf) > LITTLE * subject.nothing(judge.objective):
        held += subject.values(judge.objective, [one.q for one in passed], seeds=1)
        some = [*some, *passed]
    return Verdict(judge, some, [*held, without])


@dataclass(eq=False)
class _Entry:
    """A candidate, the plain choice, or the base (q is None): its parts so far, and its value on so many rows."""

    q: Mapping[str, Q] | None
    found: Found | None = None
    parts: list[Any] = field(default_factory=list)
    value: float = math.inf
    rows: int = 0


class _Rounds:
    """The rounds of held-out rows: `rows` of them so far, by the measure of `judge`."""

    def __init__(self, subject: Subject, most: int | None) -> None:
        self.subject = subject
        self._left = subject.rounds(ROUND)[:most]
        self.judge = subject.agreement(self._left.pop(0))
        self._objectives: list[Any] = [self.judge.objective]
        self.rows = self.judge.rows

    def end(self) -> None:
        """Make no further round."""
        self._left.clear()

    def another(self) -> bool:
        """Go on to the next round; False where there is none."""
        if not self._left:
            return False
        judge = self.subject.agreement(self._left.pop(0))
        self._objectives.append(judge.objective)
        self.rows += judge.rows
        return True

    def look(self, entries: Sequence[_Entry]) -> None:
        """Value the entries on the latest round, together with the rounds that they have been through."""
        whole, latest = O.joined(self._objectives), self._objectives[-1]
        own: list[_Entry] = []
        for one in entries:
            if not any(_same(one.q, other.q) for other in own):
                own.append(one)
        found = self.subject.parts(latest, [one.q for one in own])
        for one in entries:
            one.parts += found[next(i for i, other in enumerate(own) if one is other or _same(one.q, other.q))]
            one.value, one.rows = whole.value(one.parts), self.rows


def _same(a: Mapping[str, Q] | None, b: Mapping[str, Q] | None) -> bool:
    """Whether two choices of numbers are the same."""
    if a is None or b is None or any(not isinstance(q, float) for q in (*a.values(), *b.values())):
        return False
    return a == b
