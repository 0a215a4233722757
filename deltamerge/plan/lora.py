"""`output.kind: peft` of a LoRA adapter: its own weights are the deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from deltamerge.calibrate.q import adapter_masks
from deltamerge.calibrate.spec import CalibrationInput, Pruned, Spec, mask_seeds
from deltamerge.errors import InputError, RecipeError
from deltamerge.files.strict_json import read_json
from deltamerge.formats.peft.config import DERIVED
from deltamerge.formats.peft.lora import is_dora, is_low_rank
from deltamerge.formats.peft.parts import factor_names
from deltamerge.methods.merge.passthrough import passthrough
from deltamerge.methods.ops import dense
from deltamerge.methods.registry import PRUNE
from deltamerge.plan.delta_graph import Deltas
from deltamerge.plan.inputs import Input, Inputs
from deltamerge.plan.merged_tensor import Tuned
from deltamerge.recipe.prune import Pruning, effective_prune
from deltamerge.recipe.schema import CalibratedQ, Recipe
from deltamerge.tensors.graph import Node
from deltamerge.tensors.tensor import Tensor, TensorInfo
from deltamerge.tensors.views import zeros_like


def own_weights(recipe: Recipe, inputs: Inputs) -> Inputs | None:
    """The inputs of a run on the own weights of a LoRA adapter that is the only fine-tune; None where there is none.

    A and B are the deltas, on a base of zeros; the adapter's other tensors stand in both and are copied.

    InputError: the adapter is on another base than the recipe's, or the base is itself one with an adapter.
    RecipeError: a weight or λ other than 1, a q or a mask from calibration.
    """
    base, tune = inputs.base, inputs.tunes[0]
    if not recipe.output.rules.adapts or base is None:
        return None
    group = inputs.groups[0]
    if len(inputs.groups) > 1 or group.part.ranges is not None:
        raise InputError("an adapter cannot be made of slices or modules", hint="write kind: model")
    if base.checkpoint.adapter is not None:
        raise InputError(f"{base.name}: an adapter needs a base that can be loaded", hint="merge it: passthrough")
    adapter = tune.checkpoint.adapter
    if recipe.output.lora or len(inputs.tunes) != 1 or adapter is None:
        return None
    if base.checkpoint.path != tune.checkpoint.path:
        message = f"{tune.name}: not an adapter on base_model, {base.name}"
        raise InputError(message, hint=f"base_model: {tune.checkpoint.base_reference}")
    assert tune.index is not None
    if (kind := adapter.config.get("peft_type")) != "LORA":
        raise InputError(f"{tune.name}: only LoRA's own A and B can be pruned, not {kind}", hint="write kind: model")
    if (start := adapter.config.get("init_lora_weights")) in DERIVED:
        message = f"{tune.name}: init_lora_weights {start!r} begins with a part of the base, which pruning would cut"
        raise InputError(message, hint="write kind: model, or save it as plain LoRA with peft")
    _check(recipe, tune.index)
    names = {name: name for name in adapter.tensors}
    factors = factor_names(adapter)
    nothing = {n: replace(i, tensor=zeros_like(i)) if n in factors else i for n, i in adapter.tensors.items()}
    own = replace(tune, tensors=dict(adapter.tensors), stored=names)
    group = replace(group, base=replace(base, tensors=nothing, stored=names), tunes=(own,))
    return Inputs((group,), own, inputs.vocabulary)


@dataclass(frozen=True, slots=True)
class Product:
    """An adapted weight, as expanded, and its pruned factors, "a" and "b"."""

    weight: TensorInfo
    update: Tensor
    factors: dict[str, Tuned]


def factor_pairs(recipe: Recipe, pruned: Sequence[Tuned]) -> list[Product]:
    """The adapted weights whose factors are `pruned`; none where whole weights are.

    InputError: a DoRA adapter, whose rows are scaled by their norms; experts or convolutions.
    """
    model = pruned[0].model
    if not recipe.output.rules.adapts or model.checkpoint.adapter is None:
        return []
    by_name = {tuned.name: tuned for tuned in pruned}
    products = []
    for weight in model.checkpoint.tensors.values():
        if is_low_rank(update := weight.tensor) and len(weight.shape) == 2:
            if is_dora(update):
                raise InputError(f"{model.name}: q cannot be calibrated on DoRA", hint="give q a number")
            sides = (("a", update.inputs[1]), ("b", update.inputs[2]))
            factors = {side: by_name[info.name] for side, info in sides if info.name in by_name}
            if factors:
                products.append(Product(weight, update, factors))
    paired = {tuned.name for product in products for tuned in product.factors.values()}
    if alone := next((name for name in by_name if name not in paired), None):
        message = f"{model.name}: q can be calibrated on A and B of linear layers alone, not {alone}"
        raise InputError(message, hint="give q a number, or exclude it")
    return products


def factor_roots(products: Sequence[Product]) -> dict[str, tuple[str, int]]:
    """A pruned factor's name -> the weight whose q it has a root of, and which root."""
    return {t.name: (p.weight.name, len(p.factors)) for p in products for t in p.factors.values()}


def factor_spec(
    products: Sequence[Product], source: CalibrationInput, prune: Pruning, q: CalibratedQ, deltas: Deltas
) -> Spec:
    """The calibration of an adapter's own A and B: masks and q are those of their product, the update of the weight."""
    random, node = PRUNE[prune.method].random, deltas.graph.node

    def product_node(product: Product, seed: int) -> Node:
        update, factors = product.update, []
        for side, info in (("a", update.inputs[1]), ("b", update.inputs[2])):
            if side in product.factors:
                stored = deltas.masked(product.factors[side], seed)
                factor = node(dense, [stored], shape=info.shape)
            else:
                factor = node(passthrough, [deltas.graph.read(info)], shape=info.shape, scales=(1.0,))
            factors.append(node(adapter_masks.whole, kind="small", node=factor))
        return node(adapter_masks.product, factors, shape=update.shape, **dict(update.parameters))

    pruned = []
    for product in products:
        nodes = tuple(product_node(product, source.seed + s) for s in range(mask_seeds(source, prune.method, q)))
        density = math.prod(deltas.density(tuned) or 1.0 for tuned in product.factors.values())
        pruned.append(Pruned(product.weight.name, product.weight.name, density, density if random else 1.0, nodes))
    scope = q.scope_or_default
    return Spec(source, prune.method, tuple(pruned), random, q.objective, scope, q.search, q.limits)


def refuse_changed_config(tune: Input) -> None:
    """InputError where an adapter changes the config, which calibration reads from the base's folder."""
    checkpoint = tune.checkpoint
    if checkpoint.adapter is not None and checkpoint.config != read_json(checkpoint.path / "config.json"):
        message = f"{tune.name}: calibration on an adapter that changes the base's head or config"
        raise InputError(message, hint="merge it first: a recipe of its own with merge_method: passthrough")


def _check(recipe: Recipe, index: int) -> None:
    problems = []
    for loc, parameters in (((), recipe.parameters), (("models", index), recipe.models[index].parameters)):
        for key in {"weight", "lambda"} & parameters.keys():
            if parameters[key] != 1:
                hint = "scale the adapter where it is loaded: set_scale, or the weight of a merge"
                message = "must be 1: it would scale both A and B"
                problems.append(recipe.problem((*loc, "parameters", key), message, hint))
    prune = effective_prune(recipe, index)
    q = prune.q if isinstance(prune.q, CalibratedQ) else None
    measured = PRUNE[prune.method].needs_activations
    if measured or (q is not None and (q.scope == "row" or q.objective == "layer_mse")):
        what = prune.method if measured else "layer_mse or a q per row"
        hint = "objective: output_change or validation, scope: global or layer; or kind: model, on the expanded delta"
        problems.append(recipe.problem(("output", "kind"), f"peft cannot use {what} on an adapter's own A and B", hint))
    if prune.protect is not None:
        problems.append(recipe.problem(("output", "kind"), "peft cannot use protect on an adapter's own A and B"))
    if problems:
        raise RecipeError(recipe.source.path, problems)
