"""C = E[x xᵀ] of the inputs of linear layers, from one walk over the calibration rows, block by block.

Those of every layer in every fine-tune, which RegMean takes, are as large as the models. They lie in files, and are
read layer by layer. The module is named in plans, so torch is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.calibrate import spec
from deltamerge.calibrate.spec import CalibrationInput, Share, masked
from deltamerge.calibrate.stage import calibrating
from deltamerge.calibrate.values import Spooled
from deltamerge.files import progress
from deltamerge.tensors.names import numbered_blocks
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.calibrate.model.blocks import Inputs, Weights
    from deltamerge.calibrate.model.layers import Linear, MatrixCut
    from deltamerge.calibrate.q.subject import Subject

Keep = Callable[[str, NDArray[np.float64]], None]
"""Is given each layer's name and its C (in, in), block after block."""
MEASURING = "measuring inputs of"


@dataclass(frozen=True, slots=True)
class InputMeasurement:
    """A fine-tune whose layers' inputs are measured; `names` are its tensors' by the names in the output."""

    source: CalibrationInput
    names: Mapping[str, str]

    @property
    def memory(self) -> int:
        """Return about the bytes of the C's of one block, each with the sum of a batch."""
        widths = {t.name: t.shape[-1] for t in self.source.tensors if len(t.shape) == 2 and t.name in self._wanted}
        shapes = {tensor.name: tensor.shape for tensor in self.source.tensors if tensor.name in widths}
        blocks = numbered_blocks(shapes) or {0: list(shapes)}
        return 16 * max((sum(widths[name] ** 2 for name in names) for names in blocks.values()), default=0)

    @property
    def _wanted(self) -> Collection[str]:
        return set(self.names.values())


def measure(measured: InputMeasurement, wanted: Collection[str], keep: Keep) -> None:
    """Hand C of each layer in `wanted`, by the fine-tune's names, to `keep`; a layer that no row reaches has none."""
    from deltamerge.calibrate.q.subject import Subject

    source = measured.source
    with calibrating(source.model, 1, MEASURING, device=source.device), Reader() as reader:
        subject = Subject(source, reader)
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
        from deltamerge.calibrate.model.activations import masks_of

        self.masks = masks_of(batches)
        self.wanted, self.keep = wanted, keep
        self.sums: dict[str, tuple[int, Tensor]] = {}
        self.last: tuple[int, Tensor, Tensor, int] | None = None

    def enter(self, layers: Sequence[Linear]) -> None:
        self.sums, self.last = {}, None

    def see(self, seen: Linear | MatrixCut, x: Tensor, batch: int) -> None:
        from deltamerge.calibrate.model.activations import tokens_of
        from deltamerge.calibrate.model.layers import Linear

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

    def leave(self, layers: Sequence[Linear]) -> bool:
        for name, (count, total) in self.sums.items():
            self.keep(name, (total / max(1, count)).numpy())
        self.enter(layers)
        return False


def memory(parts: Sequence[Share]) -> int:
    """Return about the bytes that measuring takes: fine-tunes run one after another, or side by side where they have
    deltas to make."""
    block = max((_measured(part).memory for part in parts), default=0)
    each = [Share(part.source) for part in parts]
    if any(one.masks for part in parts for one in part.pruned):
        return 4 * block + spec.memory(*each)
    return block + max(map(spec.memory, each), default=0)


def _measured(part: Share) -> InputMeasurement:
    return InputMeasurement(part.source, {one.name: one.stored for one in part.pruned})


def inputs(found: Spooled, *, parts: tuple[Share, ...]) -> Spooled:
    """Return `found` with the moments of the layers in `parts`, fine-tune after fine-tune, block by block."""
    for model, part in enumerate(parts):
        measured = _measured(part)
        measure(measured, set(measured.names.values()), _kept(found, measured.names, model))
    return found


def merged(*inputs: Node, known: Mapping[Node, Any], parts: tuple[Share, ...], wanted: tuple[str, ...]) -> Spooled:
    """Return the same of inputs that the merged blocks before a layer make of each fine-tune's rows (Nguyen et al.,
    "RegMean++", arXiv 2508.03121): inside a block, and outside blocks, the fine-tune's own weights run.

    inputs   the spool; of each tensor what the merge adds, made with the moments that are in the spool when it is
             read; and what that needs
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
        for part in parts:
            with errors.context(part.source.model):
                subjects.append(Subject(part.source, reader, masked(inputs[1:], part.pruned, 1), known))
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
