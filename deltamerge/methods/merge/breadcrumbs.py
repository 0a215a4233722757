"""Model breadcrumbs: task arithmetic of deltas without outliers and noise (Davari & Belilovsky, arXiv 2312.06795)."""

from __future__ import annotations

from deltamerge.methods.merge.sums import keeps_single
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.methods.parameters import DeltaWeights, Density, Gamma, Lambda, MatchSum, Normalize
from deltamerge.methods.registry import delta_method


@delta_method(
    "task arithmetic of deltas without their largest and smallest entries",
    "arXiv 2312.06795",
    formula=task_arithmetic,
    adds=True,
    implies_prune="breadcrumbs",
    keeps_single=keeps_single,
)
def breadcrumbs(
    *,
    weights: DeltaWeights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    gamma: Gamma = 0.01,
    rescale: MatchSum = False,
) -> None:
    """Name the parameters of `methods.prune.breadcrumbs`, which runs first, and of `task_arithmetic`."""
