"""Learned codes: the factors of a delta in few bits, fitted by gradient to the fine-tune's outputs, without labels.

The loss is the one of learned scales (`objectives.Distribution`), and the change of the last hidden states: they say
more of a row than its outputs do. A number stands behind each code, and the code's level is the nearest to it. The
number takes the level's gradient (the straight-through estimator, arXiv 1308.3432).
Scales are learned too. Numbers with trellis codes get the levels of the nearest sequence of codes, found anew in each
step. The number of components of each level count stays as it is, and so do the bytes. The rows of a language model are
varied in each turn (`variations`), so that a few rows are enough.

A layer's product x V Uᵀ is computed from its inputs and added to the output of the base's weight, so that no gradient
is as large as a weight. Tables of embeddings keep the codes of the start: a step would cost as much as all layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamerge.calibrate.merge.second_moments import InputMeasurement
from deltamerge.calibrate.model.blocks import BlockModel
from deltamerge.calibrate.model.candidates import Cache
from deltamerge.calibrate.model.passes import BlockOutput, Inputs, Logits, Weights, float_attention
from deltamerge.calibrate.q.objectives import Distribution, StateChange, last_states
from deltamerge.calibrate.q.subject import Subject
from deltamerge.calibrate.q.variations import Variations
from deltamerge.calibrate.rows.files import DataRow
from deltamerge.calibrate.rows.heads import LANGUAGE
from deltamerge.calibrate.rows.splits import select, without
from deltamerge.calibrate.spec import held_rows, held_weights, hidden
from deltamerge.calibrate.stage import calibrating
from deltamerge.files import progress
from deltamerge.formats.delta import trellis
from deltamerge.formats.delta.parts import LEVELS, Factored, coded_scales
from deltamerge.methods.rate import HELD_STATES, LATENT, LEARNING_ROWS, learning_passes, learning_steps, unit
from deltamerge.tensors.reader import Reader

LEARNING = "learning codes of"
CODE_RATE, SCALE_RATE = 0.018, 0.03  # learning rates, in standard deviations of a factor, and of a scale's logarithm
WARM = 5  # steps
STATES = 1.0  # of the change of hidden states beside that of outputs, each as a share of the start's
CODES = 5  # codes in a byte, about
DECIDING = 0.1  # share of the rows that decide


@dataclass(frozen=True)
class LearnedCodes:
    """Factors by the fine-tune's names, and the loss on the rows that decide, before and after.

    Before is the loss of the best codes that are not learned. Learned codes that lose no less are not taken. Nothing is
    learned if the head's outputs are numbers: such models lost score by it (docs/measurements/bytes.md).
    """

    factors: Mapping[str, Factored]
    before: float
    after: float


@dataclass(frozen=True)
class Codes:
    """The factors of an artifact's layers by the fine-tune's names, and its other tensors.

    fixed   makes a tensor that has no factors; None: it is the fine-tune's own
    """

    factors: Mapping[str, Factored]
    fixed: Callable[[str], Tensor | None]


def learn_codes(measured: InputMeasurement, start: Codes, plain: Codes) -> LearnedCodes:
    """Fit the factors of `start`, and compare what they lose with `plain`, the best artifact without learning."""
    source = measured.source
    passes = learning_passes(source.calibration.sequences)
    with calibrating(source.model, passes, LEARNING, device=source.device), Reader() as reader:
        subject = Subject(source, measured.tensors, reader)
        found = _learned(subject, start, plain)
        subject.forget()
    return found


def _learned(subject: Subject, start: Codes, plain: Codes) -> LearnedCodes:
    learned, deciding = _split(subject)
    taken = LATENT * sum(one.nbytes for one in start.factors.values()) // CODES + HELD_STATES * hidden(subject.source)
    room = max(0, subject.source.cache - taken)
    batches, groups, held = _batches(subject, learned, room)
    stop = subject.reads.batches(deciding, size=subject.size).inputs
    last = subject.distribution(stop, states=last_states)
    assert last.states is not None

    first = _Placed(subject, plain, 0)
    before = first.lose(last, stop)
    if subject.is_regression:
        return LearnedCodes(start.factors, before, before)
    change = first.lose(last.states, stop)
    last = replace(last, weight=STATES * before / change if change else 0.0)
    before += last.weight * change
    del first

    codes = _Placed(subject, start, room - held)
    latents = codes.latents
    optimiser = torch.optim.Adam(
        [
            {"params": [side for one in latents.values() for side in (one.left, one.right)], "lr": CODE_RATE},
            {"params": [one.logs for one in latents.values()], "lr": SCALE_RATE},
        ],
        betas=(0.9, 0.99),
    )
    steps = learning_steps(subject.source.calibration.sequences)
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, partial(_rate, steps))

    def step(objective: Distribution, group: Sequence[int]) -> None:
        codes.place()
        size = sum(map(objective.count, group))
        for batch in group:
            _descend(subject.model, objective, batch, codes.weights, size, held=held > 0)
        for one in latents.values():
            one.pull()
        optimiser.step()
        optimiser.zero_grad()
        rates.step()
        _count(subject, [batches[batch] for batch in group], 3)

    turns = math.ceil(steps / len(groups))
    variations, draw = _variations(subject, batches, turns), np.random.default_rng(subject.source.seed)
    for turn in range(turns):
        if not turn or variations.substitutes:
            objective = replace(subject.distribution(variations.turn(turn), states=last_states), weight=last.weight)
        order = draw.permutation(len(groups))[: steps - turn * len(groups)]
        with codes.added(), float_attention(codes.dtype, subject.device):
            for number in order:
                step(objective, groups[number])
    for one in latents.values():
        one.settle()
    after = codes.lose(last, stop)
    if not after < before:
        return LearnedCodes(start.factors, before, before)
    factors = {**start.factors, **{name: one.rounded() for name, one in latents.items()}}
    return LearnedCodes(factors, before, after)


def _count(subject: Subject, batches: Sequence[Inputs], times: int) -> None:
    rows = sum(len(next(iter(batch.values()))) for batch in batches)
    progress.here(progress.PASSES).step(times * rows / subject.source.calibration.sequences)


class _Placed:
    """An artifact's codes on the base, in the model that runs them; `room` bytes of other weights are kept."""

    def __init__(self, subject: Subject, codes: Codes, room: int) -> None:
        self._subject, self._fixed = subject, codes.fixed
        model = subject.model
        self.dtype = torch.bfloat16 if model.precision == "bfloat16" else torch.float32
        self.latents = {
            name: Latent(one, subject.device) for name, one in codes.factors.items() if name not in model.lookups
        }
        self._outside = {*model.parts[0]} if not model.whole else set[str]()
        self._kept = Cache(lambda names: {name: self._still(name) for name in names}, 0, room)
        self._layers = _layers(model, self.latents)

    def place(self) -> None:
        """Make the factors of the numbers as they are now."""
        for one in self.latents.values():
            one.place(self.dtype)

    def added(self) -> AbstractContextManager[None]:
        """Add the products of the placed factors to the outputs of their layers."""
        return _added(self._layers, self.latents, self.dtype)

    def weights(self, names: Sequence[str]) -> Mapping[str, Tensor]:
        """Return weights without the products that are added."""
        found = {name: self._kept(name) for name in names}
        for name in found.keys() & (self.latents.keys() - self._layers.keys()):
            found[name] = found[name] + self.latents[name].product().view(found[name].shape)
        return found

    def lose(self, objective: Distribution | StateChange, batches: Sequence[Inputs]) -> float:
        """Return what the codes lose on batches."""
        self.place()
        with torch.no_grad(), self.added():
            found = self._subject.model.run(batches, [self.weights], objective.reduce)
        _count(self._subject, batches, 1)
        return objective.value(found[0])

    def _still(self, name: str) -> Tensor:
        """Return the tensor that is the same in each step."""
        subject = self._subject
        if name in self.latents:
            return subject.start(name).to(self.dtype)
        made = self._fixed(name)
        made = subject.tune([name])[name] if made is None else made.to(subject.device)
        return made.to(torch.float32) if name in self._outside and made.is_floating_point() else made


def _split(subject: Subject) -> tuple[list[DataRow], list[DataRow]]:
    """Return the rows to learn on, and the rows that decide."""
    search, held = subject.rows["search"], subject.rows["held"]
    rows = subject.source.calibration.sequences
    deciding = select(held, max(1, round(DECIDING * rows)), subject.source.seed + 1)
    return [*search, *without(held, deciding)][:rows], deciding


def _batches(
    subject: Subject, rows: Sequence[DataRow], room: int
) -> tuple[list[dict[str, Tensor]], list[list[int]], int]:
    """Return batches of rows of about one length, the batch indices of each step, and the bytes held to go back.

    With all weights these bytes are at most `room`; 0: activations are computed again, block by block.
    """
    near = sorted(rows, key=lambda row: len(str(row.content)) + len(row.completion or ""))
    for size in (LEARNING_ROWS, LEARNING_ROWS // 2, LEARNING_ROWS // 4, 1):
        batches, groups = subject.reads.steps(near, step=LEARNING_ROWS, size=size)
        longest = max(next(iter(batch.values())).shape[1] for batch in batches.inputs)
        held = held_rows(subject.source, size, longest)
        if subject.model.blocks and held + held_weights(subject.source) <= room:
            return batches.inputs, groups, held
    batches, groups = subject.reads.steps(near, step=LEARNING_ROWS, size=LEARNING_ROWS)
    return batches.inputs, groups, 0


def _variations(subject: Subject, batches: Sequence[Inputs], turns: int) -> Variations:
    """Return the rows to learn on, with substitutes for the tokens of a language model's rows."""
    seed = subject.source.seed
    if subject.task not in LANGUAGE or subject.reads.decoder or subject.model.headless:
        return Variations(batches, [], torch.empty(0), seed)
    special = subject.reads.special
    found = Variations.drawn(subject.model, subject.tune, batches, turns=turns, special=special, seed=seed)
    subject.count(batches)
    return found


def _rate(steps: int, step: int) -> float:
    """Return the share of the learning rate: up over the first steps, then down along a cosine."""
    return min((step + 1) / WARM, 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _layers(model: BlockModel, latents: Mapping[str, Latent]) -> dict[str, nn.Linear]:
    """Return the layers of latents whose product is taken of their inputs: all of the blocks that rows have reached."""
    inside = {name for part in model.parts[1:] for name in part}
    found = {}
    for path, module in model.module.named_modules():
        name = model.checkpoint_name.get(f"{path}.weight", "")
        if type(module) is nn.Linear and name in latents and name in inside & model.reached:
            found[name] = module
    return found


@contextmanager
def _added(layers: Mapping[str, nn.Linear], latents: Mapping[str, Latent], dtype: torch.dtype) -> Iterator[None]:
    """Add the products of latents to the outputs of their layers; both take the same inputs, in `dtype`."""

    def taking(module: nn.Module, inputs: Any) -> Any:
        return inputs[0].to(dtype), *inputs[1:]

    def adding(latent: Latent) -> Callable[[nn.Module, Any, Tensor], Tensor]:
        return lambda module, inputs, output: output + latent.of(inputs[0])

    hooks = [layer.register_forward_pre_hook(taking) for layer in layers.values()]
    hooks += [layer.register_forward_hook(adding(latents[name])) for name, layer in layers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _descend(
    model: BlockModel, objective: Distribution, batch: int, weights: Weights, size: float, *, held: bool
) -> None:
    """Add the gradient of a batch's loss / `size` to the tensors that the weights are computed from."""
    output = model.differentiable(objective.batches[batch], weights, model.precision, held=held)
    total, _ = objective.loss(batch, _summed(output, model))
    torch.autograd.backward(total / size)


def _summed(output: BlockOutput, model: BlockModel) -> BlockOutput:
    """Return the output with the gradients of a last layer's logits computed beside them."""
    scores = output.scores
    if scores is None or scores.weight is None or scores.weight.requires_grad:
        return output
    weight = scores.weight.to(torch.bfloat16) if model.precision == "bfloat16" else scores.weight
    return replace(output, scores=SlopedLogits(scores.x, scores.weight, scores.bias, weight))


@dataclass(frozen=True, slots=True)
class SlopedLogits(Logits):
    """Logits whose gradients are computed with them, so that no logit is computed twice.

    sloping   the weight that gradients are multiplied with, in their precision
    """

    sloping: Tensor | None = None

    def map(self, value: Callable[[slice, Tensor], Tensor]) -> list[Tensor]:
        """Return `value`, a number for each row, of rows and their logits, piece by piece."""
        found = []
        for rows, x in self._rows():
            logits = replace(self, x=x.detach()).computed.requires_grad_()
            values = value(rows, logits)
            (slope,) = torch.autograd.grad(values.sum(), logits)
            assert self.sloping is not None
            found.append(_sloped(x, values.detach(), (slope.to(self.sloping.dtype) @ self.sloping).to(x.dtype)))
        return found


def _sloped(x: Tensor, values: Tensor, slope: Tensor) -> Tensor:
    apply: Callable[..., Tensor] = _Sloped.apply
    return apply(x, values, slope)


class _Sloped(torch.autograd.Function):
    """Values (N) of the rows of x (N, H), whose gradients (N, H) are known."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grads[0][:, None], None, None


class Latent:
    """The numbers that a tensor's factors are the nearest levels to, in standard deviations, and log scales.

    A step places the factors as they are now, multiplies by them, and pulls their gradients back to the numbers. The
    numbers of trellis codes have the levels of the nearest sequence of codes.
    """

    def __init__(self, start: Factored, device: torch.device) -> None:
        self._start = start
        units = np.array([unit(int(kind)) for kind in start.levels], np.float32).astype(np.float64)
        self._unit = torch.tensor(units, dtype=torch.float32, device=device)[:, None]
        kinds, firsts = np.unique(start.levels, return_index=True)
        ends = [*firsts[1:].tolist(), len(units)]
        self._groups = [(kind, slice(*rows)) for kind, *rows in zip(kinds.tolist(), firsts.tolist(), ends, strict=True)]
        self.left, self.right = (self._numbers(side * units[:, None]) for side in (start.left, start.right))
        self._is_nothing = start.scales <= 0
        self.logs = self._numbers(np.log(np.where(self._is_nothing, 1.0, start.scales) / units**2))
        self._kept = torch.from_numpy(~self._is_nothing).to(device)

    def _numbers(self, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._unit.device)

    @property
    def _scales(self) -> Tensor:
        return torch.where(self._kept, self.logs.exp(), 0.0)[:, None]

    def place(self, dtype: torch.dtype) -> None:
        """Make the factors of the numbers as they are now, in `dtype`; they have gradients."""
        left = self._nearest(self.left) * self._unit * self._scales
        right = self._nearest(self.right) * self._unit
        self._u, self._v = (side.to(dtype).requires_grad_() for side in (left, right))

    def of(self, x: Tensor) -> Tensor:
        """Return x V Uᵀ (…, m) of inputs (…, n)."""
        return F.linear(F.linear(x, self._v), self._u.T)

    def product(self) -> Tensor:
        """Return Uᵀ V (m, n), the sum of the components."""
        return self._u.T @ self._v

    def pull(self) -> None:
        """Give the numbers the gradients of the factors, as if numbers were levels."""
        u, v = self._u.grad, self._v.grad
        if u is None or v is None:  # no row has reached the layer
            return
        u, v, scales = u.float(), v.float(), self._scales
        self.left.grad, self.right.grad = u * scales, v
        self.logs.grad = (u * self._u.detach().float()).sum(1)

    def settle(self) -> None:
        """Round the scales as they are stored."""
        scales = torch.from_numpy(np.where(self._is_nothing, 1.0, self.rounded().scales))
        self.logs.copy_((scales.to(self.logs.device) / self._unit[:, 0].double() ** 2).log())

    def _nearest(self, side: Tensor) -> Tensor:
        """Return the levels, as integers in float32."""
        found, scaled = torch.empty_like(side), side / self._unit
        for kind, rows in self._groups:
            if kind in trellis.BITS:
                levels = trellis.levels_of(trellis.nearest(scaled[rows].cpu().numpy(), kind), kind)
                found[rows] = torch.from_numpy(levels).to(found)
            else:
                table = torch.tensor(LEVELS[kind], dtype=torch.float32, device=found.device)
                found[rows] = table[torch.bucketize(scaled[rows], (table[1:] + table[:-1]) / 2)]
        return found

    def rounded(self) -> Factored:
        """Return the factors as they are stored, scales rounded too."""
        left, right = (self._nearest(side).cpu().numpy().astype(np.int8) for side in (self.left, self.right))
        scales = self.logs.double().exp().cpu().numpy() * self._unit[:, 0].double().cpu().numpy() ** 2
        return Factored(self._start.levels, left, right, coded_scales(np.where(self._is_nothing, 0.0, scales)))
