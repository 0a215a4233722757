"""Calibration `per: merge`: one factor of λ, or with `coefficients` a factor of every delta, by tensor or row.

One factor of λ is searched for all fine-tunes together. Each runs with the merged weights and its own head on its own
rows; the objective is the sum of theirs.

Coefficients are fitted by gradient. The merged model base + Σ c_k D_k is fitted to every fine-tune's output
distribution on that fine-tune's own rows, with its head, by Adam on the c alone. Nothing is labelled. The states that a
head of classes or numbers reads count as much as its outputs, since they say more of a row. The distances are shares of
the base's, so that all tasks count alike. Rows of the base are a task of their own weight: the distance from the base
is a share of the fine-tunes' mean one, which is what they forgot.

Data of classifiers is varied in each turn where rows have factors, since so many factors fit a few texts by heart.
Weights of a block are made when it runs, forward and backward, and then freed. Where no fine-tune has a head of its
own, rows of all run together, so that weights are made once for all. Several GPUs share the fine-tunes: each has the
base, the deltas and some of the fine-tunes, whose gradients are added up in their order on the first. A plan names the
functions, so torch is imported when they run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from deltamerge.calibrate.rows.heads import LANGUAGE
from deltamerge.calibrate.spec import (
    COEFFICIENT_STEP,
    FITTED_PASSES,
    STATES_BYTES,
    VARIED_PASSES,
    Calibrated,
    QValue,
    Spec,
    rounded,
    width,
)
from deltamerge.calibrate.stage import calibrating
from deltamerge.engine import backends
from deltamerge.engine.devices import current, torch_devices
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.calibrate.model.blocks import BlockModel
    from deltamerge.calibrate.model.candidates import Shared
    from deltamerge.calibrate.model.passes import BlockOutput, Inputs, Weights
    from deltamerge.calibrate.q.choices import Qs
    from deltamerge.calibrate.q.objectives import Distribution
    from deltamerge.calibrate.q.search import Minima
    from deltamerge.calibrate.q.subject import HeldOutMeasure, Subject
    from deltamerge.calibrate.q.variations import MixedRows

T = TypeVar("T")
Coefficients = Mapping[str, "Tensor"]
"""By the tensor's name in the output (K) or (K, …) of rows: a factor of each of its K deltas."""
RATE, VARIED_RATE = 0.1, 0.05  # of Adam, at the first step; it falls to 0 in a line
PATIENCE = 5  # looks in a row that are no better, after which a fit ends; where rows are varied it goes on
TOGETHER, ALONE = 32, 16  # rows of a batch: of all fine-tunes, of one
JUDGED = 4  # passes over held-out rows: the fine-tune, the base, the recipe's own and the fitted coefficients
SMALLEST = 1e-9  # distance of the base from a fine-tune that is not divided by


def calibrate(*inputs: Node, known: Mapping[Node, Any], spec: Spec) -> Calibrated:
    """Return the coefficients, by "delta:tensor"; none if the recipe's are as good on held-out rows."""
    from deltamerge.calibrate.q.choices import QPoint, Verdict, decide
    from deltamerge.calibrate.q.subject import Subject

    with calibrating(spec.name, spec.passes, device=spec.source.device), Reader() as reader:
        devices = torch_devices(spec.source.device)[: len(spec.parts)]
        share = math.ceil(len(spec.parts) / len(devices))
        subjects, models = [], spec.models(inputs)
        for i, part in enumerate(spec.parts):
            source, reads = replace(part.source, share=share), i < len(devices)
            if len(devices) > 1:
                cache = spec.source.cache if reads else source.cache
                source = replace(source, device=str(devices[i % len(devices)]), cache=cache)
            tensors = models[i] if reads else replace(models[i], masks=())
            subjects.append(Subject(source, tensors, reader, known, halved=spec.halved))
        merge = _Merge(spec, subjects, subjects[: len(devices)])
        start = merge.start()
        fitted, path = _fit(merge, start)
        judge, held, plain = _judged(merge, [fitted, start])
        step, value = min(path, key=lambda point: (point[1], point[0]))
        found = [QPoint({}, value, {"step": float(step)})]
        some = judge.eligible(found)
        chosen, record = decide(spec, Verdict(judge, some, [*held[: len(some)], plain]), found)
        record |= {
            "coefficients": spec.scope,
            "models": [part.source.model for part in spec.parts],
            "plain": {"q": 1.0, "value": rounded(path[0][1])},
            "sequences": subjects[0].counts[0],
            "forward_passes": sum(subject.passes for subject in subjects),
            "path": [["step", float(at), rounded(loss)] for at, loss in path],
        }
        for subject in subjects:
            subject.forget()
        return Calibrated({} if chosen is None else _named(spec, fitted), record)


def _named(spec: Spec, fitted: Coefficients) -> dict[str, QValue]:
    found: dict[str, QValue] = {}
    for name, values in fitted.items():
        for delta, value in zip(spec.coefficients, values, strict=True):
            one: QValue = value.numpy() if value.dim() else rounded(float(value))
            found[f"{delta}:{name}"] = one
    return found


@dataclass(eq=False)
class _Merge:
    """The fine-tunes of a merge, side by side; the first of each device, `places`, reads the deltas of all."""

    spec: Spec
    subjects: Sequence[Subject]
    places: Sequence[Subject]

    def __post_init__(self) -> None:
        self.own = [{one.stored: one.name for one in part.pruned} for part in self.spec.parts]
        self.stored = [{one.name: one.stored for one in part.pruned} for part in self.spec.parts[: len(self.places)]]

    def start(self) -> dict[str, Tensor]:
        """Return the recipe's own: 1 of each fine-tune's delta, or 1 of the method's merged delta and 0 of theirs."""
        from deltamerge.calibrate.q.learned import row_shape

        first, layers = self.subjects[0], self.subjects[0].layers
        plain = torch.tensor(self.spec.starts, dtype=torch.float32).to(first.device)
        found = {}
        for name, stored in self.stored[0].items():
            shape: tuple[int, ...] = ()
            if self.spec.scope == "row" and stored in layers and len(first.infos[stored].shape) == 2:
                shape = row_shape(layers[stored].transposed, first.infos[stored].shape)
            found[name] = plain.view(-1, *[1] * len(shape)).expand(-1, *shape).clone()
        return found

    @property
    def count(self) -> float:
        """Return the weight of all models; a fine-tune's is 1."""
        return len(self.subjects) - 1 + self.spec.base_weight if self.spec.base_weight else len(self.subjects)

    def nothing(self) -> dict[str, Tensor]:
        """Return coefficients of 0, which give the base."""
        return {name: values * 0.0 for name, values in self.start().items()}

    @property
    def model(self) -> BlockModel:
        """Return the model that runs the rows of all fine-tunes, where they run together."""
        return self.subjects[0].model

    def weights(self, task: int, coefficients: Coefficients, shared: Shared | None = None) -> Weights:
        """Return the merged weights under a fine-tune's names, with its own head; gradients flow to the coefficients,
        where weights are `shared` when they descend."""
        from deltamerge.calibrate.model.candidates import combined

        subject, own = self.subjects[task], self.own[task]
        first, of_first = self.places[task % len(self.places)], self.stored[task % len(self.places)]

        def made(names: Sequence[str]) -> dict[str, Tensor]:
            bases = subject.start.several(names)
            stored = [of_first[own[name]] for name in names if name in own]
            deltas = [cache.several(stored) for cache in first.masks]
            found = {}
            for name in names:
                if name not in own:
                    found[name] = bases[name]
                    continue
                stored_there = of_first[own[name]]
                parts = [one for some in deltas if (one := some[stored_there]) is not None]
                make = partial(combined, bases[name], coefficients[own[name]], parts)
                alike = subject.infos[name].shape == first.infos[stored_there].shape
                found[name] = shared.sum(own[name], make) if shared is not None and alike else make()
            return found

        return made

    def own_weights(self, task: int) -> Weights:
        """Return a fine-tune's own weights under the base's names."""
        from deltamerge.calibrate.model.passes import renamed

        stored = {name: own for own, name in self.own[task].items()}
        places = {of_base: stored[name] for of_base, name in self.own[-1].items()}
        return renamed(self.subjects[task].tune, places, self.subjects[-1].tune)


@dataclass(frozen=True, slots=True)
class _Rows:
    """A fine-tune's rows: batches to learn from, the batch indices of each step, and batches that decide.

    mixed   the batches to learn from, to be varied
    """

    learned: Distribution
    groups: list[list[int]]
    stop: Distribution
    mixed: MixedRows | None = None

    def step(self, number: int) -> list[int]:
        """Return the indices of the batches of a step, from 1."""
        return self.groups[(number - 1) % len(self.groups)]


def _rows(subject: Subject, number: int, size: int, *, varied: bool) -> _Rows:
    from deltamerge.calibrate.q.variations import MixedRows

    batches, groups, stop = subject.steps(COEFFICIENT_STEP, size)
    mixed = MixedRows(batches, subject.reads.words, (subject.source.seed, number)) if varied else None
    return _Rows(_distribution(subject, batches), groups, _distribution(subject, stop), mixed)


def _distribution(subject: Subject, batches: Sequence[Inputs]) -> Distribution:
    from deltamerge.calibrate.q.objectives import head_inputs

    states = None if subject.task in LANGUAGE or subject.model.headless else head_inputs
    return subject.distribution(batches, states=states)


def _varied(subject: Subject, rows: _Rows, turn: int) -> _Rows:
    """Return the rows as they are in a turn."""
    if rows.mixed is None:
        return rows
    learned = _distribution(subject, rows.mixed.turn(turn))
    return replace(rows, learned=replace(learned, weight=rows.learned.weight))


def _scaled(merge: _Merge, tasks: Sequence[_Rows]) -> tuple[list[_Rows], list[float]]:
    """Return the rows with a weight of their states, by which outputs and states count alike, and the base's losses."""
    nothing = merge.nothing()
    scales = _scales(merge, [task.stop for task in tasks])
    if any(task.stop.states is None for task in tasks):
        return list(tasks), scales
    changes = _values(merge, [task.stop.states for task in tasks], nothing)
    weights = [scale / change if change > SMALLEST else 0.0 for scale, change in zip(scales, changes, strict=True)]
    weighted = [
        replace(task, learned=replace(task.learned, weight=weight), stop=replace(task.stop, weight=weight))
        for task, weight in zip(tasks, weights, strict=True)
    ]
    return weighted, [scale + weight * change for scale, weight, change in zip(scales, weights, changes, strict=True)]


def _scales(merge: _Merge, objectives: Sequence[Any]) -> list[float]:
    """Return the distances that count as 1: the base's from each fine-tune, and the fine-tunes' mean one from the base
    on its rows, over the weight of these. Not known: 1."""
    found = _values(merge, objectives, merge.nothing())
    if merge.spec.base_weight:
        base, tunes = merge.subjects[-1], range(len(merge.subjects) - 1)
        with current(base.device):
            forgot = base.evaluate(objectives[-1], [merge.own_weights(i) for i in tunes])
        found[-1] = sum(forgot) / len(forgot) / merge.spec.base_weight
    return [value if value > SMALLEST else 1.0 for value in found]


def _joined(batches: Sequence[Inputs], pad: int) -> dict[str, Tensor]:
    """Return one batch of the rows of several, padded to the longest."""
    from torch.nn.functional import pad as padded

    from deltamerge.calibrate.model.passes import COMPARED

    if any(COMPARED in batch for batch in batches):
        batches = [{COMPARED: batch["attention_mask"].bool(), **batch} for batch in batches]
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    return {
        name: torch.cat(
            [
                padded(batch[name], (0, longest - batch[name].shape[1]), value=pad if name == "input_ids" else 0)
                for batch in batches
            ]
        )
        for name in batches[0]
    }


def _alike(lengths: Mapping[T, int], count: int) -> list[list[T]]:
    """Return what is to run together, `count` at most of like length: padding takes as long as texts."""
    ordered = sorted(lengths, key=lambda one: lengths[one])
    return [ordered[at : at + count] for at in range(0, len(ordered), count)]


def _fitting(sizes: Sequence[int], room: int) -> list[range]:
    """Return the numbers of batches that go back together: as many as fit, one at least."""
    found, first = list[range](), 0
    for number in range(1, len(sizes) + 1):
        if number == len(sizes) or sum(sizes[first : number + 1]) > room:
            found.append(range(first, number))
            first = number
    return found


def _places(batches: Sequence[Inputs]) -> int:
    """Count the tokens of one batch of the rows of several, with padding."""
    return sum(len(batch["input_ids"]) for batch in batches) * max(batch["input_ids"].shape[1] for batch in batches)


def _cut(where: tuple[slice, ...], values: Tensor) -> Tensor:
    return values[where]


def _apart(output: BlockOutput, batches: Sequence[Inputs]) -> Iterator[BlockOutput]:
    """Yield of the output for a joined batch each batch's own."""
    from deltamerge.calibrate.model.passes import BlockOutput

    first = 0
    for batch in batches:
        rows, tokens = batch["input_ids"].shape
        own, scores, read = slice(first, first + rows), output.scores, output.read
        first += rows
        if scores is not None:
            scores = scores.take(partial(_cut, (own, slice(tokens)) if scores.per_token else (own,)))
        if read is not None:
            read = read[own] if read.dim() == 2 else read[own, :tokens]
        yield BlockOutput(output.hidden[own, :tokens], scores, read)


def _fit(merge: _Merge, start: Coefficients) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
    """Return the coefficients of the smallest mean distance on the rows that decide, and (step, that distance) of every
    look.

    A look comes before the first step and after every turn through the rows.
    PATIENCE of them in a row that are no better end it, but not where rows are varied.
    """
    from deltamerge.calibrate.model.candidates import Shared
    from deltamerge.calibrate.model.devices import add_gradients, in_turns
    from deltamerge.calibrate.q.learned import descend

    every = range(len(merge.subjects))
    size = _batch_rows(len(merge.subjects)) if merge.spec.runs_together else ALONE

    varies = merge.spec.varies

    def rows_of(_: Subject, i: int) -> _Rows:
        return _rows(merge.subjects[i], i, size, varied=varies)

    tasks = list(in_turns(merge.places, every, rows_of))
    for subject in merge.subjects:  # the own weights of most have had their last turn
        subject.tensors.ahead.forget()
    tasks, scales = _scaled(merge, tasks)
    leaves, named = _leaves(merge.spec.scope, start)
    rate = VARIED_RATE if varies else RATE
    optimiser = torch.optim.Adam(leaves, lr=rate)

    def of_name() -> dict[str, Tensor]:
        return named(leaves)

    def look() -> float:
        values = _values(merge, [task.stop for task in tasks], of_name())
        return sum(value / scale for value, scale in zip(values, scales, strict=True)) / merge.count

    def descend_all(step: int) -> None:
        """Run the rows of all fine-tunes at once, texts of like length together."""
        of_step = [task.step(step) for task in tasks]
        sizes = [
            sum(map(task.learned.count, group)) * scale * len(tasks)
            for task, group, scale in zip(tasks, of_step, scales, strict=True)
        ]
        pad = merge.subjects[0].reads.pad_token_id or 0
        lengths = {
            (i, b): task.learned.batches[b]["input_ids"].shape[1]
            for i, (task, group) in enumerate(zip(tasks, of_step, strict=True))
            for b in group
        }
        numbers = _alike(lengths, max(1, TOGETHER // size))
        batches = [[tasks[i].learned.batches[b] for i, b in some] for some in numbers]
        states = [4 * width(merge.spec.source) * len(merge.model.blocks) * _places(some) for some in batches]

        def loss(first: int, place: int, output: BlockOutput) -> Tensor:
            number = first + place
            total = torch.zeros((), device=merge.places[0].device)
            for (i, b), own in zip(numbers[number], _apart(output, batches[number]), strict=True):
                total = total + tasks[i].learned.loss(b, own)[0] / sizes[i]
            return total

        for some in _fitting(states, STATES_BYTES):
            joined = [_joined(batches[number], pad) for number in some]
            merge.model.descend(joined, merge.weights(0, of_name()), partial(loss, some[0]))
            for i, b in (one for number in some for one in numbers[number]):
                merge.subjects[i].count([tasks[i].learned.batches[b]], 3)

    def descend_task(step: int, shared: Shared | None, _: Subject, i: int, copies: Sequence[Tensor]) -> None:
        task, subject = tasks[i], merge.subjects[i]
        group = task.step(step)
        size = sum(map(task.learned.count, group)) * scales[i] * len(tasks)
        weights = merge.weights(i, named(copies), shared)
        for batch in group:
            descend(subject.model, task.learned, batch, weights, size, subject.model.precision)
            subject.count([task.learned.batches[batch]], 3)

    def of_turn(number: int, _: Subject, i: int) -> _Rows:
        return _varied(merge.subjects[i], tasks[i], number)

    backends.trim()  # memory that was freed by making the deltas
    path, kept = [(0, look())], {name: value.detach().clone() for name, value in of_name().items()}
    turn = max(len(task.groups) for task in tasks)
    steps = max(1, _turns(merge, tasks)) * turn
    for step in range(1, steps + 1):
        if varies and step > 1 and (step - 1) % turn == 0:
            tasks = list(in_turns(merge.places, every, partial(of_turn, (step - 1) // turn)))
        optimiser.zero_grad()
        if merge.spec.runs_together:
            descend_all(step)
        elif merge.spec.shares_weights:
            (place,) = merge.places
            shared = Shared(place.device)
            for i in every:
                descend_task(step, shared, place, i, leaves)
            shared.descend()
        else:
            add_gradients(leaves, merge.places, every, partial(descend_task, step, None))
        for group_ in optimiser.param_groups:
            group_["lr"] = rate * (1.0 - (step - 1) / steps)
        optimiser.step()
        if step % turn == 0:
            path.append((step, look()))
            best = min(path, key=lambda point: (point[1], -point[0]))[0]
            if step == best:
                kept = {name: value.detach().clone() for name, value in of_name().items()}
            elif not varies and step >= best + PATIENCE * turn:
                break
    return {name: value.cpu() for name, value in kept.items()}, path


def _batch_rows(models: int) -> int:
    """Return the rows of each of `models` that run together: as few as the batches of a step of TOGETHER allow."""
    batches = math.ceil(COEFFICIENT_STEP / max(1, TOGETHER // models))
    return math.ceil(COEFFICIENT_STEP / batches)


def _leaves(scope: str, start: Coefficients) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], dict[str, Tensor]]]:
    """Return the fitted numbers, and the function that makes every tensor's coefficients of them."""
    if scope == "model":
        one = next(iter(start.values())).clone().requires_grad_(True)
        return [one], lambda some: dict.fromkeys(start, some[0])
    own = [value.clone().requires_grad_(True) for value in start.values()]
    return own, lambda some: dict(zip(start, some, strict=True))


def _turns(merge: _Merge, tasks: Sequence[_Rows]) -> int:
    """Return the number of times that the passes left allow to go through all fine-tunes' rows."""
    from deltamerge.calibrate.model.passes import sequences

    turn, left = max(len(task.groups) for task in tasks), []
    for subject, task in zip(merge.subjects, tasks, strict=True):
        search, held = subject.counts
        once = sum(map(sequences, task.learned.batches)) / len(task.groups) * turn
        stop = sum(map(sequences, task.stop.batches))
        passes, walks = (FITTED_PASSES, 3) if task.mixed is None else (VARIED_PASSES, 4)
        left.append((passes * search - subject.sequences - JUDGED * held) / (walks * once + stop))
    return int(min(left))


def _values(merge: _Merge, objectives: Sequence[Any], coefficients: Coefficients) -> list[float]:
    """Return the value of each fine-tune's objective."""
    from deltamerge.calibrate.model.devices import in_turns
    from deltamerge.calibrate.q.objectives import Generation

    if merge.spec.runs_together and not any(isinstance(one, Generation) for one in objectives):
        return _values_together(merge, objectives, coefficients)
    every = range(len(objectives))
    return list(in_turns(merge.places, every, lambda _, i: _value(merge, i, objectives[i], coefficients)))


def _values_together(merge: _Merge, objectives: Sequence[Any], coefficients: Coefficients) -> list[float]:
    """Return the same by one walk over the rows of all fine-tunes."""
    detached = {name: value.detach() for name, value in coefficients.items()}
    places = [(i, batch) for i, one in enumerate(objectives) for batch in range(len(one.batches))]

    def reduce(number: int, output: BlockOutput) -> tuple[int, Any]:
        i, batch = places[number]
        return i, objectives[i].reduce(batch, output)

    batches = [objectives[i].batches[batch] for i, batch in places]
    (found,) = merge.model.run(batches, [merge.weights(0, detached)], reduce)
    for subject, objective in zip(merge.subjects, objectives, strict=True):
        subject.count(objective.batches)
    return [one.value([part for k, part in found if k == i]) for i, one in enumerate(objectives)]


def _value(merge: _Merge, task: int, objective: Any, coefficients: Coefficients) -> float:

    subject = merge.subjects[task]
    detached = {name: value.detach().to(subject.device) for name, value in coefficients.items()}
    return subject.evaluate(objective, [merge.weights(task, detached)])[0]


def _judged(merge: _Merge, choices: Sequence[Coefficients]) -> tuple[HeldOutMeasure, list[float], float]:
    """Return the judge on held-out rows, and the values of the choices; the last is the recipe's own."""
    from deltamerge.calibrate.model.devices import in_turns

    judges = list(in_turns(merge.places, merge.subjects, lambda _, subject: subject.judge()))
    objectives = [judge.objective for judge in judges]
    labelled = all(subject.metric is not None for subject in merge.subjects)
    scales = [1.0] * len(judges) if labelled else _scales(merge, objectives)
    totals = []
    for chosen in choices:
        values = zip(_values(merge, objectives, chosen), scales, strict=True)
        totals.append(sum(value / scale for value, scale in values) / merge.count)
    judge = mean_judge(judges)
    if not labelled:
        kept = ", and of the base as a share of theirs from it," if merge.spec.base_weight else ","
        judge = replace(judge, measure=f"{judge.measure}, each as a share of the base's{kept}")
    return judge, totals[:-1], totals[-1]


def calibrate_lambda(*inputs: Node, known: Mapping[Node, Any], spec: Spec) -> Calibrated:
    """Return 1/factor of the recipe's λ, as the q of every merged tensor; 1 if the recipe's λ is as good on held-out
    rows."""
    from deltamerge.calibrate.q.choices import SCAN, QPoint, Verdict, decide
    from deltamerge.calibrate.q.search import shortlist
    from deltamerge.calibrate.q.subject import Subject

    with calibrating(spec.name, spec.passes, device=spec.source.device), Reader() as reader:
        subjects = [
            Subject(part.source, tensors, reader, known)
            for part, tensors in zip(spec.parts, spec.models(inputs), strict=True)
        ]
        assert spec.bounds is not None
        low, high = spec.bounds
        result, evaluate = _search_factor(subjects, spec.objective, low, high)
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
        chosen, record = decide(spec, Verdict(judge, some, held), found)
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


def _search_factor(
    subjects: Sequence[Subject], objective: str, low: float, high: float
) -> tuple[Minima, Callable[[Sequence[float]], list[float]]]:
    """Return the minimum of the sum of the fine-tunes' objectives over the factor, and that sum at several factors."""
    from deltamerge.calibrate.q import objectives as O
    from deltamerge.calibrate.q import search

    def summed(own: Sequence[Any], factors: Sequence[float], masks: range) -> list[list[float]]:
        """Return [factor][mask]."""
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
    measure = f"mean {' and '.join(measures)} of {len(judges)} models"
    return HeldOutMeasure(one.objective, measure, one.rows, trusted, higher=all(judge.higher for judge in judges))
