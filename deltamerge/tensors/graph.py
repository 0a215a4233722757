"""The lazy graph of a plan: interned, plain-data nodes whose functions are names, looked up when they run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.traits import Function as Function
from deltamerge.tensors.traits import function_of as function_of
from deltamerge.tensors.traits import name_of as name_of

Kind = Literal["read", "map", "sum", "concat", "whole", "small"]
TILED = frozenset({"read", "map"})  # their values are tiles
REDUCTIONS = frozenset({"sum", "concat", "whole"})
READ = "read"  # the function of such nodes, which the backends read themselves


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One step: `function` ("module:name") of the values of `inputs` and of plain `parameters`.

        read     a tile of a stored tensor; `parameters["tensor"]` says where its bytes are
        map      f(*inputs, tile, **parameters) -> the tile's value
        sum      f(*inputs, tile, **parameters) -> a partial per tile; the partials are added (integers only)
        concat   the same, but the partials are concatenated in tile order
        whole    f(*inputs, **parameters) -> a value of the size of the tensor; inputs that have tiles are given as a
                 `source.Source` each, which computes any range of the tensor when it is read
        small    f(*inputs, **parameters) -> a value that fits in memory (a threshold, norms, q)

    `tensors.traits` has what a function declares besides: of `whole` functions what they need, of reductions when they
    are needless.

    Nodes are interned by `Graph`, so identity is equality. A node's inputs exist before it, so graphs have no cycles.
    `shape` and `dtype` (a safetensors code) are those of the tensor whose tiles the node computes.
    """

    function: str
    inputs: tuple[Node, ...]
    parameters: tuple[tuple[str, Any], ...]
    shape: tuple[int, ...]
    dtype: str
    kind: Kind

    def parameter(self, name: str) -> Any:
        """The parameter of that name."""
        for key, value in self.parameters:
            if key == name:
                return value
        raise KeyError(name)


@dataclass
class Graph:
    """Makes nodes; equal nodes are one object."""

    nodes: dict[tuple[Any, ...], Node] = field(default_factory=dict)
    reads: dict[TensorInfo, Node] = field(default_factory=dict)

    def node(
        self,
        function: Function,
        inputs: Iterable[Node] = (),
        *,
        kind: Kind = "map",
        shape: tuple[int, ...] = (),
        dtype: str = "F32",
        **parameters: Any,
    ) -> Node:
        """The node with these fields.

        function   what makes the value, or its "module:name"
        inputs     nodes
        kind       of the node, see `Node`
        shape      of the tensor; () for small values
        dtype      safetensors code
        others     keyword arguments of the function
        """
        inputs, function = tuple(inputs), name_of(function)
        plain = tuple(sorted(parameters.items())) if len(parameters) > 1 else tuple(parameters.items())
        key = (function, inputs, plain, shape, dtype, kind)  # inputs count by identity
        found = self.nodes.get(key)
        if found is None:
            found = self.nodes[key] = Node(function, inputs, plain, shape, dtype, kind)
        return found

    def read(self, tensor: TensorInfo) -> Node:
        """The node that reads a stored tensor."""
        found = self.reads.get(tensor)
        if found is None:
            parameters = (("tensor", tensor),)
            found = self.reads[tensor] = Node(READ, (), parameters, tensor.shape, tensor.dtype, "read")
        return found


def depth_first(root: Node) -> list[Node]:
    """Every node that `root` needs, inputs first, in the order that keeps the fewest values alive."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[Node | None] = [root]
    while stack:
        node = stack.pop()
        if node is None:  # all inputs of the node below it are in order
            done = stack.pop()
            assert done is not None
            order.append(done)
        elif node not in seen:
            seen.add(node)
            if node.inputs:
                stack += (node, None, *node.inputs[::-1])
            else:
                order.append(node)
    return order


@dataclass(frozen=True, slots=True)
class Schedule:
    """How one output tensor is computed: passes over its tiles, with small values between them.

    passes   of pass i the nodes, in order, that run on every tile to make its reductions. The last pass makes the root;
             it is empty if the root is a small node, whose shape is that of the tensor it describes
    small    of pass i the small nodes that can be computed before it
    frees    of pass i: position in `passes[i]` -> nodes whose tile values are last used there
    """

    root: Node
    passes: tuple[tuple[Node, ...], ...]
    small: tuple[tuple[Node, ...], ...]
    frees: tuple[dict[int, tuple[Node, ...]], ...]


def schedule(root: Node) -> Schedule:
    """Split the nodes under `root` into the fewest passes over its tiles; linear in their number."""
    order = depth_first(root)
    place = {node: i for i, node in enumerate(order)}
    passes, small, frees = _arrange(tuple([(n.kind, tuple([place[s] for s in n.inputs])) for n in order]))

    def named(places: Iterable[int]) -> tuple[Node, ...]:
        return tuple([order[i] for i in places])

    return Schedule(
        root,
        tuple(map(named, passes)),
        tuple(map(named, small)),
        tuple({position: named(freed) for position, freed in last.items()} for last in frees),
    )


# A node as its kind and the indices of its inputs. Tensors of a model are made in few ways, so schedules are cached.
_Shape = tuple[tuple[Kind, tuple[int, ...]], ...]
_Places = tuple[int, ...]


@lru_cache(maxsize=256)
def _arrange(nodes: _Shape) -> tuple[list[_Places], list[_Places], list[dict[int, _Places]]]:
    """A schedule's passes, small nodes and frees, as indices; the last node is the root."""
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
    return passes, small, frees


def _tile_nodes(nodes: _Shape, targets: list[int]) -> _Places:
    """The read, map and reduction nodes of one pass: those that `targets` need, without the inputs of small values."""
    wanted = set(targets)
    for i in range(len(nodes) - 1, -1, -1):
        if i in wanted:
            wanted |= {source for source in nodes[i][1] if nodes[source][0] in TILED}
    return tuple(sorted(wanted))


def _last_uses(nodes: _Shape, needed: _Places, keep: list[int]) -> dict[int, _Places]:
    """Position among the `needed` nodes -> the nodes that are last used there, without those in `keep`."""
    inside, kept, last = set(needed), set(keep), dict[int, int]()
    for position, i in enumerate(needed):
        last |= {source: position for source in nodes[i][1] if source in inside}
    frees: dict[int, list[int]] = {}
    for source, position in last.items():
        if source not in kept:
            frees.setdefault(position, []).append(source)
    return {position: tuple(freed) for position, freed in frees.items()}


def last_uses(nodes: Sequence[Node], keep: Node) -> dict[int, tuple[Node, ...]]:
    """Position among `nodes` -> those of them, but for `keep`, that are last used there."""
    inside, last = set(nodes) - {keep}, dict[Node, int]()
    for position, node in enumerate(nodes):
        last |= {source: position for source in node.inputs if source in inside}
    frees: dict[int, list[Node]] = {}
    for source, position in last.items():
        frees.setdefault(position, []).append(source)
    return {position: tuple(freed) for position, freed in frees.items()}


def peak_tiles(plan: Schedule) -> int:
    """The most tile values alive at once in any pass."""
    peak = 0
    for nodes, frees in zip(plan.passes, plan.frees, strict=True):
        alive = 0
        for position, node in enumerate(nodes):
            alive += node.kind not in REDUCTIONS
            peak = max(peak, alive)
            alive -= len(frees.get(position, ()))
    return peak
