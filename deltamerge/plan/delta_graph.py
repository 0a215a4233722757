"""One fine-tune's delta of a tensor as graph nodes: read, subtract, mask, rescale."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.engine.devices import ALL
from deltamerge.errors import InputError
from deltamerge.methods.ops import subtract, zeros
from deltamerge.methods.registry import PRUNE, Masking, PruneMethod
from deltamerge.plan.inputs import Input
from deltamerge.recipe import values
from deltamerge.recipe.prune import Pruning, effective_prune
from deltamerge.recipe.schema import CalibratedQ, Recipe, Section
from deltamerge.tensors.names import EMBEDDING, TOKEN_HEAD, has_columns, has_norm, is_stacked, is_transposed
from deltamerge.tensors.patterns import finds
from deltamerge.tensors.tensor import Graph, Node, TensorInfo
from deltamerge.tensors.traits import Function, function_of

if TYPE_CHECKING:
    from deltamerge.calibrate.merge.second_moments import InputMeasurement


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages before the first tile, of all tensors of a model: nodes by the model's place in the recipe.

    activations  measure inputs for `Masking.norms` and `protect`
    weighing     measure the weights of a budget's errors
    cuts         find the threshold of `group: model`
    calibrated   choose the q's
    roots        a pruned factor of an adapter -> the weight whose q it takes a root of, and which root
    together     chooses the λ of a merge that is calibrated as a whole
    totals       computes the merge method's sums over all tensors
    rows         computes the merge method's measurements on every model's rows
    inputs       the weights of a LoRA's factors; no node, because they are passed on block by block
    """

    activations: Mapping[int, Node] = field(default_factory=dict)
    weighing: Mapping[int, Node] = field(default_factory=dict)
    cuts: Mapping[int, Node] = field(default_factory=dict)
    calibrated: Mapping[int, Node] = field(default_factory=dict)
    roots: Mapping[str, tuple[str, int]] = field(default_factory=dict)
    together: Node | None = None
    totals: Node | None = None
    rows: Node | None = None
    inputs: Mapping[int, InputMeasurement] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Tell whether there is any stage."""
        return self != Stages()

    def on_one_gpu(self, device: str) -> bool:
        """Tell whether some stages run only on the first of several GPUs."""
        numbers = device.partition(":")[2]
        return (numbers == ALL or "," in numbers) and bool(
            self.activations or self.weighing or self.inputs or self.rows is not None
        )

    @property
    def of_masks(self) -> tuple[Node, ...]:
        """Return the stages that masks need."""
        return (*self.activations.values(), *self.cuts.values())

    @property
    def of_deltas(self) -> tuple[Node, ...]:
        """Return the stages that pruned, rescaled deltas need."""
        return (*self.of_masks, *self.calibrated.values())

    @property
    def calibrations(self) -> tuple[Node, ...]:
        """Return the stages that choose something: each model's q's, or the merge's λ."""
        together = () if self.together is None else (self.together,)
        return (*self.calibrated.values(), *together)


@dataclass(frozen=True, slots=True)
class Deltas:
    """Makes the nodes of pruned deltas. It holds everything that a recipe's tensors share.

    `prunes` are the models' prunings, `densities` the densities of tensors under a budget.
    """

    recipe: Recipe
    graph: Graph
    prunes: tuple[Pruning, ...]
    densities: Mapping[str, float] | None = None
    stages: Stages = field(default_factory=Stages)

    @classmethod
    def of(cls, recipe: Recipe, graph: Graph, densities: Mapping[str, float] | None) -> Deltas:
        """Return the maker for a recipe, with its models' prunings."""
        return cls(recipe, graph, tuple(effective_prune(recipe, i) for i in range(len(recipe.models))), densities)

    @property
    def whole_merge(self) -> bool:
        """Tell whether the merge is calibrated as a whole, and not the q's of models."""
        return self.recipe.calibration is not None and self.recipe.calibration.per == "merge"

    @property
    def coefficients(self) -> str | None:
        """Return the scope of a factor in a merge that is calibrated as a whole: a model, layer or row; None: one λ."""
        calibration = self.recipe.calibration
        return calibration.coefficients if calibration is not None and self.whole_merge else None

    @property
    def have_stages(self) -> bool:
        """Tell whether something may run before the first tile: a measurement, a search, a threshold of a model."""
        return any(
            prune.protect is not None
            or prune.group == "model"
            or isinstance(prune.q, CalibratedQ)
            or PRUNE[prune.method].needs_activations
            or self.recipe.calibration_of(index) is not None
            for index, prune in enumerate(self.prunes)
        )

    def prune_of(self, tuned: Tuned) -> Pruning:
        return self.prunes[tuned.index]

    def method_of(self, tuned: Tuned) -> PruneMethod:
        return PRUNE[self.prune_of(tuned).method]

    def is_budgeted(self, tuned: Tuned) -> bool:
        """Tell whether a tensor's density depends on a budget for all tensors."""
        return self.prune_of(tuned).budget is not None or self.method_of(tuned).shares

    def prunes_by_name(self, tuned: Tuned) -> bool:
        """Tell whether the include and exclude lists of its model prune a tensor."""
        prune, name = self.prune_of(tuned), tuned.name
        included = prune.include is None or any(finds(pattern, name) for pattern in prune.include)
        return included and not any(finds(pattern, name) for pattern in prune.exclude)

    def density(self, tuned: Tuned) -> float | None:
        """Return the density of a tensor's mask, None if it is not pruned."""
        prune, merge = self.prune_of(tuned), tuned.merge
        if prune.method == "none" or not self.prunes_by_name(tuned):
            return None
        if self.method_of(tuned).shares:
            return 1.0
        if prune.budget is not None:
            assert self.densities is not None
            return self.densities[merge.name]
        factors = [number(prune.parameters[key], merge) for key in self.method_of(tuned).factors]
        if factors and None not in factors:
            return math.prod(factor for factor in factors if factor is not None)
        return number(prune.density, merge)

    def is_masked(self, tuned: Tuned) -> bool:
        """Tell whether entries of a tensor's delta are dropped or divided, so that it is not simply whole."""
        density, prune = self.density(tuned), self.prune_of(tuned)
        if density is None or density != 1:
            return density is not None
        calibrated = isinstance(prune.q, CalibratedQ) and not self.whole_merge
        return not (calibrated or prune.rescale) and self.plain_q(tuned, density) != 1

    def plain_q(self, tuned: Tuned, density: float) -> float:
        """Return the q of a tensor without a calibrated q: the recipe's number, or the method's."""
        prune = self.prune_of(tuned)
        if isinstance(prune.q, CalibratedQ):
            return density if self.method_of(tuned).random else 1.0
        q = None if prune.rescale else number(prune.q, tuned.merge)
        return density if q is None else q

    def whole(self, tuned: Tuned) -> Node:
        """Return the node of Δ = fine-tune − base."""
        pair = self._pair(tuned)
        if not pair[1].is_source:
            return pair[0]
        dtypes = (tuned.tensor.dtype, tuned.base.dtype)
        return self._node(subtract, pair, tuned.base.shape, dtypes=dtypes)

    def nothing(self, tuned: Tuned) -> Node:
        """Return zeros, for a density of 0, which mergekit's parameters allow."""
        return self._node(zeros, self._pair(tuned)[:1], tuned.base.shape)

    def pruned(self, tuned: Tuned, seed: int) -> tuple[Node, str]:
        """Return the pruned, rescaled delta, and its description ("" if it is whole)."""
        prune, density, whole = self.prune_of(tuned), self.density(tuned), self.whole(tuned)
        if density is None:
            return whole, ""
        if density == 0:
            return self._restored(tuned, self.nothing(tuned), f" {prune.method} density=0")
        if isinstance(prune.q, CalibratedQ) and not self.whole_merge:
            return self._calibrated(tuned, prune.q, density)
        if not self.is_masked(tuned):
            return whole, ""
        from deltamerge.methods.prune import rescale

        q = self.plain_q(tuned, density)
        node, shape = self.masked(tuned, seed), tuned.base.shape
        if prune.rescale:
            columns, _ = self.protected(tuned)
            node = rescale.matched(self.graph.node, self._cleared(whole, columns), node, prune.rescale)
            return self._restored(tuned, node, f" {prune.method} density={density:g} {prune.rescale}")
        if q != 1:
            value = self.graph.node(rescale.constant, kind="small", value=q)
            node = self._node(rescale.divide, [node, value], shape)
        return self._restored(tuned, node, f" {prune.method} density={density:g} q={q:g}")

    def _calibrated(self, tuned: Tuned, q: CalibratedQ, density: float) -> tuple[Node, str]:
        """Return the masked delta, divided by the q that the model's stage chose for this tensor."""
        if not self.is_masked(tuned):
            return self.whole(tuned), ""
        from deltamerge.calibrate.values import pick
        from deltamerge.methods.prune import rescale

        node = self.masked(tuned, self.recipe.seed)
        name, root = self.stages.roots.get(tuned.name, (tuned.name, 1))
        value = self.graph.node(pick, [self.stages.calibrated[tuned.index]], kind="small", name=name, root=root)
        apart = q.scope_or_default == "row" or (q.scope_or_default == "layer" and len(tuned.base.shape) > 2)
        divide = rescale.divide_rows if apart else rescale.divide  # stacked matrices have a q each
        node = self._node(divide, [node, value], tuned.base.shape)
        return self._restored(tuned, node, f" {self.prune_of(tuned).method} density={density:g} q={q.objective}")

    def masked(self, tuned: Tuned, seed: int) -> Node:
        """Return mask ∘ Δ, not rescaled. Protected columns are left out, and no density counts them. The seed keys
        random masks."""
        from deltamerge.methods.prune.bits import mask_key

        density = self.density(tuned)
        assert density is not None
        columns, count = self.protected(tuned)
        whole = self._cleared(self.whole(tuned), columns)
        if density == 1:
            return whole

        prune, method, shape = self.prune_of(tuned), self.method_of(tuned), tuned.base.shape
        transposed = method.needs_activations and self.transposed(tuned)
        masking = Masking(
            method=method,
            make=self.graph.node,
            delta=whole,
            pair=self._pair(tuned),
            density=density,
            share=density * (1 - count / shape[-1]) if count else density,
            key=mask_key(seed, tuned.model.name, tuned.name),
            parameters=self._parameters(tuned),
            group=prune.group,
            sampling=prune.sampling,
            rescaled=prune.rescale is not None,
            norms=self._norms(tuned, transposed),
            transposed=transposed,
            cut=self._cut(tuned),
        )
        with errors.context(f"tensor {tuned.name}"):
            return self._cleared(function_of(method.nodes)(masking), columns)

    def _parameters(self, tuned: Tuned) -> dict[str, float | bool]:
        """Return the parameters of a tensor's pruning method."""
        method, given = self.method_of(tuned), dict[str, float | bool]()
        for name, value in self.prune_of(tuned).parameters.items():
            found = number(value, tuned.merge)
            if found is None:
                raise InputError(
                    f"tensor {tuned.name}: {method.name}: no {name} for it", hint="add a value without filter"
                )
            given[name] = method.parameters[name].typed(found)
        return given

    def _norms(self, tuned: Tuned, transposed: bool) -> Node | None:
        """Return the node of ‖x_j‖ of a linear layer's inputs; None: the method needs none, or the tensor has none."""
        shape = tuned.base.shape
        if not self.method_of(tuned).needs_activations or not has_norm(tuned.name, shape):
            return None
        from deltamerge.calibrate.values import norm

        stacked: dict[str, Any] = {"stacked": shape[0]} if len(shape) == 3 else {}
        return self.graph.node(
            norm,
            [self.stages.activations[tuned.index]],
            kind="small",
            name=tuned.tensor.name,
            count=shape[-2] if transposed else shape[-1],
            transposed=transposed,
            **stacked,
        )

    def transposed(self, tuned: Tuned) -> bool:
        """Tell whether a weight is stored (in, out)."""
        name, checkpoint = tuned.tensor.name, tuned.model.checkpoint
        tensors = checkpoint.tensors if name in checkpoint.tensors else {name: tuned.tensor}
        return is_transposed(name, checkpoint.config, tensors)

    def _cut(self, tuned: Tuned) -> Node | None:
        """Return the tensor's part of its model's threshold. None: entries do not compete within the model."""
        if self.prune_of(tuned).group != "model":
            return None
        from deltamerge.calibrate.values import cut_of

        return self.graph.node(cut_of, [self.stages.cuts[tuned.index]], kind="small", name=tuned.name)

    def protected(self, tuned: Tuned) -> tuple[Node | None, int]:
        """Return the node of a linear weight's protected columns, and their largest number. None: there are none."""
        guarded = self.prune_of(tuned).protect
        if guarded is None or not has_columns(tuned.name, tuned.tensor.shape):
            return None, 0
        from deltamerge.calibrate.values import columns, massive

        width = tuned.tensor.shape[-1]
        if guarded.massive_activations is not None:
            k = min(guarded.massive_activations, width)
            measured = [self.stages.activations[tuned.index]]
            return self.graph.node(massive, measured, kind="small", name=tuned.tensor.name, k=k), k
        numbers: set[int] = set()
        for pattern, some in (guarded.columns or {}).items():
            if finds(pattern, tuned.name):
                numbers.update(some)
        if not numbers:
            return None, 0
        if max(numbers) >= width:
            raise InputError(f"prune.protect.columns: {tuned.name} has {width} columns, {max(numbers)} is none of them")
        return self.graph.node(columns, kind="small", numbers=tuple(sorted(numbers))), len(numbers)

    def _cleared(self, delta: Node, columns: Node | None) -> Node:
        if columns is None:
            return delta
        from deltamerge.methods.prune.protect import clear

        return self._node(clear, [delta, columns], delta.shape)

    def _restored(self, tuned: Tuned, kept: Node, text: str) -> tuple[Node, str]:
        """Return the kept delta with its protected columns, and its description."""
        columns, count = self.protected(tuned)
        if columns is None:
            return kept, text
        from deltamerge.methods.prune.protect import restore

        inputs = [kept, *self._pair(tuned), columns]
        return self._node(restore, inputs, tuned.base.shape), f"{text} protect={count}"

    def _pair(self, tuned: Tuned) -> tuple[Node, Node]:
        """Return the two nodes whose difference is Δ: the fine-tune and the base, or added values of a delta artifact
        and zeros.

        Where a LoRA is made, they are an adapter's own update and zeros.
        """
        values = None
        if tuned.model.checkpoint.base is not None:
            from deltamerge.models.delta_over_base import added

            values = added(tuned.tensor)
        if values is None and self.recipe.output.lora and tuned.base is not None:
            from deltamerge.formats.peft.lora import update_of

            values = update_of(tuned.tensor, tuned.base)
        if values is None:
            return self.graph.read(tuned.tensor), self.graph.read(tuned.base)
        node = self.graph.read(values)
        return node, self._node(zeros, [node], tuned.base.shape)

    def _node(self, function: Function, inputs: Any, shape: tuple[int, ...], **parameters: Any) -> Node:
        return self.graph.node(function, inputs, shape=shape, **parameters)


def number(value: Any, merge: Merge) -> float | None:
    """Return a value of the recipe for a tensor. None: no filter matches it."""
    found = None if value is None else values.value_for(value, merge.name, merge.position)
    return None if found is None else float(found)


@dataclass(frozen=True, slots=True)
class Merge:
    """A tensor to merge.

    name       its name in the output
    part       its part of the recipe
    position   its layer's position, from 0 to 1
    base       the base's tensor, if the merge has a base
    sources    the models and their tensors
    dtype      the dtype of the result
    """

    name: str
    part: Section
    position: float
    base: TensorInfo | None
    sources: Sequence[tuple[Input, TensorInfo]]
    dtype: str

    @property
    def tunes(self) -> tuple[Tuned, ...]:
        """Return the fine-tunes' tensors, in the recipe's order."""
        return tuple([Tuned(self, model, tensor) for model, tensor in self.sources])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.sources[0][1].shape


@dataclass(frozen=True, slots=True)
class Tuned:
    """One fine-tune's tensor in a merge."""

    merge: Merge
    model: Input
    tensor: TensorInfo

    @property
    def name(self) -> str:
        return self.merge.name

    @property
    def base(self) -> TensorInfo:
        """Return the base's tensor, which is subtracted. A merge of deltas always has one."""
        assert self.merge.base is not None
        return self.merge.base

    @property
    def index(self) -> int:
        """Return the fine-tune's index in the recipe."""
        assert self.model.index is not None
        return self.model.index


def matrix_form(name: str, shape: tuple[int, ...], models: int) -> tuple[int, int, int] | None:
    """Return (matrices, rows, columns) of a tensor.

    A weight of a linear layer is one matrix, stacked experts are a matrix each, and a convolution has a row for each
    output.

    None: a vector, a table whose rows are looked up, a head with a row for each token (perhaps the same table), or a
    matrix with fewer rows or columns than `models`, which leaves no direction for each.
    """
    if len(shape) < 2 or EMBEDDING.search(name) or TOKEN_HEAD.search(name):
        return None
    if is_stacked(name, shape):
        form = shape
    elif name.endswith("weight"):
        form = (1, shape[0], math.prod(shape[1:]))
    else:
        return None
    return (form[0], form[1], form[2]) if min(form[1:]) >= models and form[0] else None
