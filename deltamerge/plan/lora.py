"""`output.kind: peft` of a LoRA adapter: its own weights are the deltas."""

from __future__ import annotations

from dataclasses import replace

from deltamerge.errors import InputError, RecipeError
from deltamerge.formats.peft.config import DERIVED
from deltamerge.formats.peft.parts import factor_names
from deltamerge.methods.registry import PRUNE
from deltamerge.plan.inputs import Inputs
from deltamerge.recipe.effective_prune import effective_prune
from deltamerge.recipe.prune_keys import CalibratedQ
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.computed import Zeros


def own_weights(recipe: Recipe, inputs: Inputs) -> Inputs | None:
    """Return the inputs of a run on the own weights of a LoRA adapter that is the only fine-tune; None where there is
    none.

    A and B are the deltas, on a base of zeros; the adapter's other tensors stand in both and are copied.

    InputError: the adapter is on another base than the recipe's, or the base is itself one with an adapter.
    RecipeError: a weight or λ other than 1, a q or a mask from calibration.
    """
    base, tune = inputs.base, inputs.tunes[0]
    if recipe.output.kind != "peft" or base is None:
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
    nothing = {n: replace(i, begin=0, made=Zeros()) if n in factors else i for n, i in adapter.tensors.items()}
    own = replace(tune, tensors=dict(adapter.tensors), stored=names)
    group = replace(group, base=replace(base, tensors=nothing, stored=names), tunes=(own,))
    return Inputs((group,), own, inputs.vocabulary)


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
