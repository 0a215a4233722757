"""What is merged: a tensor of the output, and each fine-tune's of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltamerge.io.tensor import TensorInfo
from deltamerge.plan.inputs import Input
from deltamerge.recipe.parts import Part


@dataclass(frozen=True, slots=True)
class Merge:
    """A tensor to merge.

    name      in the output
    part      the slice or module of the recipe that it belongs to
    position  of its layer, from 0 to 1, where gradients are read
    base      the base's tensor, where the method has it apart
    sources   the fine-tunes and their tensors, in the recipe's order
    dtype     of the output
    """

    name: str
    part: Part
    position: float
    base: TensorInfo | None
    sources: Sequence[tuple[Input, TensorInfo]]
    dtype: str

    @property
    def tunes(self) -> tuple[Tuned, ...]:
        """Each fine-tune's, in the recipe's order."""
        return tuple(Tuned(self, model, tensor) for model, tensor in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0][1].shape


@dataclass(frozen=True, slots=True)
class Tuned:
    """One fine-tune's tensor of a merge."""

    merge: Merge
    model: Input
    tensor: TensorInfo

    @property
    def name(self) -> str:
        return self.merge.name

    @property
    def base(self) -> TensorInfo:
        """The tensor that its delta is taken from, which a merge of deltas has."""
        assert self.merge.base is not None
        return self.merge.base

    @property
    def index(self) -> int:
        """The fine-tune's place in the recipe."""
        assert self.model.index is not None
        return self.model.index
