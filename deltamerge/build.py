"""One output tensor of a recipe as graph nodes: read, subtract, mask, rescale, combine, cast; and its stages."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from deltamerge import errors, nodes
from deltamerge.errors import InputError, RecipeError
from deltamerge.graph import Graph, Node
from deltamerge.graph import resolve as call
from deltamerge.inputs import Input
from deltamerge.io.checkpoint import TensorInfo, added
from deltamerge.io.encodings import uniform_density
from deltamerge.io.gathered import Gathered
from deltamerge.lora import factor_pairs, factor_roots, factor_spec, refuse_changed_config
from deltamerge.methods import PRUNE
from deltamerge.parameters import lookup, resolve
from deltamerge.parts import Part
from deltamerge.pruners.bits import Key, mask_key
from deltamerge.pruners.della import check as check_della
from deltamerge.pruning import Pruning, effective_prune
from deltamerge.recipe import CalibratedQ, Recipe
from deltamerge.registry import MergeMethod
from deltamerge.stages import Part as StagePart
from deltamerge.stages import Pruned, Source, Spec, has_norm, is_transposed, mask_seeds, within
from deltamerge.tensors import ITEMSIZE, VALUE_BITS

SELECT = "deltamerge.pruners.select"
MASKS = "deltamerge.pruners.masks"
RESCALE = "deltamerge.pruners.rescale"
PROTECT = "deltamerge.pruners.protect"
STAGE = "deltamerge.calibrate.stage"
TOGETHER = "deltamerge.calibrate.together"
STAGES = "deltamerge.stages"
THRESHOLD = "deltamerge.threshold"
KINDS: Mapping[str, Callable[[Any], Any]] = MappingProxyType({"number": float, "integer": int, "bool": bool})


@dataclass(frozen=True, slots=True)
class Built:
    """The node of an output tensor and, for people, what it does and with which numbers, model by model.

    `delta` makes the float32 values that an artifact adds to the base, where one is asked for; `changed` is the
    expected fraction of entries that differ from the base's, 1 where nothing is known.
    """

    root: Node
    method: str
    details: tuple[str, ...]
    delta: Node | None = None
    changed: float = 1.0


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

    def __init__(
        self,
        recipe: Recipe,
        graph: Graph,
        folder: Path,
        device: str,
        memory: int | None = None,
        densities: Mapping[str, float] | None = None,
    ) -> None:
        self.recipe = recipe
        self.graph = graph
        self.folder = folder
        self.device = device
        self.memory = memory
        self.prunes = [effective_prune(recipe, i) for i in range(len(recipe.models))]
        self.patterns = [_Patterns(prune) for prune in self.prunes]
        self.stages: dict[int, Node] = {}
        self.activations: dict[int, Node] = {}
        self.densities = densities
        self.budgeted: list[tuple[Merge, TensorInfo]] = []
        self.cuts: dict[int, Node] = {}
        self.whole_merge = recipe.calibration is not None and recipe.calibration.per == "merge"
        self.together: Node | None = None  # the stage of a merge that is calibrated as a whole
        self.roots: dict[str, tuple[str, int]] = {}

    def prepare(self, merges: Sequence[Merge]) -> None:
        """Make the stages of the models whose q is calibrated or whose masks need activations; share out a budget."""
        self._share(merges)
        for index, prune in enumerate(self.prunes):
            measured = prune.method == "wanda" or (prune.protect is not None and prune.protect.columns is None)
            calibrated = isinstance(prune.q, CalibratedQ) and not self.whole_merge
            if not (measured or calibrated or prune.protect or prune.group == "model"):
                continue
            pruned = [
                (m, tune, tensor, density)
                for m in merges
                for tune, tensor in m.tunes
                if tune.index == index and (density := self._density(m, tune)) not in (None, 1.0)
            ]
            self._find_columns(prune, [m.name for m, _, tensor, _ in pruned if has_norm(m.name, tensor.shape)])
            if pruned and prune.group == "model":
                if prune.protect:
                    raise InputError("prune.protect: does not go with group: model yet", hint="group: tensor")
                self.cuts[index] = self._cut(pruned)
            if not pruned or not (measured or calibrated):
                continue
            hint = "leave it out, prune: {exclude: [embed, lm_head]}, or use dare or magnitude with a number q"
            _refuse_gathered([(m, tensor) for m, _, tensor, _ in pruned], hint)
            products = factor_pairs(self.recipe, pruned)
            if products and isinstance(prune.q, CalibratedQ):
                source = self._source(products[0].tune, [(p.weight, p.update.base) for p in products], prune)
                spec = factor_spec(self.graph, products, source, prune, prune.q, self._masked, self.read)
                self.stages[index] = self.graph.node(f"{STAGE}:calibrate", kind="small", spec=spec)
                self.roots |= factor_roots(products)
                continue
            source = self._source(pruned[0][1], [(tensor, m.base) for m, _, tensor, _ in pruned if m.base], prune)
            if measured:
                self.activations[index] = self.graph.node(f"{STAGE}:activations", kind="small", source=source)
            if isinstance(prune.q, CalibratedQ) and calibrated:
                shared = tuple(made[index] for made in (self.activations, self.cuts) if index in made)
                spec = self._spec(source, prune, prune.q, pruned, shared)
                self.stages[index] = self.graph.node(f"{STAGE}:calibrate", shared, kind="small", spec=spec)

        if self.whole_merge:
            self.together = self._together([m for m in merges if m.base is not None])

    def _together(self, merges: Sequence[Merge]) -> Node:
        """The stage that finds the λ of the merge: the delta that every fine-tune would get, of each mask seed."""
        _refuse_gathered([(m, tensor) for m in merges for _, tensor in m.tunes], "calibrate per: model")
        searched = [p.q for p in self.prunes if isinstance(p.q, CalibratedQ)]
        objective = searched[0].objective if searched else "output_change"
        calibration = self.recipe.calibration
        assert calibration is not None
        random = any(p.method in PRUNE and PRUNE[p.method].random for p in self.prunes)
        seeds = calibration.seeds if random and objective == "output_change" else 1
        deltas = {m.name: tuple(self._merged_delta(m, self.recipe.seed + s) for s in range(seeds)) for m in merges}
        tunes = [tune for tune, _ in merges[0].tunes]
        parts = []
        for i, tune in enumerate(tunes):
            pairs = [(m.tunes[i][1], m.base) for m in merges if m.base]
            assert tune.index is not None
            source = self._source(tune, pairs, self.prunes[tune.index], share=len(tunes))
            pruned = tuple(Pruned(m.name, m.tunes[i][1].name, 1.0, 1.0, deltas[m.name]) for m in merges)
            parts.append(StagePart(source, pruned))
        low, high = 1.0, 1.0  # of the factor of λ
        for m in merges:
            for tune, _ in m.tunes:
                density = self._density(m, tune) or 1.0
                plain = self._plain_q(m, tune, density)
                low, high = min(low, plain), max(high, plain / density)
        shared = (*self.activations.values(), *self.cuts.values())
        spec = Spec(
            parts[0].source,
            self.recipe.method.name,
            parts[0].pruned,
            random,
            objective,
            "global",
            "auto",
            (low / 4.0, high * 2.0),
            shared,
            tuple(parts),
        )
        return self.graph.node(f"{TOGETHER}:calibrate", shared, kind="small", spec=spec)

    def _merged_delta(self, m: Merge, seed: int) -> Node:
        """What the merge adds to the base, in float32."""
        assert m.base is not None
        inputs = [self.read(m.base), *(self._delta(m, m.base, tune, tensor, seed)[0] for tune, tensor in m.tunes)]
        shape = m.base.shape
        merged = self._combined(m, inputs, self._parameters(m)[0])
        pair = [self._cast(merged, "F32"), self.read(m.base)]
        return self._node("deltamerge.ops:subtract", pair, shape, dtypes=("F32", m.base.dtype))

    def _cut(self, pruned: Sequence[tuple[Merge, Input, TensorInfo, float | None]]) -> Node:
        """The one threshold of a model: as many entries as the tensors' densities add up to."""
        whole = [(m.name, self._whole(m.base, tensor), density) for m, _, tensor, density in pruned if m.base]
        k = sum(round((density or 0.0) * math.prod(node.shape)) for _, node, density in whole)
        deltas = tuple((name, node) for name, node, _ in whole)
        return self.graph.node(f"{THRESHOLD}:model_cut", kind="small", deltas=deltas, k=k, device=self.device)

    def _share(self, merges: Sequence[Merge]) -> None:
        """Find the tensors that a budget is for; until their densities are known, one for all that would about fit."""
        self.budgeted = [
            (m, tensor)
            for m in merges
            for tune, tensor in m.tunes
            if tune.index is not None
            and self.prunes[tune.index].budget is not None
            and self.patterns[tune.index].prunes(m.name)
        ]
        if self.densities is None and self.budgeted:
            budget = next(prune.budget for prune in self.prunes if prune.budget is not None)
            size = sum(math.prod(m.base.shape) for m, _ in self.budgeted if m.base)
            output = self.recipe.output
            bits = VALUE_BITS[output.values or "bfloat16"] if output.adds else 8 * ITEMSIZE[self.budgeted[0][0].dtype]
            density = uniform_density(8 * budget / size, bits) if size else 1.0
            self.densities = {m.name: density for m, _ in self.budgeted}

    def _source(
        self, tune: Input, pairs: Sequence[tuple[TensorInfo, TensorInfo]], prune: Pruning, share: int = 1
    ) -> Source:
        calibration = self.recipe.calibration
        assert calibration is not None
        labelled = isinstance(prune.q, CalibratedQ) and (
            prune.q.objective == "validation" or calibration.metric is not None
        )
        checkpoint = tune.checkpoint
        refuse_changed_config(tune)
        source = Source(
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
        return within(source, self.memory, share)

    def _spec(
        self,
        source: Source,
        prune: Pruning,
        q: CalibratedQ,
        tensors: Sequence[tuple[Merge, Input, TensorInfo, float | None]],
        shared: tuple[Node, ...],
    ) -> Spec:
        random = PRUNE[prune.method].random
        seeds = mask_seeds(source, prune.method, q)
        pruned = []
        for m, tune, tensor, density in tensors:
            assert m.base is not None
            assert density is not None
            masked = tuple(self._masked(m, m.base, tune, tensor, self.recipe.seed + s) for s in range(seeds))
            plain = density if random else 1.0
            pruned.append(Pruned(m.name, tensor.name, density, plain, masked, self._protected(m, tune, tensor)[0]))
        return Spec(
            source, prune.method, tuple(pruned), random, q.objective, q.scope_or_default, q.search, q.limits, shared
        )

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
            pruned = [self._delta(merge, base, tune, tensor, self.recipe.seed) for tune, tensor in tunes]
        else:
            pruned = [(self.read(tensor), "") for _, tensor in tunes]
        if self.together is not None and base is not None:
            q = self.graph.node(f"{STAGES}:pick", [self.together], kind="small", name=merge.name)
            pruned = [
                (self._node(f"{RESCALE}:divide", [node, q], base.shape), f"{text} lambda calibrated")
                for node, text in pruned
            ]
        inputs = [node for node, _ in pruned] if base is None else [self.read(base), *(node for node, _ in pruned)]
        details = tuple(
            f"{tune.name}{own}{text}" for (tune, _), own, (_, text) in zip(tunes, texts, pruned, strict=True)
        )
        changed = 1 - math.prod(1 - self._kept(merge, tune) for tune, _ in tunes)
        delta = None
        if self.recipe.output.adds and base is not None and not self._left_whole(merge):
            if method.adds:
                zeros = self._node("deltamerge.ops:zeros", inputs[1:2], base.shape)
                delta = self._cast(self._combined(merge, [zeros, *inputs[1:]], values), "F32")
            else:
                pair = [self._cast(self._combined(merge, inputs, values), "F32"), inputs[0]]
                delta = self._node("deltamerge.ops:subtract", pair, base.shape, dtypes=("F32", base.dtype))
        if len(inputs) - deltas == 1 and not pruned[0][1] and _takes_whole(method, values):
            return Built(self.copy(tunes[0][1], dtype), "copy", (tunes[0][0].name,), delta, changed)
        return Built(self._cast(self._combined(merge, inputs, values), dtype), method.name, details, delta, changed)

    def _combined(self, merge: Merge, inputs: Sequence[Node], values: dict[str, Any]) -> Node:
        """The method's result in float32, of the base where it stands apart and of the models or their deltas."""
        method, shape = self.recipe.method, merge.tunes[0][1].shape
        if method.nodes is None:
            return self._node(method.function, inputs, shape, **values)
        with errors.context(f"tensor {merge.name}"):
            based = merge.base is not None and method.deltas
            node: Node = call(method.nodes)(self.graph.node, method.function, inputs, shape, based=based, **values)
            return node

    def _left_whole(self, merge: Merge) -> bool:
        """Whether pruning leaves this tensor whole in every model, though it was asked for: it is stored exactly."""
        return all(self._density(merge, tune) is None and self._prune_of(tune) != "none" for tune, _ in merge.tunes)

    def _prune_of(self, tune: Input) -> str:
        assert tune.index is not None
        return self.prunes[tune.index].method

    def _kept(self, merge: Merge, tune: Input) -> float:
        """The fraction of a delta's entries that pruning or the merge method keeps."""
        density = self._density(merge, tune)
        if density is None and "density" in (method := self.recipe.method).parameters and not method.implies_prune:
            density = float(self._value("density", merge, tune))
        return 1.0 if density is None else min(1.0, density)

    def _parameters(self, merge: Merge) -> tuple[dict[str, Any], list[str]]:
        """What the method's function is given for a tensor, and for people what of it is a model's own, by model."""
        values: dict[str, Any] = {}
        texts = [""] * len(merge.tunes)
        for name, param in self.recipe.method.parameters.items():
            if param.prunes:
                continue
            kind = KINDS[param.kind]
            if param.per_model:
                own = tuple(kind(self._value(name, merge, tune)) for tune, _ in merge.tunes)
                texts = [f"{text} {name}={value:g}" for text, value in zip(texts, own, strict=True)]
                values[f"{name}s"] = own
            else:
                values["lambda_" if name == "lambda" else name] = kind(self._value(name, merge, None))
        return values, texts

    def _delta(self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo, seed: int) -> tuple[Node, str]:
        """The pruned, rescaled delta of one fine-tune, and its description ("" if it is whole)."""
        assert tune.index is not None
        prune = self.prunes[tune.index]
        whole = self._whole(base, tensor)
        if prune.method == "none":
            return self._trimmed(merge, tune, whole)
        density = self._density(merge, tune)
        if density is None:
            return whole, ""
        if isinstance(prune.q, CalibratedQ) and not self.whole_merge:
            return self._calibrated(merge, base, tune, tensor, prune.q, density)
        q = self._plain_q(merge, tune, density)
        if density == 1 and (q == 1 or prune.rescale):
            return whole, ""
        node = self._masked(merge, base, tune, tensor, seed)
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

    def _plain_q(self, merge: Merge, tune: Input, density: float) -> float:
        """The q of a tensor whose own is not calibrated: the recipe's number, or the method's."""
        assert tune.index is not None
        prune = self.prunes[tune.index]
        if isinstance(prune.q, CalibratedQ):
            return density if PRUNE[prune.method].random else 1.0
        q = None if prune.rescale else _number(prune.q, merge)
        return density if q is None else q

    def _calibrated(
        self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo, q: CalibratedQ, density: float
    ) -> tuple[Node, str]:
        """The masked delta over what the model's stage chose for this tensor."""
        assert tune.index is not None
        if density == 1:
            return self._whole(base, tensor), ""
        node = self._masked(merge, base, tune, tensor, self.recipe.seed)
        name, root = self.roots.get(merge.name, (merge.name, 1))
        value = self.graph.node(f"{STAGES}:pick", [self.stages[tune.index]], kind="small", name=name, root=root)
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
        inputs = [kept, *self._pair(base, tensor), columns]
        return self._node(f"{PROTECT}:restore", inputs, base.shape), f"{text} protect={count}"

    def _whole(self, base: TensorInfo, tensor: TensorInfo) -> Node:
        pair = self._pair(base, tensor)
        if pair[1].kind != "read":
            return pair[0]
        return self._node("deltamerge.ops:subtract", pair, base.shape, dtypes=(tensor.dtype, base.dtype))

    def _pair(self, base: TensorInfo, tensor: TensorInfo) -> list[Node]:
        """What a delta is the difference of: fine-tune and base, or values that a delta artifact adds and zeros."""
        values = added(tensor)
        if values is None:
            return [self.read(tensor), self.read(base)]
        node = self.read(values)
        return [node, self._node("deltamerge.ops:zeros", [node], base.shape)]

    def _density(self, merge: Merge, tune: Input) -> float | None:
        """The density of a tensor's mask, None if it is not pruned."""
        assert tune.index is not None
        prune = self.prunes[tune.index]
        if prune.method == "none" or not self.patterns[tune.index].prunes(merge.name):
            return None
        if prune.budget is not None:
            assert self.densities is not None
            return self.densities[merge.name]
        if prune.method == "structured":
            a, b = (_number(prune.parameters[side], merge) for side in "ab")
            if a is not None and b is not None:
                return a * b
        return _number(prune.density, merge)

    def _masked(self, merge: Merge, base: TensorInfo, tune: Input, tensor: TensorInfo, seed: int) -> Node:
        """mask ∘ Δ, not rescaled, without protected columns, which no density counts; the seed keys random masks."""
        assert tune.index is not None
        prune, shape = self.prunes[tune.index], base.shape
        density = self._density(merge, tune)
        assert density is not None
        key = mask_key(seed, tune.name, merge.name)
        columns, count = self._protected(merge, tune, tensor)
        whole, pair = self._cleared(self._whole(base, tensor), columns), self._pair(base, tensor)
        if prune.method == "dare" and prune.sampling == "uniform":
            return self._cleared(self._node(f"{MASKS}:dare", pair, shape, key=key, density=density), columns)
        if prune.method in ("breadcrumbs", "magnitude_outliers"):
            return self._between(whole, density, _number(prune.parameters["gamma"], merge) or 0.0)
        if prune.method == "structured":
            a, b = (_number(prune.parameters[side], merge) for side in "ab")
            return self._cleared(self._node(f"{MASKS}:structured", pair, shape, key=key, a=a, b=b), columns)
        if count:
            density *= 1 - count / shape[-1]
        if prune.sampling == "magnitude":
            return self._cleared(nodes.sampled(self.graph, whole, pair, key, density), columns)
        if prune.method == "wanda" and has_norm(merge.name, shape):
            transposed = is_transposed(tensor.name, tune.checkpoint.config.get("model_type"))
            return nodes.best_scored(self.graph, whole, self.activations[tune.index], tensor.name, transposed, density)
        if prune.method == "magnitude" and prune.group == "row" and len(shape) > 1:
            return self._node(f"{SELECT}:keep_largest_rows", [whole], shape, density=density)
        if prune.method not in ("magnitude", "wanda"):
            return self._by_function(prune, merge, whole, key, density)
        if prune.group == "model":
            of_model = self.cuts[tune.index]
            cut = self.graph.node(f"{THRESHOLD}:cut_of", [of_model], kind="small", name=merge.name)
            return nodes.above(self.graph, whole, cut)
        return nodes.largest(self.graph, whole, round(density * math.prod(shape)))

    def _by_function(self, prune: Pruning, merge: Merge, whole: Node, key: Key, density: float) -> Node:
        """The mask of a method that is one function of a tile, with the parameters that it declares."""
        method = PRUNE[prune.method]
        assert method.function is not None
        given: dict[str, Any] = {"density": density} | ({"key": key} if method.random else {})
        for name, value in prune.parameters.items():
            number = _number(value, merge)
            if number is None:
                raise InputError(
                    f"tensor {merge.name}: {method.name}: no {name} for it", hint="add a value without filter"
                )
            given[name] = KINDS[method.parameters[name].kind](number)
        if prune.method == "della":
            with errors.context(f"tensor {merge.name}"):
                check_della(density, given["epsilon"])
        return self._node(method.function, [whole], whole.shape, **given)

    def _trimmed(self, merge: Merge, tune: Input, whole: Node) -> tuple[Node, str]:
        """The int(density · n) largest entries, at least 1, where the merge method has a density of its own (ties)."""
        method = self.recipe.method
        if "density" not in method.parameters or method.implies_prune:
            return whole, ""
        density = float(self._value("density", merge, tune))
        if density >= 1:
            return whole, ""
        return nodes.largest(self.graph, whole, max(1, int(density * math.prod(whole.shape)))), f" density={density:g}"

    def _matched(self, whole: Node, kept: Node, norm: str) -> Node:
        """mergekit's rescaling: kept · ‖Δ‖ / ‖kept‖, as a division by ‖kept‖ / ‖Δ‖."""
        norms = [
            self.graph.node(f"{RESCALE}:norm", [node], kind="concat", shape=node.shape, norm=norm)
            for node in (kept, whole)
        ]
        ratio = self.graph.node(f"{RESCALE}:ratio", norms, kind="small", norm=norm)
        return self._node(f"{RESCALE}:divide", [kept, ratio], whole.shape)

    def _between(self, delta: Node, density: float, gamma: float) -> Node:
        """The int(density · n) magnitudes of Δ that follow its int(γ · n) largest; γ yields where both exceed n."""
        size = math.prod(delta.shape)
        kept = int(density * size)
        top = min(int(gamma * size), size - kept)
        if not top:
            return nodes.largest(self.graph, delta, kept)
        cuts = [*self._ends(delta, top + kept), *self._ends(delta, top)]
        return self._node(f"{SELECT}:keep_between", [delta, *cuts], delta.shape)

    def _ends(self, delta: Node, k: int) -> tuple[Node, Node]:
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
        if node.kind == "read" and node.dtype == dtype and not isinstance(node.parameter("tensor"), Gathered):
            return node
        return self.graph.node("deltamerge.ops:cast", [node], shape=node.shape, dtype=dtype, to=dtype)


def _refuse_gathered(tensors: Sequence[tuple[Merge, TensorInfo]], hint: str) -> None:
    """A stage runs the fine-tune with its own vocabulary, so what is pruned must have the rows of its files."""
    for merge, tensor in tensors:
        if isinstance(tensor, Gathered) or isinstance(merge.base, Gathered):
            message = f"{merge.name}: cannot be pruned with calibration while its vocabulary changes"
            raise InputError(message, hint=hint)


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
    module, _, combine = method.function.rpartition(":")
    if not module.startswith("deltamerge."):
        return False  # a function of another package may do anything with a single model
    if combine in ("multislerp", "karcher"):
        return True
    if combine == "passthrough":
        return bool(values["scales"] == (1.0,))
    weighted = combine in ("task_arithmetic", "ties") and values["lambda_"] == 1
    return weighted and (values["normalize"] or values["weights"] == (1.0,))


def _number(value: Any, merge: Merge) -> float | None:
    found = None if value is None else resolve(value, merge.name, merge.position)
    return None if found is None else float(found)
