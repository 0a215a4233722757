"""Sums over all tensors of a merge, for methods that need them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from deltamerge.calibrate.q.threshold import reduced
from deltamerge.tensors.graph import Node
from deltamerge.tensors.reader import Reader


def totals(
    *values: Any, parts: tuple[tuple[str, Node], ...], known: tuple[Node, ...], device: str
) -> tuple[float, ...]:
    """The sums of the numbers of all blocks of all tensors, each exact and rounded once; `parts` are the nodes of
    (blocks, k) float64 by tensor, `values` those of the `known` nodes that they need."""
    given = dict(zip(known, values, strict=True))
    with Reader() as reader:
        found = [one for _, one in reduced(parts, lambda _, node: node, {}, reader, device, given)]
    columns = np.concatenate([one for one in found if one.size] or [np.zeros((0, 0))]).T
    return tuple(math.fsum(column) if np.isfinite(column).all() else float(column.sum()) for column in columns)
