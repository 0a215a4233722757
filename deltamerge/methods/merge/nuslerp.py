"""NuSlerp: slerp of two models, or with a base of their deltas, at t = w_2 / Σ w, of tensors, rows or columns."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.merge.spans import ZERO_SUM, arc, nodes, norms_of
from deltamerge.methods.parameters import Shares
from deltamerge.methods.registry import Param, merge_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    from deltamerge.methods.merge.spans import Floats
    from deltamerge.tensors.tiles import Tile

Flatten = Annotated[bool, Param("whole tensors; false: row by row", kind="bool", scalar=True)]
RowWise = Annotated[bool, Param("if not flattened: along the first dimension", kind="bool", scalar=True)]


@merge_method(
    "slerp of two models, or with a base of their deltas, at t = w_2 / Σ w",
    takes_base=True,
    deltas=True,
    minimum=2,
    maximum=2,
    nodes=nodes,
)
def nuslerp(
    gram: Floats,
    *,
    weights: Shares,
    nuslerp_flatten: Flatten = True,
    nuslerp_row_wise: RowWise = False,
    tile: Tile | None = None,
) -> Floats:
    """Return the coefficients of slerp at t = w_2 / (w_1 + w_2), or 1/2 where that sum is 0.

    Directions count as colinear if abs(sin θ) is below 1e-8. `spans.nodes` takes the two choices of vectors.
    """
    total = math.fsum(weights)
    t = 0.5 if abs(total) < ZERO_SUM else weights[1] / total
    norms = np.maximum(norms_of(gram), 1e-7)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1.0, 1.0)
    return arc(cosine, 1.0 - cosine * cosine <= 1e-16, t)
