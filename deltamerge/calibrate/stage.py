"""The stages before the first tile: activations, a fine-tune's q's, the threshold of `group: model`, a merge's totals.

The minima that a search of q found are compared with each other and with the plain choice, the method without
calibration. This is done on rows that the search has not seen and, where the model has a head, by another measure
(`Subject.judge`). Where all minima predict as the base does, other points that the search evaluated are compared too.

A plan names these functions, so torch is imported when they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.calibrate.model.transformers_code import quiet
from deltamerge.calibrate.spec import (
    CLOSER,
    LAST_ROUND,
    MORE_ROUNDS,
    CalibrationInput,
    Spec,
    models_of,
    rounded,
)
from deltamerge.calibrate.values import Calibrated, ModelCut, QValue
from deltamerge.engine import backends
from deltamerge.engine.devices import memory_of
from deltamerge.engine.execute import computed, default_workers, execute
from deltamerge.engine.worker import Task
from deltamerge.errors.shown import shown
from deltamerge.files import progress
from deltamerge.methods.prune import select
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Tensor
from deltamerge.tensors.tiles import Tile
from deltamerge.tensors.traits import Function, traits
from deltamerge.tensors.views import ordered_product

if TYPE_CHECKING:
    import torch

    from deltamerge.calibrate.q.choices import QPoint, Qs
    from deltamerge.calibrate.q.statistics import LayerStatistics
    from deltamerge.calibrate.q.subject import HeldOutMeasure

ACTIVATIONS = "measuring activations of"
TOGETHER = 32  # tensors whose histograms are held before they are added
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


@traits(reads=2)
def model_cut(*inputs: Tensor, known: Mapping[Tensor, Any], names: tuple[str, ...], k: int, device: str) -> ModelCut:
    """Return the cut that keeps the k largest magnitudes of all deltas, which are the inputs, by `names`.

    Equal ones are kept from the first tensor on, in flat order.
    """
    deltas = list(zip(names, inputs, strict=True))
    if k == 0:
        nothing = select.nothing()
        return ModelCut(nothing.threshold, dict.fromkeys(names, (0, 0)))
    with Reader() as reader:

        def reduced(make: Callable[[Graph, Tensor], Tensor], given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
            graph = Graph()
            values = {**known, **{_small(graph, name): value for name, value in given.items()}}
            return _in_turns([(name, make(graph, delta)) for name, delta in deltas], values, reader, device)

        def total(make: Callable[[Graph, Tensor], Tensor], given: Mapping[str, Any]) -> Any:
            return sum(values for _, values in reduced(make, given))

        high = select.pick_bin(total(lambda g, d: _sum(g, select.high_histogram, d), {}), k=k)
        low = total(lambda g, d: _sum(g, select.low_histogram, d, _small(g, "bin")), {"bin": high})
        cut = select.pick_cut(low, high)
        if cut.equal_kept == cut.equal_total:
            return ModelCut(cut.threshold, dict.fromkeys(names, (0, 0)))
        counts = {name: int(np.sum(count)) for name, count in reduced(_equals, {"cut": cut})}
    left, equal = cut.equal_kept, {}
    for name in names:
        equal[name] = (min(left, counts[name]), counts[name])
        left -= equal[name][0]
    return ModelCut(cut.threshold, equal)


def _sum(graph: Graph, function: Function, delta: Tensor, *more: Tensor) -> Tensor:
    return graph.node(function, [delta, *more], kind="sum", shape=delta.shape)


def _equals(graph: Graph, delta: Tensor) -> Tensor:
    return graph.node(select.equal_counts, [delta, _small(graph, "cut")], kind="concat", shape=delta.shape)


def _small(graph: Graph, name: str) -> Tensor:
    """Return a node for a value that is passed when the graph runs."""
    return graph.node(name, kind="small")


def _in_turns(
    roots: Sequence[tuple[str, Tensor]], known: Mapping[Tensor, Any], reader: Reader, device: str
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the value of each reduction, by the names of their tensors."""
    for start in range(0, len(roots), TOGETHER):
        some = roots[start : start + TOGETHER]
        tasks = [Task(name, root, backends.choose(root, device)) for name, root in some]
        values = execute(tasks, reader, None, device=device, workers=default_workers(), known=known)
        yield from ((name, values[root]) for name, root in some)


@traits(reads=1)
def totals(*inputs: Tensor, known: Mapping[Tensor, Any], names: tuple[str, ...], device: str) -> tuple[float, ...]:
    """Return the sums of the numbers of all blocks of all tensors, each exact and rounded once.

    The inputs are a reduction to (blocks, k) float64 for each of `names`, and what they need.
    """
    roots = list(zip(names, inputs, strict=False))
    with Reader() as reader:
        found = [one for _, one in _in_turns(roots, known, reader, device)]
    columns = np.concatenate([one for one in found if one.size] or [np.zeros((0, 0))]).T
    return tuple(math.fsum(column) if np.isfinite(column).all() else float(column.sum()) for column in columns)


def whole(*inputs: Tensor, known: Mapping[Tensor, Any]) -> Array:
    """Return the whole value of the first input, a small tensor: float32 on the CPU, in its shape."""
    with Reader() as reader:
        made = computed({"factor": inputs[0]}, reader, workers=1, known=known)["factor"]
    return made.view(np.float32).reshape(inputs[0].shape)


def product(a: Array, b: Array, *, tile: Tile, scale: float, transposed: bool) -> torch.Tensor:
    """Return s · B A, or its transpose, of masked factors, on a tile of the weight: flat float32.

    a            (r, in) masked
    b            (out, r) masked
    tile         the part of the weight
    scale        s
    transposed   whether the weight is stored (in, out)
    """
    import torch

    left, right = (a.T, b.T) if transposed else (b, a)
    top, bottom = tile.start // tile.columns, math.ceil(tile.stop / tile.columns)
    out = np.empty((bottom - top, tile.columns), np.float32)
    ordered_product(left[top:bottom], right, out)
    out *= np.float32(scale)
    first = tile.start - top * tile.columns
    return torch.from_numpy(out.reshape(-1)[first : first + tile.size])
