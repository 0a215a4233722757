"""DELLA: the consensus of TIES, of deltas pruned by DELLA (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

from deltamerge.methods.merge.sums import keeps_single
from deltamerge.methods.merge.ties import ties
from deltamerge.methods.parameters import DeltaWeights, Density, Epsilon, Lambda, Normalize, Rescale
from deltamerge.methods.registry import delta_method


@delta_method(
    "ties consensus of deltas pruned by DELLA",
    "arXiv 2406.11617",
    formula=ties,
    adds=True,
    implies_prune="della",
    keeps_single=keeps_single,
)
def della(
    *,
    weights: DeltaWeights,
    normalize: Normalize = True,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    rescale: Rescale = True,
    epsilon: Epsilon = 0.15,
) -> None:
    """Name the parameters of `methods.prune.della`, which runs first, and of `ties`."""
