"""The rank of each weight of a LoRA: the one asked for, or that which pays in a budget of bytes."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

from deltamerge.methods.low_rank import Floats


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What each rank of a weight keeps, in descending order, and the bytes that each takes."""

    gains: Floats
    price: int


def greedy(spectra: Mapping[str, Spectrum], room: int) -> dict[str, int]:
    """The ranks that keep most in `room` bytes: the next rank goes where it keeps most a byte.

    Gains fall with the rank and a weight's ranks all cost the same: no other choice of as many bytes keeps more,
    but for what the last rank that does not fit leaves over.
    """
    ranks = dict.fromkeys(spectra, 0)
    queue = [(-float(s.gains[0]) / s.price, i, name) for i, (name, s) in enumerate(spectra.items()) if s.gains.size]
    heapq.heapify(queue)
    while queue:
        _, i, name = heapq.heappop(queue)
        spectrum = spectra[name]
        if spectrum.price > room:
            continue
        room -= spectrum.price
        ranks[name] += 1
        if ranks[name] < spectrum.gains.size:
            heapq.heappush(queue, (-float(spectrum.gains[ranks[name]]) / spectrum.price, i, name))
    return ranks


def affordable(prices: Mapping[str, int], budget: int) -> int:
    """The one rank for all weights that about fits."""
    return budget // max(1, sum(prices.values()))
