"""DELLA: the larger an entry within its row, the more likely it is kept (Deep et al., arXiv 2406.11617).

δ ∘ Δ / π · density / q, δ ~ Bernoulli(π), π = density − ε + 2ε · rank / (n − 1), rank from 0 by abs(Δ) in a row of n.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes
from deltamerge.errors import InputError
from deltamerge.methods.parameters import Epsilon
from deltamerge.methods.prune.bits import words_torch
from deltamerge.methods.prune.select import magnitude_bits
from deltamerge.methods.registry import prune_method
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import alike, densify, row_length_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.engine.fused.operations import Assembly
    from deltamerge.methods.prune.bits import Key
    from deltamerge.methods.registry import Masking
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Kept, Tile


def nodes(masking: Masking) -> Any:
    """Make the node of the kept entries: weighted by 1/π, unless they get the norm of the whole delta afterwards."""
    check(masking.share, masking.parameters["epsilon"])
    weighted = {"weighted": False} if masking.rescaled else {}
    return masking.masked(masking.delta, key=masking.key, density=masking.share, **masking.parameters, **weighted)


def check(density: float, epsilon: float) -> None:
    """Raise InputError unless every π is a probability above 0."""
    if density < 1.0 and not 0.0 < density - epsilon <= density + epsilon <= 1.0:
        message = f"della: density {density:g} ± epsilon {epsilon:g} must lie in (0, 1]"
        raise InputError(message, hint="choose a smaller epsilon")


def probabilities(count: int, density: float, epsilon: float) -> NDArray[np.float64]:
    """Return π of each rank in a row of `count`."""
    if count < 2:
        return np.full(count, density)
    return np.asarray(density - epsilon + np.arange(count) * (2.0 * epsilon / (count - 1)), np.float64)


@lru_cache(maxsize=16)
def _limits(columns: int, density: float, epsilon: float) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Return for each rank the bound of kept words, π · 2**32, and π / density. Upper halves come first."""
    probability = probabilities(columns, density, epsilon)
    bounds = np.round(probability * 2.0**32).astype(np.int64)
    return np.concatenate([bounds >> 16, bounds & 0xFFFF]).astype(np.uint32), (probability / density).astype(np.float32)


def loop(assembly: Assembly, node: Node, key: Key, density: float, epsilon: float, weighted: bool = True) -> None:
    """Add this pruning to the compiled loop as an operation."""
    form, lengths = assembly.form, list[int]()
    for length in form.row_lengths:
        limits, ratios = _limits(length, density, epsilon)
        lengths += [length, sum(map(len, assembly.limits)), assembly.table(ratios)]
        assembly.limits.append(limits)
    delta, count = assembly.register(node.inputs[0]), len(lengths) // 3
    fields = (delta, form.columns, int(weighted))
    assembly.add(codes.RANK, assembly.made(node), *fields, key=key, lists=tuple(lengths), count=count)


@prune_method(
    "keep with a probability that grows with the rank of abs(Δ) in its row, divide by it, then by q / density",
    "arXiv 2406.11617",
    options=frozenset({"rescale", "protect"}),
    random=True,
    nodes=nodes,
    loop=loop,
    sorts=True,
    vectors=True,
    q_decides_below=0.05,
)
def della(
    delta: torch.Tensor | Kept, *, tile: Tile, key: Key, density: float, epsilon: Epsilon = 0.15, weighted: bool = True
) -> torch.Tensor:
    """Return δ ∘ Δ · density / π, δ ~ Bernoulli(π); float32. Divided by q = density it is unbiased.

        delta      float32 or `Kept`
        key        the mask's key
        density    the mean of π
        epsilon    ε of π = density − ε + 2ε · rank / (n − 1), rank from 0 by abs(Δ) in a row of n, equals from the left
        weighted   False: δ ∘ Δ alone

    A row is the last dimension (`tiles.row_length_of`); π = density for a row of one. An entry is kept if the 32-bit
    word of its position is below π · 2**32.
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


def _ranks(rows: torch.Tensor) -> torch.Tensor:
    """Return int64 (rows, n): the number of entries in the row that are smaller, or equal and further left."""
    order = magnitude_bits(rows).sort(dim=1, stable=True).indices
    ranks = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape)
    return torch.empty_like(order).scatter_(1, order, ranks)


def _at(rank: torch.Tensor, table: NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(table).to(rank.device)[rank]
