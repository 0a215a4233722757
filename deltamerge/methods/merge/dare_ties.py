"""DARE TIES: the consensus of TIES, of deltas pruned by DARE (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from deltamerge.methods.merge.sums import keeps_single
from deltamerge.methods.merge.ties import ties
from deltamerge.methods.parameters import DeltaWeights, Density, Lambda, Normalize, Rescale
from deltamerge.methods.registry import delta_method


@delta_method(
    "ties consensus of deltas pruned by DARE",
    "arXiv 2311.03099",
    formula=ties,
    adds=True,
    implies_prune="dare",
    keeps_single=keeps_single,
)
def dare_ties(
    *,
    weights: DeltaWeights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    rescale: Rescale = True,
) -> None:
    """Name the parameters: those of `ties`, and of `methods.prune.dare`, which comes first."""
