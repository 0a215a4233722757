"""The calibration stages of a graph: one pass that measures activations, and the choice of a fine-tune's q's.

A calibrated q is applied to the weights of linear layers; other pruned tensors (1-D, embeddings) keep q = 1, which
measures better than to rescale them too (docs/calibration.md). What is chosen is compared with the plain choice, the
method without calibration, on rows that the search has not seen, and has to be better there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from deltamerge import errors
from deltamerge.calibrate import objectives as O  # short for a namespace
from deltamerge.calibrate import search, statistics
from deltamerge.calibrate.candidates import Q
from deltamerge.calibrate.scales import learn, row_shape
from deltamerge.calibrate.statistics import LayerStatistics, Vector
from deltamerge.calibrate.subject import BATCH, Subject
from deltamerge.errors import InputError
from deltamerge.io.checkpoint import Reader
from deltamerge.stages import STEPS, Calibrated, QValue, Source, Spec, grid_step

Qs = dict[str, Q]
ROUNDED = 6
KAPPA = (0.25, 4.0)
# q of a closed form or learned: above 1 where a row is better left out, and never without bound (algorithms.md 6.2)
HIGHEST = 10.0
LOWEST = 0.01
GROUP = 64 // BATCH


def activations(*, source: Source) -> dict[str, LayerStatistics]:
    """Statistics of the fine-tune's linear layers over the calibration rows, by the fine-tune's tensor names."""
    with calibrating(source), Reader() as reader:
        subject = Subject(source, reader)
        if any(layer.transposed for layer in subject.layers.values()):
            raise InputError(
                "wanda and massive_activations need weights stored (out, in), this model stores (in, out)",
                hint="use method magnitude, without protect or with columns",
            )
        return subject.statistics(drawn=False)


def calibrate(*inputs: Any, spec: Spec) -> Calibrated:
    """The q's that a fine-tune's objective is smallest for, or the plain choice if that is as good.

    `inputs` are the values of `spec.shared`, small nodes that the masks are made from.
    """
    with calibrating(spec.source), Reader() as reader:
        masks = [{p.stored: p.masked[s] for p in spec.pruned} for s in range(spec.seeds)]
        protected = {p.stored: p.protected for p in spec.pruned if p.protected is not None}
        subject = Subject(spec.source, reader, masks, dict(zip(spec.shared, inputs, strict=True)), protected)
        return _Choice(spec, subject).make()


@contextmanager
def calibrating(source: Source) -> Iterator[None]:
    """Errors say which model's calibration failed; transformers' advice on lengths and padding stays unsaid."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with errors.context(f"calibration of {source.model}"):
            yield
    finally:
        logger.setLevel(level)


@dataclass(frozen=True, slots=True)
class _Found:
    """q's of the linear weights (the fine-tune's names), the searched number by its name, and what was tried."""

    q: Qs
    value: float
    numbers: dict[str, float | str]
    path: list[list[Any]]


class _Choice:
    def __init__(self, spec: Spec, subject: Subject) -> None:
        self.spec, self.subject = spec, subject
        self.layers = subject.layers
        if not self.layers:
            raise InputError("no weight of a linear layer is pruned", hint="give a number as q, or change include")
        self.density = {p.stored: p.density for p in spec.pruned if p.stored in self.layers}
        self.plain: Qs = {p.stored: p.plain for p in spec.pruned}
        self.objective = self._objective()

    def make(self) -> Calibrated:
        found = self._search()
        plain = self._value(self.plain)
        held, measure = self._held_out()
        after, before = self.subject.values(held, [found.q, self.plain], seeds=1)
        better = after < before
        chosen = found.q if better else self.plain
        higher = isinstance(held, O.Validation) and held.metric != "loss"
        shown = {"calibrated": after, "plain": before}
        if higher:
            shown = {name: 1.0 - value for name, value in shown.items()}
        shown = {name: _rounded(value) for name, value in shown.items()}
        rows, word = self.subject.counts[1], "better" if better else "no better"
        record = {
            "objective": self.spec.objective,
            "scope": self.spec.scope,
            "search": self.spec.search,
            "chosen": "calibrated" if better else "plain",
            "why": f"{measure} on {rows} held-out rows: {shown['calibrated']:.4g} calibrated is {word} "
            f"than {shown['plain']:.4g} without calibration",
            "value": _rounded(found.value),
            "plain": {"q": _range([p.plain for p in self.spec.pruned]), "value": _rounded(plain)},
            "held_out": {"measure": measure, "rows": rows, **shown},
            "sequences": self.subject.counts[0],
            "mask_seeds": self.spec.seeds,
            "forward_passes": self.subject.passes,
            "searched": found.numbers,
            "path": found.path,
        }
        return Calibrated(self._output(chosen), record)

    def _output(self, q: Qs) -> dict[str, QValue]:
        names = {p.stored: p.name for p in self.spec.pruned}
        chosen: dict[str, QValue] = {}
        for stored, value in q.items():
            if isinstance(value, torch.Tensor) and value.dim():
                chosen[names[stored]] = value.to("cpu", torch.float32).numpy()
            elif float(value) != 1.0:
                chosen[names[stored]] = _rounded(float(value))
        return chosen

    def _objective(self) -> O.Objective | None:
        if self.spec.objective == "layer_mse":
            return None
        if self.spec.objective == "validation":
            return self.subject.validation(self.subject.search)
        return self.subject.output_change(self.subject.search)

    def _value(self, q: Qs) -> float:
        """The objective of the plain choice on the rows that were searched on."""
        if self.objective is None:
            return _layer_error(self._drawn, q)
        return self.subject.values(self.objective, [q])[0]

    def _held_out(self) -> tuple[O.Objective, str]:
        """What decides between the calibrated and the plain choice, and its name."""
        if self.subject.metric is not None:
            return self.subject.validation(self.subject.held), self.subject.metric
        return self.subject.output_change(self.subject.held), "output change"

    def _search(self) -> _Found:
        if self.objective is None:
            return self._closed_form()
        if self.spec.search == "gradient":
            return self._learned()
        if self.spec.scope == "global":
            return self._global()
        return self._families() if self.spec.random else self._scaled()

    def _global(self) -> _Found:
        low, high = self._bounds(min(self.density.values()), 1.0)
        return self._minimise("q", lambda q: dict.fromkeys(self.layers, q), low, high)

    def _minimise(self, name: str, qs: Callable[[float], Qs], low: float, high: float) -> _Found:
        """Search one number that all q's follow from."""
        objective = self.objective
        assert objective is not None

        def evaluate(points: Sequence[float]) -> list[float]:
            return self.subject.values(objective, [qs(point) for point in points])

        if self.spec.search == "grid" and name == "q":
            found = search.grid(evaluate, low, high, step=grid_step(low))
        elif self.spec.search == "grid":
            found = search.minimise(evaluate, low, high, coarse=16, budget=16)
        else:
            found = search.minimise(evaluate, low, high)
        point = _rounded(found.point)
        path = [[name, _rounded(x), _rounded(value)] for x, value in found.path]
        return _Found(qs(point), found.value, {name: point}, path)

    def _bounds(self, low: float, high: float) -> tuple[float, float]:
        return self.spec.bounds or (low, high)

    def _families(self) -> _Found:
        """Random masks: q per layer from the paper's bound or from least squares, one η searched; the better."""
        layers = self._seen(self.subject.statistics(drawn=False))
        low, high = self._bounds(0.0, 1.0)
        mean_density = float(np.mean([self.density[name] for name in layers]))
        rows: dict[str, Callable[[LayerStatistics, float, float], Vector]] = {
            "bound": statistics.bound_rows,
            "least_squares": statistics.least_squares_rows,
        }
        found = []
        for family, of_rows in rows.items():
            of_layer = statistics.FAMILIES[family]

            def qs(eta: float, of_rows: Any = of_rows, of_layer: Any = of_layer) -> Qs:
                of = of_rows if self.spec.scope == "row" else of_layer
                return {n: self._shaped(n, np.clip(of(s, self.density[n], eta), low, high)) for n, s in layers.items()}

            one = self._minimise("eta", qs, *statistics.eta_range(of_layer, layers.values(), mean_density))
            numbers: dict[str, float | str] = {"family": family, **one.numbers}
            found.append(_Found(one.q, one.value, numbers, [[family, *step] for step in one.path]))
        best = min(found, key=lambda one: one.value)
        return _Found(best.q, best.value, best.numbers, [step for one in found for step in one.path])

    def _scaled(self) -> _Found:
        """Importance masks: the closed-form q of the drawn mask, all of them times one κ that is searched."""
        layers, (low, high) = self._drawn, self._bounds(self._lowest(), HIGHEST)
        exact = {name: self._exact(layer) for name, layer in layers.items()}

        def qs(kappa: float) -> Qs:
            return {name: self._shaped(name, np.clip(kappa * q, low, high)) for name, q in exact.items()}

        return self._minimise("kappa", qs, *KAPPA)

    def _closed_form(self) -> _Found:
        """layer_mse: the exact least-squares q of the drawn mask, of each layer or row; global: of relative errors."""
        layers, (low, high) = self._drawn, self._bounds(self._lowest(), HIGHEST)
        if self.spec.scope == "global":
            parts = [
                (np.sum(s.power) / s.energy.sum(), np.sum(s.cross) / s.energy.sum())
                for s in layers.values()
                if s.power is not None and s.cross is not None and s.energy.sum() > 0.0
            ]
            power, cross = (float(sum(column)) for column in zip(*parts, strict=True)) if parts else (0.0, 0.0)
            q = power / cross if cross > 0.0 and power > 0.0 else 1.0
            qs: Qs = dict.fromkeys(self.layers, _rounded(float(np.clip(q, low, high))))
        else:
            qs = {name: self._shaped(name, np.clip(self._exact(s), low, high)) for name, s in layers.items()}
        return _Found(qs, _layer_error(layers, qs), {}, [])

    def _exact(self, layer: LayerStatistics) -> float | Vector:
        return statistics.drawn_rows(layer) if self.spec.scope == "row" else statistics.drawn(layer) or 1.0

    def _lowest(self) -> float:
        return min(LOWEST, *self.density.values())

    def _learned(self) -> _Found:
        """Scales fitted by gradient, from the searched global q; the held-out rows say when to stop."""
        start = self._global()
        q = float(start.numbers["q"])
        shapes = {name: row_shape(layer, self.subject.infos[name].shape) for name, layer in self.layers.items()}
        first: Qs = {n: torch.full(shapes[n], q) if self.spec.scope == "row" else q for n in self.layers}
        inputs = [*self.subject.search.inputs, *self.subject.held.inputs]
        count = len(self.subject.search.inputs)
        held = list(range(count, min(len(inputs), 2 * count)))
        objective = self.subject.distribution([*inputs[:count], *(inputs[b] for b in held)])
        learned = learn(
            self.subject.model,
            objective,
            self.subject.start,
            self.subject.masks[0],
            first,
            groups=[range(b, min(b + GROUP, count)) for b in range(0, count, GROUP)],
            held_out=held,
            bounds=self._bounds(self._lowest(), HIGHEST),
            steps=STEPS,
        )
        self.subject.sequences += learned.forward_passes * self.subject.counts[0] // count
        qs = {n: value if value.dim() else _rounded(float(value)) for n, value in learned.q.items()}
        path = [*start.path, *(["step", step, _rounded(loss)] for step, loss in learned.path)]
        value = self._value(qs)
        return _Found(qs, value, {"q": q, "step": learned.step}, path)

    @cached_property
    def _drawn(self) -> dict[str, LayerStatistics]:
        return self._seen(self.subject.statistics(drawn=True))

    def _seen(self, layers: Mapping[str, LayerStatistics]) -> dict[str, LayerStatistics]:
        found = {name: layer for name, layer in layers.items() if name in self.layers}
        if not found:
            raise InputError("no pruned linear layer was reached by the calibration data")
        return found

    def _shaped(self, name: str, q: Any) -> Q:
        """One number, or one per output row in the shape that broadcasts to the stored weight."""
        if np.ndim(q) == 0:
            return _rounded(float(q))
        shape = row_shape(self.layers[name], self.subject.infos[name].shape)
        return torch.from_numpy(np.asarray(q, dtype=np.float32)).view(shape)


def _layer_error(layers: Mapping[str, LayerStatistics], q: Mapping[str, Q]) -> float:
    """Mean over layers of ‖Y − Ŷ/q‖² / ‖Y‖²."""
    errors = [
        statistics.drawn_error(layer, np.asarray(q.get(name, 1.0), dtype=np.float64).reshape(-1))
        for name, layer in layers.items()
    ]
    return float(np.mean(errors))


def _rounded(value: float) -> float:
    """Six significant digits: what a lock says is what was used."""
    return float(f"{value:.{ROUNDED}g}")


def _range(values: Sequence[float]) -> float | list[float]:
    low, high = min(values), max(values)
    return low if low == high else [low, high]
