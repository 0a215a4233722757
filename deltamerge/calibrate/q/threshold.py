"""`group: model`: one exact threshold over all tensors of a model, with one tile of a tensor in memory at a time.

The passes are those of `prune.select` for one tensor, with histograms summed over the tensors: the high bits, the low
bits inside the bin found and, if only some of the entries equal to the threshold are kept, their number per tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine import backends
from deltamerge.engine.execute import Task, default_workers, execute
from deltamerge.methods.prune import select
from deltamerge.tensors.graph import Function, Graph, Node
from deltamerge.tensors.reader import Reader

TOGETHER = 32  # tensors whose histograms are kept before they are added


@dataclass(frozen=True, slots=True)
class ModelCut:
    """The threshold of a model; `equal` has (kept, all) of the entries equal to it, by tensor."""

    threshold: int
    equal: Mapping[str, tuple[int, int]]


def model_cut(*, deltas: tuple[tuple[str, Node], ...], k: int, device: str) -> ModelCut:
    """The cut that keeps the k largest magnitudes of all `deltas`; equal ones are kept from the first tensor on, in
    flat order."""
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


def cut_of(cut: ModelCut, *, name: str) -> select.Cut:
    """One tensor's cut, from a model's."""
    kept, count = cut.equal[name]
    return select.Cut(cut.threshold, kept, count)


def _sum(graph: Graph, function: Function, delta: Node, *more: Node) -> Node:
    return graph.node(function, [delta, *more], kind="sum", shape=delta.shape)


def _equals(graph: Graph, delta: Node) -> Node:
    return graph.node(select.equal_counts, [delta, _small(graph, "cut")], kind="concat", shape=delta.shape)


def _small(graph: Graph, name: str) -> Node:
    """A node for a value that is passed when the graph runs."""
    return graph.node(name, kind="small")


def reduced(
    deltas: Sequence[tuple[str, Node]],
    make: Callable[[Graph, Node], Node],
    known: Mapping[str, Any],
    reader: Reader,
    device: str,
    stages: Mapping[Node, Any] | None = None,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """One reduction of every delta; `stages` has the values of nodes that come before them."""
    graph = Graph()
    given = {_small(graph, name): value for name, value in known.items()} | dict(stages or {})
    for start in range(0, len(deltas), TOGETHER):
        roots = [(name, make(graph, delta)) for name, delta in deltas[start : start + TOGETHER]]
        tasks = [Task(name, root, backends.choose(root, device)) for name, root in roots]
        values = execute(tasks, reader, None, device=device, workers=default_workers(), known=given)
        yield from ((name, values[root]) for name, root in roots)
