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
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.tiles import Tile
from deltamerge.tensors.traits import Function, traits
from deltamerge.tensors.views import ordered_product

if TYPE_CHECKING:
    import torch

TOGETHER = 32  # tensors whose histograms are kept before they are added


@traits(reads=2)
def model_cut(*inputs: Node, known: Mapping[Node, Any], names: tuple[str, ...], k: int, device: str) -> ModelCut:
    """Return the cut that keeps the k largest magnitudes of all deltas, which are the inputs, by `names`.

    Equal ones are kept from the first tensor on, in flat order.
    """
    deltas = list(zip(names, inputs, strict=True))
    if k == 0:
        nothing = select.nothing()
        return ModelCut(nothing.threshold, dict.fromkeys(names, (0, 0)))
    with Reader() as reader:

        def reduced(make: Callable[[Graph, Node], Node], given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
            graph = Graph()
            values = {**known, **{_small(graph, name): value for name, value in given.items()}}
            return _in_turns([(name, make(graph, delta)) for name, delta in deltas], values, reader, device)

        def total(make: Callable[[Graph, Node], Node], given: Mapping[str, Any]) -> Any:
            return sum(values for _, values in reduced(make, given))

        high = select.pick_bin(total(lambda g, d: _sum(g, select.high_histogram, d), {}), k=k)
        low = total(lambda g, d: _sum(g, select.low_histogram, d, _small(g, "bin")), {"bin": high})
        cut = select.pick_cut(low, high)
        if cut.equal_kept == cut.equal_total:
            return ModelCut(cut.threshold, dict.fromkeys(names, (0, 0)))
        counts = {name: int(np.sum(count)) for name, count in reduced(_equals, {"cut": cut})}
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


def _in_turns(
    roots: Sequence[tuple[str, Node]], known: Mapping[Node, Any], reader: Reader, device: str
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the value of each reduction, by the names of their tensors."""
    for start in range(0, len(roots), TOGETHER):
        some = roots[start : start + TOGETHER]
        tasks = [Task(name, root, backends.choose(root, device)) for name, root in some]
        values = execute(tasks, reader, None, device=device, workers=default_workers(), known=known)
        yield from ((name, values[root]) for name, root in some)


@traits(reads=1)
def totals(*inputs: Node, known: Mapping[Node, Any], names: tuple[str, ...], device: str) -> tuple[float, ...]:
    """Return the sums of the numbers of all blocks of all tensors, each exact and rounded once.

    The inputs are a reduction to (blocks, k) float64 for each of `names`, and what they need.
    """
    roots = list(zip(names, inputs, strict=False))
    with Reader() as reader:
        found = [one for _, one in _in_turns(roots, known, reader, device)]
    columns = np.concatenate([one for one in found if one.size] or [np.zeros((0, 0))]).T
    return tuple(math.fsum(column) if np.isfinite(column).all() else float(column.sum()) for column in columns)


def whole(*inputs: Node, known: Mapping[Node, Any]) -> Array:
    """Return the whole value of the first input, a small tensor: float32 on the CPU, in its shape."""
    with Reader() as reader:
        made = computed({"factor": inputs[0]}, reader, workers=1, known=known)["factor"]
    return made.view(np.float32).reshape(inputs[0].shape)


def product(a: Array, b: Array, *, tile: Tile, scale: float, transposed: bool) -> torch.Tensor:
    """Return s · B A, or its transpose, of masked factors, on a tile of the weight: flat float32.

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
