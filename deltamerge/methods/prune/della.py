"""DELLA: the larger an entry within its row, the more likely it is kept."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.errors import InputError
from deltamerge.io.lazy import torch
from deltamerge.methods.ops import alike, densify, row_length_of
from deltamerge.methods.prune.bits import Key, words_torch
from deltamerge.methods.prune.select import magnitude_bits
from deltamerge.methods.tiles import Kept, Tile


def della(
    delta: torch.Tensor | Kept, *, tile: Tile, key: Key, density: float, epsilon: float, weighted: bool = True
) -> torch.Tensor:
    """δ ∘ Δ · density / π, δ ~ Bernoulli(π); float32 (arXiv 2406.11617). Divided by q = density it is unbiased.

        delta      float32 or `Kept`
        key        the mask's
        density    the mean of π
        epsilon    ε of π = density − ε + 2ε · rank / (n − 1), rank from 0 by abs(Δ) in a row of n, equals from the left
        weighted   False: δ ∘ Δ alone

    A row is the last dimension (`ops.row_length_of`); π = density for a row of one. An entry is kept if the position's
    32-bit word is below π · 2**32.
    """
    dense = densify(delta, tile.size)
    words = words_torch(key, tile.start, tile.stop, dense.device)
    parts = [dense[:0]]
    for rows, drawn in zip(alike(dense, tile), alike(words, tile), strict=True):
        columns = row_length_of(tile, rows.shape[1])
        values = rows.reshape(-1, columns)
        rank = _ranks(values)
        probability = probabilities(columns, density, epsilon)
        stays = drawn.reshape(-1, columns) < _at(rank, np.round(probability * 2.0**32).astype(np.int64))
        if weighted:
            values = values / _at(rank, (probability / density).astype(np.float32))
        parts.append(values.where(stays, values.new_zeros(())).view(-1))
    return torch.cat(parts)


def check(density: float, epsilon: float) -> None:
    """InputError unless every π is a probability above 0."""
    if density < 1.0 and not 0.0 < density - epsilon <= density + epsilon <= 1.0:
        message = f"della: density {density:g} ± epsilon {epsilon:g} must lie in (0, 1]"
        raise InputError(message, hint="choose a smaller epsilon")


def probabilities(count: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """π of each rank in a row of `count`."""
    if count < 2:
        return np.full(count, density)
    return np.asarray(density - epsilon + np.arange(count) * (2.0 * epsilon / (count - 1)), np.float64)


def _ranks(rows: torch.Tensor) -> torch.Tensor:
    """int64 (rows, n): the number of entries in the row that are smaller, or equal and further left."""
    order = magnitude_bits(rows).sort(dim=1, stable=True).indices
    ranks = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _at(rank: torch.Tensor, table: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(table).to(rank.device)[rank]
