"""One output tensor of a recipe as graph nodes: read, subtract, mask, rescale, combine, cast."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltamerge.errors import RecipeError
from deltamerge.graph import Graph, Node
from deltamerge.inputs import Input
from deltamerge.io.checkpoint import TensorInfo
from deltamerge.parameters import lookup, resolve
from deltamerge.prune.bits import mask_key
from deltamerge.pruning import Pruning, effective_prune
from deltamerge.recipe import Recipe

SELECT = "deltamerge.prune.select"
MASKS = "deltamerge.prune.masks"
RESCALE = "deltamerge.prune.rescale"


@dataclass(frozen=True, slots=True)
class Built:
    """The node of an output tensor and, for people, what it does and with which numbers, model by model."""

    root: Node
    method: str
    details: tuple[str, ...]


class Builder:
    """Makes the nodes of a recipe's tensors; holds what is the same for all of them."""

    def __init__(self, recipe: Recipe, graph: Graph) -> None:
        self.recipe = recipe
        self.graph = graph
        self.prunes = [effective_prune(recipe, i) for i in range(len(recipe.models))]
        self.patterns = [_Patterns(prune) for prune in self.prunes]

    def read(self, tensor: TensorInfo) -> Node:
        return self.graph.node(
            "deltamerge.io.checkpoint:read",
            kind="read",
            shape=tensor.shape,
            dtype=tensor.dtype,
            tensor=tensor,
        )

    def copy(self, tensor: TensorInfo, dtype: str) -> Node:
        """The stored tensor, cast only if its dtype differs."""
        return self._cast(self.read(tensor), dtype)

    def merge(
        self,
        name: str,
        position: float,
        base: TensorInfo | None,
        tunes: Sequence[tuple[Input, TensorInfo]],
        dtype: str,
    ) -> Built:
        """The merged tensor; `name` is its name in the output, `position` that of its layer, from 0 to 1."""
        method = self.recipe.method
        combine = method.function.rpartition(":")[2]
        if combine == "passthrough":
            tune, tensor = tunes[0]
            scale = float(self._value("scale", name, position, tune))
            if scale == 1:
                return Built(self.copy(tensor, dtype), "copy", (tune.name,))
            node = self._node(method.function, [self.read(tensor)], tensor.shape, scale=scale)
            return Built(self._cast(node, dtype), "passthrough", (f"{tune.name} scale={scale:g}",))
        weights = tuple(float(self._value("weight", name, position, tune)) for tune, _ in tunes)
        normalize = bool(self._value("normalize", name, position, None))
        if combine == "linear":
            nodes = [self.read(tensor) for _, tensor in tunes]
            node = self._node(method.function, nodes, nodes[0].shape, weights=weights, normalize=normalize)
            details = tuple(f"{tune.name} weight={w:g}" for (tune, _), w in zip(tunes, weights, strict=True))
            return Built(self._cast(node, dtype), "linear", details)
        assert base is not None
        lambda_ = float(self._value("lambda", name, position, None))
        pruned = [self._delta(name, position, base, tune, tensor) for tune, tensor in tunes]
        details = tuple(
            f"{tune.name} weight={w:g}{text}" for (tune, _), w, (_, text) in zip(tunes, weights, pruned, strict=True)
        )
        whole = len(tunes) == 1 and lambda_ == 1 and (normalize or weights[0] == 1)
        if whole and not pruned[0][1]:
            return Built(self.copy(tunes[0][1], dtype), "copy", (tunes[0][0].name,))
        inputs = [self.read(base), *(node for node, _ in pruned)]
        node = self._node(method.function, inputs, base.shape, weights=weights, normalize=normalize, lambda_=lambda_)
        return Built(self._cast(node, dtype), method.name, details)

    def _delta(self, name: str, position: float, base: TensorInfo, tune: Input, tensor: TensorInfo) -> tuple[Node, str]:
        """The pruned, rescaled delta of one fine-tune, and its description ("" if it is whole)."""
        assert tune.index is not None
        prune = self.prunes[tune.index]
        shape = base.shape
        pair = [self.read(tensor), self.read(base)]
        whole = self._node("deltamerge.ops:subtract", pair, shape, dtypes=(tensor.dtype, base.dtype))
        if prune.method == "none":
            return self._trimmed(name, position, tune, whole)
        a, b = (_number(value, name, position) for value in (prune.a, prune.b))
        density = a * b if a is not None and b is not None else _number(prune.density, name, position)
        if density is None or not self.patterns[tune.index].prunes(name):
            return whole, ""
        q = None if prune.rescale else _number(prune.q, name, position)
        q = density if q is None else q
        if density == 1 and (q == 1 or prune.rescale):
            return whole, ""
        key = mask_key(self.recipe.seed, tune.name, name)
        if prune.method == "dare":
            node = self._node(f"{MASKS}:dare", pair, shape, key=key, density=density)
        elif prune.method == "structured":
            node = self._node(f"{MASKS}:structured", pair, shape, key=key, a=a, b=b)
        elif prune.group == "row" and len(shape) > 1:
            node = self._node(f"{SELECT}:keep_largest_rows", [whole], shape, density=density)
        else:
            node = self._largest(whole, round(density * math.prod(shape)))
        if prune.rescale:
            return self._matched(whole, node, prune.rescale), f" {prune.method} density={density:g} {prune.rescale}"
        text = f" {prune.method} density={density:g} q={q:g}"
        if q == 1:
            return node, text
        value = self.graph.node(f"{RESCALE}:constant", kind="small", value=q)
        return self._node(f"{RESCALE}:divide", [node, value], shape), text

    def _trimmed(self, name: str, position: float, tune: Input, whole: Node) -> tuple[Node, str]:
        """The int(density · n) largest entries, at least 1, where the merge method has a density of its own (ties)."""
        method = self.recipe.method
        if "density" not in method.parameters or method.implies_prune:
            return whole, ""
        density = float(self._value("density", name, position, tune))
        if density >= 1:
            return whole, ""
        return self._largest(whole, max(1, int(density * math.prod(whole.shape)))), f" density={density:g}"

    def _matched(self, whole: Node, kept: Node, norm: str) -> Node:
        """mergekit's rescaling: kept · ‖Δ‖ / ‖kept‖, as a division by ‖kept‖ / ‖Δ‖."""
        norms = [
            self.graph.node(f"{RESCALE}:norm", [node], kind="concat", shape=node.shape, norm=norm)
            for node in (kept, whole)
        ]
        ratio = self.graph.node(f"{RESCALE}:ratio", norms, kind="small", norm=norm)
        return self._node(f"{RESCALE}:divide", [kept, ratio], whole.shape)

    def _largest(self, delta: Node, k: int) -> Node:
        """Δ with only its k largest magnitudes: two or three passes over the tensor, then the mask."""
        if k >= math.prod(delta.shape):
            return delta
        make = self.graph.node
        if k == 0:
            cut = make(f"{SELECT}:nothing", kind="small")
            ranks = make(f"{SELECT}:no_ranks", kind="small")
            return self._node(f"{SELECT}:keep_largest", [delta, cut, ranks], delta.shape)
        high = make(f"{SELECT}:high_histogram", [delta], kind="sum", shape=delta.shape)
        found = make(f"{SELECT}:pick_bin", [high], kind="small", k=k)
        low = make(f"{SELECT}:low_histogram", [delta, found], kind="sum", shape=delta.shape)
        cut = make(f"{SELECT}:pick_cut", [low, found], kind="small")
        equal = make(f"{SELECT}:equal_counts", [delta, cut], kind="concat", shape=delta.shape)
        ranks = make(f"{SELECT}:pick_ranks", [equal], kind="small")
        return self._node(f"{SELECT}:keep_largest", [delta, cut, ranks], delta.shape)

    def _value(self, key: str, name: str, position: float, tune: Input | None) -> Any:
        levels = [self.recipe.parameters]
        if tune is not None and tune.index is not None:
            levels.insert(0, self.recipe.models[tune.index].parameters)
        default = self.recipe.method.parameters[key].default_for(len(self.recipe.fine_tunes))
        value = lookup(key, name, position, *levels, default=default)
        if value is None:
            model = () if tune is None or tune.index is None else ("models", tune.index)
            hint = "end the list with a value without a filter"
            problem = self.recipe.problem((*model, "parameters", key), f"no filter matches {name}", hint)
            raise RecipeError(self.recipe.source.path, [problem])
        return value

    def _node(self, function: str, inputs: Sequence[Node], shape: tuple[int, ...], **parameters: Any) -> Node:
        return self.graph.node(function, inputs, shape=shape, **parameters)

    def _cast(self, node: Node, dtype: str) -> Node:
        if node.kind == "read" and node.dtype == dtype:
            return node
        return self.graph.node("deltamerge.ops:cast", [node], shape=node.shape, dtype=dtype, to=dtype)


class _Patterns:
    """Which tensors a model's include and exclude lists prune."""

    def __init__(self, prune: Pruning) -> None:
        self.include = None if prune.include is None else [re.compile(p) for p in prune.include]
        self.exclude = [re.compile(p) for p in prune.exclude]

    def prunes(self, name: str) -> bool:
        if self.include is not None and not any(p.search(name) for p in self.include):
            return False
        return not any(p.search(name) for p in self.exclude)


def _number(value: Any, name: str, position: float) -> float | None:
    found = None if value is None else resolve(value, name, position)
    return None if found is None else float(found)
