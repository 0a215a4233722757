"""Learned scales: the q of every tensor, or of every output row, of a drawn mask, fitted by gradient without labels.

The pruned model base + masked/q is fitted to the fine-tune's output distribution (`objectives.Distribution`) by Adam on
log q. Only q has gradients. A block's weights are computed when it runs, forward and backward, and then freed, so
memory is that of one forward pass with checkpoints at the blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deltamerge.calibrate.model.blocks import BlockModel, Weights
from deltamerge.calibrate.model.candidates import Masked, Q, pruned
from deltamerge.calibrate.model.devices import add_gradients
from deltamerge.calibrate.q.objectives import Distribution
from deltamerge.calibrate.spec import Precision


@dataclass(frozen=True, slots=True)
class Learned:
    """The q's of the step with the smallest held-out loss: float32, in the shapes of the starting values.

    path      (step, held-out loss) at each evaluation; step 0 is the start
    step      the step chosen
    steps     the number of steps; each is three forward passes (forward, again from the checkpoints, backward)
    reached   the tensors that the output depends on; others keep their starting values
    """

    q: dict[str, Tensor]
    step: int
    path: tuple[tuple[int, float], ...]
    steps: int
    reached: frozenset[str]


@dataclass(frozen=True, slots=True)
class Learner:
    """A model on a device, the fine-tune's outputs there, and the arguments of `candidates.pruned` for its weights."""

    model: BlockModel
    objective: Distribution
    base: Callable[[str], Tensor]
    masked: Callable[[str], Masked | None]

    @property
    def device(self) -> torch.device:
        """Tell where it computes."""
        return self.model.device

    def weights(self, logs: Mapping[str, Tensor]) -> Weights:
        """Return the pruned weights with q's of these logarithms; a q is computed when its weight is."""

        def made(names: Sequence[str]) -> Mapping[str, Tensor]:
            return pruned(self.base, self.masked, {name: logs[name].exp() for name in names if name in logs})(names)

        return made


def learn(
    first: Learner,
    start: Mapping[str, Q],
    *,
    groups: Sequence[Sequence[int]],
    held_out: Sequence[int],
    bounds: tuple[float, float],
    steps: int = 40,
    lr: float = 0.1,
    patience: int = 3,
    others: Callable[[Distribution], Sequence[Learner]] = lambda _: (),
) -> Learned:
    """Fit the q's of `start`, each a number or () for a tensor, `row_shape` for its rows.

    groups        batch indices of each step's data, used in turn; gradients are summed over a group
    held_out      batch indices of the data that decides. A look at it comes before the first step and after every turn
                  through `groups`. The best look is kept; `patience` looks in a row that are no better end the search
    bounds        of every q: without them scales pass 100 on tensors that hardly matter
    others        the same on other devices, which share the batches of a step; they give the q of one device
    """
    low, high = math.log(bounds[0]), math.log(bounds[1])
    logs = {name: _log(q, low, high, first.device) for name, q in start.items()}
    optimiser = torch.optim.Adam(list(logs.values()), lr=lr)
    places, stop = [first, *others(first.objective)], subset(first.objective, held_out)

    def look() -> float:
        return stop.value(first.model.run(stop.batches, [first.weights(logs)], stop.reduce)[0])

    def descend_batch(count: int, at: Learner, batch: int, copies: Sequence[Tensor]) -> None:
        descend(at.model, at.objective, batch, at.weights(dict(zip(logs, copies, strict=True))), count)

    path = [(0, look())]
    reached: set[str] = set()
    best, smallest, kept, worse, taken = 0, path[0][1], _copy(logs), 0, 0
    for step in range(1, steps + 1):
        optimiser.zero_grad()
        group = groups[(step - 1) % len(groups)]
        count = sum(map(first.objective.count, group))
        add_gradients(list(logs.values()), places, group, partial(descend_batch, count))
        reached |= {name for name, log in logs.items() if log.grad is not None}
        optimiser.step()
        with torch.no_grad():
            for log in logs.values():
                log.clamp_(low, high)
        taken = step
        if step % len(groups) and step < steps:
            continue
        path.append((step, look()))
        if path[-1][1] < smallest:
            best, smallest, kept, worse = step, path[-1][1], _copy(logs), 0
        else:
            worse += 1
            if worse >= patience:
                break
    return Learned(kept, best, tuple(path), taken, frozenset(reached))


def descend(
    model: BlockModel,
    objective: Distribution,
    batch: int,
    weights: Weights,
    size: float,
    precision: Precision = "float32",
) -> None:
    """Add the gradient of a batch's loss / `size` to the tensors that the weights are computed from."""
    total, _ = objective.loss(batch, model.differentiable(objective.batches[batch], weights, precision))
    torch.autograd.backward(total / size)


def row_shape(transposed: bool, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of one q per output row, which broadcasts to the stored weight: (m, 1), or (1, m) where it is
    stored (in, out).

    Of stacked matrices (E, m, 1); of those stored (in, out) one per matrix, (E, 1, 1).
    """
    if len(shape) > 2:
        return (*shape[:-2], 1, 1) if transposed else (*shape[:-1], 1)
    return (1, shape[1]) if transposed else (shape[0], 1)


def _log(q: Q, low: float, high: float, device: torch.device) -> Tensor:
    value = torch.as_tensor(q, dtype=torch.float32).detach().to(device)
    return value.log().clamp(low, high).clone().requires_grad_(True)


def _copy(logs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: log.detach().exp().cpu() for name, log in logs.items()}


def subset(objective: Distribution, batches: Sequence[int]) -> Distribution:
    """Return the objective on some of its batches."""
    return Distribution(
        [objective.batches[b] for b in batches], [objective.targets[b] for b in batches], objective.regression
    )
