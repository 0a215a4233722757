"""Arcee fusion: take the most important entries from the model, by size and by their row's shift (https://arcee.ai).

A row is the last dimension (`tiles.row_length_of`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from deltamerge.methods.prune import select
from deltamerge.methods.registry import delta_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import alike, densify, row_length_of

if TYPE_CHECKING:
    from deltamerge.tensors.tiles import Kept, Make, Tile

FLOOR = 1e-8


def nodes(make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool) -> Any:
    """Make the node of `arcee_fusion`: two passes find the exact quartiles of the importance, a third takes entries."""
    score = make(importance, inputs, shape=shape)
    size = math.prod(shape)
    high = make(select.high_histogram, [score], kind="sum", shape=shape)
    quartiles = []
    for quarter in (1, 2, 3) if size else ():
        # the ascending index floor(quarter / 4 · (n − 1)) is the k-th largest
        found = make(select.pick_bin, [high], kind="small", k=size - quarter * (size - 1) // 4)
        low = make(select.low_histogram, [score, found], kind="sum", shape=shape)
        quartiles.append(make(select.pick_cut, [low, found], kind="small"))
    least = make(threshold, quartiles, kind="small")
    return make(function, [*inputs, score, least], shape=shape)


def importance(base: torch.Tensor, delta: torch.Tensor | Kept, *, tile: Tile) -> torch.Tensor:
    """Return abs(Δ) · Σ p log(p / q) over the row, p and q the softmaxes of base + Δ and base, 1e-8 added to each.

    numpy computes it in float64, because exponentials differ in the last bit between devices. The result is float32.
    """
    dense = densify(delta, tile.size)
    old, change = (alike(x.to(torch.float64).cpu(), tile) for x in (base, dense))
    parts = [np.empty(0, np.float32)]
    for one, other in zip(old, change, strict=True):
        columns = row_length_of(tile, one.shape[1])
        q, d = (x.numpy().reshape(-1, columns) for x in (one, other))
        p = _softmax(q + d)
        q = _softmax(q)
        parts.append((np.abs(d) * (p * np.log(p / q)).sum(1, keepdims=True)).reshape(-1).astype(np.float32))
    return torch.from_numpy(np.concatenate(parts)).to(dense.device)


def threshold(*quartiles: Any) -> float:
    """Return median + 1.5 · (Q3 − Q1), in float32; of nothing, 0."""
    if not quartiles:
        return 0.0
    bits = np.array([cut.threshold for cut in quartiles], np.int32)
    first, median, third = bits.view(np.float32)
    return float(median + np.float32(1.5) * (third - first))


def _softmax(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raised = np.exp(rows - rows.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True) + FLOOR)


@delta_method(
    "keep Δ where abs(Δ) · KL of the rows' softmaxes is at least median + 1.5 · IQR",
    "https://arcee.ai",
    maximum=1,
    nodes=nodes,
)
def arcee_fusion(
    base: torch.Tensor, delta: torch.Tensor | Kept, importance: torch.Tensor, threshold: float, *, tile: Tile
) -> torch.Tensor:
    """Return base + Δ where the importance reaches the threshold, base elsewhere; float32.

    base         tile in its stored dtype
    delta        float32 tile
    importance   float32, for each entry
    threshold    the least importance of an entry that is taken

    NaN reaches the threshold too, so that it shows in the result.
    """
    dense = densify(delta, tile.size)
    return base.to(torch.float32) + dense.where(~(importance < threshold), dense.new_zeros(()))
