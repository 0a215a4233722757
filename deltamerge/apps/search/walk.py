"""The weights of several candidates in memory, part by part of a model: what they share is read and computed once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deltamerge.apps.search.candidates import RecipeCandidate
from deltamerge.apps.search.tasks import ScoredTask
from deltamerge.calibrate.model.blocks import Weights
from deltamerge.engine import backends
from deltamerge.engine.execute import Task as Piece
from deltamerge.engine.execute import default_workers, execute
from deltamerge.engine.whole import computed
from deltamerge.methods.ops import dense
from deltamerge.tensors.dtypes import nbytes_of, torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.views import in_memory

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
PRUNING = "deltamerge.methods.prune."
GIVEN = "deltamerge.apps.search.walk:given"


class BoundedCache(Generic[K, T]):
    """What `make` makes of keys, several at once; the last `budget` bytes of it are kept."""

    def __init__(self, budget: int, size: Callable[[T], int]) -> None:
        self.budget, self.size, self.bytes = budget, size, 0
        self.kept: OrderedDict[K, T] = OrderedDict()

    def get(self, keys: Sequence[K], make: Callable[[list[K]], Mapping[K, T]]) -> dict[K, T]:
        """Return the values of `keys`, made if they are not there."""
        missing = [key for key in keys if key not in self.kept]
        new = make(missing) if missing else {}
        found = {key: new[key] if key in new else self.kept[key] for key in keys}
        for key, value in found.items():
            self.bytes += self.size(value) if key in new else 0
            self.kept[key] = value
            self.kept.move_to_end(key)
        while self.bytes > self.budget and len(self.kept) > len(keys):
            self.bytes -= self.size(self.kept.popitem(last=False)[1])
        return found


def given(*, value: Any) -> Any:
    """Return a value that is there already."""
    return value


class Walk:
    """The weights of `candidates` while models walk through their blocks; `known` are the values of their stages.

    A part of the model is resident. Its tensors that candidates share are in memory once: stored ones, pruned deltas,
    singular vectors and the like. A candidate's own tensors are made of these when its turn comes, rounded to the
    output's dtype. They are held in `dtype` (None: as they are) until the next turn.
    """

    def __init__(
        self,
        candidates: Sequence[RecipeCandidate],
        reader: Reader,
        known: Mapping[Node, Any],
        device: str,
        budget: int,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.candidates, self.reader, self.known, self.device = candidates, reader, known, device
        self.dtype = dtype
        self.graph = Graph()
        self.shared: BoundedCache[str, dict[Node, Node]] = BoundedCache(budget, _bytes_of_nodes)
        self.made: BoundedCache[tuple[int, str], Tensor] = BoundedCache(
            budget, lambda tensor: tensor.numel() * tensor.element_size()
        )

    def weights(self, k: int, index: int, task: ScoredTask) -> Weights:
        """Candidate k's weights below the head of a task, which is the fine-tune `index`'s."""
        places = self.candidates[k].places[index]

        def of(names: Sequence[str]) -> dict[str, Tensor]:
            merged = self.tensors(k, [places[name] for name in names if name in places])
            others = task.own([name for name in names if name not in places])
            return {**{name: merged[places[name]] for name in names if name in places}, **others}

        return of

    def tensors(self, k: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Candidate k's tensors by the output's names; before `dtype`, bit for bit those of a run."""
        made = self.made.get([(k, name) for name in names], lambda keys: self._make(k, [name for _, name in keys]))
        return {name: made[k, name] for name in names}

    def _make(self, k: int, names: Sequence[str]) -> dict[tuple[int, str], Tensor]:
        shared = self.shared.get(names, self._share)
        roots = {name: _over(self.candidates[k].roots[name], shared[name]) for name in names}
        return {(k, name): tensor for name, tensor in self._compute(roots).items()}

    def _share(self, names: Sequence[str]) -> dict[str, dict[Node, Node]]:
        """Return, by tensor, the nodes that candidates share, as nodes that read them from memory."""
        wanted: dict[str, Node] = {}
        of_name: dict[str, list[tuple[Node, str]]] = {name: [] for name in names}
        for name in names:
            for i, node in enumerate(_common([candidate.roots[name] for candidate in self.candidates])):
                key = f"{name}#{i}"
                plain = node.kind == "map" and node.dtype == "F32" and node.function.startswith(PRUNING)
                wanted[key] = self.graph.node(dense, [node], shape=node.shape) if plain else node
                of_name[name].append((node, key))
        whole = {key: node for key, node in wanted.items() if node.kind == "whole"}
        values = self._values(whole)
        buffers = self._run({key: node for key, node in wanted.items() if key not in whole})
        found: dict[str, dict[Node, Node]] = {}
        for name, nodes in of_name.items():
            found[name] = {}
            for node, key in nodes:
                if key in whole:
                    known = (("value", values[node]),)
                    found[name][node] = Node(GIVEN, (), known, node.shape, node.dtype, "small")
                    continue
                found[name][node] = in_memory(key, node.dtype, node.shape, memoryview(buffers[key].data)).tensor
        return found

    def _compute(self, roots: Mapping[str, Node]) -> dict[str, Tensor]:
        whole = {name: node for name, node in roots.items() if not node.is_source}
        buffers = self._run(whole)
        for name, node in roots.items():
            if node.is_source:  # shared as a whole, or a copy
                buffers[name] = np.empty(node.nbytes, np.uint8)
                self.reader.read_into(node, 0, buffers[name])
        made = {}
        for name, node in roots.items():
            tensor = torch.from_numpy(buffers.pop(name)).view(torch_dtype(node.dtype)).view(node.shape)
            to = self.dtype if tensor.is_floating_point() else None
            made[name] = tensor.to(self.device, to or tensor.dtype)
        return made

    def _values(self, whole: Mapping[str, Node]) -> dict[Node, Any]:
        """Return the values of nodes of whole tensors."""
        pieces = [Piece(name, node, backends.choose(node, self.device)) for name, node in whole.items()]
        if not pieces:
            return {}
        return execute(pieces, self.reader, None, device=self.device, workers=default_workers(), known=self.known)

    def _run(self, roots: Mapping[str, Node]) -> dict[str, NDArray[np.uint8]]:
        return computed(roots, self.reader, device=self.device, known=self.known)


def _common(roots: Sequence[Node]) -> list[Node]:
    """Return the nodes at which to cut the graphs of one tensor: common to several, and of its size.

    They are stored tensors, pruned deltas, and values of whole matrices.
    """
    distinct = list(dict.fromkeys(roots))
    if len(distinct) == 1:
        return distinct if len(roots) > 1 and not distinct[0].is_source else _reads(distinct[0])
    count: dict[Node, int] = {}
    for root in distinct:
        for node in depth_first(root):
            count[node] = count.get(node, 0) + 1
    found: dict[Node, None] = {}
    seen: set[Node] = set()
    pending = list(distinct)
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if count[node] > 1 and (node.is_source or node.kind == "whole" or _is_delta(node, distinct[0])):
            found[node] = None
        else:
            pending += node.operands
    return list(found)


def _reads(root: Node) -> list[Node]:
    return [node for node in depth_first(root) if node.is_source]


def _is_delta(node: Node, root: Node) -> bool:
    """Return whether a node is a pruned delta of the whole tensor, which is dear to make again."""
    return node.kind == "map" and node.function.startswith(PRUNING) and node.shape == root.shape


def _over(root: Node, cut: Mapping[Node, Node]) -> Node:
    """Return the graph of `root` with its cut nodes replaced."""
    made = dict(cut)
    for node in depth_first(root):
        if node in made:
            continue
        inputs = tuple(made[source] for source in node.operands)
        same = all(a is b for a, b in zip(inputs, node.operands, strict=True))
        made[node] = node if same else Node(node.function, inputs, node.parameters, node.shape, node.dtype, node.kind)
    return made[root]


def _bytes_of_nodes(nodes: Mapping[Node, Node]) -> int:
    return sum(nbytes_of(node.dtype, node.shape) for node in nodes.values())  # of a value of a matrix about
