"""Which tensors are matrices to a merge of whole matrices."""

from __future__ import annotations

import math

from deltamerge.calibrate.reach import is_stacked
from deltamerge.tensors.names import EMBEDDING, TOKEN_HEAD


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
