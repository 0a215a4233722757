"""DARE linear: task arithmetic of deltas pruned by DARE (Yu et al., arXiv 2311.03099)."""

from __future__ import annotations

from deltamerge.methods.merge.sums import keeps_single
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.methods.parameters import DeltaWeights, Density, Lambda, Normalize, Rescale
from deltamerge.methods.registry import delta_method


@delta_method(
    "task arithmetic of deltas pruned by DARE",
    "arXiv 2311.03099",
    formula=task_arithmetic,
    adds=True,
    implies_prune="dare",
    keeps_single=keeps_single,
)
def dare_linear(
    *,
    weights: DeltaWeights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    rescale: Rescale = True,
) -> None:
    """Name the parameters of `methods.prune.dare`, which runs first, and of `task_arithmetic`."""
