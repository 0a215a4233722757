"""Breadcrumbs TIES: the consensus of TIES, of deltas pruned as model breadcrumbs are (arXiv 2312.06795)."""

from __future__ import annotations

from deltamerge.methods.merge.sums import keeps_single
from deltamerge.methods.merge.ties import ties
from deltamerge.methods.parameters import DeltaWeights, Density, Gamma, Lambda, MatchSum, Normalize
from deltamerge.methods.registry import delta_method


@delta_method(
    "ties consensus of deltas without their largest and smallest entries",
    "arXiv 2312.06795",
    formula=ties,
    adds=True,
    implies_prune="breadcrumbs",
    keeps_single=keeps_single,
)
def breadcrumbs_ties(
    *,
    weights: DeltaWeights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    rescale: MatchSum = False,
) -> None:
    """Name the parameters: those of `ties`, and of `methods.prune.breadcrumbs`, which comes first."""
