"""Calibration `per: merge`: one factor of the merge's λ, chosen for all of its fine-tunes together.

Every fine-tune runs with the merged weights and its own head on the same rows; the objective is the sum of theirs.
A plan names `calibrate`, so torch is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltamerge.calibrate.spec import Spec, rounded
from deltamerge.calibrate.stage import calibrating, decide
from deltamerge.calibrate.values import Calibrated
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from deltamerge.calibrate.q.comparison import Qs
    from deltamerge.calibrate.q.search import Minima
    from deltamerge.calibrate.q.subject import HeldOutMeasure, Subject


def calibrate(*inputs: Node, known: Mapping[Node, Any], spec: Spec) -> Calibrated:
    """1/factor of the recipe's λ, as the q of every merged tensor; 1 if the recipe's λ is as good on held-out rows."""
    from deltamerge.calibrate.q.choices import SCAN
    from deltamerge.calibrate.q.comparison import QPoint
    from deltamerge.calibrate.q.search import shortlist
    from deltamerge.calibrate.q.subject import Subject

    with calibrating(spec.name, spec.passes, device=spec.source.device), Reader() as reader:
        subjects = [Subject(part.source, reader, spec.masked(inputs, i), known) for i, part in enumerate(spec.parts)]
        assert spec.bounds is not None
        low, high = spec.bounds
        result, evaluate = _search(subjects, spec.objective, low, high)
        found = [
            QPoint({}, value, {"factor of lambda": rounded(f)}, edge) for f, value, edge in shortlist(result, low, high)
        ]
        judges = [subject.judge() for subject in subjects]
        judge = mean_judge(judges)
        some = judge.eligible(found)
        factors = [*(float(one.numbers["factor of lambda"]) for one in some), 1.0]
        each = [
            s.values(j.objective, [_q(s, f) for f in factors], seeds=1) for s, j in zip(subjects, judges, strict=True)
        ]
        held = [sum(of_factor) / len(subjects) for of_factor in zip(*each, strict=True)]
        (plain,) = evaluate([1.0])
        for subject in subjects:
            subject.forget()
        chosen, record = decide(spec, judge, found, some, held, plain)
        record |= {
            "models": [part.source.model for part in spec.parts],
            "plain": {"q": 1.0, "value": rounded(plain)},
            "sequences": subjects[0].counts[0],
            "forward_passes": sum(subject.passes for subject in subjects),
            "path": [
                *([SCAN, "factor of lambda", rounded(f), rounded(value)] for f, value in result.scan),
                *(["factor of lambda", rounded(f), rounded(value)] for f, value in result.path),
            ],
        }
        factor = 1.0 if chosen is None else float(chosen.numbers["factor of lambda"])
        names = [tensor.name for tensor in spec.pruned]
        return Calibrated({} if factor == 1.0 else dict.fromkeys(names, rounded(1.0 / factor)), record)


def _search(
    subjects: Sequence[Subject], objective: str, low: float, high: float
) -> tuple[Minima, Callable[[Sequence[float]], list[float]]]:
    """Return the minimum of the sum of the fine-tunes' objectives over the factor, and that sum at several factors."""
    from deltamerge.calibrate.q import objectives as O
    from deltamerge.calibrate.q import search

    def summed(own: Sequence[Any], factors: Sequence[float], masks: range) -> list[list[float]]:
        """[factor][mask]"""
        values = [s.of_masks(o, [_q(s, f) for f in factors], masks) for s, o in zip(subjects, own, strict=True)]
        return [[sum(of_mask) for of_mask in zip(*rows, strict=True)] for rows in zip(*values, strict=True)]

    every = range(len(subjects[0].masks))
    if objective == "validation":
        labelled = [s.validation("search") for s in subjects]

        def evaluate(factors: Sequence[float]) -> list[float]:
            return [O.over_seeds(values) for values in summed(labelled, factors, every)]

        return search.minimise(evaluate, low, high), evaluate
    changes = [s.output_change("search") for s in subjects]
    few = [O.first(change, s.few) for change, s in zip(changes, subjects, strict=True)]
    seen = search.scan(lambda factors: [values[0] for values in summed(few, factors, range(1))], low, high)
    result = search.model(seen, lambda factors, masks: summed(changes, factors, masks), len(every))
    some = range(result.masks)
    return result, lambda factors: [O.over_seeds(values) for values in summed(changes, factors, some)]


def _q(subject: Subject, factor: float) -> Qs:
    return dict.fromkeys(subject.pairs, rounded(1.0 / factor))


def mean_judge(judges: Sequence[HeldOutMeasure]) -> HeldOutMeasure:
    """Return the name of the mean of the fine-tunes' measures."""
    from deltamerge.calibrate.q.subject import HeldOutMeasure

    measures = list(dict.fromkeys(judge.measure for judge in judges))
    one, trusted = judges[0], all(judge.trusted for judge in judges)
    measure = f"mean {' and '.join(measures)} of {len(judges)} fine-tunes"
    return HeldOutMeasure(one.objective, measure, one.rows, trusted, higher=all(judge.higher for judge in judges))
