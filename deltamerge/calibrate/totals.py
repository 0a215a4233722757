"""Sums over all tensors of a merge, for methods that need them."""

from __future__ import annotations

import math

import numpy as np

from deltamerge.calibrate.threshold import reduced
from deltamerge.engine.graph import Node
from deltamerge.io.reader import Reader


def totals(*, parts: tuple[tuple[str, Node], ...], device: str) -> tuple[float, ...]:
    """The sums of the numbers of all blocks of all tensors, each exact and rounded once; `parts` are the nodes of
    (blocks, k) float64 by tensor."""
    with Reader() as reader:
        found = [values for _, values in reduced(parts, lambda _, node: node, {}, reader, device)]
    columns = np.concatenate([values for values in found if values.size] or [np.zeros((0, 0))]).T
    return tuple(math.fsum(column) if np.isfinite(column).all() else float(column.sum()) for column in columns)
