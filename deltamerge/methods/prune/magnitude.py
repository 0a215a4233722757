"""Magnitude: keep the round(density · n) entries of largest abs(Δ) in each group (arXiv 2410.09344)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deltamerge.methods.prune.select import above, keep_largest_rows, largest
from deltamerge.methods.registry import prune_method

if TYPE_CHECKING:
    from deltamerge.methods.registry import Masking


@prune_method(
    "keep the round(density · n) entries of largest abs(Δ) in each group; of a model as many as its tensors would",
    "arXiv 2410.09344",
    options=frozenset({"rescale", "group", "protect", "budget"}),
    groups=("tensor", "row", "model"),
    q_decides_below=0.2,
)
def magnitude(masking: Masking) -> Any:
    """Make the node of the largest entries of each row, of the model, or of the tensor."""
    if masking.group == "row" and len(masking.shape) > 1:
        return masking.make(keep_largest_rows, [masking.delta], shape=masking.shape, density=masking.share)
    if masking.group == "model":
        return above(masking.make, masking.delta, masking.cut)
    return largest(masking.make, masking.delta, round(masking.share * math.prod(masking.shape)))
