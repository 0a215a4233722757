"""Breadcrumbs TIES: the consensus of TIES, of deltas pruned as model breadcrumbs are (arXiv 2312.06795)."""

from __future__ import annotations

from deltamerge.methods.merge.breadcrumbs import breadcrumbs
from deltamerge.methods.merge.ties import ties
from deltamerge.methods.registry import like

breadcrumbs_ties = like(
    breadcrumbs,
    name="breadcrumbs_ties",
    function=ties,
    summary="ties consensus of deltas without their largest and smallest entries",
)
