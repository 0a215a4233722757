"""WANDA: keep the entries of largest abs(Δ_ij) · ‖x_j‖ in each row (Sun et al., arXiv 2306.11695; arXiv 2410.09344)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deltamerge.methods.prune.columns import largest_of_columns
from deltamerge.methods.prune.select import (
    end_of,
    keep_largest_rows_scored,
    keep_largest_rows_stacked,
    keep_where,
    largest,
    scored_stacked,
)
from deltamerge.methods.registry import prune_method

if TYPE_CHECKING:
    from deltamerge.methods.registry import Masking


@prune_method(
    "keep the round(density · n) entries of largest abs(Δ_ij) · ‖x_j‖ in each row, on calibration data",
    "arXiv 2306.11695, 2410.09344",
    options=frozenset({"rescale", "group", "protect"}),
    groups=("row",),
    needs_activations=True,
    q_decides_below=0.2,
)
def wanda(masking: Masking) -> Any:
    """Make the node of the best scores of each output's inputs.

    A tensor that is no weight of a linear layer keeps its largest entries. In stacked experts that are stored (in,
    out), all scores compete, because tiles cut an output's inputs.
    """
    make, delta, shape = masking.make, masking.delta, masking.shape
    k = round(masking.share * math.prod(shape))
    if masking.norms is None:
        return largest(make, delta, k)
    inputs = [delta, masking.norms]
    if len(shape) == 3 and not masking.transposed:
        return make(keep_largest_rows_stacked, inputs, shape=shape, density=masking.share)
    if len(shape) == 3:
        score = make(scored_stacked, inputs, shape=shape)
        return make(keep_where, [delta, score, *end_of(make, score, k)], shape=shape)
    if masking.transposed:
        return largest_of_columns(make, delta, masking.norms, masking.share)
    return make(keep_largest_rows_scored, inputs, shape=shape, density=masking.share)
