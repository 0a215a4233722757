"""A tensor to be merged, and each fine-tune's tensor of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deltamerge.plan.inputs import Input
from deltamerge.recipe.schema import Section
from deltamerge.tensors.tensor import TensorInfo


@dataclass(frozen=True, slots=True)
class Merge:
    """A tensor to merge.

    name       in the output
    part       of the recipe that it belongs to
    position   of its layer, from 0 to 1
    base       the base's tensor, if the merge has a base
    sources    the models and their tensors
    dtype      of the result
    """

    name: str
    part: Section
    position: float
    base: TensorInfo | None
    sources: Sequence[tuple[Input, TensorInfo]]
    dtype: str

    @property
    def tunes(self) -> tuple[Tuned, ...]:
        """The fine-tunes' tensors, in the recipe's order."""
        return tuple(Tuned(self, model, tensor) for model, tensor in self.sources)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0][1].shape


@dataclass(frozen=True, slots=True)
class Tuned:
    """One fine-tune's tensor in a merge."""

    merge: Merge
    model: Input
    tensor: TensorInfo

    @property
    def name(self) -> str:
        return self.merge.name

    @property
    def base(self) -> TensorInfo:
        """The base's tensor, from which the delta is taken; a merge of deltas has one."""
        assert self.merge.base is not None
        return self.merge.base

    @property
    def index(self) -> int:
        """The fine-tune's index in the recipe."""
        assert self.model.index is not None
        return self.model.index
