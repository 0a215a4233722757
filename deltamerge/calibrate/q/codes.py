"""Learned codes: the factors of a delta in few bits, fitted by gradient to the fine-tune's outputs, without labels.

The loss is that of learned scales (`objectives.Distribution`). A level is the nearest to a number of its own, which
takes the level's gradient (the straight-through estimator, arXiv 1308.3432); scales are learned beside them. How many
components have how many levels is given, and stays: so do the bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deltamerge.calibrate.merge.second_moments import InputMeasurement
from deltamerge.calibrate.model.candidates import Cache
from deltamerge.calibrate.q.learned import descend, subset
from deltamerge.calibrate.q.subject import Subject
from deltamerge.calibrate.stage import calibrating
from deltamerge.formats.delta.parts import LEVELS, Factored, coded_scales
from deltamerge.tensors.reader import Reader

LEARNING = "learning codes of"
STEPS = 100
STEP = 8  # rows of a step
CODE_RATE, SCALE_RATE = 0.012, 0.03  # learning rates, in units of the largest level, and of a scale's logarithm
WARM = 5  # steps
LOOKS = 2  # passes of the fine-tune, and over the rows that decide, together
DECIDING = 0.1  # share of the rows that decide


@dataclass(frozen=True)
class LearnedCodes:
    """Factors by the fine-tune's names, and the loss on the rows that decide, before and after.

    Where learning made it no smaller, the factors are those of the start; and where the head's outputs are numbers, of
    which it lost score (docs/measurements/bytes.md).
    """

    factors: Mapping[str, Factored]
    before: float
    after: float


def learn_codes(
    measured: InputMeasurement, start: Mapping[str, Factored], fixed: Callable[[str], Tensor | None]
) -> LearnedCodes:
    """Fit the factors of layers; `fixed` makes the model's other tensors, None: one is the fine-tune's own."""
    source = measured.source
    passes = math.ceil(3 * STEPS * STEP / source.calibration.sequences) + LOOKS
    with calibrating(source.model, passes, LEARNING, device=source.device), Reader() as reader:
        subject = Subject(source, measured.tensors, reader)
        found = _learned(subject, start, fixed)
        subject.forget()
    return found


def _learned(subject: Subject, start: Mapping[str, Factored], fixed: Callable[[str], Tensor | None]) -> LearnedCodes:
    def still(name: str) -> Tensor:
        made = fixed(name)
        return subject.tune([name])[name] if made is None else made.to(subject.device)

    kept = Cache(lambda names: {name: still(name) for name in names}, 0, subject.source.cache)
    dtype = torch.bfloat16 if subject.model.precision == "bfloat16" else torch.float32
    latents = {name: Latent(one, subject.device) for name, one in start.items()}

    def weights(products: Callable[[str], Tensor]) -> Callable[[Sequence[str]], Mapping[str, Tensor]]:
        def made(name: str) -> Tensor:
            if name not in latents:
                return kept(name)
            base = subject.start(name).to(dtype)
            return base + products(name).view(base.shape)

        return lambda names: {name: made(name) for name in names}

    batches, groups, stop = subject.steps(STEP, STEP, DECIDING)
    objective = subject.distribution([*batches, *stop])
    deciding = subset(objective, range(len(batches), len(objective.batches)))

    def look(some: Mapping[str, Factored]) -> float:
        placed = {name: Latent(one, subject.device) for name, one in some.items()}
        found = subject.model.run(
            deciding.batches, [weights(lambda name: placed[name].product(dtype))], deciding.reduce
        )
        subject.count(deciding.batches)
        return deciding.value(found[0])

    before = look(start)
    if subject.is_regression:
        return LearnedCodes(start, before, before)
    codes = [tensor for latent in latents.values() for tensor in (latent.left, latent.right)]
    optimiser = torch.optim.Adam(
        [{"params": codes, "lr": CODE_RATE}, {"params": [one.logs for one in latents.values()], "lr": SCALE_RATE}],
        betas=(0.9, 0.99),
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimiser, _rate)
    products = weights(lambda name: latents[name].product(dtype))
    for step in range(STEPS):
        optimiser.zero_grad()
        group = groups[step % len(groups)]
        count = sum(map(objective.count, group))
        for batch in group:
            descend(subject.model, objective, batch, products, count, subject.model.precision)
        optimiser.step()
        rates.step()
        subject.count([batches[batch] for batch in group], 3)
    found = {name: latent.rounded() for name, latent in latents.items()}
    after = look(found)
    return LearnedCodes(found, before, after) if after < before else LearnedCodes(start, before, before)


def _rate(step: int) -> float:
    """The share of the learning rate: up over the first steps, then down along a cosine."""
    return min((step + 1) / WARM, 1.0) * 0.5 * (1 + math.cos(math.pi * step / STEPS))


class Latent:
    """The numbers that a tensor's factors are the nearest levels to, in units of the largest level, and log scales."""

    def __init__(self, start: Factored, device: torch.device) -> None:
        self._start = start
        top = np.array([float(LEVELS[int(count)][-1]) for count in start.levels])
        self._groups = [(int(count), torch.from_numpy(start.levels == count)) for count in np.unique(start.levels)]
        self._top = torch.tensor(top, dtype=torch.float32, device=device)[:, None]
        self.left, self.right = (self._placed(side / top[:, None]) for side in (start.left, start.right))
        self._is_nothing = start.scales <= 0
        self.logs = self._placed(np.log(np.where(self._is_nothing, 1.0, start.scales) * top**2))
        self._kept = torch.from_numpy(~self._is_nothing).to(device)

    def _placed(self, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32, device=self._top.device, requires_grad=True)

    def product(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return Σ_k scale_k u_k v_kᵀ (m, n), multiplied in `dtype`, with gradients to the numbers as if they were the
        levels."""
        scales = torch.where(self._kept, self.logs.exp(), 0.0)
        left, right = (side + (self._nearest(side.detach()) / self._top - side).detach() for side in self._sides)
        return (left * scales[:, None]).to(dtype).T @ right.to(dtype)

    @property
    def _sides(self) -> tuple[Tensor, Tensor]:
        return self.left, self.right

    def _nearest(self, side: Tensor) -> Tensor:
        """Return the levels, as integers in float32."""
        found, scaled = torch.empty_like(side), side * self._top
        for count, rows in self._groups:
            levels = torch.tensor(LEVELS[count], dtype=torch.float32, device=side.device)
            found[rows] = levels[torch.bucketize(scaled[rows], (levels[1:] + levels[:-1]) / 2)]
        return found

    def rounded(self) -> Factored:
        """Return the factors as they are stored, scales rounded too."""
        left, right = (self._nearest(side.detach()).cpu().numpy().astype(np.int8) for side in self._sides)
        scales = self.logs.detach().double().exp().cpu().numpy() / self._top[:, 0].double().cpu().numpy() ** 2
        return Factored(self._start.levels, left, right, coded_scales(np.where(self._is_nothing, 0.0, scales)))
