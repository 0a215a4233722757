"""Arcee fusion: only the most important entries, by size and by their row's shift, are taken from the model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from deltamerge.io.lazy import torch
from deltamerge.methods.ops import alike, densify, row_length_of
from deltamerge.methods.prune import select
from deltamerge.methods.tiles import Kept, Make, Tile

FLOOR = 1e-8


def arcee_fusion(
    base: torch.Tensor, delta: torch.Tensor | Kept, importance: torch.Tensor, threshold: float, *, tile: Tile
) -> torch.Tensor:
    """base + Δ where the importance reaches the threshold, base elsewhere; float32 (https://arcee.ai).

    base         tile in its stored dtype
    delta        float32 tile
    importance   of each entry, float32
    threshold    the least importance that is taken

    What is not a number reaches the threshold too, so that it is seen in the result.
    """
    dense = densify(delta, tile.size)
    return base.to(torch.float32) + dense.where(~(importance < threshold), dense.new_zeros(()))


def nodes(make: Make, function: str, inputs: list[Any], shape: tuple[int, ...], *, based: bool) -> Any:
    """The node of `arcee_fusion`: two passes find the exact quartiles of the importance, a third takes the entries."""
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
    """abs(Δ) · Σ p log(p / q) over the row, p and q the softmaxes of base + Δ and base, 1e-8 added to each.

    Computed in float64 by numpy, since exponentials differ in their last bit from device to device; float32. A row is
    the last dimension (`ops.row_length_of`).
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
    """median + 1.5 · (Q3 − Q1), in float32; of nothing, 0."""
    if not quartiles:
        return 0.0
    bits = np.array([cut.threshold for cut in quartiles], np.int32)
    first, median, third = bits.view(np.float32)
    return float(median + np.float32(1.5) * (third - first))


def _softmax(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raised = np.exp(rows - rows.max(1, keepdims=True))
    return np.asarray(raised / raised.sum(1, keepdims=True) + FLOOR)
