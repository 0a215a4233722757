"""Moments of a delta's entries from one pass: sums of powers and a histogram of magnitudes.

Tiles yield float64 partials per block, added by `math.fsum`, and integer counts, so no figure depends on tiles, threads
or the device. Figures from the histogram (quantiles, the energy that a density keeps) take every magnitude as the
middle of its bin, which is at most 0.4 % away.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.methods.ops import block_rows, densify, halved
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import Tile

BINS = 1 << 15


def moments(delta: Any, base: torch.Tensor, *, tile: Tile) -> NDArray[np.float64]:
    """Return (blocks, 8) of Δ: Σ Δ, Σ |Δ|, Σ Δ², Σ Δ³, Σ Δ⁴, the number of zeros, max |Δ|, and Σ W² of the base."""
    x = densify(delta, tile.size).to(torch.float64)
    square, w = x * x, base.to(torch.float64)
    summed = (x, x.abs(), square, square * x, square * square, (x == 0).to(torch.float64))
    columns = [halved(block_rows(values, tile)) for values in summed]
    columns += [block_rows(x.abs(), tile).amax(1), halved(block_rows(w * w, tile))]
    return torch.stack(columns, 1).cpu().numpy()


@dataclass(frozen=True, slots=True, eq=False)
class DeltaMoments:
    """Sums over the entries of one or more deltas; `bins` are high 16 bits of |Δ|, `counts` their frequencies."""

    count: int
    total: float
    absolute: float
    square: float
    cube: float
    fourth: float
    zeros: float
    largest: float
    base_square: float
    bins: NDArray[np.int64]
    counts: NDArray[np.int64]

    @property
    def mean_abs(self) -> float:
        """E|Δ|."""
        return self.absolute / self.count if self.count else 0.0

    @property
    def variance(self) -> float:
        """E[Δ²] − E[Δ]²."""
        return max(0.0, self.square / self.count - (self.total / self.count) ** 2) if self.count else 0.0

    @property
    def kurtosis(self) -> float | None:
        """E[(Δ − E Δ)⁴] / variance², 3 for a normal distribution; None without variance."""
        variance = self.variance
        if not variance:
            return None
        mean = self.total / self.count
        second, third, fourth = (value / self.count for value in (self.square, self.cube, self.fourth))
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        ratio = central / variance**2 if variance**2 else math.inf
        return ratio if math.isfinite(ratio) else None

    @property
    def relative_norm(self) -> float | None:
        """Return ‖Δ‖ / ‖W‖. None where the base is zero."""
        return math.sqrt(self.square / self.base_square) if self.base_square else None

    @property
    def magnitudes(self) -> NDArray[np.float64]:
        """Return the middle of each bin. 0 for the bin of zero, and none above the largest magnitude."""
        middle = ((self.bins << 16) | 0x8000).astype(np.uint32).view(np.float32).astype(np.float64)
        return np.minimum(np.where(self.bins == 0, 0.0, middle), self.largest)

    def quantile(self, share: float) -> float:
        """Return the smallest magnitude that at least `share` of the entries do not exceed."""
        if not self.count:
            return 0.0
        index = int(np.searchsorted(np.cumsum(self.counts), math.ceil(share * self.count)))
        return float(self.magnitudes[min(index, len(self.bins) - 1)])

    def kept_energy(self, density: float) -> float:
        """Return the share of Σ Δ² in the round(density · n) largest magnitudes."""
        energy = self.magnitudes**2
        left = round(density * self.count) - (np.cumsum(self.counts[::-1]) - self.counts[::-1])
        kept = np.clip(left, 0, self.counts[::-1])
        whole = float(energy @ self.counts)
        return float(energy[::-1] @ kept) / whole if whole else 0.0

    def sampling_error(self, density: float) -> float:
        """Σ Δ² (1/π − 1) / Σ Δ² of importance sampling, π = min(1, c |Δ|) with mean `density`."""
        size, counts = self.magnitudes, self.counts.astype(np.float64)
        whole = float(size**2 @ counts)
        wanted = density * self.count
        if not whole or wanted >= counts[size > 0].sum():
            return 0.0
        suffix = np.concatenate([np.cumsum(counts[::-1])[::-1], [0.0]])  # number of entries in bin i and above
        below = np.cumsum(size * counts)
        # bins from i on have π = 1; i is the first for which the bin below stays under 1
        for i in range(len(size), 0, -1):
            if below[i - 1] <= 0.0:
                return 0.0
            c = (wanted - suffix[i]) / below[i - 1]
            if c * size[i - 1] <= 1.0:
                return float(np.sum(counts[:i] * (size[:i] / c - size[:i] ** 2))) / whole
        return 0.0


SUMS = tuple(f.name for f in fields(DeltaMoments) if f.name not in ("count", "largest", "bins", "counts"))


def join_moments(partials: NDArray[np.float64], counts: NDArray[np.int64], *, size: int) -> DeltaMoments:
    """Return the moments of one tensor of `size` entries from `moments` of its blocks and its `high_histogram`."""
    total, absolute, square, cube, fourth, zeros, _, base = (math.fsum(column) for column in partials.T)
    largest = float(partials[:, 6].max(initial=0.0))
    bins = np.flatnonzero(counts)
    return DeltaMoments(size, total, absolute, square, cube, fourth, zeros, largest, base, bins, counts[bins])


def together(some: Iterable[DeltaMoments]) -> DeltaMoments:
    """Return the moments of all entries of several deltas."""
    parts = list(some)
    counts = np.zeros(BINS, np.int64)
    for part in parts:
        counts[part.bins] += part.counts
    bins = np.flatnonzero(counts)
    sums = {name: math.fsum(getattr(part, name) for part in parts) for name in SUMS}
    largest = max((part.largest for part in parts), default=0.0)
    return DeltaMoments(sum(part.count for part in parts), largest=largest, bins=bins, counts=counts[bins], **sums)
