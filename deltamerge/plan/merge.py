"""A tensor to be merged, and each fine-tune's tensor of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltamerge.calibrate.reach import is_stacked
from deltamerge.plan.inputs import Input
from deltamerge.recipe.schema import Section
from deltamerge.tensors.names import EMBEDDING, TOKEN_HEAD
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
        """Return the fine-tunes' tensors, in the recipe's order."""
        return tuple([Tuned(self, model, tensor) for model, tensor in self.sources])

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
        """Return the base's tensor, from which the delta is taken; a merge of deltas has one."""
        assert self.merge.base is not None
        return self.merge.base

    @property
    def index(self) -> int:
        """Return the fine-tune's index in the recipe."""
        assert self.model.index is not None
        return self.model.index


def matrix_form(name: str, shape: tuple[int, ...], models: int) -> tuple[int, int, int] | None:
    """(matrices, rows, columns): a weight of a linear layer is one, stacked experts are as many as there are, a
    convolution has the rows of its outputs.

    None: a vector, a table whose rows are looked up, a head with a row a token, which may be the same table, or a
    matrix of fewer rows or columns than `models`, in which they have no directions of their own.
    """
    if len(shape) < 2 or EMBEDDING.search(name) or TOKEN_HEAD.search(name):
        return None
    if is_stacked(name, shape):
        form = shape
    elif name.endswith("weight"):
        form = (1, shape[0], math.prod(shape[1:]))
    else:
        return None
    return (form[0], form[1], form[2]) if min(form[1:]) >= models and form[0] else None
