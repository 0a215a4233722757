"""Linear: Σ w_i x_i, ÷ Σ w_i if normalised (Wortsman et al., "Model soups", arXiv 2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused.operations import Assembly, weighted
from deltamerge.errors import InputError
from deltamerge.methods.merge.sums import SMALLEST_DIVISOR, divisor_of, weighted_sum
from deltamerge.methods.ops import over
from deltamerge.methods.parameters import Normalize, Weights
from deltamerge.methods.registry import merge_method

if TYPE_CHECKING:
    import torch

    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Make, Tile


def nodes(
    make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool, **parameters: Any
) -> Any:
    """Return the node of `linear`. InputError: the weights of a mean add up to 0."""
    weights = parameters.get("counts") or parameters["weights"]
    if parameters["normalize"] and abs(sum(weights)) <= max(SMALLEST_DIVISOR, 1e-6 * sum(map(abs, weights))):
        raise InputError("linear: the weights add up to 0", hint="change them, or set normalize: false")
    return make(function, inputs, shape=shape, **parameters)


def loop(
    assembly: Assembly,
    node: Node,
    weights: tuple[float, ...],
    normalize: bool,
    counts: tuple[float, ...] | None = None,
) -> None:
    """Add this merge to the compiled loop as an operation."""
    divisor = divisor_of(weights if counts is None else counts) if normalize else 1.0
    weighted(assembly, node, weights, divisor, models=node.inputs)


@merge_method(
    "Σ w_i x_i, ÷ Σ w_i if normalize; the base is an input like any other",
    "arXiv 2203.05482",
    loop=loop,
    nodes=nodes,
)
def linear(
    *tensors: torch.Tensor,
    tile: Tile,
    weights: Weights,
    normalize: Normalize = True,
    counts: tuple[float, ...] | None = None,
) -> torch.Tensor:
    """Return Σ w_i x_i, divided by Σ w_i if `normalize`; float32.

    counts   each tensor's count in the divisor, if some are running sums: a sum counts its own Σ w
    """
    total = weighted_sum([x.float() for x in tensors], weights)
    return over(total, divisor_of(weights if counts is None else counts)) if normalize else total
