"""Measurements for inspect and recommend: statistics of a fine-tune's layers, and the losses of masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from deltamerge.calibrate.model.candidates import Cache, Masked, Q, pruned
from deltamerge.calibrate.q import objectives as O
from deltamerge.calibrate.q import statistics as statistics
from deltamerge.calibrate.q.statistics import LayerStatistics, collect
from deltamerge.calibrate.q.subject import Subject
from deltamerge.calibrate.spec import HELD_OUT, Spec
from deltamerge.calibrate.stage import ACTIVATIONS, calibrating
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

POINTS = 8
Scores = dict[str, float]


@dataclass(frozen=True, slots=True, eq=False)
class MaskLoss:
    """The loss of one mask.

    plain         its q without calibration
    q             the q of linear weights with the smallest output change; if that is the first or last point, where the
                  output change prefers the base or a drowned delta, the point with the nearest predictions
    path          [q, output change] on the search rows
    layer_error   mean over linear layers of ‖Y − Ŷ/q‖²/‖Y‖²: at the plain q, at q, at each layer's own best
    lost          distance of held-out predictions from the fine-tune's (`Subject.agreement`): plain, calibrated
    metric        the metric of the same rows, {} without labels
    """

    plain: float
    q: float
    path: list[tuple[float, float]]
    layer_error: Scores
    lost: Scores
    metric: Scores


@dataclass(frozen=True, slots=True, eq=False)
class MaskEvidence:
    """Masks of one fine-tune's delta, measured.

    masks     one per spec; None where WANDA has no norms (weights stored (in, out))
    lost      distance of the base's predictions, which keep nothing of the delta
    metric    the base's and the fine-tune's
    """

    influence: dict[str, LayerStatistics]
    masks: list[MaskLoss | None]
    lost: float
    metric_name: str | None
    metric: Scores
    held_out: int
    forward_passes: int


def influence(stage: Node, *, drawn: bool = True) -> dict[str, LayerStatistics]:
    """Return statistics of the linear layers of a calibration stage's fine-tune over its search rows, by tensor names.

    `drawn`: also measure the first mask, which must need no activations.
    """
    spec: Spec = stage.parameter("spec")
    source, tensors = spec.source, replace(spec.models(stage.inputs)[0], protected={})
    with calibrating(source.model, 1, ACTIVATIONS, device=source.device), Reader() as reader:
        found = Subject(source, tensors, reader).statistics(drawn=drawn)
        return {name: layer for name, layer in found.items() if not drawn or layer.power is not None}


def measure_influence(stages: Sequence[Node]) -> MaskEvidence:
    """Return the losses of the masks of several stages with one source, for the first mask seed of each."""
    specs: list[Spec] = [stage.parameter("spec") for stage in stages]
    source = specs[0].source
    with calibrating(source.model, passes(specs), "trying masks of", device=source.device), Reader() as reader:
        models = [spec.models(stage.inputs)[0] for spec, stage in zip(specs, stages, strict=True)]
        found = Subject(source, models[0], reader).statistics(drawn=False)
        transposed = any(layer.transposed for layer in Subject(source, models[0], reader).layers.values())
        some = [i for i, spec in enumerate(specs) if not (spec.shared and transposed)]
        usable, masks = [specs[i] for i in some], tuple(models[i].masks[0] for i in some)
        # WANDA's activations
        known = {node: found for i in some for node in specs[i].shared_inputs(stages[i].inputs)}
        tensors = replace(models[0], masks=masks, protected={})
        comparison = _Comparison(Subject(source, tensors, reader, known), usable)
        losses = dict(zip(map(id, usable), comparison.losses(), strict=True))
        lost, metric = comparison.nothing()
        return MaskEvidence(
            found,
            [losses.get(id(spec)) for spec in specs],
            lost,
            comparison.subject.metric,
            metric,
            comparison.subject.counts[1],
            comparison.subject.passes,
        )


def passes(specs: Sequence[Spec]) -> int:
    """Return the most forward passes over the rows that `measure_influence` takes."""
    calibration = specs[0].source.calibration
    held = math.ceil(max(HELD_OUT, calibration.sequences) / calibration.sequences)
    each = 1 + 2 * POINTS + 4 * held  # statistics, two searches; plain and best by the judge and by the metric
    return 3 + held + len(specs) * each + 3 * held  # activations, outputs to compare with; the base, the metric


class _Comparison:
    def __init__(self, subject: Subject, specs: Sequence[Spec]) -> None:
        self.subject, self.specs = subject, specs
        self.change = subject.output_change("search")
        self.judge = subject.agreement(subject.batches["held"].inputs)
        self.validation = subject.validation("held") if subject.metric is not None else None

    @cached_property
    def near(self) -> O.Objective | O.Generation:
        """Return the distance of predictions on the search rows."""
        return self.subject.agreement(self.subject.batches["search"].inputs).objective

    def losses(self) -> list[MaskLoss]:
        return [self._loss(spec, mask) for spec, mask in zip(self.specs, self.subject.masks, strict=True)]

    def nothing(self) -> tuple[float, Scores]:
        """Return the divergence of the base, and the metric of base and fine-tune."""
        subject = self.subject
        lost = subject.nothing(self.judge.objective)
        variants = [pruned(subject.start, lambda name: None, {}), subject.tune]
        if self.validation is None:
            return lost, {}
        values = subject.evaluate(self.validation, variants)
        return lost, dict(zip(("base", "fine_tune"), map(self._score, values), strict=True))

    def _score(self, value: float) -> float:
        """Return the metric of a value of `validation`."""
        return value if self.subject.metric == "loss" else 1.0 - value

    def _loss(self, spec: Spec, mask: Cache[Masked | None]) -> MaskLoss:
        subject = self.subject
        inputs = subject.batches["search"].inputs
        layers = collect(subject.model, subject.tune, inputs, subject.tensors.delta, draw=mask)
        subject.count(inputs)
        layers = {name: layer for name, layer in layers.items() if name in subject.layers}
        density = min(p.density for p in spec.pruned)
        points = [float(f"{q:.6g}") for q in np.geomspace(density, 1.0, POINTS)]
        change = self._values(self.change, mask, [self._linear(q) for q in points])
        best = int(np.argmin(change))
        if best in (0, POINTS - 1):
            best = int(np.argmin(self._values(self.near, mask, [self._linear(q) for q in points])))
        q = points[best]
        whole: dict[str, Q] = {p.stored: p.plain for p in spec.pruned}
        both, names = [whole, self._linear(q)], ("plain", "calibrated")
        lost = dict(zip(names, self._values(self.judge.objective, mask, both), strict=True))
        metric: Scores = {}
        if self.validation is not None:
            metric = dict(zip(names, map(self._score, self._values(self.validation, mask, both)), strict=True))
        plain = spec.pruned[0].plain
        errors = {
            "plain": _mean(layers, lambda layer: statistics.drawn_error(layer, plain)),
            "calibrated": _mean(layers, lambda layer: statistics.drawn_error(layer, q)),
            "least_squares": _mean(layers, lambda layer: statistics.drawn_error(layer, statistics.drawn(layer) or 1.0)),
        }
        return MaskLoss(plain, q, list(zip(points, change, strict=True)), errors, lost, metric)

    def _values(
        self, objective: O.Objective | O.Generation, mask: Cache[Masked | None], qs: Sequence[dict[str, Q]]
    ) -> list[float]:
        subject = self.subject
        variants = [pruned(subject.start, mask, q) for q in qs]
        return subject.evaluate(objective, variants)

    def _linear(self, q: float) -> dict[str, Q]:
        return dict.fromkeys(self.subject.layers, q)


def _mean(layers: Mapping[str, LayerStatistics], error: Callable[[LayerStatistics], float]) -> float:
    return float(np.mean([error(layer) for layer in layers.values()]))
