"""Second moments, of the inputs of linear layers and of gradients, from walks over the calibration rows.

C = E[x xᵀ] of every layer in every fine-tune, which RegMean uses, is as large as the models. The diagonal of Fisher's
information is the mean square of the log-likelihood's gradients, entry by entry. Rows run one at a time, forward and
backward, and a block's gradients are squared and added to a file at once. All results lie in files, and are read layer
by layer. The module is named in plans, so torch is imported when it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.calibrate import spec
from deltamerge.calibrate.spec import CalibrationInput, ModelTensors, Share, masked, models_of
from deltamerge.calibrate.stage import calibrating
from deltamerge.calibrate.values import Spooled
from deltamerge.errors import InputError
from deltamerge.errors.shown import human
from deltamerge.files import progress
from deltamerge.files.descriptors import writing
from deltamerge.methods.rate import HELD_STATES, LATENT, LEARNING_ROWS, learning_passes, learning_steps
from deltamerge.tensors.names import numbered_blocks
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.calibrate.model.blocks import BlockOutput, Inputs, Weights
    from deltamerge.calibrate.model.layers import Linear, MatrixCut
    from deltamerge.calibrate.q.subject import Subject

Keep = Callable[[str, NDArray[np.float64]], None]
"""Is given each layer's name and its C (in, in), block after block."""
MEASURING = "measuring inputs of"


@dataclass(frozen=True, slots=True)
class InputMeasurement:
    """A fine-tune whose layers' inputs are measured. `names` maps names in the output to its tensors' names.

    codes   about the bytes of the artifact whose codes are learned on the rows instead
    """

    source: CalibrationInput
    tensors: ModelTensors
    names: Mapping[str, str]
    codes: float = 0.0

    @property
    def memory(self) -> int:
        """Return about the bytes of the C's of one block, or of the data held to learn codes."""
        if not self.codes:
            return block_bytes(self.source, set(self.names.values()))
        codes = math.ceil(LATENT * self.codes) + HELD_STATES * spec.hidden(self.source)
        held = codes + spec.held_weights(self.source) + spec.held_rows(self.source, LEARNING_ROWS)
        return max(codes, min(self.source.cache, held))

    @property
    def note(self) -> str:
        """Describe the cost of learning codes; "": none are learned."""
        if not self.codes:
            return ""
        rows = self.source.calibration.sequences
        return (
            f"codes of {self.source.model} are learned in {learning_steps(rows)} steps of {LEARNING_ROWS} rows: "
            f"about {learning_passes(rows)} forward passes over the rows in {self.source.precision}, "
            f"{human(self.memory)} of memory"
        )


def block_bytes(source: CalibrationInput, wanted: Collection[str]) -> int:
    """Return about the bytes of C of the `wanted` layers of one block, each with the sum of a batch."""
    shapes = {t.name: t.shape for t in source.tensors if len(t.shape) == 2 and t.name in wanted}
    blocks = numbered_blocks(shapes) or {0: list(shapes)}
    return 16 * max((sum(shapes[name][-1] ** 2 for name in names) for names in blocks.values()), default=0)


def measure(measured: InputMeasurement, wanted: Collection[str], keep: Keep) -> None:
    """Hand C of each layer in `wanted`, by the fine-tune's names, to `keep`; a layer that no row reaches has none."""
    from deltamerge.calibrate.q.subject import Subject

    source = measured.source
    with calibrating(source.model, 1, MEASURING, device=source.device), Reader() as reader:
        subject = Subject(source, measured.tensors, reader)
        batches = subject.batches["search"].inputs
        watch = MomentSums(batches, wanted, keep)
        subject.model.run(batches, [subject.tune], lambda batch, output: None, watch=watch)
        subject.count(batches)
        subject.forget()


class MomentSums:
    """A watch that sums x xᵀ over real tokens of the layers in `wanted`, block by block, and hands each C to `keep` as
    the block is left: products in float32, their sum in float64.

    Layers that are given the same input share a sum.
    """

    def __init__(self, batches: Sequence[Inputs], wanted: Collection[str], keep: Keep) -> None:
        from deltamerge.calibrate.q.statistics import masks_of

        self.masks = masks_of(batches)
        self.wanted, self.keep = wanted, keep
        self.sums: dict[str, tuple[int, Tensor]] = {}
        self.last: tuple[int, Tensor, Tensor, int] | None = None

    def enter(self, layers: Sequence[Linear]) -> None:
        self.sums, self.last = {}, None

    def see(self, seen: Linear | MatrixCut, x: Tensor, batch: int) -> None:
        from deltamerge.calibrate.model.layers import Linear
        from deltamerge.calibrate.q.statistics import tokens_of

        if not isinstance(seen, Linear) or seen.name not in self.wanted:
            return
        if self.last is None or self.last[0] != batch or self.last[1] is not x:
            tokens = tokens_of(x, self.masks[batch]).float()
            self.last = batch, x, (tokens.T @ tokens).double().cpu(), len(tokens)
        _, _, product, count = self.last
        before = self.sums.get(seen.name)
        if before is None:
            self.sums[seen.name] = count, product.clone()
        else:
            before[1].add_(product)
            self.sums[seen.name] = before[0] + count, before[1]

    def leave(self, layers: Sequence[Linear]) -> None:
        for name, (count, total) in self.sums.items():
            self.keep(name, (total / max(1, count)).numpy())
        self.enter(layers)


def memory(parts: Sequence[Share]) -> int:
    """Return about the bytes that measuring takes: fine-tunes run one after another, or side by side where they have
    deltas to make."""
    block = max((block_bytes(part.source, {one.stored for one in part.pruned}) for part in parts), default=0)
    each = [Share(part.source) for part in parts]
    if any(one.masks for part in parts for one in part.pruned):
        return 4 * block + spec.memory(*each)
    return block + max(map(spec.memory, each), default=0)


def inputs(*inputs: Node, known: Mapping[Node, Any], parts: tuple[Share, ...]) -> Spooled:
    """Return the spool, the first input, with the moments of the layers in `parts`, fine-tune after fine-tune, block by
    block."""
    found: Spooled = known[inputs[0]]
    models = models_of(inputs, [part.source for part in parts])
    for model, (part, tensors) in enumerate(zip(parts, models, strict=True)):
        names = {one.name: one.stored for one in part.pruned}
        measured = InputMeasurement(part.source, tensors, names)
        measure(measured, set(names.values()), _kept(found, names, model))
    return found


def merged(*inputs: Node, known: Mapping[Node, Any], parts: tuple[Share, ...], wanted: tuple[str, ...]) -> Spooled:
    """Return second moments of inputs after the merged earlier blocks, on each fine-tune's rows.

    Source: Nguyen et al., "RegMean++", arXiv 2508.03121. Inside a block, and outside blocks, the fine-tune's own
    weights run.

    inputs   the spool; each tensor's merged delta, computed with the moments in the spool when it is read; the nodes
             that it needs; the fine-tunes' tensors
    parts    the fine-tunes
    wanted   the layers' names in the output

    All fine-tunes walk side by side, a block at a time. InputError: a model whose blocks cannot be told apart.
    """
    from deltamerge.calibrate.q.subject import Subject

    found: Spooled = known[inputs[0]]
    with ExitStack() as stack:
        stack.enter_context(calibrating("the merge", len(parts), MEASURING, device=parts[0].source.device))
        reader = stack.enter_context(Reader())
        subjects = []
        models = models_of(inputs, [part.source for part in parts])
        for part, tensors in zip(parts, models, strict=True):
            with errors.context(part.source.model):
                tensors = replace(tensors, masks=masked(inputs[1:], part.pruned, 1))
                subjects.append(Subject(part.source, tensors, reader, known))
        walks = []
        for model, (subject, part) in enumerate(zip(subjects, parts, strict=True)):
            names = {one.name: one.stored for one in part.pruned if one.name in wanted}
            walks.append(
                _walk(subject, _onward(subject, part, subjects[0], parts[0]), names, _kept(found, names, model))
            )
        for _ in zip(*walks, strict=True):
            progress.here(progress.PASSES).step(len(parts) / len(subjects[0].model.parts))
        for subject in subjects:
            subject.forget()
    return found


def _walk(subject: Subject, passed: Weights, names: Mapping[str, str], keep: Keep) -> Iterator[int]:
    from deltamerge.calibrate.model.blocks import relay

    batches = subject.batches["search"].inputs
    return relay(subject.model, batches, subject.tune, passed, MomentSums(batches, set(names.values()), keep))


def _onward(subject: Subject, part: Share, first: Subject, of_first: Share) -> Weights:
    """Return the merged weights under a fine-tune's names and with its own head; `first` makes the merged deltas for
    all."""
    from deltamerge.calibrate.model.candidates import pruned

    by_name = {one.name: one.stored for one in of_first.pruned}
    own = {one.stored: by_name[one.name] for one in part.pruned}
    made = first.masks[0]
    return pruned(subject.start, lambda name: made(own[name]) if name in own else None, {})


def _kept(found: Spooled, names: Mapping[str, str], model: int) -> Keep:
    by_stored = {stored: name for name, stored in names.items()}
    return lambda stored, moments: found.keep(by_stored[stored], model, moments)


@dataclass(frozen=True, slots=True)
class MeasuredInput:
    """A weight whose inputs are measured: its number of matrices, and whether it is stored (in, out)."""

    inputs: int
    transposed: bool


def of_result(
    *inputs: Node,
    known: Mapping[Node, Any],
    source: CalibrationInput,
    names: tuple[str, ...],
    wanted: tuple[tuple[str, MeasuredInput], ...],
) -> Spooled:
    """Return the second moments of the inputs of a merge's own layers, before it is quantised.

    inputs   the spool; the tensors of the result in the order of `names`; stages that they need; the template's tensors
    source   the template, which runs with the result's weights, and the rows
    wanted   the weights that are quantised, by name

    InputError: the inputs of a weight cannot be observed.
    """
    from deltamerge.calibrate.q.subject import Subject

    found: Spooled = known[inputs[0]]
    roots = dict(zip(names, inputs[1 : 1 + len(names)], strict=True))
    with calibrating("the merge", 1, MEASURING, device=source.device), Reader() as reader:
        (tensors,) = models_of(inputs, [source])
        subject = Subject(source, tensors, reader, ahead=False)
        batches = subject.batches["search"].inputs
        weights = _result(subject, roots, reader, known)
        watch = MatrixMoments(batches, dict(wanted), found)
        subject.model.run(batches, [weights], lambda batch, output: None, watch=watch)
        subject.count(batches)
        subject.forget()
    return found


def _result(subject: Subject, roots: Mapping[str, Node], reader: Reader, known: Mapping[Node, Any]) -> Weights:
    """Return the weights of a merge, computed on request. Missing weights are the template's."""
    import torch

    from deltamerge.engine.execute import computed
    from deltamerge.tensors.dtypes import TORCH_NAMES

    def weights(asked: Sequence[str]) -> dict[str, Tensor]:
        some = {name: roots[name] for name in asked if name in roots}
        made = computed(some, reader, device=subject.source.device, known=known) if some else {}
        found = dict(subject.tune([name for name in asked if name not in roots]))
        for name, node in some.items():
            dtype = getattr(torch, TORCH_NAMES[node.dtype])
            found[name] = torch.from_numpy(made.pop(name)).view(dtype).reshape(node.shape)
        return found

    return weights


class MatrixMoments:
    """A watch that sums x xᵀ over the real tokens of every matrix in `wanted`, block by block, into `found`.

    Products are float32, sums float64. Each expert sums over its own tokens; experts' sums lie in files.
    """

    def __init__(self, batches: Sequence[Inputs], wanted: Mapping[str, MeasuredInput], found: Spooled) -> None:
        from deltamerge.calibrate.q.statistics import masks_of

        self.masks = masks_of(batches)
        self.wanted, self.found = wanted, found
        self.sums: dict[tuple[str, int], Any] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self.last: tuple[int, Tensor, NDArray[np.float64], int] | None = None
        self.written: tuple[NDArray[np.float64], Path] | None = None

    def enter(self, layers: Sequence[Linear]) -> None:
        self.sums, self.counts, self.last = {}, {}, None

    def see(self, seen: Linear | MatrixCut, x: Tensor, batch: int) -> None:
        from deltamerge.calibrate.model.layers import Linear
        from deltamerge.calibrate.q.statistics import tokens_of

        layer, cut = (seen, None) if isinstance(seen, Linear) else (seen.layer, seen)
        wanted = self.wanted.get(layer.name)
        if wanted is None:
            return
        if seen.transposed != wanted.transposed:
            raise InputError(f"{layer.name}: a scale is of several inputs' outputs", hint="output: {rounding: nearest}")
        if cut is not None:
            tokens = _of_matrix(cut, x, wanted.inputs).float()
            self._add((layer.name, cut.lead), (tokens.T @ tokens).double().cpu().numpy(), len(tokens), in_file=True)
            return
        if self.last is None or self.last[0] != batch or self.last[1] is not x:
            tokens = tokens_of(x, self.masks[batch]).float()
            self.last = batch, x, (tokens.T @ tokens).double().cpu().numpy(), len(tokens)
        self._add((layer.name, 0), self.last[2], self.last[3])

    def _add(self, key: tuple[str, int], product: NDArray[np.float64], count: int, *, in_file: bool = False) -> None:
        if key not in self.sums:
            self.sums[key] = np.zeros_like(product)
            if in_file:
                path = self.found.begun(*key)
                with writing():
                    self.sums[key] = np.memmap(path, np.float64, "w+", shape=product.shape)
        self.sums[key] += product
        self.counts[key] = self.counts.get(key, 0) + count

    def leave(self, layers: Sequence[Linear]) -> None:
        for key, total in self.sums.items():
            total /= max(1, self.counts[key])
            if isinstance(total, np.memmap):
                with writing():
                    total.flush()
            elif self.written is not None and np.array_equal(self.written[0], total):  # another layer's input too
                self.found.files[key] = self.written[1]
            else:
                self.found.keep(*key, total)
                self.written = total, self.found.files[key]
        self.enter(layers)


def _of_matrix(cut: MatrixCut, x: Tensor, inputs: int) -> Tensor:
    """Return x (N, inputs) in the order of the file. InputError: only some of the inputs are multiplied at once."""
    import torch

    def numbers(index: slice | Tensor, size: int) -> Tensor:
        return index if isinstance(index, torch.Tensor) else torch.arange(size)[index]

    places = numbers(cut.inputs, inputs)
    if len(places) != inputs:
        message = f"{cut.layer.name}: its inputs are multiplied in parts, so that they cannot be measured"
        raise InputError(message, hint="output: {rounding: nearest}, without calibration")
    found = torch.empty(len(x), inputs, dtype=x.dtype, device=x.device)
    found[:, places] = x[:, numbers(cut.features, x.shape[1])]
    return found


FORWARDS = 4  # passes of a row: forward, again from the checkpoints, backward
CLASSES = 8  # most classes for an exact expectation over the model's answers; with more, one answer is drawn


def squares(*inputs: Node, known: Mapping[Node, Any], parts: tuple[Share, ...]) -> Spooled:
    """Return E(∂ log p(y | x) / ∂w)² of every tensor of `parts`, over rows x and answers y of the fine-tune's own.

    Classes are weighed by their probabilities. For a language model y is the row's own text; for a regression the
    squares are of the outputs' gradients. InputError: a model without a head, or gradients that are not finite.
    """
    from deltamerge.calibrate.q.subject import Subject

    found: Spooled = known[inputs[0]]
    models = models_of(inputs, [part.source for part in parts])
    for model, (part, tensors) in enumerate(zip(parts, models, strict=True)):
        source = part.source
        with calibrating(source.model, FORWARDS, "differentiating", device=source.device), Reader() as reader:
            subject = Subject(source, tensors, reader)
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

    from deltamerge.calibrate.model.candidates import tapped

    spark = torch.zeros((), device=subject.device, requires_grad=True)

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        stored = subject.tune(names)
        return {n: tapped(t, spark, n, sums.add) if n in sums.names else t for n, t in stored.items()}

    generator = torch.Generator().manual_seed(subject.source.seed)
    for batch in subject.reads.batches(subject.rows["search"], size=1).inputs:
        output = subject.model.differentiable(batch, weights)
        if output.scores is not None and output.scores.per_token:
            terms = [(1.0, _of_text(output, batch))]
        else:
            terms = _of_answers(output, subject.is_regression, generator)
        for i, (weight, term) in enumerate(terms):
            sums.weight = weight
            torch.autograd.backward(term, retain_graph=i + 1 < len(terms))
        subject.count([batch], FORWARDS)


def _of_text(output: BlockOutput, batch: Mapping[str, Tensor]) -> Tensor:
    """Return log p of the tokens of the row, each given the tokens before it."""
    import torch.nn.functional as F

    from deltamerge.calibrate.rows.batches import said

    assert output.logits is not None
    labels = said(dict(batch)).to(output.logits.device)
    return -F.cross_entropy(output.logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100, reduction="sum")


def _of_answers(output: BlockOutput, regression: bool, generator: Any) -> list[tuple[float, Tensor]]:
    """Return (weight, log-likelihood) of answers to one row."""
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
