"""One output tensor of a recipe as graph nodes: read, subtract, mask, rescale, combine, cast; and its stages."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError, RecipeError
from deltamerge.graph import Graph, Node
from deltamerge.graph import resolve as call
from deltamerge.inputs import Input
from deltamerge.io.checkpoint import TensorInfo
from deltamerge.methods import PRUNE
from deltamerge.parameters import lookup, resolve
from deltamerge.parts import Part
from deltamerge.prune.bits import Key, mask_key
from deltamerge.prune.della import check as check_della
from deltamerge.pruning import Pruning, effective_prune
from deltamerge.recipe import CalibratedQ, Recipe
from deltamerge.registry import MergeMethod
from deltamerge.stages import Pruned, Source, Spec, has_norm

SELECT = "deltamerge.prune.select"
MASKS = "deltamerge.prune.masks"
RESCALE = "deltamerge.prune.rescale"
SAMPLING = "deltamerge.prune.sampling"
PROTECT = "deltamerge.prune.protect"
STAGE = "deltamerge.calibrate.stage"
STAGES = "deltamerge.stages"


@dataclass(frozen=True, slots=True)
class Built:
    """The node of an output tensor and, for people, what it does and with which numbers, model by model."""

    root: Node
    method: str
    details: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Merge:
    """A tensor to merge: its name in the output, the part it belongs to, the position of its layer from 0 to 1, its
    sources, its dtype."""

    name: str
    part: Part
    position: float
    base: TensorInfo | None
    tunes: Sequence[tuple[Input, TensorInfo]]
    dtype: str


class Builder:
    """Makes the nodes of a recipe's tensors; holds what is the same for all of them.

    `prepare` comes before `merge`: what is calibrated depends on all tensors of a model. `stages` and `activations`
    are the stages' nodes by the model's index.
    """

    def __init__(self, recipe: Recipe, graph: Graph, folder: Path, device: str) -> None:
        self.recipe = recipe
        self.graph = graph
        self.folder = folder
        self.device = device
        self.prunes = [effective_prune(recipe, i) for i in range(len(recipe.models))]
        self.patterns = [_Patterns(prune) for prune in self.prunes]
        self.stages: dict[int, Node] = {}
        self.activations: dict[int, Node] = {}

    def prepare(self, merges: Sequence[Merge]) -> None:
        """Make the stages of the models whose q is calibrated or whose masks need activations."""
        for index, prune in enumerate(self.prunes):
            measured = prune.method == "wanda" or (prune.protect is not None and prune.protect.columns is None)
            calibrated = isinstance(prune.q, CalibratedQ)
            if not (measured or calibrated or prune.protect):
                continue
            pruned = [
                (m, tune, tensor, density)
                for m in merges
                for tune, tensor in m.tunes
                if tune.index == index and (density := self._density(m, tune)) not in (None, 1.0)
            ]
            self._find_columns(prune, [m.name for m, _, tensor, _ in pruned if has_norm(m.name, tensor.shape)])
            if not pruned or not (measured or calibrated):
                continue
            source = self._source(pruned[0][1], [(tensor, m.base) for m, _, tensor, _ in pruned if m.base], prune)
            if measured:
                self.activations[index] = self.graph.node(f"{STAGE}:activations", kind="small", source=source)
            if isinstance(prune.q, CalibratedQ):
                shared = (self.activations[index],) if index in self.activations else ()
                spec = self._spec(source, prune, prune.q, pruned, shared)
                self.stages[index] = self.graph.node(f"{STAGE}:calibrate", shared, kind="small", spec=spec)

    def _source(self, tune: Input, pairs: Sequence[tuple[TensorInfo, TensorInfo]], prune: Pruning) -> Source:
        calibration = self.recipe.calibration
        assert calibration is not None
        labelled = isinstance(prune.q, CalibratedQ) and (
            prune.q.objective == "validation" or calibration.metric is not None
        )
        checkpoint = tune.checkpoint
        return Source(
            tune.name,
            checkpoint.path,
            tuple(checkpoint.tensors.values()),
            tuple(pairs),
            calibration,
            self.folder,
            self.recipe.seed,
            self.device,
            labelled,
        )

    def _spec(
        self,
        source: Source,
        prune: Pruning,
        q: CalibratedQ,
        tensors: Sequence[tuple[Merge, Input, TensorInfo, float | None]],
        shared: tuple[Node, ...],
    ) -> Spec:
        """Further mask seeds, which only random masks have, are those of the recipe with its seed + 1, + 2 …"""
        random = PRUNE[prune.method].random
        seeds = source.calibration.seeds if random and q.objective == "output_change" and q.search != "gradient" else 1
        pruned = []
        for m, tune, tensor, density in tensors:
            assert m.base is not None
            assert density is not None
            masked = tuple(self._masked(m, m.base, tune, tensor, self.recipe.seed + s) for s in range(seeds))
            plain = density if random else 1.0
            pruned.append(Pruned(m.name, tensor.name, density, plain, masked, self._protected(m, tune, tensor)[0]))
        return Spec(source, tuple(pruned), random, q.objective, q.scope_or_default, q.search, q.limits, shared)

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

    def merge(self, merge: Merge) -> Built:
        """The merged tensor."""
        base, tunes, dtype = merge.base, merge.tunes, merge.dtype
        method = self.recipe.method
        deltas = base is not None and method.deltas
        values, texts = self._parameters(merge)
        if base is not None and deltas:
            pruned = [self._delta(merge, base, tune, tensor) for tune, tensor in tunes]
        else:
            pruned = [(self.read(tensor), "") for _, tensor in tunes]
        inputs = [node for node, _ in pruned] if base is None else [self.read(base), *(node for node, _ in pruned)]
        if len(inputs) - deltas == 1 and not pruned[0][1] and _takes_whole(method, values):
            return Built(self.copy(tunes[0][1], dtype), "copy", (tunes[0][0].name,))
        shape = tunes[0][1].shape
        if method.nodes is None:
            node = self._node(method.function, inputs, shape, **values)
        else:
            with errors.context(f"tensor {merge.name}"):
                node = call(method.nodes)(self.graph.node, method.function, inputs, shape, based=deltas, **values)
        details = tuple(
            f"{tune.name}{own}{text}" for (tune, _), own, (_, text) in zip(tunes, texts, pruned, strict=True)
        )
        return Built(self._cast(node, dtype), method.name, details)

    def _parameters(self, merge: Merge) -> tuple[dict[str, Any], list[str]]:
        """What the method's function is given for a tensor, and for people what of it is a model's own, by model."""
        values: dict[str, Any] = {}
        texts = [""] * len(merge.tunes)
        for name, param in self.recipe.method.parameters.items():
            if param.prunes:
                continue
            kind = {"number": float, "integer": int, "bool": bool}[param.kind]
            if param.per_model:
                own = tuple(kind(self._value(name, merge, tune)) for tune, _ in merge.tunes)
                texts = [f"{text} {name}={value:g}" for text, value in zip(texts, own, strict=True)]
                values[f"{name}s"] = own
            else:
                values["lambda_" if name == "lambda" else name] = kind(self._value(name, merge, None))
        return values, texts

    def _delta(self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo) -> tuple[Node, str]:
        """The pruned, rescaled delta of one fine-tune, and its description ("" if it is whole)."""
        assert tune.index is not None
        prune = self.prunes[tune.index]
        whole = self._whole(base, tensor)
        if prune.method == "none":
            return self._trimmed(merge, tune, whole)
        density = self._density(merge, tune)
        if density is None:
            return whole, ""
        if isinstance(prune.q, CalibratedQ):
            return self._calibrated(merge, base, tune, tensor, prune.q, density)
        q = None if prune.rescale else _number(prune.q, merge)
        q = density if q is None else q
        if density == 1 and (q == 1 or prune.rescale):
            return whole, ""
        node = self._masked(merge, base, tune, tensor, self.recipe.seed)
        if prune.rescale and prune.method == "della":
            node = self._node(node.function, node.inputs, base.shape, **dict(node.parameters), weighted=False)
        if prune.rescale:
            columns, _ = self._protected(merge, tune, tensor)
            node = self._matched(self._cleared(whole, columns), node, prune.rescale)
            text = f" {prune.method} density={density:g} {prune.rescale}"
            return self._restored(merge, base, tune, tensor, node, text)
        text = f" {prune.method} density={density:g} q={q:g}"
        if q != 1:
            value = self.graph.node(f"{RESCALE}:constant", kind="small", value=q)
            node = self._node(f"{RESCALE}:divide", [node, value], base.shape)
        return self._restored(merge, base, tune, tensor, node, text)

    def _calibrated(
        self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo, q: CalibratedQ, density: float
    ) -> tuple[Node, str]:
        """The masked delta over what the model's stage chose for this tensor."""
        assert tune.index is not None
        if density == 1:
            return self._whole(base, tensor), ""
        node = self._masked(merge, base, tune, tensor, self.recipe.seed)
        value = self.graph.node(f"{STAGES}:pick", [self.stages[tune.index]], kind="small", name=merge.name)
        divide = "divide_rows" if q.scope_or_default == "row" else "divide"
        text = f" {self.prunes[tune.index].method} density={density:g} q={q.objective}"
        node = self._node(f"{RESCALE}:{divide}", [node, value], base.shape)
        return self._restored(merge, base, tune, tensor, node, text)

    def _protected(self, merge: Merge, tune: Input, tensor: TensorInfo) -> tuple[Node | None, int]:
        """The node of a linear weight's protected columns, and how many they are at most; None where there are none."""
        assert tune.index is not None
        protect = self.prunes[tune.index].protect
        if protect is None or not has_norm(merge.name, tensor.shape):
            return None, 0
        width = tensor.shape[-1]
        if protect.massive_activations is not None:
            k = min(protect.massive_activations, width)
            measured = [self.activations[tune.index]]
            return self.graph.node(f"{STAGES}:massive", measured, kind="small", name=tensor.name, k=k), k
        numbers: set[int] = set()
        for pattern, some in (protect.columns or {}).items():
            if re.search(pattern, merge.name):
                numbers.update(some)
        if not numbers:
            return None, 0
        if max(numbers) >= width:
            raise InputError(f"prune.protect.columns: {merge.name} has {width} columns, {max(numbers)} is none of them")
        return self.graph.node(f"{STAGES}:columns", kind="small", numbers=tuple(sorted(numbers))), len(numbers)

    def _find_columns(self, prune: Pruning, linear: Sequence[str]) -> None:
        """InputError: a pattern of protected columns that no pruned linear weight matches."""
        for pattern in (prune.protect and prune.protect.columns) or {}:
            if not any(re.search(pattern, name) for name in linear):
                raise InputError(f"prune.protect.columns: {pattern!r} finds no pruned weight of a linear layer")

    def _cleared(self, delta: Node, columns: Node | None) -> Node:
        return delta if columns is None else self._node(f"{PROTECT}:clear", [delta, columns], delta.shape)

    def _restored(
        self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo, kept: Node, text: str
    ) -> tuple[Node, str]:
        """The kept delta with its protected columns, and its description."""
        columns, count = self._protected(merge, tune, tensor)
        if columns is None:
            return kept, text
        inputs = [kept, self.read(tensor), self.read(base), columns]
        return self._node(f"{PROTECT}:restore", inputs, base.shape), f"{text} protect={count}"

    def _whole(self, base: TensorInfo, tensor: TensorInfo) -> Node:
        pair = [self.read(tensor), self.read(base)]
        return self._node("deltamerge.ops:subtract", pair, base.shape, dtypes=(tensor.dtype, base.dtype))

    def _density(self, merge: Merge, tune: Input) -> float | None:
        """The density of a tensor's mask, None if it is not pruned."""
        assert tune.index is not None
        prune = self.prunes[tune.index]
        if prune.method == "none" or not self.patterns[tune.index].prunes(merge.name):
            return None
        a, b = (_number(value, merge) for value in (prune.a, prune.b))
        return a * b if a is not None and b is not None else _number(prune.density, merge)

    def _masked(self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo, seed: int) -> Node:
        """mask ∘ Δ, not rescaled, without protected columns, which no density counts; the seed keys random masks."""
        assert tune.index is not None
        prune, shape = self.prunes[tune.index], base.shape
        density = self._density(merge, tune)
        assert density is not None
        key = mask_key(seed, tune.name, merge.name)
        columns, count = self._protected(merge, tune, tensor)
        whole, pair = self._cleared(self._whole(base, tensor), columns), [self.read(tensor), self.read(base)]
        if prune.method == "dare" and prune.sampling == "uniform":
            return self._cleared(self._node(f"{MASKS}:dare", pair, shape, key=key, density=density), columns)
        if prune.method in ("breadcrumbs", "magnitude_outliers"):
            return self._between(whole, density, _number(prune.gamma, merge) or 0.0)
        if prune.method == "structured":
            a, b = (_number(value, merge) for value in (prune.a, prune.b))
            return self._cleared(self._node(f"{MASKS}:structured", pair, shape, key=key, a=a, b=b), columns)
        if count:
            density *= 1 - count / shape[-1]
        if prune.sampling == "magnitude":
            return self._cleared(self._sampled(whole, pair, key, density), columns)
        if prune.method == "wanda" and has_norm(merge.name, shape):
            norms = self.graph.node(
                f"{STAGES}:norm",
                [self.activations[tune.index]],
                kind="small",
                name=tensor.name,
                columns=shape[-1],
            )
            return self._node(f"{SELECT}:keep_largest_rows_scored", [whole, norms], shape, density=density)
        if prune.method == "magnitude" and prune.group == "row" and len(shape) > 1:
            return self._node(f"{SELECT}:keep_largest_rows", [whole], shape, density=density)
        if prune.method not in ("magnitude", "wanda"):
            return self._by_function(prune, merge, whole, key, density)
        return self._largest(whole, round(density * math.prod(shape)))

    def _by_function(self, prune: Pruning, merge: Merge, whole: Node, key: Key, density: float) -> Node:
        """The mask of a method that is one function of a tile, with the parameters that it declares."""
        method = PRUNE[prune.method]
        assert method.function is not None
        given: dict[str, Any] = {"density": density} | ({"key": key} if method.random else {})
        for name in method.parameters.keys() - {"density", "q"}:
            given[name] = _number(getattr(prune, name), merge)
        if prune.method == "della":
            with errors.context(f"tensor {merge.name}"):
                check_della(density, given["epsilon"])
        return self._node(method.function, [whole], whole.shape, **given)

    def _sampled(self, whole: Node, pair: Sequence[Node], key: Key, density: float) -> Node:
        """Importance sampling: two passes find c, a third draws."""
        make, shape = self.graph.node, whole.shape
        expected = density * math.prod(shape)
        sums = make(f"{SAMPLING}:sums", [whole], kind="sum", shape=shape)
        clip = make(f"{SAMPLING}:pick_clip", [sums], kind="small", expected=expected)
        inside = make(f"{SAMPLING}:clip_bin", [clip], kind="small")
        low = make(f"{SELECT}:low_histogram", [whole, inside], kind="sum", shape=shape)
        c = make(f"{SAMPLING}:factor", [low, clip], kind="small", expected=expected)
        return self._node(f"{SAMPLING}:sampled", [*pair, c], shape, key=key, density=density)

    def _trimmed(self, merge: Merge, tune: Input, whole: Node) -> tuple[Node, str]:
        """The int(density · n) largest entries, at least 1, where the merge method has a density of its own (ties)."""
        method = self.recipe.method
        if "density" not in method.parameters or method.implies_prune:
            return whole, ""
        density = float(self._value("density", merge, tune))
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
        return self._node(f"{SELECT}:keep_largest", [delta, *self._cut(delta, k)], delta.shape)

    def _between(self, delta: Node, density: float, gamma: float) -> Node:
        """The int(density · n) magnitudes of Δ that follow its int(γ · n) largest; γ yields where both exceed n."""
        size = math.prod(delta.shape)
        kept = int(density * size)
        top = min(int(gamma * size), size - kept)
        if not top:
            return self._largest(delta, kept)
        cuts = [*self._cut(delta, top + kept), *self._cut(delta, top)]
        return self._node(f"{SELECT}:keep_between", [delta, *cuts], delta.shape)

    def _cut(self, delta: Node, k: int) -> tuple[Node, Node]:
        """Where the k largest magnitudes end: the cut, and the ranks of those equal to it."""
        make = self.graph.node
        if k == 0:
            return make(f"{SELECT}:nothing", kind="small"), make(f"{SELECT}:no_ranks", kind="small")
        high = make(f"{SELECT}:high_histogram", [delta], kind="sum", shape=delta.shape)
        found = make(f"{SELECT}:pick_bin", [high], kind="small", k=k)
        low = make(f"{SELECT}:low_histogram", [delta, found], kind="sum", shape=delta.shape)
        cut = make(f"{SELECT}:pick_cut", [low, found], kind="small")
        equal = make(f"{SELECT}:equal_counts", [delta, cut], kind="concat", shape=delta.shape)
        return cut, make(f"{SELECT}:pick_ranks", [equal], kind="small")

    def _value(self, key: str, merge: Merge, tune: Input | None) -> Any:
        levels = list(merge.part.levels)
        if tune is not None and tune.index is not None:
            levels.insert(0, self.recipe.models[tune.index].parameters)
        default = self.recipe.method.parameters[key].default_for(len(merge.tunes))
        value = lookup(key, merge.name, merge.position, *levels, default=default)
        if value is None:
            model = () if tune is None or tune.index is None else ("models", tune.index)
            hint = "end the list with a value without a filter"
            problem = self.recipe.problem((*model, "parameters", key), f"no filter matches {merge.name}", hint)
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


def _takes_whole(method: MergeMethod, values: dict[str, Any]) -> bool:
    """Whether a single model that was not pruned comes out as it is."""
    combine = method.function.rpartition(":")[2]
    if combine in ("multislerp", "karcher"):
        return True
    if combine == "passthrough":
        return bool(values["scales"] == (1.0,))
    weighted = combine in ("task_arithmetic", "ties") and values["lambda_"] == 1
    return weighted and (values["normalize"] or values["weights"] == (1.0,))


def _number(value: Any, merge: Merge) -> float | None:
    found = None if value is None else resolve(value, merge.name, merge.position)
    return None if found is None else float(found)
