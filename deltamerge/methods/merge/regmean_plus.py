"""RegMean++: `regmean` with the inputs that the merged blocks before a layer make of the rows (arXiv 2508.03121)."""

from __future__ import annotations

from deltamerge.methods.merge.regmean import OffDiagonal, nodes, regmean
from deltamerge.methods.parameters import Lambda, RowWeights
from deltamerge.methods.registry import delta_method


@delta_method(
    "regmean with the inputs that the merged blocks before a layer make of the rows",
    "arXiv 2508.03121",
    formula=regmean,
    adds=True,
    matrices=True,
    nodes=nodes,
    rows="merged",
)
def regmean_plus(*, weights: RowWeights, off_diagonal: OffDiagonal = 0.9, lambda_: Lambda = 1.0) -> None:
    """Name the parameters of `regmean`."""
