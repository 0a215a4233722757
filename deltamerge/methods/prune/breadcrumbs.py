"""Model breadcrumbs: drop the largest and the smallest entries (Davari & Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deltamerge.methods.parameters import Gamma
from deltamerge.methods.prune.select import end_of, keep_between, largest
from deltamerge.methods.registry import prune_method

if TYPE_CHECKING:
    from deltamerge.methods.registry import Masking


@prune_method(
    "drop the int(gamma · n) entries of largest abs(Δ), keep the int(density · n) that follow",
    "arXiv 2312.06795",
    options=frozenset({"rescale", "protect"}),
    q_decides_below=0.2,
)
def breadcrumbs(masking: Masking, *, gamma: Gamma = 0.01) -> Any:
    """Make the node of the int(density · n) magnitudes that follow the int(γ · n) largest.

    If both together exceed n, γ is reduced.
    """
    delta, size = masking.delta, math.prod(masking.shape)
    kept = int(masking.density * size)
    top = min(int(gamma * size), size - kept)
    if not top:
        return largest(masking.make, delta, kept)
    ends = [*end_of(masking.make, delta, top + kept), *end_of(masking.make, delta, top)]
    return masking.make(keep_between, [delta, *ends], shape=delta.shape)
