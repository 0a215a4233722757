"""Values over whole tensors, before the first tile: `group: model`'s threshold, a merge's totals, products of A and B.

One tile of a tensor is in memory at a time. The threshold is exact: its passes are those of `prune.select` for one
tensor, with histograms summed over the tensors. They count the high bits, the low bits inside the bin found and, if
only some of the entries equal to the threshold are kept, their number per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.calibrate.values import ModelCut
from deltamerge.engine import backends
from deltamerge.engine.execute import Task, computed, default_workers, execute
from deltamerge.methods.prune import select
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.tiles import Tile
from deltamerge.tensors.traits import Function
from deltamerge.tensors.views import Array, ordered_product

if TYPE_CHECKING:
    import torch

TOGETHER = 32  # tensors whose histograms are kept before they are added


def model_cut(*, deltas: tuple[tuple[str, Node], ...], k: int, device: str) -> ModelCut:
    """Return the cut that keeps the k largest magnitudes of all `deltas`; equal ones are kept from the first tensor on,
    in flat order."""
    names = [name for name, _ in deltas]
    if k == 0:
        nothing = select.nothing()
        return ModelCut(nothing.threshold, dict.fromkeys(names, (0, 0)))
    with Reader() as reader:

        def total(make: Callable[[Graph, Node], Node], known: Mapping[str, Any]) -> Any:
            return sum(values for _, values in reduced(deltas, make, known, reader, device))

        high = select.pick_bin(total(lambda g, d: _sum(g, select.high_histogram, d), {}), k=k)
        low = total(lambda g, d: _sum(g, select.low_histogram, d, _small(g, "bin")), {"bin": high})
        cut = select.pick_cut(low, high)
        if cut.equal_kept == cut.equal_total:
            return ModelCut(cut.threshold, dict.fromkeys(names, (0, 0)))
        make = _equals
        counts = {n: int(np.sum(c)) for n, c in reduced(deltas, make, {"cut": cut}, reader, device)}
    left, equal = cut.equal_kept, {}
    for name in names:
        equal[name] = (min(left, counts[name]), counts[name])
        left -= equal[name][0]
    return ModelCut(cut.threshold, equal)


def _sum(graph: Graph, function: Function, delta: Node, *more: Node) -> Node:
    return graph.node(function, [delta, *more], kind="sum", shape=delta.shape)


def _equals(graph: Graph, delta: Node) -> Node:
    return graph.node(select.equal_counts, [delta, _small(graph, "cut")], kind="concat", shape=delta.shape)


def _small(graph: Graph, name: str) -> Node:
    """Return a node for a value that is passed when the graph runs."""
    return graph.node(name, kind="small")


def reduced(
    deltas: Sequence[tuple[str, Node]],
    make: Callable[[Graph, Node], Node],
    known: Mapping[str, Any],
    reader: Reader,
    device: str,
    stages: Mapping[Node, Any] | None = None,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield one reduction of every delta; `stages` has the values of nodes that come before them."""
    graph = Graph()
    given = {_small(graph, name): value for name, value in known.items()} | dict(stages or {})
    for start in range(0, len(deltas), TOGETHER):
        roots = [(name, make(graph, delta)) for name, delta in deltas[start : start + TOGETHER]]
        tasks = [Task(name, root, backends.choose(root, device)) for name, root in roots]
        values = execute(tasks, reader, None, device=device, workers=default_workers(), known=given)
        yield from ((name, values[root]) for name, root in roots)


def totals(
    *values: Any, parts: tuple[tuple[str, Node], ...], known: tuple[Node, ...], device: str
) -> tuple[float, ...]:
    """Return the sums of the numbers of all blocks of all tensors, each exact and rounded once; `parts` are the nodes
    of (blocks, k) float64 by tensor, `values` those of the `known` nodes that they need."""
    given = dict(zip(known, values, strict=True))
    with Reader() as reader:
        found = [one for _, one in reduced(parts, lambda _, node: node, {}, reader, device, given)]
    columns = np.concatenate([one for one in found if one.size] or [np.zeros((0, 0))]).T
    return tuple(math.fsum(column) if np.isfinite(column).all() else float(column.sum()) for column in columns)


def whole(*, node: Node) -> Array:
    """Return the whole value of `node`, a small tensor: float32 on the CPU, in the node's shape."""
    with Reader() as reader:
        return computed({"factor": node}, reader, workers=1)["factor"].view(np.float32).reshape(node.shape)


def product(a: Array, b: Array, *, tile: Tile, scale: float, transposed: bool) -> torch.Tensor:
    """s · B A, or its transpose, of masked factors, on a tile of the weight: flat float32.

    a            (r, in) masked
    b            (out, r) masked
    tile         the part of the weight
    scale        s
    transposed   whether the weight is stored (in, out)
    """
    import torch

    left, right = (a.T, b.T) if transposed else (b, a)
    top, bottom = tile.start // tile.columns, math.ceil(tile.stop / tile.columns)
    out = np.empty((bottom - top, tile.columns), np.float32)
    ordered_product(left[top:bottom], right, out)
    out *= np.float32(scale)
    first = tile.start - top * tile.columns
    return torch.from_numpy(out.reshape(-1)[first : first + tile.size])
