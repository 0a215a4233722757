"""C = E[x xᵀ] of the inputs of linear layers, from one walk over the calibration rows, block by block.

The module is named in plans, so torch is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deltamerge.calibrate.spec import CalibrationInput
from deltamerge.calibrate.stage import calibrating
from deltamerge.tensors.names import numbered_blocks
from deltamerge.tensors.reader import Reader

if TYPE_CHECKING:
    from torch import Tensor

    from deltamerge.calibrate.model.blocks import Inputs
    from deltamerge.calibrate.model.layers import Cut, Linear

Keep = Callable[[str, NDArray[np.float64]], None]
"""Is given each layer's name and its C (in, in), block after block."""
MEASURING = "measuring inputs of"


@dataclass(frozen=True, slots=True)
class Measured:
    """A fine-tune whose layers' inputs are measured; `names` are its tensors' by the names in the output."""

    source: CalibrationInput
    names: Mapping[str, str]

    @property
    def memory(self) -> int:
        """About the bytes of the C's of one block, each with the sum of a batch."""
        widths = {t.name: t.shape[-1] for t in self.source.tensors if len(t.shape) == 2 and t.name in self._wanted}
        shapes = {tensor.name: tensor.shape for tensor in self.source.tensors if tensor.name in widths}
        blocks = numbered_blocks(shapes) or {0: list(shapes)}
        return 16 * max((sum(widths[name] ** 2 for name in names) for names in blocks.values()), default=0)

    @property
    def _wanted(self) -> Collection[str]:
        return set(self.names.values())


def measure(measured: Measured, wanted: Collection[str], keep: Keep) -> None:
    """Hand C of each layer in `wanted`, by the fine-tune's names, to `keep`; a layer that no row reaches has none."""
    from deltamerge.calibrate.q.subject import Subject

    source = measured.source
    with calibrating(source.model, 1, MEASURING, device=source.device), Reader() as reader:
        subject = Subject(source, reader)
        batches = subject.batches["search"].inputs
        watch = Moments(batches, wanted, keep)
        subject.model.run(batches, [subject.tune], lambda batch, output: None, watch=watch)
        subject.count(batches)
        subject.forget()


class Moments:
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

    def see(self, seen: Linear | Cut, x: Tensor, batch: int) -> None:
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
