"""Magnitude outliers: mergekit's name of the masks of `breadcrumbs` (arXiv 2312.06795)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.methods.parameters import Gamma
from deltamerge.methods.prune.breadcrumbs import breadcrumbs
from deltamerge.methods.registry import prune_method

if TYPE_CHECKING:
    from deltamerge.methods.registry import Masking


@prune_method(
    "drop the int(gamma · n) entries of largest abs(Δ), keep the int(density · n) that follow",
    "arXiv 2312.06795",
    options=frozenset({"rescale", "protect"}),
    q_decides_below=0.2,
)
def magnitude_outliers(masking: Masking, *, gamma: Gamma = 0.01) -> Any:
    """Make the node of `breadcrumbs`."""
    return breadcrumbs(masking, gamma=gamma)
