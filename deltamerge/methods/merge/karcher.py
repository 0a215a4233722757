"""Karcher: the Riemannian mean of the models' directions × their mean norm (arXiv 2603.04972)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated

from deltamerge.methods.merge.spans import keeps_single, length_of, nodes, norms_of
from deltamerge.methods.registry import Param, merge_method
from deltamerge.tensors.lazy import numpy as np

if TYPE_CHECKING:
    from deltamerge.methods.merge.spans import Floats
    from deltamerge.tensors.tiles import Tile

MaxIter = Annotated[int, Param("iterations at most", None, "integer", low=0, scalar=True)]
Tol = Annotated[float, Param("angles below this count as 0", low=0)]


@merge_method(
    "Riemannian mean of the directions × mean norm; a base, listed or not, is one of the models",
    "arXiv 2603.04972",
    takes_base=True,
    nodes=nodes,
    keeps_single=keeps_single,
)
def karcher(gram: Floats, *, max_iter: MaxIter = 10, tol: Tol = 1e-5, tile: Tile | None = None) -> Floats:
    """Return the point of the sphere nearest to all directions u_i, × the mean norm: m ← exp_m(mean of log_m(u_i)).

    At most `max_iter` steps, until one is shorter than `tol`; models of norm ≤ `tol` have no direction.
    """
    norms = norms_of(gram)
    valid = norms > tol
    if not valid.any():
        return np.zeros(len(norms))
    safe = np.where(valid, norms, 1.0)
    unit = gram / np.multiply.outer(safe, safe)
    share = valid / valid.sum()
    length = length_of(share, unit)
    mean = share / length if length >= tol else np.eye(len(norms))[int(valid.argmax())]
    for _ in range(max_iter):
        cosine = np.clip(unit @ mean, -1.0, 1.0)
        angle = np.where(valid, np.arccos(cosine), 0.0)
        far = (angle >= tol) & (angle < math.pi)
        factor = np.divide(angle, np.sin(angle), out=np.zeros_like(angle), where=far) * share
        tangent = factor - (factor @ cosine) * mean
        length = length_of(tangent, unit)
        if length < tol:
            break
        mean = math.cos(length) * mean + math.sin(length) * (tangent / length)
        mean = mean / length_of(mean, unit)
    return np.asarray(norms.mean() * mean / safe)
