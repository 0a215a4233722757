"""Consensus TA: the sum of deltas where several tasks agree (Wang et al., arXiv 2405.07813)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.merge.tall_masks import is_tall, onto_base, summed
from deltamerge.methods.parameters import Lambda, Threshold
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import torch

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Kept, Tile

    Tensor = torch.Tensor

Agreement = Annotated[int, Param("number of masks that must agree", None, "integer", low=0, scalar=True)]


@delta_method(
    "Σ Δ_i where at least `agreement` of the TALL masks abs(Δ_i) ≥ threshold · abs(Σ Δ − Δ_i) hold",
    "arXiv 2405.07813",
    adds=True,
)
def consensus(
    base: Tensor,
    *deltas: Tensor | Kept,
    tile: Tile,
    threshold: Threshold = 0.4,
    agreement: Agreement = 2,
    lambda_: Lambda = 1.0,
) -> Tensor:
    """Return base + λ Σ Δ_i where at least `agreement` of the TALL masks abs(Δ_i) ≥ threshold · abs(Σ Δ − Δ_i) hold."""
    dense, total = summed(deltas, tile)
    votes = sum(is_tall(delta, total, threshold).to(torch.int32) for delta in dense)
    return onto_base(base, total.where(torch.as_tensor(votes >= agreement), 0.0), lambda_)
