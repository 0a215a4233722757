"""The calibration stages of a graph: one measures activations, the other chooses a fine-tune's q's.

The minima that a search found are compared with each other and with the plain choice, the method without calibration.
This is done on rows that the search has not seen and, where the model has a head, by another measure (`Subject.judge`).
Where all minima predict as the base does, other points that the search evaluated are compared too.

A plan names these functions, so torch is imported when they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.calibrate.model.transformers_code import quiet
from deltamerge.calibrate.spec import CLOSER, LAST_ROUND, MORE_ROUNDS, CalibrationInput, Spec, models_of, rounded
from deltamerge.calibrate.values import Calibrated, QValue
from deltamerge.engine import backends
from deltamerge.engine.devices import memory_of
from deltamerge.errors.shown import shown
from deltamerge.files import progress
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor

if TYPE_CHECKING:
    from deltamerge.calibrate.q.choices import QPoint, Qs
    from deltamerge.calibrate.q.closed_forms import LayerStatistics
    from deltamerge.calibrate.q.subject import HeldOutMeasure

ACTIVATIONS = "measuring activations of"
LONG = 40  # characters of a model's name beside its progress


def activations(*inputs: Tensor, known: Mapping[Tensor, Any], source: CalibrationInput) -> dict[str, LayerStatistics]:
    """Return the statistics of the linear layers over the calibration rows, by the fine-tune's tensor names."""
    from deltamerge.calibrate.q.subject import Subject

    with calibrating(source.model, 1, ACTIVATIONS, device=source.device), Reader() as reader:
        (tensors,) = models_of(inputs, [source])
        subject = Subject(source, tensors, reader)
        found = subject.statistics(drawn=False)
        subject.forget()
        return found


def calibrate(*inputs: Tensor, known: Mapping[Tensor, Any], spec: Spec) -> Calibrated:
    """Return the q's with the smallest objective, or the plain choice if that is as good on held-out rows."""
    from deltamerge.calibrate.q.choices import Rounds, Searches, by_metric, compare
    from deltamerge.calibrate.q.subject import Subject

    with calibrating(spec.name, spec.passes, device=spec.source.device), Reader() as reader:
        (tensors,) = spec.models(inputs)
        subject = Subject(spec.source, tensors, reader, known)
        plain: Qs = {p.stored: p.plain for p in spec.pruned}
        rounds = Rounds(subject, plain)
        searches = Searches(spec, subject, rounds)
        found = searches.run()
        value = searches.value(plain)
        if subject.metric is not None:
            verdict = by_metric(subject, found, searches.passed, plain)
        else:
            some = [*found, *searches.passed]
            one_number = spec.scope == "global" and spec.search != "gradient"
            most = LAST_ROUND + (MORE_ROUNDS if searches.passed and spec.random else 0) if one_number else None
            times = 1 if spec.random else CLOSER  # masks differ by more than another step would gain
            verdict = compare(rounds, some, most=most, closer=searches.closer, times=times)
        subject.forget()
        chosen, record = decide(spec, verdict.judge, found, verdict.some, verdict.held, value)
        record["mask_seeds"] = searches.masks or spec.seeds
        record["candidates"] += [
            {**one.numbers, "value": rounded(one.value), "held_out": rounded(verdict.judge.shown(held)), "rows": rows}
            for one, held, rows in verdict.dropped
        ]
        q = _range([p.plain for p in spec.pruned])
        record |= {
            "plain": {"q": q, "value": rounded(value), "mask_seeds": searches.compared},
            "sequences": subject.counts[0],
            "precision": subject.model.precision,
            "forward_passes": subject.passes,
            "path": searches.path,
        }
        if chosen is not None and (left := searches.not_calibrated(chosen)):
            record["not_calibrated"] = left
        names = {p.stored: p.name for p in spec.pruned}
        return Calibrated(_output(plain if chosen is None else chosen.q, names), record)


def decide(
    spec: Spec,
    judge: HeldOutMeasure,
    found: Sequence[QPoint],
    some: Sequence[QPoint],
    held: Sequence[float],
    plain: float,
) -> tuple[QPoint | None, dict[str, Any]]:
    """Return the best candidate if it betters the plain choice, else None; and the record for the lock.

    spec    the stage
    judge   compares on held-out rows
    found   all candidates of the search
    some    the candidates that may be judged
    held    their held-out values, and last that of the plain choice
    plain   the plain choice's objective on the search rows
    """
    if some:
        best = min(range(len(some)), key=lambda i: (held[i], i))
        one, better = some[best], held[best] < held[-1]
    else:
        best, one, better = -1, found[0], False
    shown = [rounded(judge.shown(value)) for value in held]
    where = f"{judge.measure} on {judge.rows} held-out rows"
    if not some:
        why = f"the objective is smallest on the bound of the search ({one.label}), and there is no head to judge it by"
    else:
        word = "better" if better else "no better"
        why = f"{where}: {shown[best]:.4g} calibrated is {word} than {shown[-1]:.4g} without calibration"
        if better and len(some) > 1:
            why = f"{one.label} is the best of {len(some)} candidates by {why}"
    candidates = [
        {**other.numbers, "value": rounded(other.value), "held_out": value}
        for other, value in zip(some, shown, strict=False)
    ]
    record = {
        "method": spec.method,
        "mask": "random" if spec.random else "importance",
        "density": _range([p.density for p in spec.pruned]),
        "objective": spec.objective,
        "scope": spec.scope,
        "search": spec.search,
        "chosen": "calibrated" if better else "plain",
        "why": why,
        "value": rounded(one.value),
        "held_out": {
            "measure": judge.measure,
            "rows": judge.rows,
            "plain": shown[-1],
            **({"calibrated": shown[best]} if some else {}),
        },
        "candidates": candidates,
        "mask_seeds": spec.seeds,
        "searched": one.numbers,
    }
    return one if better else None, record


@contextmanager
def calibrating(name: str, passes: int, what: str = "calibrating", *, device: str) -> Iterator[None]:
    """Name the model in errors of its calibration, and in a phase of at most so many forward passes over the rows;
    silence transformers' advice on lengths and padding; reuse what a pass frees. InputError: the device has too little
    memory."""
    with (
        quiet(),
        errors.context(f"calibration of {name}"),
        progress.phase(f"{what} {shown(name, LONG)}", passes, progress.PASSES, bound=True),
        backends.quiet_allocator(whole=True),
        memory_of(device),
    ):
        yield


def _output(q: Qs, names: dict[str, str]) -> dict[str, QValue]:
    import torch

    chosen: dict[str, QValue] = {}
    for stored, value in q.items():
        if isinstance(value, torch.Tensor) and value.dim():
            chosen[names[stored]] = value.to("cpu", torch.float32).numpy()
        elif float(value) != 1.0:
            chosen[names[stored]] = rounded(float(value))
    return chosen


def _range(values: Sequence[float]) -> float | list[float]:
    low, high = min(values), max(values)
    return low if low == high else [low, high]
