"""Multislerp: barycentre of directions in the tangent space of their mean, × Σ w_i ‖x_i‖.

https://goddard.blog/posts/multislerp-wow-what-a-cool-idea
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from deltamerge.errors import InputError
from deltamerge.methods.merge import spans
from deltamerge.methods.merge.spans import ZERO_SUM, keeps_single, length_of, norms_of
from deltamerge.methods.parameters import Shares
from deltamerge.methods.registry import Param, merge_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    from deltamerge.methods.merge.spans import Floats
    from deltamerge.tensors.tiles import Make, Tile

NormalizeWeights = Annotated[bool, Param("divide the weights by their sum", kind="bool")]
Eps = Annotated[float, Param("added to norms before dividing by them", low=0)]


def nodes(
    make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool, **parameters: Any
) -> Any:
    """Return the node of `multislerp`. InputError: the weights of a mean add up to 0."""
    if parameters["normalize_weights"] and abs(sum(parameters["weights"])) < ZERO_SUM:
        raise InputError("multislerp: the weights add up to 0", hint="change them, or set normalize_weights: false")
    return spans.nodes(make, function, inputs, shape, based=based, **parameters)


@merge_method(
    "barycentre of directions in the tangent space of their mean, × Σ w_i ‖x_i‖; with a base of deltas",
    "https://goddard.blog/posts/multislerp-wow-what-a-cool-idea",
    takes_base=True,
    deltas=True,
    nodes=nodes,
    keeps_single=keeps_single,
)
def multislerp(
    gram: Floats,
    *,
    weights: Shares,
    normalize_weights: NormalizeWeights = True,
    eps: Eps = 1e-8,
    tile: Tile | None = None,
) -> Floats:
    """Average directions u_i = x_i / (‖x_i‖ + ε) in the tangent space of their normalised mean m.

        gram                of the models
        weights             w_i
        normalize_weights   whether to divide them by their sum
        eps                 ε

    v = Σ w_i (u_i − ⟨u_i, m⟩ m); back on the sphere m cos‖v‖ + v sin‖v‖/‖v‖; times Σ w_i ‖x_i‖. Two opposite models are
    interpolated linearly; InputError if more of them add up to 0.
    """
    count = gram.shape[-1]
    share = np.array(weights, np.float64)
    if normalize_weights:
        share = share / share.sum()
    if count == 1:
        return np.ones(1)
    norms = norms_of(gram)
    unit = gram / np.multiply.outer(norms + eps, norms + eps)
    length = length_of(share, unit)
    if length < max(eps, 1e-12):
        if count == 2 or not norms.any():
            return share
        raise InputError("multislerp: the directions of the models add up to 0", hint="use other weights")
    mean = share / length
    tangent = share - (share @ unit @ mean) * mean
    angle = length_of(tangent, unit) + eps
    direction = mean * math.cos(angle) + tangent * (math.sin(angle) / angle if angle else 1.0)
    return np.asarray((norms @ share) * direction / np.where(norms + eps > 0.0, norms + eps, 1.0))
