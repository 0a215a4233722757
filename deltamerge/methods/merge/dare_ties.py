"""DARE TIES: the consensus of TIES, of deltas pruned by DARE (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from deltamerge.methods.merge.dare_linear import dare_linear
from deltamerge.methods.merge.ties import ties
from deltamerge.methods.registry import like

dare_ties = like(dare_linear, name="dare_ties", function=ties, summary="ties consensus of deltas pruned by DARE")
