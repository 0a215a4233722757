"""Model Stock: base + t · mean(Δ_i), t from the mean cosine between deltas (Jang et al., arXiv 2403.19522)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.merge.spans import nodes, norms_of
from deltamerge.methods.registry import Param, delta_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    from deltamerge.methods.merge.spans import Floats
    from deltamerge.tensors.tiles import Tile

FilterWise = Annotated[bool, Param("compute t for each row", kind="bool", scalar=True)]


@delta_method(
    "base + t · mean(Δ_i), t = N c / (1 + (N − 1) c), c the mean cosine between deltas",
    "arXiv 2403.19522",
    minimum=2,
    nodes=nodes,
)
def model_stock(gram: Floats, *, filter_wise: FilterWise = False, tile: Tile | None = None) -> Floats:
    """Return t / N for each delta, t = N c / (1 + (N − 1) c), c the mean cosine of the pairs.

    t = 0 if the formula has no value. Products of norms below 1e-6 count as 1e-6. `spans.nodes` takes `filter_wise`.
    """
    count = gram.shape[-1]
    norms = norms_of(gram)
    first, second = np.triu_indices(count, 1)
    products = np.maximum(norms[..., first] * norms[..., second], 1e-6)
    cosine = np.clip(gram[..., first, second] / products, -1.0, 1.0).mean(-1)
    divisor = 1.0 + (count - 1) * cosine
    singular = np.abs(divisor) < 1e-6
    t = np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
    return np.repeat(t[..., None] / count, count, axis=-1)
