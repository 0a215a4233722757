"""Mean squared gradients of the log-likelihood of a few rows, entry by entry: the diagonal of Fisher's information.

A row is run at a time, forward and backward; a block's gradient is squared and added to a file as soon as it is there,
so memory is that of a forward pass with checkpoints at the blocks. Plans name `squares`, so torch is imported when it
runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamerge.calibrate.spec import Share
from deltamerge.calibrate.stage import calibrating
from deltamerge.calibrate.values import Spooled
from deltamerge.errors import InputError
from deltamerge.files.descriptors import writing
from deltamerge.tensors.reader import Reader

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.calibrate.model.blocks import BlockOutput
    from deltamerge.calibrate.q.subject import Subject

FORWARDS = 4  # passes of a row: forward, again from the checkpoints, backward
CLASSES = 8  # up to so many the expectation over the model's answers is exact; of more, one is drawn


def squares(found: Spooled, *, parts: tuple[Share, ...]) -> Spooled:
    """E(∂ log p(y | x) / ∂w)² of every tensor of `parts`, over rows x and answers y of the fine-tune's own.

    Classes are weighed by their probabilities; of a language model y is the row's own text; of a regression the squares
    are those of its outputs. InputError: a model without a head, or gradients that are not finite.
    """
    from deltamerge.calibrate.q.subject import Subject

    for model, part in enumerate(parts):
        source = part.source
        with calibrating(source.model, FORWARDS, "differentiating", device=source.device), Reader() as reader:
            subject = Subject(source, reader)
            if subject.model.headless:
                raise InputError("it has no head, whose answers are differentiated", hint="merge_method: regmean")
            names = {one.stored: one.name for one in part.pruned}
            sums = _SquareSums(found, model, names, subject.counts[0])
            _differentiate(subject, sums)
            sums.close()
            subject.forget()
    return found


class _SquareSums:
    """Adds squared gradients to a tensor's file."""

    def __init__(self, found: Spooled, model: int, names: Mapping[str, str], rows: int) -> None:
        self.found, self.model, self.names, self.rows = found, model, names, rows
        self.weight = 1.0
        self.maps: dict[str, Any] = {}

    def add(self, stored: str, grad: Tensor) -> None:
        import torch

        name = self.names[stored]
        if name not in self.maps:
            path = self.found.begun(name, self.model)
            with writing():
                self.maps[name] = np.memmap(path, np.float32, "w+", shape=(grad.numel(),))
        square = grad.detach().to("cpu", torch.float32).reshape(-1).square().mul_(self.weight / self.rows)
        self.maps[name] += square.numpy()

    def close(self) -> None:
        """Take the mean over the model. InputError: it is not finite."""
        total = math.fsum(float(values.sum(dtype=np.float64)) for values in self.maps.values())
        if not math.isfinite(total):
            raise InputError("the gradients of its answers are not finite", hint="merge_method: linear, or other rows")
        size = sum(values.size for values in self.maps.values())
        self.found.scales[self.model] = total / max(1, size)
        with writing():
            for values in self.maps.values():
                values.flush()
        self.maps.clear()


def _differentiate(subject: Subject, sums: _SquareSums) -> None:
    import torch

    from deltamerge.calibrate.merge.sums import tapped
    from deltamerge.calibrate.q.objectives import per_token

    spark = torch.zeros((), device=subject.device, requires_grad=True)

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        stored = subject.tune(names)
        return {n: tapped(t, spark, n, sums.add) if n in sums.names else t for n, t in stored.items()}

    generator = torch.Generator().manual_seed(subject.source.seed)
    for batch in subject.reads.batches(subject.rows["search"], size=1).inputs:
        output = subject.model.differentiable(batch, weights)
        if per_token(output.logits):
            terms = [(1.0, _of_text(output, batch))]
        else:
            terms = _of_answers(output, subject.is_regression, generator)
        for i, (weight, term) in enumerate(terms):
            sums.weight = weight
            torch.autograd.backward(term, retain_graph=i + 1 < len(terms))
        subject.count([batch], FORWARDS)


def _of_text(output: BlockOutput, batch: Mapping[str, Tensor]) -> Tensor:
    """log p of the tokens of the row, each given those before it."""
    import torch.nn.functional as F

    from deltamerge.calibrate.rows.batches import said

    assert output.logits is not None
    labels = said(dict(batch)).to(output.logits.device)
    return -F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum")


def _of_answers(output: BlockOutput, regression: bool, generator: Any) -> list[tuple[float, Tensor]]:
    """(weight, log-likelihood) of answers to one row."""
    import torch

    assert output.logits is not None
    logits = output.logits[0]
    if regression:
        return [(1.0, value) for value in logits]
    logs = logits.log_softmax(-1)
    probabilities = logs.detach().exp().cpu()
    if len(logs) <= CLASSES:
        return [(float(p), value) for p, value in zip(probabilities, logs, strict=True)]
    drawn = int(torch.multinomial(probabilities, 1, generator=generator))
    return [(1.0, logs[drawn])]
