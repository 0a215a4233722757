"""Slerp: from the base to a model along the arc between the flattened tensors (https://en.wikipedia.org/wiki/Slerp)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.merge.spans import arc, nodes, norms_of
from deltamerge.methods.registry import Param, merge_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    from deltamerge.methods.merge.spans import Floats
    from deltamerge.tensors.tiles import Tile

Fraction = Annotated[float, Param("0 is the base, 1 the other model")]
COLINEAR = 0.9995


@merge_method(
    "from the base to the other model, along the arc between the flattened tensors",
    needs_base=True,
    maximum=1,
    nodes=nodes,
)
def slerp(gram: Floats, *, t: Fraction, tile: Tile | None = None) -> Floats:
    """Return sin((1 − t)θ)/sin θ and sin(tθ)/sin θ, θ the angle between base and model.

    If abs(cos θ) > 0.9995, return 1 − t and t. Norms of at most 1e-8 count as 1.
    """
    norms = norms_of(gram)
    norms = np.where(norms > 1e-8, norms, 1.0)
    cosine = np.clip(gram[..., 0, 1] / (norms[..., 0] * norms[..., 1]), -1.0, 1.0)
    return arc(cosine, np.abs(cosine) > COLINEAR, t)
