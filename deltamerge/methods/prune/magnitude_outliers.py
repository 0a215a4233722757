"""Magnitude outliers: mergekit's name of the masks of `breadcrumbs` (arXiv 2312.06795)."""

from __future__ import annotations

from deltamerge.methods.prune.breadcrumbs import breadcrumbs
from deltamerge.methods.registry import like

magnitude_outliers = like(breadcrumbs, name="magnitude_outliers")
