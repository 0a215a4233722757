"""The ways to choose a fine-tune's q's, and the comparison of their results with the plain choice.

A q is one searched number, a number for each layer or row, a closed form, or learned. A calibrated q divides the
weights of linear layers that the data reaches. 1-D tensors and embeddings keep q = 1, which scores better than
rescaling them too (docs/measurements/calibration.md). Experts are linear layers, stacked in one tensor or not. Except
in the scope global, each expert has its own q; an expert that no token reached has its layer's q. Other pruned tensors
are divided as without calibration. Learned scales apply to all pruned tensors that the output depends on.

The minima of a search of q are compared with each other and with the plain choice, the method without calibration. This
uses rows that the search has not seen and, if the model has a head, another measure (`Subject.judge`). If all minima
predict like the base, other evaluated points are compared too.

Candidates are compared on held-out rows, which are taken as needed. If there are labels, the metric decides, on all
held-out rows. Otherwise rows come in rounds of `ROUND`, and a comparison ends after the first round whose values differ
clearly: by more than a factor exp(2/sqrt(rows)). A plan names `calibrate` by a string, so that planning imports no
torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from deltamerge.calibrate.model.candidates import Q
from deltamerge.calibrate.model.layers import Linear
from deltamerge.calibrate.q import objectives as O
from deltamerge.calibrate.q import search, statistics
from deltamerge.calibrate.q.learned import learn, row_shape
from deltamerge.calibrate.q.statistics import LayerStatistics, Vector
from deltamerge.calibrate.q.subject import HeldOutMeasure, Subject
from deltamerge.calibrate.spec import (
    CLOSER,
    LAST_ROUND,
    MORE_ROUNDS,
    OTHER,
    ROUND,
    SHORTLIST,
    STEPS,
    UNSCALED,
    UNSEEN,
    Calibrated,
    QValue,
    Spec,
    grid_step,
    grouped,
    rounded,
)
from deltamerge.calibrate.stage import calibrating
from deltamerge.errors import InputError
from deltamerge.tensors.names import is_unscaled
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor

Path = list[list[Any]]
KAPPA = (0.25, 4.0)
HARDLY_LESS = 0.8  # share of the base's distance from the fine-tune: where no q leaves less, predictions are compared
SCAN = "few rows"  # the name of a search's first round in a lock's path
# Bounds of q in closed forms and learned scales. A q above 1 shrinks a row that is better left out; without a bound
# learned scales pass 100 on tensors that hardly matter.
HIGHEST = 10.0
LOWEST = 0.01


def calibrate(*inputs: Tensor, known: Mapping[Tensor, Any], spec: Spec) -> Calibrated:
    """Return the q's with the smallest objective, or the plain choice if that is as good on held-out rows."""
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
            one_number = spec.scope == "global" and spec.search != "gradient"
            most = LAST_ROUND + (MORE_ROUNDS if searches.passed and spec.random else 0) if one_number else None
            times = 1 if spec.random else CLOSER  # masks differ by more than another step would gain
            some = [*found, *searches.passed]
            verdict = compare(rounds, some, most=most, closer=searches.closer, times=times)
        subject.forget()
        chosen, record = decide(spec, verdict, found)
        record["mask_seeds"] = searches.masks or spec.seeds
        record["plain"] = {"q": _range([p.plain for p in spec.pruned]), "value": rounded(value)}
        record["plain"]["mask_seeds"] = searches.compared
        record |= {
            "sequences": subject.counts[0],
            "precision": subject.model.precision,
            "forward_passes": subject.passes,
            "path": searches.path,
        }
        if chosen is not None and (left := searches.not_calibrated(chosen)):
            record["not_calibrated"] = left
        names = {p.stored: p.name for p in spec.pruned}
        return Calibrated(_output(plain if chosen is None else chosen.q, names), record)


def decide(spec: Spec, verdict: Verdict, found: Sequence[QPoint]) -> tuple[QPoint | None, dict[str, Any]]:
    """Return the best candidate if it is better than the plain choice, otherwise None; and the record for the lock.

    verdict   the values of candidates on held-out rows
    found     all candidates of the search, including candidates that could not be compared
    """
    judge, some, held = verdict.judge, verdict.some, verdict.held
    shown = [rounded(judge.shown(value)) for value in held]
    if some:
        best = min(range(len(some)), key=lambda i: (held[i], i))
        one, better = some[best], held[best] < held[-1]
        word = "better" if better else "no better"
        why = f"{judge.measure} on {judge.rows} held-out rows: {shown[best]:.4g} calibrated is {word} than"
        why = f"{why} {shown[-1]:.4g} without calibration"
        if better and len(some) > 1:
            why = f"{one.label} is the best of {len(some)} candidates by {why}"
        calibrated = {"calibrated": shown[best]}
    else:
        one, better, calibrated = found[0], False, {}
        why = f"the objective is smallest on the bound of the search ({one.label}), and there is no head to judge it by"
    candidates = [
        {**point.numbers, "value": rounded(point.value), "held_out": value}
        for point, value in zip(some, shown, strict=False)
    ]
    candidates += [
        {**point.numbers, "value": rounded(point.value), "held_out": rounded(judge.shown(value)), "rows": rows}
        for point, value, rows in verdict.dropped
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
        "held_out": {"measure": judge.measure, "rows": judge.rows, "plain": shown[-1], **calibrated},
        "candidates": candidates,
        "mask_seeds": spec.seeds,
        "searched": one.numbers,
    }
    return one if better else None, record


def _output(q: Qs, names: Mapping[str, str]) -> dict[str, QValue]:
    """Return the q's by the names of the output. A q of 1 is left out."""
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


class Searches:
    """Runs a spec's search on a subject.

    path     records every evaluated point
    rounds   rounds of held-out rows, whose predictions are compared if the output change decides little
    few      the objective on a part of the rows, if it was not used beyond the first round
    masks    number of masks in the mean of the smallest objective; 0: all
    passed   more candidates for a judge other than the objective, from a search of one q by output change
    """

    def __init__(self, spec: Spec, subject: Subject, rounds: Rounds | None = None) -> None:
        self.spec, self.subject = spec, subject
        if not subject.may_have_layers:
            raise InputError("no weight of a linear layer is pruned", hint="give a number as q, or change include")
        self.path: Path = []
        self.masks = 0
        self.few: O.OutputChange | None = None
        self.rounds = None if spec.search == "gradient" or subject.metric is not None else rounds
        self.passed: list[QPoint] = []
        self._valued: list[tuple[Qs, float]] = []

    @cached_property
    def layers(self) -> dict[str, Linear]:
        """Return the pruned linear layers, stacked experts that the rows reach among them."""
        _ = self.objective  # a pass shows which they are
        _ = self.subject.reached
        return self.subject.layers

    @cached_property
    def plain(self) -> dict[str, float]:
        """Return the q's without calibration."""
        return {p.stored: p.plain for p in self.spec.pruned}

    @cached_property
    def density(self) -> dict[str, float]:
        """Return the densities of the layers."""
        return {p.stored: p.density for p in self.spec.pruned if p.stored in self.layers}

    @cached_property
    def reached(self) -> list[str]:
        """Return the layers that the rows reach."""
        found = self.subject.reached & self.layers.keys()
        if not found:
            raise InputError("no pruned linear layer was reached by the calibration data")
        return [name for name in self.layers if name in found]

    def rest(self, own: Collection[str]) -> dict[str, tuple[float, str]]:
        """Return (q, why) of the pruned tensors without a searched q: 1, or the method's divisor."""
        found = {}
        for pruned in self.spec.pruned:
            name = pruned.stored
            if name in own:
                continue
            if name in self.layers:
                found[name] = pruned.plain, UNSEEN
            elif name in self.subject.model.lookups or is_unscaled(name, self.subject.infos[name].shape):
                found[name] = 1.0, UNSCALED
            else:
                found[name] = pruned.plain, OTHER
        return found

    def closer(self, candidates: Sequence[QPoint], values: Sequence[float]) -> QPoint | None:
        """Return one more candidate of a search for one q. None: there is none.

        It is the vertex of the parabola in log q through the best candidate and its neighbours.
        """
        if self.few is None:
            return None
        some = sorted((float(one.numbers["q"]), value) for one, value in zip(candidates, values, strict=True))
        q = search.closer(some)
        return None if q is None else self._found(dict.fromkeys(self.reached, q), min(values), {"q": q})

    def not_calibrated(self, found: QPoint) -> list[dict[str, Any]]:
        """Return the entry of the lock about tensors without a searched q."""
        names = {pruned.stored: pruned.name for pruned in self.spec.pruned}
        return grouped((names[name], q, why) for name, (q, why) in self.rest(found.own).items())

    def _whole(self, own: Qs) -> Qs:
        return {name: q for name, (q, _) in self.rest(own).items()} | own

    def _found(self, own: Qs, value: float, numbers: dict[str, float | str], edge: bool = False) -> QPoint:
        return QPoint(self._whole(own), value, numbers, edge, frozenset(own))

    def run(self) -> list[QPoint]:
        """Return the candidates, the smallest objective first; learned scales come before their start."""
        if self.objective is None:
            return self._closed_form()
        if self.spec.search == "gradient":
            return self._learned()
        if self.spec.scope == "global":
            return self._global()
        return self._families() if self.spec.random else self._scaled()

    @cached_property
    def objective(self) -> O.Objective | O.Generation | None:
        """Return the spec's objective; None for layer_mse, which has a closed form."""
        if self.spec.objective == "layer_mse":
            return None
        if self.spec.objective == "validation":
            return self.subject.validation("search")
        return self.subject.output_change("search")

    @property
    def compared(self) -> int:
        """Return the masks that the plain choice's objective is a mean over."""
        return min(self.masks, search.FIRST) if self.masks else self.spec.seeds

    def value(self, q: Qs) -> float:
        """Return the objective on the search rows, over `compared` masks.

        The first round has valued some choices already, on fewer rows. If one mask is enough, such a value is scaled to
        all rows, by the ratio of both values at the best point.
        """
        if self.compared == 1 and (known := [value for some, value in self._valued if same(some, q)]):
            return known[0]
        if self.objective is None:
            return _layer_error(self._drawn, q)
        return self.subject.values(self.few or self.objective, [q], seeds=self.compared)[0]

    def _global(self) -> list[QPoint]:
        low, high = self._bounds(min(self.density.values()), 1.0)
        return self._minimise("q", lambda q: dict.fromkeys(self.reached, q), low, high)

    def _minimise(
        self, name: str, qs: Callable[[float], Qs], low: float, high: float, family: str | None = None
    ) -> list[QPoint]:
        """Return the local minima over one number, from which `qs` makes all q's."""
        found = self._search(name, lambda points: [self._whole(qs(point)) for point in points], low, high)
        named: dict[str, float | str] = {} if family is None else {"family": family}
        few = f"{family}, {SCAN}" if family else SCAN
        self.path += [[few, name, rounded(x), rounded(value)] for x, value in found.scan]
        self.path += [[*named.values(), name, rounded(x), rounded(value)] for x, value in found.path]
        short = search.shortlist(found, low, high)
        change = self.spec.objective == "output_change" and self.spec.search != "gradient"
        if name == "q":
            self._valued = [(self._whole(qs(x)), value * found.scale) for x, value in found.scan]
        if name == "q" and change and (self.subject.metric is not None or self.few is not None):
            known = {x for x, _, _ in short}
            points = [point for point in search.passed(found, low, high) if point[0] not in known]
            self.passed = [self._found(qs(rounded(x)), value, {name: rounded(x)}) for x, value in points]
        return [self._found(qs(rounded(x)), value, {**named, name: rounded(x)}, edge) for x, value, edge in short]

    def _search(self, name: str, qs: Callable[[Sequence[float]], list[Qs]], low: float, high: float) -> search.Minima:
        """Return the minimum over one number: of the output change by a model of it, of a metric by trying."""
        objective, subject = self.objective, self.subject
        assert objective is not None

        def evaluate(points: Sequence[float]) -> list[float]:
            return subject.values(objective, qs(points))

        if self.spec.search == "grid" and name == "q":
            return search.grid(evaluate, low, high, step=grid_step(low))
        if self.spec.search == "grid":
            return search.minimise(evaluate, low, high, coarse=16, budget=16)
        if not isinstance(objective, O.OutputChange):
            return search.minimise(evaluate, low, high)
        few = O.first(objective, subject.few)
        seen = search.scan(lambda points: subject.values(few, qs(points), seeds=1), low, high)
        if name == "q" and self._says_little(few, seen.values[seen.minima[0]]):
            self.few, self.masks = few, 1
            return search.Minima(seen.best, seen.values[seen.minima[0]], (), seen.path)
        found = search.model(
            seen, lambda points, masks: subject.of_masks(objective, qs(points), masks), len(subject.masks)
        )
        self.masks = max(self.masks, found.masks)
        return found

    def _says_little(self, few: O.OutputChange, least: float) -> bool:
        """Tell whether the least output change is hardly less than the base's, and predictions can be compared
        instead."""
        if self.rounds is None or not self.rounds.judge.trusted:
            return False
        return few.distance(least) > HARDLY_LESS * few.distance(self.subject.nothing(few))

    def _bounds(self, low: float, high: float) -> tuple[float, float]:
        return self.spec.bounds or (low, high)

    def _families(self) -> list[QPoint]:
        """Search one η in each family of random masks: q per layer from the paper's bound, or from least squares."""
        layers = self._seen(self.subject.statistics(drawn=False))
        mean_density = float(np.mean([self.density[name] for name in layers]))
        found: list[QPoint] = []
        for family, (of_layer, _) in statistics.FAMILIES.items():
            bounds = statistics.eta_range(of_layer, layers.values(), mean_density)
            found += self._minimise("eta", partial(self._of_family, family, layers), *bounds, family=family)
        return sorted(found, key=lambda one: one.value)[:SHORTLIST]

    def _of_family(self, family: str, layers: Mapping[str, LayerStatistics], eta: float) -> Qs:
        """Return the q's of a family of random masks."""
        (of_layer, of_rows), bounds = statistics.FAMILIES[family], self._bounds(0.0, 1.0)

        def own(name: str, layer: LayerStatistics) -> Q:
            d = self.density[name]
            return self._own(name, layer, lambda s: of_layer(s, d, eta), lambda s: of_rows(s, d, eta), bounds)

        return {name: own(name, layer) for name, layer in layers.items()}

    def _scaled(self) -> list[QPoint]:
        """Search one κ for importance masks: all closed-form q's of the drawn mask are multiplied by it."""
        layers, (low, high) = self._drawn, self._bounds(self._lowest(), HIGHEST)
        exact = {name: self._exact(name, layer) for name, layer in layers.items()}

        def qs(kappa: float) -> Qs:
            return {name: self._clipped(kappa * q, low, high) for name, q in exact.items()}

        return self._minimise("kappa", qs, *KAPPA)

    def _closed_form(self) -> list[QPoint]:
        """Return for layer_mse the exact least-squares q of the drawn mask, of each layer or row; global: of relative
        errors."""
        layers, (low, high) = self._drawn, self._bounds(self._lowest(), HIGHEST)
        if self.spec.scope == "global":
            parts = [
                (np.sum(s.power) / s.energy.sum(), np.sum(s.cross) / s.energy.sum())
                for s in layers.values()
                if s.power is not None and s.cross is not None and s.energy.sum() > 0.0
            ]
            power, cross = (float(sum(column)) for column in zip(*parts, strict=True)) if parts else (0.0, 0.0)
            q = power / cross if cross > 0.0 and power > 0.0 else 1.0
            qs: Qs = dict.fromkeys(self.reached, rounded(float(np.clip(q, low, high))))
        else:
            qs = {name: self._clipped(self._exact(name, s), low, high) for name, s in layers.items()}
        return [self._found(qs, _layer_error(layers, qs), {"family": "closed form"})]

    def _exact(self, name: str, layer: LayerStatistics) -> Q:
        """Return the closed-form q, or the layer's plain q if the mask has none."""
        none = self.plain[name]
        return self._own(
            name,
            layer,
            lambda s: statistics.drawn(s) or none,
            lambda s: statistics.drawn_rows(s, none),
            (0.0, math.inf),
        )

    def _lowest(self) -> float:
        return min(LOWEST, *self.density.values())

    def _learned(self) -> list[QPoint]:
        """Fit scales of all pruned tensors by gradient from the best global q; rows of their own decide when to stop.

        Those rows cannot judge whether the scales are better than their start, so both are candidates.
        """
        subject = self.subject
        batches, groups, stop = subject.steps()
        starts = self._global()
        start = self._agreeing(starts, stop)
        q = float(start.numbers["q"])
        rows = self.layers if self.spec.scope == "row" else {}
        others = {name: plain for name, (plain, why) in self.rest(self.reached).items() if why != UNSCALED}
        first: Qs = {}
        for name in (pruned.stored for pruned in self.spec.pruned):
            begin = others.get(name, q)
            shape = row_shape(rows[name].transposed, subject.infos[name].shape) if name in rows else ()
            first[name] = torch.full(shape, begin) if name in rows else begin
        learned = learn(
            subject.learner(subject.distribution([*batches, *stop])),
            first,
            groups=groups,
            held_out=range(len(batches), len(batches) + len(stop)),
            bounds=self._bounds(self._lowest(), HIGHEST),
            steps=STEPS,
            others=subject.learners,
        )
        subject.count(stop, len(learned.path))
        for step in range(learned.steps):
            subject.count([batches[b] for b in groups[step % len(groups)]], 3)
        qs = {n: q if q.dim() else rounded(float(q)) for n, q in learned.q.items() if n in learned.reached}
        self.path += [["step", step, rounded(loss)] for step, loss in learned.path]
        numbers: dict[str, float | str] = {"family": "learned", "step": float(learned.step), "from q": q}
        return [self._found(qs, self.value(self._whole(qs)), numbers), *starts]

    def _agreeing(self, found: Sequence[QPoint], inputs: Sequence[Mapping[str, torch.Tensor]]) -> QPoint:
        """Return the minimum whose predictions are nearest to the fine-tune's."""
        some = [one for one in found if not one.edge] or list(found)
        if len(some) == 1:
            return some[0]
        values = self.subject.values(self.subject.agreement(inputs).objective, [one.q for one in some], seeds=1)
        return some[values.index(min(values))]

    @cached_property
    def _drawn(self) -> dict[str, LayerStatistics]:
        return self._seen(self.subject.statistics(drawn=True))

    def _seen(self, layers: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        found = {name: layer for name, layer in layers.items() if name in self.layers}
        if not found:
            raise InputError("no pruned linear layer was reached by the calibration data")
        return found

    def _own(
        self,
        name: str,
        layer: LayerStatistics,
        of_layer: Callable[[LayerStatistics], float],
        of_rows: Callable[[LayerStatistics], Vector],
        bounds: tuple[float, float],
    ) -> Q:
        """Return a layer's q: one number, or one for each output row in the scope `row`, and for each matrix that it
        stacks."""
        shape, parts = self.subject.infos[name].shape, layer.parts or (layer,)
        if self.spec.scope == "row" and not (layer.parts and layer.transposed):
            values = np.concatenate([of_rows(part) for part in parts])
            to = row_shape(layer.transposed, shape)
        elif layer.parts:
            values, to = np.array([of_layer(part) for part in parts]), (*shape[:-2], 1, 1)
        else:
            return rounded(float(np.clip(of_layer(layer), *bounds)))
        return torch.from_numpy(np.clip(values, *bounds).astype(np.float32)).view(to)

    @staticmethod
    def _clipped(q: Q, low: float, high: float) -> Q:
        return q.clamp(low, high) if isinstance(q, torch.Tensor) else rounded(float(np.clip(q, low, high)))


def _layer_error(layers: Mapping[str, LayerStatistics], q: Mapping[str, Q]) -> float:
    """Return the mean over layers of ‖Y − Ŷ/q‖² / ‖Y‖²; matrices that a layer stacks count as layers."""
    errors = []
    for name, layer in layers.items():
        own = np.asarray(q.get(name, 1.0), dtype=np.float64)
        parts = layer.parts or (layer,)
        each = own.reshape(len(parts), -1) if own.ndim and layer.parts else [own.reshape(-1)] * len(parts)
        errors += [statistics.drawn_error(part, value) for part, value in zip(parts, each, strict=True)]
    return float(np.mean(errors))


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
    own       the tensors with their own searched q; the others get theirs from `Searches.rest`
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

    judge    the judge, with the number of used rows
    some     the candidates that were compared to the end
    held     their values, and last the plain choice's value
    dropped  candidates that were worse after an earlier round, with their values and the number of rows
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
        """Go on to the next round. False: there is none."""
        if not self._left:
            return False
        judge = self.subject.agreement(self._left.pop(0))
        self._objectives.append(judge.objective)
        self.rows += judge.rows
        return True

    def look(self, entries: Sequence[Contender]) -> None:
        """Value the entries that have no value of the latest round. Values are over all rounds so far."""
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
