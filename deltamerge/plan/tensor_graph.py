"""One output tensor of a recipe as graph nodes: the models' values or pruned deltas, combined, cast."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.errors import RecipeError
from deltamerge.methods.ops import cast, subtract, zeros
from deltamerge.plan.delta_graph import Deltas, Merge, Tuned, matrix_form
from deltamerge.plan.inputs import Input
from deltamerge.recipe.schema import MERGED, Recipe
from deltamerge.recipe.values import lookup
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Graph, Node, Tensor, TensorInfo
from deltamerge.tensors.traits import Function, name_of
from deltamerge.tensors.traits import function_of as call
from deltamerge.tensors.views import moves_rows

SUM = "deltamerge.methods.merge.task_arithmetic:task_arithmetic"  # imported where a recipe names it
CORE = "deltamerge.methods.merge.core_space:in_core"

if TYPE_CHECKING:
    from deltamerge.plan.calibration_graph import StageMaker


@dataclass(frozen=True, slots=True)
class Built:
    """The node of an output tensor and, for people, its description and its numbers by model.

    `delta` makes the float32 values that an artifact adds to the base, if there is an artifact. `changed` is the
    expected fraction of entries that differ from the base's; 1 if unknown. If the delta is a sum of adapters' updates,
    `updates` are the updates and their coefficients. `core` is the number of directions of the LoRAs' core; 0 without.
    """

    root: Node
    method: str
    details: tuple[str, ...]
    delta: Node | None = None
    changed: float = 1.0
    updates: tuple[tuple[float, Tensor], ...] = ()
    core: int = 0


@dataclass(frozen=True, slots=True)
class Builder:
    """Makes the nodes of a recipe's tensors. Call `merge` on a `prepared` builder, because stages need whole models.

    `base` is the base of all parts, `budgeted` are the tensors under a budget.
    """

    recipe: Recipe
    graph: Graph
    deltas: Deltas
    folder: Path
    device: str
    memory: int | None = None
    base: Input | None = None
    budgeted: tuple[Tuned, ...] = ()

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        graph: Graph,
        folder: Path,
        device: str,
        memory: int | None = None,
        densities: Mapping[str, float] | None = None,
        base: Input | None = None,
    ) -> Builder:
        """Return the builder of a recipe; data of its calibration lies in `folder`."""
        return cls(recipe, graph, Deltas.of(recipe, graph, densities), folder, device, memory, base)

    @property
    def maker(self) -> StageMaker:
        """Return the maker of calibration's stages. Only recipes with stages import it."""
        from deltamerge.plan.calibration_graph import StageMaker

        return StageMaker(self.folder, self.device, self.memory)

    def prepared(self, merges: Sequence[Merge]) -> Builder:
        """Return this builder with the stages that `merges` need, and with the densities of a budget.

        Until the densities are known, all tensors get one density that would about fit.
        """
        tunes = [t for merge in merges for t in merge.tunes if t.model.index is not None]
        deltas = self.deltas
        budgeted = tuple(t for t in tunes if deltas.is_budgeted(t) and deltas.prunes_by_name(t))
        if any(deltas.prune_of(t).budget is not None for t in budgeted) and deltas.densities is None:
            deltas = replace(deltas, densities=dict.fromkeys((t.name for t in budgeted), self._affordable(budgeted)))
        if deltas.have_stages:
            deltas = replace(deltas, stages=self.maker.make(deltas, merges))
        builder = replace(self, deltas=deltas, budgeted=budgeted)
        if self.recipe.method.totals is not None:
            deltas = replace(deltas, stages=replace(deltas.stages, totals=builder._totals(merges)))
            builder = replace(builder, deltas=deltas)
        if self.recipe.method.rows is not None:
            deltas = replace(deltas, stages=replace(deltas.stages, rows=builder._measured(merges)))
            builder = replace(builder, deltas=deltas)
        if not deltas.whole_merge:
            return builder
        based = [merge for merge in merges if merge.base is not None]
        if deltas.coefficients is None:
            together = self.maker.together(deltas, based, builder._merged_delta)
        else:
            starts = (
                [1.0] * len(self.recipe.fine_tunes) if builder._is_sum else [1.0, *[0.0] * len(self.recipe.fine_tunes)]
            )
            together = self.maker.fitted(deltas, based, builder._parts, starts, self.base)
        return replace(builder, deltas=replace(deltas, stages=replace(deltas.stages, together=together)))

    def _affordable(self, budgeted: Sequence[Tuned]) -> float:
        """Return the density at which all tensors of a budget together about fit."""
        from deltamerge.formats.delta.positions import uniform_density
        from deltamerge.formats.delta.values import VALUE_BITS

        budget = next(prune.budget for prune in self.deltas.prunes if prune.budget is not None)
        size = sum(math.prod(t.base.shape) for t in budgeted)
        output = self.recipe.output

        bits = VALUE_BITS[output.values or "bfloat16"] if output.adds else 8 * ITEMSIZE[budgeted[0].merge.dtype]
        return uniform_density(8 * budget / size, bits) if size else 1.0

    def copy(self, tensor: TensorInfo, dtype: str) -> Node:
        """Return the stored tensor, cast only if its dtype differs."""
        return self.cast(self.graph.read(tensor), dtype)

    def merge(self, merge: Merge) -> Built:
        """Return the merged tensor."""
        base, tunes, dtype = merge.base, merge.tunes, merge.dtype
        method = self.recipe.method
        apart = base is not None and method.deltas
        values, texts = self._parameters(merge)
        if apart:
            pruned = [self._delta(tuned, self.recipe.seed) for tuned in tunes]
        else:
            pruned = [(self.graph.read(tuned.tensor), "") for tuned in tunes]
        together = self.deltas.stages.together
        if self.deltas.coefficients is not None and base is not None:
            return self._fitted(merge, pruned, texts)
        if together is not None and base is not None:
            from deltamerge.calibrate.values import pick
            from deltamerge.methods.prune.rescale import divide

            q = self.graph.node(pick, [together], kind="small", name=merge.name)
            pruned = [(self._node(divide, [node, q], base.shape), f"{text} lambda calibrated") for node, text in pruned]
        inputs = [node for node, _ in pruned]
        if base is not None:
            inputs.insert(0, self.graph.read(base))
        details = tuple(f"{t.model.name}{own}{text}" for t, own, (_, text) in zip(tunes, texts, pruned, strict=True))
        changed = 1 - math.prod(1 - self._kept(tuned) for tuned in tunes)
        delta = None
        lora = self.recipe.output.lora
        if base is not None and (lora or (self.recipe.output.adds and not self._left_whole(merge))):
            if method.adds:
                nothing = self._node(zeros, inputs[1:2], base.shape)
                delta = self.cast(self._combined(merge, [nothing, *inputs[1:]], values), "F32")
            else:
                delta = self._difference(self._combined(merge, inputs, values), inputs[0])
        if (
            len(inputs) - apart == 1
            and not pruned[0][1]
            and method.keeps_single is not None
            and call(method.keeps_single)(**values)
        ):
            kept = self.copy(tunes[0].tensor, dtype)
            built = Built(kept, "copy", (tunes[0].model.name,), delta, changed)
        else:
            combined = self._combined(merge, inputs, values)
            built = Built(self.cast(combined, dtype), method.name, details, delta, changed, core=_core_size(combined))
        plain = lora and together is None and not any(text for _, text in pruned)
        return replace(built, updates=_updates(merge, method.name, values)) if plain else built

    @property
    def _is_sum(self) -> bool:
        """Tell whether the method adds up deltas, so that only the deltas' factors can be fitted."""
        return name_of(self.recipe.method.function) == SUM

    def _parts(self, merge: Merge) -> dict[str, Node]:
        """Return the deltas that get a factor each: the models', and the method's result unless it is their sum."""
        own = [self._delta(tuned, self.recipe.seed)[0] for tuned in merge.tunes]
        names = [self.recipe.names[tuned.index] for tuned in merge.tunes]
        if self._is_sum:
            values = self._parameters(merge)[0]
            factor = _factor(values)
            factors = [factor * weight for weight in values["weights"]]
            scaled = [self._times(node, factor) for node, factor in zip(own, factors, strict=True)]
            return dict(zip(names, scaled, strict=True))
        return {MERGED: self._merged_delta(merge, self.recipe.seed), **dict(zip(names, own, strict=True))}

    def _times(self, node: Node, factor: float) -> Node:
        from deltamerge.methods.prune.rescale import constant, multiply

        number = self.graph.node(constant, kind="small", value=factor)
        return self._node(multiply, [node, number], node.shape)

    def _fitted(self, merge: Merge, pruned: Sequence[tuple[Node, str]], texts: Sequence[str]) -> Built:
        """Return base + the sum of the deltas times their fitted factors."""
        from deltamerge.calibrate.values import pick_coefficient
        from deltamerge.methods.prune.rescale import multiply

        scaled, stage = [], self.deltas.stages.together
        assert merge.base is not None
        assert stage is not None
        spec = stage.parameter("spec")
        for (name, node), start in zip(self._parts(merge).items(), spec.starts, strict=True):
            found = {"delta": name, "name": merge.name, "start": start}
            factor = self.graph.node(pick_coefficient, [stage], kind="small", **found)
            scaled.append(self._node(multiply, [node, factor], merge.shape))
        alike = {"weights": (1.0,) * len(scaled), "normalize": False, "lambda_": 1.0}

        def added(to: Node) -> Node:
            return self._node(SUM, [to, *scaled], merge.shape, **alike)

        adds = self.recipe.output.lora or (self.recipe.output.adds and not self._left_whole(merge))
        delta = self.cast(added(self._node(zeros, scaled[:1], merge.shape)), "F32") if adds else None
        details = tuple(
            f"{t.model.name}{own}{text} fitted" for t, own, (_, text) in zip(merge.tunes, texts, pruned, strict=True)
        )
        changed = 1 - math.prod(1 - self._kept(tuned) for tuned in merge.tunes)
        merged = self.cast(added(self.graph.read(merge.base)), merge.dtype)
        return Built(merged, self.recipe.method.name, details, delta, changed)

    def _totals(self, merges: Sequence[Merge]) -> Node:
        """Return the node of the sums that the merge method needs over all tensors."""
        from deltamerge.calibrate.stage import totals

        function, parts, names = self.recipe.method.totals, [], []
        assert function is not None
        for merge in merges:
            if merge.base is None:
                continue
            inputs = [self.graph.read(merge.base), *(self._delta(tuned, self.recipe.seed)[0] for tuned in merge.tunes)]
            values = self._parameters(merge)[0]
            parts.append(self.graph.node(function, inputs, kind="concat", shape=merge.shape, **values))
            names.append(merge.name)
        inputs = [*parts, *self.deltas.stages.of_deltas]
        return self.graph.node(totals, inputs, kind="stage", names=tuple(names), device=self.device)

    def _measured(self, merges: Sequence[Merge]) -> Node:
        """Return the node of the merge method's measurements on every model's rows."""
        based = [merge for merge in merges if merge.base is not None]
        if self.recipe.method.rows != "merged":
            return self.maker.inputs(self.deltas, based, gradients=self.recipe.method.rows == "gradients")
        from deltamerge.calibrate.values import spool

        filled = self.graph.node(spool, kind="small", of=repr(self.recipe.source.data))
        builder = replace(self, deltas=replace(self.deltas, stages=replace(self.deltas.stages, rows=filled)))
        return self.maker.merged_inputs(self.deltas, based, builder._merged_delta, filled)

    def _combined(self, merge: Merge, inputs: Sequence[Node], values: dict[str, Any]) -> Node:
        """Return the method's result in float32, from the base if it stands apart, and the models or their deltas."""
        method, shape = self.recipe.method, merge.shape
        if self.deltas.stages.totals is not None:
            inputs = [*inputs, self.deltas.stages.totals]
        if self.deltas.stages.rows is not None:
            from deltamerge.calibrate.values import of_layer, of_tensor

            read = of_tensor if method.rows == "gradients" else of_layer
            inputs = [*inputs, self.graph.node(read, [self.deltas.stages.rows], kind="small", name=merge.name)]
        if method.nodes is None:
            return self._node(method.function, inputs, shape, **values)
        if method.matrices:
            form = matrix_form(merge.name, shape, len(merge.sources))
            values = {**values, "form": form, "transposed": form is not None and self.deltas.transposed(merge.tunes[0])}
        function, updates = method.function, self._core(merge, values)
        if updates:
            from deltamerge.methods.merge.core_space import Update

            factors = [self.graph.read(one) for update in updates if update is not None for one in update.inputs[1:3]]
            inputs, function = [inputs[0], *factors], CORE
            values |= {"method": name_of(method.function), "updates": tuple(map(Update.of, updates))}
            values |= {"balanced": True} if self.recipe.balance is not None and len(merge.tunes) > 1 else {}
        with errors.context(f"tensor {merge.name}"):
            based = merge.base is not None and method.deltas
            node: Node = call(method.nodes)(self.graph.node, function, inputs, shape, based=based, **values)
            return node

    def _core(self, merge: Merge, values: Mapping[str, Any]) -> tuple[Tensor | None, ...]:
        """Return the updates s · B A of a matrix that is merged in their core, None for a model without an update.

        The result is None if the method, a pruning, or a tensor without low-rank update needs whole deltas.
        """
        method, form = self.recipe.method, values.get("form")
        if method.in_core is None or form is None or not call(method.in_core)(**values) or merge.base is None:
            return ()
        calibrated = self.deltas.whole_merge and self.deltas.coefficients is None
        if calibrated or any(self.deltas.prune_of(tuned).method != "none" for tuned in merge.tunes):
            return ()
        from deltamerge.formats.peft.lora import update_of
        from deltamerge.methods.merge.core_space import Update, fits

        found: list[Tensor | None] = []
        for tuned in merge.tunes:
            update = None if tuned.tensor.is_same(merge.base) else update_of(tuned.tensor, merge.base)
            if update is None and not tuned.tensor.is_same(merge.base):
                return ()
            found.append(None if update is None else update.tensor)
        return tuple(found) if fits(tuple(map(Update.of, found)), form) else ()

    def _difference(self, merged: Node, base: Node) -> Node:
        """Return the difference of a merged tensor and the base, in float32."""
        pair = [self.cast(merged, "F32"), base]
        return self._node(subtract, pair, base.shape, dtypes=("F32", base.dtype))

    def _left_whole(self, merge: Merge) -> bool:
        """Tell whether the recipe prunes, but leaves this tensor whole in every model. It is then stored exactly."""
        return all(self.deltas.density(t) is None and self.deltas.prune_of(t).method != "none" for t in merge.tunes)

    def kept(self, merges: Sequence[Merge]) -> dict[int, Counter[float]]:
        """Return the entries of every model's delta, counted by the fraction of them that pruning or the merge method
        keeps. Models are named by their place in the recipe."""
        counted: dict[int, Counter[float]] = {}
        for tuned in (tuned for merge in merges if merge.base is not None for tuned in merge.tunes):
            counted.setdefault(tuned.index, Counter())[self._kept(tuned)] += math.prod(tuned.base.shape)
        return counted

    def _kept(self, tuned: Tuned) -> float:
        """Return the fraction of a delta's entries that pruning or the merge method keeps."""
        density = self.deltas.density(tuned)
        if density is None and "density" in (method := self.recipe.method).parameters and not method.implies_prune:
            density = float(self._value("density", tuned.merge, tuned))
        return 1.0 if density is None else min(1.0, density)

    def parameters(self, merge: Merge) -> dict[str, Any]:
        """Return the parameters of the method's function for a tensor."""
        return self._parameters(merge)[0]

    def _parameters(self, merge: Merge) -> tuple[dict[str, Any], list[str]]:
        """Return the parameters of the method's function for a tensor, and each model's own in words."""
        values: dict[str, Any] = {}
        texts = [""] * len(merge.tunes)
        for name, param in self.recipe.method.parameters.items():
            if param.prunes:
                continue
            if param.per_model:
                own = tuple(param.typed(self._value(name, merge, tuned)) for tuned in merge.tunes)
                texts = [f"{text} {name}={value:g}" for text, value in zip(texts, own, strict=True)]
                values[param.argument(name)] = own
            else:
                values[param.argument(name)] = param.typed(self._value(name, merge, None))
        if any(tuned.model.checkpoint.running_sum for tuned in merge.tunes):
            from deltamerge.plan.running_sum import counts

            values["counts"] = counts([t.model.checkpoint for t in merge.tunes], values["weights"])
        if self.recipe.output.rules.accumulates:
            values["normalize"] = False
        return values, texts

    def _delta(self, tuned: Tuned, seed: int) -> tuple[Node, str]:
        """Return the pruned, rescaled and balanced delta of one fine-tune, and its description ("" if it is whole)."""
        node, text = self._pruned(tuned, seed)
        others = tuned.merge.tunes
        if self.recipe.balance is None or len(others) == 1:
            return node, text
        from deltamerge.methods.prune.rescale import balanced

        deltas = [self._pruned(one, seed)[0] for one in others]
        number = next(i for i, one in enumerate(others) if one.index == tuned.index)
        return balanced(self.graph.node, deltas, number), f"{text} balanced"

    def _pruned(self, tuned: Tuned, seed: int) -> tuple[Node, str]:
        """Return the pruned, rescaled delta of one fine-tune, and its description ("" if it is whole)."""
        if self.deltas.prune_of(tuned).method == "none":
            return self._trimmed(tuned)
        return self.deltas.pruned(tuned, seed)

    def _trimmed(self, tuned: Tuned) -> tuple[Node, str]:
        """Return the int(density · n) largest entries, at least 1, if the merge method has its own density (ties)."""
        method, whole = self.recipe.method, self.deltas.whole(tuned)
        if "density" not in method.parameters or method.implies_prune:
            return whole, ""
        density = float(self._value("density", tuned.merge, tuned))
        if density >= 1:
            return whole, ""
        if density == 0:
            return self.deltas.nothing(tuned), " density=0"
        from deltamerge.methods.prune.select import largest

        kept = largest(self.graph.node, whole, max(1, int(density * math.prod(whole.shape))))
        if "rescale" in method.parameters and self._value("rescale", tuned.merge, None):
            from deltamerge.methods.prune.rescale import matched

            return matched(self.graph.node, whole, kept, "l1"), f" density={density:g} l1"
        return kept, f" density={density:g}"

    def _merged_delta(self, merge: Merge, seed: int) -> Node:
        """Return the merge minus the base, in float32."""
        assert merge.base is not None
        base = self.graph.read(merge.base)
        inputs = [base, *(self._delta(tuned, seed)[0] for tuned in merge.tunes)]
        merged = self._combined(merge, inputs, self._parameters(merge)[0])
        return self._difference(merged, base)

    def _value(self, key: str, merge: Merge, tuned: Tuned | None) -> Any:
        """Return a parameter of the merge method for a tensor, of one model where it is `tuned`'s own."""
        levels = list(merge.part.levels)
        if tuned is not None:
            levels.insert(0, self.recipe.models[tuned.index].parameters)
        default = self.recipe.method.parameters[key].default_for(len(merge.sources))
        value = lookup(key, merge.name, merge.position, *levels, default=default)
        if value is None:
            model = () if tuned is None else ("models", tuned.index)
            hint = "end the list with a value without a filter"
            problem = self.recipe.problem((*model, "parameters", key), f"no filter matches {merge.name}", hint)
            raise RecipeError(self.recipe.source.path, [problem])
        return value

    def _node(self, function: Function, inputs: Sequence[Node], shape: tuple[int, ...], **parameters: Any) -> Node:
        return self.graph.node(function, inputs, shape=shape, **parameters)

    def cast(self, node: Node, dtype: str) -> Node:
        """Return a node's values in the output dtype."""
        if node.is_source and node.dtype == dtype and not moves_rows(node):
            return node
        return self.graph.node(cast, [node], shape=node.shape, dtype=dtype, to=dtype)


def _core_size(combined: Node) -> int:
    """Return the number of directions of the core that a merge is computed in. 0: there is no core."""
    cores = (node for node in combined.inputs if node.function == CORE)
    return sum(one.rank for node in cores for one in node.parameter("updates") if one is not None)


def _factor(values: Mapping[str, Any]) -> float:
    """Return the factor of every weighted delta in a sum, from the parameters of `task_arithmetic`."""
    from deltamerge.methods.merge.sums import divisor_of

    factor: float = values["lambda_"] / (divisor_of(values["weights"]) if values["normalize"] else 1.0)
    return factor


def _updates(merge: Merge, method: str, values: Mapping[str, Any]) -> tuple[tuple[float, Tensor], ...]:
    """Return the coefficients and updates whose sum is a merged delta; none if it is no such sum."""
    if method != "task_arithmetic" or merge.base is None:
        return ()
    changed = [(tuned, weight) for tuned, weight in zip(merge.tunes, values["weights"], strict=True)
               if not tuned.tensor.is_same(merge.base)]  # fmt: skip
    if any(tuned.tensor.kind == "stored" for tuned, _ in changed):
        return ()
    from deltamerge.formats.peft.lora import update_of

    if any(update_of(tuned.tensor, merge.base) is None for tuned, _ in changed):
        return ()
    factor = _factor(values)
    return tuple((factor * weight, tuned.tensor.tensor) for tuned, weight in changed)
