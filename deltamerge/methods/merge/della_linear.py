"""DELLA linear: task arithmetic of deltas pruned by DELLA (Deep et al., arXiv 2406.11617)."""

from __future__ import annotations

from deltamerge.methods.merge.sums import keeps_single
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.methods.parameters import DeltaWeights, Density, Epsilon, Lambda, Normalize, Rescale
from deltamerge.methods.registry import delta_method


@delta_method(
    "task arithmetic of deltas pruned by DELLA",
    "arXiv 2406.11617",
    formula=task_arithmetic,
    adds=True,
    implies_prune="della",
    keeps_single=keeps_single,
)
def della_linear(
    *,
    weights: DeltaWeights,
    normalize: Normalize = False,
    lambda_: Lambda = 1.0,
    density: Density = 1.0,
    rescale: Rescale = True,
    epsilon: Epsilon = 0.15,
) -> None:
    """Name the parameters of `methods.prune.della`, which runs first, and of `task_arithmetic`."""
