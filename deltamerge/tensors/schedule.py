"""The passes over a tensor that its graph needs, and the values that are alive in each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from deltamerge.tensors.tensor import Kind, Tensor

TILED = frozenset({"stored", "view", "map"})  # their values are tiles
REDUCTIONS = frozenset({"sum", "concat", "whole"})
_ENDS: dict[Kind, Kind] = {"view": "stored", "stage": "small"}  # how an end counts for the nodes above it


def depth_first(root: Tensor) -> list[Tensor]:
    """Return every node that `root` needs, inputs first, in the order that keeps the fewest values alive.

    Sources and stages are ends: a reader or the stage itself computes their inputs.
    """
    order: list[Tensor] = []
    seen: set[Tensor] = set()
    stack: list[Tensor | None] = [root]
    while stack:
        node = stack.pop()
        if node is None:  # all inputs of the node below it are in order
            done = stack.pop()
            assert done is not None
            order.append(done)
        elif node not in seen:
            seen.add(node)
            if node.inputs and node.kind not in _ENDS:
                stack += (node, None, *node.inputs[::-1])
            else:
                order.append(node)
    return order


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one output tensor is computed: passes over its tiles, with small values between them.

    passes   for pass i the nodes, in order, that run on every tile to compute its reductions. The last pass computes
             the root. It is empty if the root is a small node, whose shape is then the described tensor's.
    small    for pass i the small nodes that can be computed before it
    frees    for pass i: position in `passes[i]` -> nodes whose tile values are last used there
    peak     the most tile values alive at once in any pass
    """

    root: Tensor
    passes: tuple[tuple[Tensor, ...], ...]
    small: tuple[tuple[Tensor, ...], ...]
    frees: tuple[dict[int, tuple[Tensor, ...]], ...]
    peak: int


def schedule(root: Tensor) -> Schedule:
    """Split the nodes under `root` into the fewest passes over its tiles; linear in their number."""
    order = depth_first(root)
    place = {id(node): i for i, node in enumerate(order)}
    form: _Form = tuple(
        (_ENDS[n.kind], ()) if n.kind in _ENDS else (n.kind, tuple([place[id(s)] for s in n.inputs])) for n in order
    )
    passes, small, frees, peak = _arrange(form)

    def named(places: Iterable[int]) -> tuple[Tensor, ...]:
        return tuple([order[i] for i in places])

    return Schedule(
        root,
        tuple(map(named, passes)),
        tuple(map(named, small)),
        tuple([{position: named(freed) for position, freed in last.items()} for last in frees]),
        peak,
    )


# A node as its kind and the indices of its inputs. A model's tensors have few different graphs, so schedules are
# cached.
_Form = tuple[tuple[Kind, tuple[int, ...]], ...]
_Places = tuple[int, ...]


@lru_cache(maxsize=256)
def _arrange(nodes: _Form) -> tuple[list[_Places], list[_Places], list[dict[int, _Places]], int]:
    """Return a schedule's passes, small nodes and frees, as indices, and its peak; the last node is the root."""
    level: list[int] = []
    for _, inputs in nodes:
        level.append(max((level[i] + (nodes[i][0] in REDUCTIONS) for i in inputs), default=0))
    root, count = len(nodes) - 1, level[-1] + 1
    passes, small, frees = [], [], []
    for index in range(count):
        here = [i for i, at in enumerate(level) if at == index]
        targets = [i for i in here if nodes[i][0] in REDUCTIONS]
        targets += [root] if index == count - 1 and nodes[root][0] != "small" else []
        needed = _tile_nodes(nodes, targets)
        passes.append(needed)
        small.append(tuple(i for i in here if nodes[i][0] == "small"))
        frees.append(_last_uses(nodes, needed, keep=targets))
    return passes, small, frees, _peak(nodes, passes, frees)


def _tile_nodes(nodes: _Form, targets: list[int]) -> _Places:
    """Return the sources, map and reduction nodes of one pass that `targets` need, without inputs of small values."""
    wanted = set(targets)
    for i in range(len(nodes) - 1, -1, -1):
        if i in wanted:
            wanted |= {source for source in nodes[i][1] if nodes[source][0] in TILED}
    return tuple(sorted(wanted))


def _last_uses(nodes: _Form, needed: _Places, keep: list[int]) -> dict[int, _Places]:
    """Return by position among the `needed` nodes the nodes, outside `keep`, that are last used there."""
    inside, kept, last = set(needed), set(keep), dict[int, int]()
    for position, i in enumerate(needed):
        last |= {source: position for source in nodes[i][1] if source in inside}
    frees: dict[int, list[int]] = {}
    for source, position in last.items():
        if source not in kept:
            frees.setdefault(position, []).append(source)
    return {position: tuple(freed) for position, freed in frees.items()}


def last_uses(nodes: Sequence[Tensor], keep: Tensor) -> dict[int, tuple[Tensor, ...]]:
    """Return by position among `nodes` the nodes, but for `keep`, that are last used there."""
    inside, last = set(nodes) - {keep}, dict[Tensor, int]()
    for position, node in enumerate(nodes):
        last |= {source: position for source in node.operands if source in inside}
    frees: dict[int, list[Tensor]] = {}
    for source, position in last.items():
        frees.setdefault(position, []).append(source)
    return {position: tuple(freed) for position, freed in frees.items()}


def _peak(nodes: _Form, passes: list[_Places], frees: list[dict[int, _Places]]) -> int:
    """Return the most tile values alive at once in any pass."""
    peak = 0
    for needed, last in zip(passes, frees, strict=True):
        alive = 0
        for position, i in enumerate(needed):
            alive += nodes[i][0] not in REDUCTIONS
            peak = max(peak, alive)
            alive -= len(last.get(position, ()))
    return peak
