"""Passthrough: one model, × scale."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from deltamerge.engine.fused.operations import Assembly, weighted
from deltamerge.methods.registry import Param, merge_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    import torch

    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Tile

Scales = Annotated[tuple[float, ...], Param("factor of the model", 1.0, per_model=True)]


def keeps_unscaled(*, scales: tuple[float, ...]) -> bool:
    """Tell whether passthrough returns its model unchanged."""
    return scales == (1.0,)


def loop(assembly: Assembly, node: Node, scales: tuple[float, ...]) -> None:
    """Add this merge to the compiled loop as an operation."""
    weighted(assembly, node, scales[:1], models=node.inputs)


@merge_method("one model, × scale", maximum=1, keeps_single=keeps_unscaled, loop=loop)
def passthrough(x: torch.Tensor, *, tile: Tile, scales: Scales) -> torch.Tensor:
    """Return scale · x in float32."""
    return x.float() * float(np.float32(scales[0]))
