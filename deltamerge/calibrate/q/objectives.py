"""The objectives that calibration minimises. Each turns a forward pass into one number; smaller is better.

An objective has two steps: `reduce(batch, output)` for every batch of a pass, then `value` of the results. Unlabelled
objectives compare with the fine-tune, whose outputs `of` collects once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from deltamerge.calibrate.model.blocks import BlockModel, BlockOutput, Inputs, Weights
from deltamerge.calibrate.model.passes import COMPARED, Logits
from deltamerge.calibrate.spec import WALKED
from deltamerge.errors import InputError

Matrix = NDArray[np.float64]
ROUNDS = 50


Compared = TypeVar("Compared", "OutputChange", "Distribution", "Agreement")
"""An objective that compares with the fine-tune's outputs, one of each batch."""
Placed = TypeVar("Placed")
TOP = 5
LEAST = 1e-12  # square of a hidden state that is divided by
DOUBT = 2.0  # temperature at which a fine-tune's probabilities say how often its answers are right
CLASSES = 64


class Objective(Protocol):
    """A function of a pass over `batches`."""

    batches: Sequence[Inputs]

    def reduce(self, batch: int, output: BlockOutput) -> Any: ...
    def value(self, parts: Sequence[Any]) -> float: ...


Made = TypeVar("Made", bound=Objective, covariant=True)


@dataclass(frozen=True, slots=True)
class Comparison(Generic[Made]):
    """An objective that compares with a fine-tune, before the fine-tune has run.

    keep    what of the fine-tune's output for a batch is compared with
    made    the objective, of these for all batches
    """

    keep: Callable[[int, BlockOutput], Any]
    made: Callable[[Sequence[Any]], Made]


def collected(
    model: BlockModel, tune: Weights, batches: Sequence[Inputs], comparisons: Sequence[Comparison[Made]]
) -> list[Made]:
    """Return the objectives of comparisons on the same batches: the fine-tune runs once for all."""

    def keep(batch: int, output: BlockOutput) -> list[Any]:
        return [one.keep(batch, output) for one in comparisons]

    parts = model.run(batches, [tune], keep)[0] if comparisons else []
    return [one.made([part[i] for part in parts]) for i, one in enumerate(comparisons)]


def evaluate(
    model: BlockModel,
    objective: Objective | Generation,
    variants: Sequence[Weights],
    group: int = WALKED,
    counted: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """Return the objective of every variant. `group` variants share one walk; their number is `counted` after it."""
    if not isinstance(objective, Generation):
        return [objective.value(parts) for parts in reduced(model, objective, variants, group, counted)]
    values: list[float] = []
    for weights in variants:
        values.append(objective.measure(model, weights))
        counted(1)
    return values


def reduced(
    model: BlockModel,
    objective: Objective,
    variants: Sequence[Weights],
    group: int = WALKED,
    counted: Callable[[int], None] = lambda _: None,
) -> list[list[Any]]:
    """Return the argument of `objective.value` for every variant, a part a batch; see `evaluate`."""
    found: list[list[Any]] = []
    for start in range(0, len(variants), group):
        some = variants[start : start + group]
        found += model.run(objective.batches, some, objective.reduce)
        counted(len(some))
    return found


def placed(objective: Placed, device: torch.device) -> Placed:
    """Return the objective with the fine-tune's outputs on a device."""
    if not isinstance(objective, OutputChange | Distribution):
        return objective
    targets = [(x.to(device), None if i is None else i.to(device)) for x, i in objective.targets]
    return replace(objective, targets=targets)


def first(objective: Compared, count: int) -> Compared:
    """Return the objective on the first `count` of its batches."""
    return replace(objective, batches=objective.batches[:count], targets=objective.targets[:count])


def joined(objectives: Sequence[Compared]) -> Compared:
    """Return the objective on the batches of all."""
    batches = [batch for one in objectives for batch in one.batches]
    return replace(objectives[0], batches=batches, targets=[target for one in objectives for target in one.targets])


def over_seeds(values: Sequence[float]) -> float:
    """Return the mean over mask seeds; of three or more, without the one farthest from the mean (as the paper does)."""
    some = np.asarray(values, dtype=np.float64)
    if len(some) > 2:
        some = np.delete(some, np.argmax(np.abs(some - some.mean())))
    return float(some.mean())


@dataclass
class OutputChange:
    """The distance of the pruned model's output from the fine-tune's, unlabelled (the paper's q_e).

    encoders, ViT, classification heads   mean |h − h'| over real tokens and neurons of the last hidden state
    language models                       mean (z − z')² over real tokens and the fine-tune's top 5 logits
    """

    batches: Sequence[Inputs]
    targets: Sequence[tuple[Tensor, Tensor | None]]

    @classmethod
    def of(cls, model: BlockModel, tune: Weights, batches: Sequence[Inputs]) -> OutputChange:
        """Collect the fine-tune's outputs: hidden states (tokens × H float32), or 5 logits a token."""
        return collected(model, tune, batches, [cls.compared(batches)])[0]

    @classmethod
    def compared(cls, batches: Sequence[Inputs]) -> Comparison[OutputChange]:
        """Return the comparison with a fine-tune that has not run yet."""

        def keep(b: int, output: BlockOutput) -> tuple[Tensor, Tensor | None]:
            if output.scores is not None and output.scores.per_token:
                scores = _scores(output, batches[b])
                top = torch.cat([some.topk(min(TOP, some.shape[-1])).indices for _, some in scores.pieces()])
                return scores.at(top), top
            return _tokens(output.hidden, batches[b]), None

        return Comparison(keep, lambda targets: cls(batches, targets))

    def reduce(self, batch: int, output: BlockOutput) -> tuple[float, int]:
        target, index = self.targets[batch]
        if index is not None:
            change = _scores(output, self.batches[batch]).at(index) - target
            return float(change.square().sum(dtype=torch.float64)), change.numel()
        change = _tokens(output.hidden, self.batches[batch]) - target
        return float(change.abs().sum(dtype=torch.float64)), change.numel()

    def value(self, parts: Sequence[tuple[float, int]]) -> float:
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    def distance(self, value: float) -> float:
        """Return a value in the units of outputs: the root of a squared change."""
        squared = any(index is not None for _, index in self.targets)
        return math.sqrt(value) if squared else value


@dataclass
class Validation:
    """1 − metric on labelled data (the paper's q_v), or the mean loss for metric `loss`.

    `labels`: per batch (B) class indices or float targets; for language models (B, T) token ids, −100 where not scored.
    """

    batches: Sequence[Inputs]
    labels: Sequence[Tensor]
    metric: str

    def reduce(self, batch: int, output: BlockOutput) -> tuple[Any, ...]:
        if output.scores is None:
            raise InputError("validation needs a model with a head", hint="objective: output_change")
        labels = self.labels[batch].to(output.hidden.device)
        if self.metric == "loss":
            return _loss(output, labels)
        logits = output.logits
        assert logits is not None
        predicted = logits.squeeze(-1) if logits.shape[-1] == 1 else logits.argmax(-1)
        return predicted.cpu().numpy(), labels.cpu().numpy(), logits.shape[-1]

    def value(self, parts: Sequence[tuple[Any, ...]]) -> float:
        if self.metric == "loss":
            return float(sum(total for total, _ in parts) / sum(count for _, count in parts))
        *columns, classes = zip(*parts, strict=True)
        predicted, labels = map(np.concatenate, columns)
        return 1.0 - METRICS[self.metric](predicted, labels, classes[0])


@dataclass
class Generation:
    """1 − exact match of greedily generated texts with the reference answers; all weights are resident.

    batches  left-padded prompts, `answers` their reference texts, `decode` turns tokens (B, T) into texts
    pattern  finds the answer in a text (`metrics.answer`); None: the whole text
    """

    batches: Sequence[Inputs]
    answers: Sequence[Sequence[str]]
    decode: Callable[[Tensor], list[str]]
    pattern: str | None = None
    new_tokens: int = 64

    def measure(self, model: BlockModel, weights: Weights) -> float:
        """Return one variant's 1 − exact match."""
        made = model.generate(self.batches, weights, new_tokens=self.new_tokens)
        texts = [text for tokens in made for text in self.decode(tokens)]
        return 1.0 - exact_match(texts, [answer for some in self.answers for answer in some], self.pattern)


States = Callable[[BlockOutput, Inputs], Tensor]


def last_states(output: BlockOutput, inputs: Inputs) -> Tensor:
    """Return the last hidden states of the real tokens (N, H)."""
    return _real_tokens(output.hidden, inputs)


def head_inputs(output: BlockOutput, inputs: Inputs) -> Tensor:
    """Return the input of a head's last layer: of each row (B, H), or of each real token (N, H) if it reads all."""
    found = output.hidden if output.read is None else output.read
    return found if found.dim() == 2 else _real_tokens(found, inputs)


@dataclass
class StateChange:
    """The distance of hidden states from the fine-tune's, differentiable: the mean of ‖h − h'‖² / ‖h‖².

    states    `last_states` or `head_inputs`: the states (N, H) of an output
    targets   the fine-tune's of each batch
    """

    batches: Sequence[Inputs]
    states: States
    targets: Sequence[Tensor]

    def change(self, batch: int, output: BlockOutput) -> Tensor:
        """Return ‖h − h'‖² / ‖h‖² of every state of a batch."""
        ours, own = self.states(output, self.batches[batch]), self.targets[batch]
        return (ours - own).square().sum(-1) / own.square().sum(-1).clamp_min(LEAST)

    def reduce(self, batch: int, output: BlockOutput) -> tuple[float, int]:
        found = self.change(batch, output)
        return float(found.sum(dtype=torch.float64)), len(found)

    def value(self, parts: Sequence[tuple[float, int]]) -> float:
        return sum(total for total, _ in parts) / sum(count for _, count in parts)


@dataclass
class Distribution:
    """The distance of the output distribution from the fine-tune's, differentiable: the loss of learned scales.

    classes      KL(fine-tune ‖ pruned), mean over sequences
    next token   the same, mean over real tokens; of a vocabulary above 64 tokens the fine-tune's 64 likeliest, and all
                 others as one class, which bounds the full divergence from below
    regression   mean squared error of the logits
    no head      mean squared error of the last hidden state

    With `states` the mean of their change, times `weight`, is added to each.
    """

    batches: Sequence[Inputs]
    targets: Sequence[tuple[Tensor, Tensor | None]]
    regression: bool
    states: StateChange | None = None
    weight: float = 0.0

    @classmethod
    def of(
        cls,
        model: BlockModel,
        tune: Weights,
        batches: Sequence[Inputs],
        *,
        regression: bool = False,
        states: States | None = None,
    ) -> Distribution:
        """Collect the fine-tune's outputs: logits, or log-probabilities and indices of the likeliest tokens.

        With `states` these are collected too.
        """
        comparison = cls.compared(model, batches, regression=regression, states=states)
        return collected(model, tune, batches, [comparison])[0]

    @classmethod
    def compared(
        cls, model: BlockModel, batches: Sequence[Inputs], *, regression: bool = False, states: States | None = None
    ) -> Comparison[Distribution]:
        """Return the comparison with a fine-tune that has not run yet."""
        hidden: dict[int, Tensor] = {}
        regression = regression or model.headless

        def keep(b: int, output: BlockOutput) -> tuple[Tensor, Tensor | None]:
            if states is not None:
                hidden[b] = states(output, batches[b])
            if regression:
                return _numbers(output, batches[b]), None
            few = output.scores is not None and output.scores.per_token
            found = [_likeliest(some.log_softmax(-1), few=few) for _, some in _scores(output, batches[b]).pieces()]
            indices = [index for _, index in found if index is not None]
            return torch.cat([logs for logs, _ in found]), torch.cat(indices) if indices else None

        def made(targets: Sequence[tuple[Tensor, Tensor | None]]) -> Distribution:
            kept = None if states is None else StateChange(batches, states, [hidden[b] for b in range(len(batches))])
            return cls(batches, targets, regression, kept)

        return Comparison(keep, made)

    def count(self, batch: int) -> int:
        """Return the sequences, tokens, or elements that a batch's loss is a sum over."""
        target, _ = self.targets[batch]
        return target.numel() if self.regression else len(target)

    def loss(self, batch: int, output: BlockOutput) -> tuple[Tensor, int]:
        """Return (sum, count): a differentiable sum over sequences, tokens or elements, and their number."""
        total, count = self._divergence(batch, output)
        if self.states is not None and self.weight:
            total = total + self.weight * count * self.states.change(batch, output).mean()
        return total, count

    def _divergence(self, batch: int, output: BlockOutput) -> tuple[Tensor, int]:
        target, index = self.targets[batch]
        if self.regression:
            return (_numbers(output, self.batches[batch]) - target).square().sum(), target.numel()

        def divergences(rows: slice, some: Tensor) -> Tensor:
            logs = some.log_softmax(-1)
            if index is not None:
                logs = _with_rest(logs.gather(-1, index[rows]))
            return F.kl_div(logs, target[rows], reduction="none", log_target=True).sum(-1)

        found = _scores(output, self.batches[batch]).map(divergences)
        return torch.cat(found).sum(), len(target)

    def reduce(self, batch: int, output: BlockOutput) -> tuple[float, int]:
        total, count = self.loss(batch, output)
        return float(total), count

    def value(self, parts: Sequence[tuple[float, int]]) -> float:
        return sum(total for total, _ in parts) / sum(count for _, count in parts)


@dataclass
class Agreement:
    """The distance of a classifier's or regression's predictions from the fine-tune's; see `agreement`."""

    batches: Sequence[Inputs]
    targets: Sequence[Any]
    regression: bool

    @classmethod
    def of(cls, model: BlockModel, tune: Weights, batches: Sequence[Inputs], *, regression: bool) -> Agreement:
        """Collect the fine-tune's logits (B, C)."""
        return collected(model, tune, batches, [cls.compared(batches, regression=regression)])[0]

    @classmethod
    def compared(cls, batches: Sequence[Inputs], *, regression: bool) -> Comparison[Agreement]:
        """Return the comparison with a fine-tune that has not run yet."""
        return Comparison(lambda b, output: _logits(output), lambda targets: cls(batches, targets, regression))

    def reduce(self, batch: int, output: BlockOutput) -> Any:
        return _logits(output)

    def value(self, parts: Sequence[Any]) -> float:
        measure = discord if self.regression else divergence
        return measure(np.concatenate(parts), np.concatenate(self.targets))


class LostScore(Agreement):
    """The expected share of the fine-tune's score that is lost; see `lost_score`. Of numbers the distance of
    `discord`."""

    def value(self, parts: Sequence[Any]) -> float:
        measure = discord if self.regression else lost_score
        return measure(np.concatenate(parts), np.concatenate(self.targets))


@dataclass
class SameAnswers:
    """1 − the share of answers that are the fine-tune's: likeliest classes, next tokens over real tokens; of numbers
    the distance of `discord`, one minus their correlation."""

    batches: Sequence[Inputs]
    targets: Sequence[Any]
    regression: bool

    @classmethod
    def compared(cls, batches: Sequence[Inputs], *, regression: bool) -> Comparison[SameAnswers]:
        """Return the comparison with the answers of a fine-tune, a number each, or its logits (B, C)."""
        made = cls(batches, [], regression)
        return Comparison(made._answers, lambda targets: replace(made, targets=targets))

    def _answers(self, batch: int, output: BlockOutput) -> Any:
        if self.regression:
            return _logits(output)
        answers = [some.argmax(-1) for _, some in _scores(output, self.batches[batch]).pieces()]
        return torch.cat(answers).cpu().numpy()

    def reduce(self, batch: int, output: BlockOutput) -> Any:
        return self._answers(batch, output)

    def value(self, parts: Sequence[Any]) -> float:
        ours, theirs = np.concatenate(parts), np.concatenate(self.targets)
        return discord(ours, theirs) if self.regression else float(np.mean(ours != theirs))


class SameTexts(SameAnswers):
    """1 − the share of rows of a language model whose every compared token is answered as the fine-tune does."""

    def reduce(self, batch: int, output: BlockOutput) -> Any:
        """Return, of each row, whether any of its answers differs. Rows without a compared token are left out."""
        differs = self._answers(batch, output) != self.targets[batch]
        rows = np.nonzero(_compared(self.batches[batch]).cpu().numpy())[0]
        numbers, place = np.unique(rows, return_inverse=True)
        return np.bincount(place, differs, len(numbers)) > 0

    def value(self, parts: Sequence[Any]) -> float:
        return float(np.mean(np.concatenate(parts)))


def is_regression(config: Any) -> bool:
    """Tell whether a head's logits are numbers rather than the classes of one distribution (regression, several
    labels)."""
    kind = getattr(config, "problem_type", None)
    return kind in ("regression", "multi_label_classification") or (kind is None and config.num_labels == 1)


def _compared(inputs: Inputs) -> Any:
    """Return (B, T) whether a place's answer is compared. None: all are."""
    return inputs.get(COMPARED, _real(inputs))


def _real(inputs: Inputs) -> Any:
    """Return (B, T) whether a place holds a token of a text, not padding. None: all do."""
    return inputs.get("decoder_attention_mask", inputs.get("attention_mask"))


def _tokens(values: Tensor, inputs: Inputs) -> Tensor:
    """Return (tokens, K) the rows of (B, T, K) that are not padding and, of a prompt and its completion, say the
    latter."""
    return _those(values, _compared(inputs))


def _real_tokens(values: Tensor, inputs: Inputs) -> Tensor:
    """Return (tokens, K) the rows of (B, T, K) that are not padding."""
    return _those(values, _real(inputs))


def _those(values: Tensor, mask: Any) -> Tensor:
    flat = values.reshape(-1, values.shape[-1])
    if mask is None or mask.numel() != len(flat):
        return flat
    return flat[mask.reshape(-1).to(flat.device, torch.bool)]


def _scores(output: BlockOutput, inputs: Inputs) -> Logits:
    """Return the logits (sequences, C), or (real tokens, V) of a language model."""
    scores = output.scores
    if scores is None:
        raise InputError("the model gives no logits", hint="give a number as q")
    return scores.take(lambda values: _tokens(values, inputs)) if scores.per_token else scores


def _logits(output: BlockOutput) -> Any:
    """Return (B, C) float64 on the host."""
    if output.logits is None:
        raise InputError("the model gives no logits", hint="give a number as q")
    return output.logits.detach().to("cpu", torch.float64).numpy()


def _numbers(output: BlockOutput, inputs: Inputs) -> Tensor:
    return _tokens(output.hidden, inputs) if output.logits is None else output.logits


def _likeliest(logs: Tensor, *, few: bool) -> tuple[Tensor, Tensor | None]:
    """Return (log-probabilities, indices). If `few` are wanted of many: the likeliest, and the sum of all others as the
    last."""
    if not few or logs.shape[-1] <= CLASSES:
        return logs, None
    top = logs.topk(CLASSES)
    return _with_rest(top.values), top.indices


def _with_rest(logs: Tensor) -> Tensor:
    """Return log-probabilities (N, K) and the logarithm of the probability that is left."""
    rest = (1.0 - logs.exp().sum(-1, keepdim=True)).clamp_min(1e-9)
    return torch.cat([logs, rest.log()], -1)


def _loss(output: BlockOutput, labels: Tensor) -> tuple[float, int]:
    """Return (sum, count) of the task's own loss: next token, squared error of one output, or cross-entropy."""
    scores = output.scores
    assert scores is not None
    if scores.per_token:
        labels = labels[:, 1:].reshape(-1)
        scored = labels != -100
        said = scores.take(lambda values: values[:, :-1].reshape(-1, values.shape[-1])[scored])
        losses = [F.cross_entropy(some, labels[scored][rows], reduction="none") for rows, some in said.pieces()]
        return float(torch.cat(losses).sum()), int(scored.sum())
    logits = output.logits
    assert logits is not None
    if logits.shape[-1] == 1:
        return float((logits.squeeze(-1) - labels.to(logits.dtype)).square().sum()), len(labels)
    return float(F.cross_entropy(logits, labels, reduction="sum")), len(labels)


def divergence(logits_NC: Matrix, target_NC: Matrix) -> float:
    """Return min over a ≥ 0 of the mean KL(softmax(t) ‖ softmax(a z)), by Newton's method.

        z     logits, t the fine-tune's, each less its mean over classes

    No accuracy sees the scale a, whatever it is: at density 0.001 pruned logits are 100 times smaller and rank the rows
    as well. So z first gets the mean square of t, and about that a ridge with the weight of one row, (a − 1)²/2N, keeps
    the fit stable where rows are few. A shift between classes is not fitted, since accuracy sees it.
    """
    z, t = (logits - logits.mean(1, keepdims=True) for logits in (logits_NC, target_NC))
    own = float(np.mean(z * z))
    z = z * np.sqrt(np.mean(t * t) / own) if own > 0.0 else z
    logs = _log_softmax(t)
    scale = max(0.0, _scale(z, np.exp(logs)))
    return float(np.mean(np.sum(np.exp(logs) * (logs - _log_softmax(scale * z)), 1)))


def discord(numbers_NK: Matrix, target_NK: Matrix) -> float:
    """Return 1 − Pearson's correlation, mean over outputs; a constant output counts as uncorrelated."""
    x, y = numbers_NK - numbers_NK.mean(0), target_NK - target_NK.mean(0)
    size = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return float(np.mean(1.0 - np.divide((x * y).sum(0), size, out=np.zeros_like(size), where=size > 0.0)))


def lost_score(logits_NC: Matrix, target_NC: Matrix) -> float:
    """Return 1 − Σ p(class of z) / Σ p(class of t), p = softmax(t / DOUBT): the accuracy that is lost, if p is.

    z     logits, t the fine-tune's
    """
    rows, p = np.arange(len(target_NC)), np.exp(_log_softmax(target_NC / DOUBT))
    return 1.0 - float(p[rows, logits_NC.argmax(1)].sum() / p.max(1).sum())


def _scale(z: Matrix, t: Matrix) -> float:
    """Return the scale a that fits softmax(a z) to t, with the ridge about 1: convex, steps halved where they
    overshoot."""

    def loss(a: float) -> float:
        return float((a - 1.0) ** 2 / (2.0 * len(z)) - np.mean(np.sum(t * _log_softmax(a * z), 1)))

    a, now = 1.0, loss(1.0)
    for _ in range(ROUNDS):
        p = np.exp(_log_softmax(a * z))
        mean = (p * z).sum(1)
        slope = float(np.mean(np.sum((p - t) * z, 1))) + (a - 1.0) / len(z)
        step = slope / (float(np.mean(np.sum(p * z * z, 1) - mean**2)) + 1.0 / len(z))
        while (after := loss(a - step)) > now and abs(step) > 1e-9:
            step /= 2.0
        if now - after <= 1e-12 * abs(now):
            break
        a, now = a - step, after
    return a


def _log_softmax(values: Matrix) -> Matrix:
    shifted = values - values.max(1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(1, keepdims=True)), dtype=np.float64)


# Metrics of predictions, labels, and the number of classes of the head. Each is in [−1, 1], larger is better.
# They are those of scikit-learn and of the GLUE benchmark. One that is undefined is 0: where there is one class, or all
# predictions are equal.


def accuracy(predicted: ArrayLike, labels: ArrayLike, _: int = 0) -> float:
    """Return the share of equal entries."""
    return float(np.mean(np.asarray(predicted) == np.asarray(labels)))


def matthews_correlation(predicted: ArrayLike, labels: ArrayLike, _: int = 0) -> float:
    """Return Matthews' correlation of any number of classes (Gorodkin's R_K)."""
    p, y = np.asarray(predicted), np.asarray(labels)
    classes = np.union1d(p, y)
    p_NC = (p[:, None] == classes).astype(np.float64)
    y_NC = (y[:, None] == classes).astype(np.float64)
    covariance = float(np.sum((p_NC - p_NC.mean(0)) * (y_NC - y_NC.mean(0))))
    return _over(covariance, float(np.sqrt(np.sum((p_NC - p_NC.mean(0)) ** 2) * np.sum((y_NC - y_NC.mean(0)) ** 2))))


def f1(predicted: ArrayLike, labels: ArrayLike, classes: int) -> float:
    """Return F1 of class 1 of a head of two classes; else the mean F1 of the classes seen (macro, as scikit-learn)."""
    p, y = np.asarray(predicted), np.asarray(labels)
    scored = [1] if classes == 2 else np.union1d(p, y).tolist()
    return float(
        np.mean([_over(2.0 * np.sum((p == c) & (y == c)), float(np.sum(p == c) + np.sum(y == c))) for c in scored])
    )


def accuracy_f1(predicted: ArrayLike, labels: ArrayLike, classes: int) -> float:
    """Return the mean of accuracy and F1 (GLUE's MRPC and QQP)."""
    return (accuracy(predicted, labels) + f1(predicted, labels, classes)) / 2.0


def pearson_spearman(predicted: ArrayLike, labels: ArrayLike, _: int = 0) -> float:
    """Return the mean of Pearson's and Spearman's correlation (GLUE's STS-B); ties have their mean rank."""
    p, y = np.asarray(predicted, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    return (_pearson(p, y) + _pearson(_ranks(p), _ranks(y))) / 2.0


def exact_match(predicted: Sequence[str], labels: Sequence[str], pattern: str | None = None) -> float:
    """Return the share of texts whose answer equals the label's; see `answer`."""
    pairs = [(answer(a, pattern), answer(b, pattern)) for a, b in zip(predicted, labels, strict=True)]
    return float(np.mean([a is not None and a == b for a, b in pairs]))


def answer(text: str, pattern: str | None = None) -> str | None:
    """Return the answer in a text: the last match of `pattern`, or its first group, stripped; the whole text without
    one.

    None: nothing matches. It equals no answer.
    """
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    return matches[-1][1 if matches[-1].re.groups else 0].strip() if matches else None


Metric = Callable[[Any, Any, int], float]
METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "matthews_correlation": matthews_correlation,
    "f1": f1,
    "accuracy_f1": accuracy_f1,
    "pearson_spearman": pearson_spearman,
}


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    return _over(float(a @ b), float(np.sqrt((a @ a) * (b @ b))))


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2.0)[inverse], dtype=np.float64)


def _over(a: float, b: float) -> float:
    return float(a / b) if b > 0.0 else 0.0
