"""Checks of a recipe beyond its types: methods, parameters and names, also across the documents of a file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence

from deltamerge.errors import Problem
from deltamerge.methods.parameters import KEPT
from deltamerge.methods.registry import MERGE, NO_EFFECT, MergeMethod
from deltamerge.recipe import prune
from deltamerge.recipe.output_keys import BUILT_IN, Quantization, is_literal
from deltamerge.recipe.problems import is_given, known_method, levels, prune_params, raw, suggest
from deltamerge.recipe.prune import effective_prune
from deltamerge.recipe.schema import DRAWN, Expert, Recipe, merge_params
from deltamerge.recipe.series import running
from deltamerge.recipe.values import show
from deltamerge.recipe.yaml_source import Loc, place

# Bounds on the size of a recipe, far above any written by hand: checking and planning always end.
MODELS = 1_000  # in all documents, slices and modules, with repetitions
LAYERS = 10_000  # layers that slices take, counted for each source
NAME = 1_000  # characters in a reference or a name
FOLDER_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
ANEW = "an average of these is made anew from all its models: kind: model"
_UNKNOWN, _WHOLE = "unknown parameter of", "is for the whole merge"
SHOWN = 3  # places that a warning names

# Keys that only merges have, and keys that only mixtures have.
OF_MERGES = (
    "models", "slices", "modules", "parameters", "prune", "calibration", "template", "tokenizer_source", "tokenizer",
    "chat_template",
)  # fmt: skip
OF_MIXTURES = ("shared_experts", "gate_mode", "experts_per_token", "architecture")
LEAST = 2  # experts


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield every fault that the types of the keys cannot express."""
    if recipe.is_moe or is_given(recipe, "experts"):
        yield from _mixture(recipe)
        return
    checks = (
        _inputs, _slices, _merge_method, _balance, _parameters, _required, _template, _config, _tokens,
        prune.problems, _output, _adapter, _running_sum, _study, _only_of_mixtures,
    )  # fmt: skip
    yield from (problem for check in checks for problem in check(recipe))


def _inputs(recipe: Recipe) -> Iterator[Problem]:
    """Check that the recipe has models, slices or modules, that they are not empty, and that names are distinct."""
    given = [key for key in ("models", "slices", "modules") if is_given(recipe, key)]
    if not given:
        yield recipe.problem((), "needs models", "models: a list of {model: path or hub id}")
    for key in given[1:]:
        message = f"cannot stand beside {given[0]}"
        yield recipe.problem((key,), message, "keep one of models, slices, modules", key=True)
    holders: list[Loc] = [(), *(("modules", name) for name in recipe.modules)]
    lists: list[Loc] = [(*loc, key) for loc in holders for key in ("models", "slices", "modules")]
    lists += [(*part.loc, "sources") for part in recipe.parts if not part.members]
    for empty in lists:
        if raw(recipe, *empty) in ([], {}):
            yield recipe.problem(empty, "must not be empty", "name at least one model")
    for name in recipe.modules:
        if is_given(recipe, "modules", name, "models") == is_given(recipe, "modules", name, "slices"):
            yield recipe.problem(("modules", name), "needs either models or slices")
    for part in recipe.parts:
        first: dict[str, Loc] = {}
        for i, at in zip(part.members, part.places, strict=True):
            name = recipe.names[i]
            if name in first:
                loc: Loc = ("models", i, "name") if recipe.models[i].name else ("models", i, "model")
                message = f"has the same name as {place(first[name])}, {show(name)}"
                yield recipe.problem(loc, message, "set a name of its own: masks are keyed by it")
            first.setdefault(name, at)


def _slices(recipe: Recipe) -> Iterator[Problem]:
    """Check that the sources of a slice have equally many layers, and that the layers of an unlisted base are clear."""
    for part in recipe.parts:
        if part.ranges is None:
            continue
        for (first, end), at in zip(part.ranges, part.places, strict=True):
            if end - first != part.layers:
                message = f"has {end - first} layers, the first source of the slice has {part.layers}"
                yield recipe.problem((*at, "layer_range"), message, "layers are merged one to one")
        method = known_method(recipe)
        listed = any(recipe.is_base(i) for i in part.members)
        if method is not None and method.deltas and part.base and not listed and len(set(part.ranges)) > 1:
            message = f"its sources lend different layers, so the layers of the base {show(part.base)} are not clear"
            yield recipe.problem(part.loc, message, "list the base as a source, with its layer_range")


def _merge_method(recipe: Recipe) -> Iterator[Problem]:
    """Check that the method is known, has its base if it needs one, and gets the right number of models."""
    name, method = recipe.method_name, known_method(recipe)
    if name is None:
        if not is_given(recipe, "merge_method") and recipe.models:
            hint = "slerp, ties, dare_linear, … (the recipe schema lists them); only a single fine-tune has a default"
            yield recipe.problem((), "needs merge_method", hint)
        return
    if method is None:
        message = f"unknown merge method {show(name)}"
        yield recipe.problem(("merge_method",), message, suggest(name, MERGE))
        return
    loc: Loc = ("merge_method",) if recipe.merge_method else ()
    based = bool(recipe.parts) and all(part.base for part in recipe.parts)
    if method.needs_base and not based and not is_given(recipe, "base_model"):
        yield recipe.problem(loc, f"{name} needs base_model", "name the model before fine-tuning")
    for part in recipe.parts:
        if not part.members:  # reported before
            continue
        loc = part.places[0][:-1]
        apart = method.base_apart(part.base)
        count = len([i for i in part.members if not (apart and recipe.is_base(i))])
        besides = " besides the base" if apart else ""
        if count < method.minimum:
            message = f"{name} needs at least {method.minimum} model{'s' * (method.minimum > 1)}{besides}"
            yield recipe.problem(loc, message)
        if method.maximum is not None and count > method.maximum:
            message = f"{name} takes {method.maximum} model{'s' * (method.maximum > 1)}{besides}, got {count}"
            yield recipe.problem(loc, message)


def _balance(recipe: Recipe) -> Iterator[Problem]:
    """Check that `balance` stands only beside a method of deltas."""
    method = known_method(recipe)
    if recipe.balance is not None and method is not None and not method.deltas:
        hint = "merge_method: task_arithmetic, or another that works on deltas"
        yield recipe.problem(("balance",), f"is of the deltas of a base, {method.name} has none", hint)


def _parameters(recipe: Recipe) -> Iterator[Problem]:
    """Check that the method has every given parameter, that its level is allowed, and that it is in its range."""
    method = known_method(recipe)
    if method is None:
        yield from _unknown_anywhere(recipe)
        return
    without = {at for at, _ in _ignored(recipe)}
    yield from (problem for at, problem in _parameters_of(recipe, method) if at not in without)


def _ignored(recipe: Recipe) -> Iterator[tuple[Loc, Problem]]:
    """Yield the place and the fault of each parameter without effect.

    These are the parameters of other methods. With `mergekit: true` they are all parameters that mergekit ignores.
    """
    method = known_method(recipe)
    for at, problem in () if method is None or recipe.is_moe else _parameters_of(recipe, method):
        unknown, whole = problem.message.startswith(_UNKNOWN), problem.message.startswith(_WHOLE)
        if (unknown or whole) if recipe.mergekit else (unknown and at[-1] in merge_params()):
            yield at, problem


def warnings(recipe: Recipe) -> Iterator[str]:
    """Warn of keys and parameters that have no effect, as in mergekit."""
    for key in recipe.stray_parameters:
        yield f"{key}: no effect at the top of a recipe, as in mergekit; move it to parameters"
    places: dict[tuple[str, str | None], list[str]] = {}
    for at, problem in _ignored(recipe):
        prunes = problem.hint if at[-1] == "density" else None
        places.setdefault((str(at[-1]), prunes), []).append(place(recipe.place(at)))
    for (_, prunes), several in places.items():
        more = f" and {len(several) - SHOWN} more" if len(several) > SHOWN else ""
        hint = f": {prunes}" if prunes else ""
        yield f"{', '.join(several[:SHOWN])}{more}: no effect under {recipe.method_name}, as in mergekit{hint}"


def _parameters_of(recipe: Recipe, method: MergeMethod) -> Iterator[tuple[Loc, Problem]]:
    """Yield the place and the fault of each wrong parameter."""
    pruned = {i for i in range(len(recipe.models)) if effective_prune(recipe, i).method != "none"}
    for loc, level, parameters in levels(recipe):
        known = {**method.parameters, **NO_EFFECT}
        if method.deltas and pruned and (loc[0] != "models" or loc[1] in pruned):
            known.setdefault("density", KEPT)
        for name, value in parameters.items():
            at = (*loc, name)
            if name not in known:
                hint = suggest(name, known)
                if name == "density":
                    hint = "it prunes: set prune.method, or merge_method to ties, dare_ties or dare_linear"
                elif name in prune_params():
                    hint = "it belongs under prune"
                yield at, recipe.problem(at, f"{_UNKNOWN} {method.name}", hint, key=True)
            elif level == "model" and name in method.parameters and not method.parameters[name].per_model:
                yield at, recipe.problem(at, _WHOLE, "move it to the recipe's parameters", key=True)
            else:
                yield from ((at, problem) for problem in recipe.out_of_range(at, known[name], value))


def _unknown_anywhere(recipe: Recipe) -> Iterator[Problem]:
    """Yield parameters that no method has. Used if the recipe's method is unknown."""
    known = NO_EFFECT.keys() | merge_params().keys()
    for loc, _, parameters in levels(recipe):
        for name in parameters.keys() - known:
            yield recipe.problem((*loc, name), "unknown parameter", suggest(name, known), key=True)


def _required(recipe: Recipe) -> Iterator[Problem]:
    """Check that parameters without a default are given, for each model or for all."""
    method = known_method(recipe)
    if method is None:
        return
    for part in recipe.parts:
        counted = [i for i in part.members if not (method.base_apart(part.base) and recipe.is_base(i))]
        above = dict.fromkeys(part.loc[:n] for n in (0, 2, len(part.loc)))  # the recipe, a module, a slice
        for name, param in method.parameters.items():
            if param.default_for(len(counted)) is not None:
                continue
            if any(is_given(recipe, *level, "parameters", name) for level in above):
                continue
            message = f"needs a {name}: {method.name} has no default"
            if not param.per_model:
                yield recipe.problem(("merge_method",), message, f"parameters: {{{name}: 0.5}}")
            for i in counted if param.per_model else ():
                if name not in recipe.models[i].parameters and not is_given(recipe, "models", i, "parameters", name):
                    yield recipe.problem(("models", i), message, f"parameters: {{{name}: 1.0}}")


def _config(recipe: Recipe) -> Iterator[Problem]:
    """Check that each key of `config` concerns what a model computes, and that its value is JSON."""
    if not recipe.config:
        return
    from deltamerge.models.config_differences import BOOKKEEPING

    for key, value in recipe.config.items():
        if BOOKKEEPING.fullmatch(key.rpartition(".")[2]):
            message = f"{show(key)} has no effect on the model"
            hint = "dtype: is a key of the recipe" if key in ("dtype", "torch_dtype") else "leave it out"
            yield recipe.problem(("config", key), message, hint, key=True)
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            yield recipe.problem(("config", key), f"{show(value)} is no value of a config.json")


def _template(recipe: Recipe) -> Iterator[Problem]:
    """Check that `template` names an input, and that the tokenizer is described once."""
    known = {*recipe.names, *(model.model for model in recipe.models)}
    method = known_method(recipe)
    if recipe.base_model is not None and (
        method is None or method.base_apart(recipe.base_model) or recipe.base_model in known
    ):
        known |= {recipe.base_model, "base"}
    if recipe.template is not None and recipe.template not in known and recipe.models:
        message = f"must be the name of a model, or base, got {show(recipe.template)}"
        yield recipe.problem(("template",), message, suggest(recipe.template, known))
    if recipe.tokenizer_of == "base" and not is_given(recipe, "base_model"):
        loc: Loc = ("tokenizer_source",) if recipe.tokenizer is None else ("tokenizer", "source")
        yield recipe.problem(loc, "base needs base_model")
    if is_given(recipe, "tokenizer") and is_given(recipe, "tokenizer_source"):
        yield recipe.problem(("tokenizer_source",), "cannot stand beside tokenizer", "keep one of the two", key=True)
    beside, alone = ("source", "tokens"), ("method", "k")
    for key in alone if recipe.transplant is None else beside:
        if is_given(recipe, "tokenizer", key):
            message = "is for transplant" if key in alone else "cannot stand beside transplant"
            hint = "transplant: MODEL" if key in alone else "the tokens come from that model's tokenizer"
            yield recipe.problem(("tokenizer", key), message, hint, key=True)
    if recipe.transplant is not None and not recipe.output.rules.standalone:
        message = f"a {recipe.output.kind} has the vocabulary of its base"
        yield recipe.problem(("tokenizer", "transplant"), message, "output: {kind: model}", key=True)


def _tokens(recipe: Recipe) -> Iterator[Problem]:
    """Check that a forced token has a source, and that a chat template is a known name or a text."""
    for token, wanted in (recipe.tokenizer.tokens if recipe.tokenizer is not None else {}).items():
        if wanted.force and not is_given(recipe, "tokenizer", "tokens", token, "source"):
            yield recipe.problem(("tokenizer", "tokens", token, "force"), "needs a source", "source: MODEL", key=True)
    known = {"auto", *BUILT_IN, *recipe.names, *(model.model for model in recipe.models)}
    known |= {"base", recipe.base_model} if recipe.base_model is not None else set()
    wanted_chat = recipe.chat_template
    if wanted_chat is not None and wanted_chat not in known and not is_literal(wanted_chat):
        message = f"must be auto, a model, {', '.join(BUILT_IN)}, or a Jinja text, got {show(wanted_chat)}"
        yield recipe.problem(("chat_template",), message, suggest(wanted_chat, known))


def _output(recipe: Recipe) -> Iterator[Problem]:
    """Check that a delta has a base, and that a delta that adds comes from a method that adds to the base."""
    output, method = recipe.output, known_method(recipe)
    yield from _quantization(recipe)
    yield from _low_rank(recipe)
    if not output.rules.patches:
        for key in ("semantics", "values", "steps"):
            if getattr(output, key) is not None and not (output.lora and key == "values"):
                yield recipe.problem(("output", key), "is of delta artifacts", "output: {kind: delta}", key=True)
        return
    if output.values is not None and output.semantics == "replace":
        hint = "semantics: add, or leave values out"
        yield recipe.problem(("output", "values"), "replace stores final values, in the output's dtype", hint, key=True)
    if not is_given(recipe, "base_model"):
        yield recipe.problem(("output", "kind"), "a delta needs base_model", "name the model that the output changes")
    elif output.adds and method is not None and not method.deltas:
        loc: Loc = ("output", "semantics" if output.semantics else "values")
        yield recipe.problem(loc, f"{method.name} adds nothing to the base", "semantics: replace")


def _low_rank(recipe: Recipe) -> Iterator[Problem]:
    """Check that keys of a LoRA stand only at `kind: peft`, and give its size in one way."""
    output = recipe.output
    sizes = [key for key in ("rank", "energy", "budget") if getattr(output, key) is not None]
    if not output.rules.adapts:
        for key in (*sizes, *(key for key in ("whole", "targets", "dora") if is_given(recipe, "output", key))):
            yield recipe.problem(("output", key), "is of a LoRA", "output: {kind: peft, rank: 32}", key=True)
        return
    if not sizes:
        for key in ("whole", "targets", "dora"):
            if is_given(recipe, "output", key):
                yield recipe.problem(("output", key), "needs a rank, an energy or a budget", "rank: 32", key=True)
        return
    if output.energy is not None and output.budget is not None:
        yield recipe.problem(("output", "budget"), "cannot stand beside energy", "keep one of the two", key=True)
    if output.values in ("int8", "sign"):
        yield recipe.problem(("output", "values"), f"factors are float32 or bfloat16, not {output.values}")
    if not is_given(recipe, "base_model"):
        yield recipe.problem(("output", "kind"), "a LoRA needs base_model", "name the model that the output changes")


FIXED_GROUPS = ("nvfp4", "mxfp4")


def _quantization(recipe: Recipe) -> Iterator[Problem]:
    """Check that only models are quantised, and that a scheme has no keys of another scheme."""
    wanted, kind, rules = recipe.output.scheme, recipe.output.kind, recipe.output.rules
    if wanted != "none" and not rules.standalone:
        message = f"a {kind} is not quantised" + (": its values have codings of their own" if rules.patches else "")
        yield recipe.problem(("output", "quantization"), message, "output: {kind: model}", key=True)
    yield from _rounding(recipe)
    if recipe.output.gguf is not None and not rules.standalone:
        yield recipe.problem(("output", "gguf"), f"a {kind} is no GGUF file", "output: {kind: model}", key=True)
    if not isinstance(wanted, Quantization):
        return
    ways = {"fp8": ("block", "channel"), "int8": ("channel",)}.get(wanted.scheme, ("group",))
    if wanted.by not in ways:
        message = f"{wanted.scheme} has a scale a {' or '.join(ways)}, got {show(wanted.strategy)}"
        yield recipe.problem(("output", "quantization", "strategy"), message)
    for key, way in (("block", "block"), ("group", "group")):
        fixed = key == "group" and wanted.scheme in FIXED_GROUPS
        if getattr(wanted, key) is not None and (fixed or wanted.by != way or way not in ways):
            message = f"is not for {wanted.scheme} with a scale a {wanted.by}"
            yield recipe.problem(("output", "quantization", key), message, key=True)


def _rounding(recipe: Recipe) -> Iterator[Problem]:
    """Check that a rounding has a quantization, and calibration rows if it needs them."""
    rounding, loc = recipe.output.rounding, ("output", "rounding")
    if rounding is None:
        return
    if recipe.output.scheme == "none":
        yield recipe.problem(loc, "nothing is quantised", "output: {quantization: int4}", key=True)
    elif rounding == "inputs" and recipe.calibration is None:
        yield recipe.problem(loc, "inputs needs calibration", "calibration: {data: calib.jsonl}, or rounding: nearest")


def _adapter(recipe: Recipe) -> Iterator[Problem]:
    """Check that the deltas of an adapter have a base."""
    method = known_method(recipe)
    if recipe.output.rules.adapts and method is not None and not method.deltas:
        hint = "merge_method: task_arithmetic, or another that works on deltas"
        yield recipe.problem(("output", "kind"), f"peft needs the deltas of a base, {method.name} has none", hint)


def _study(recipe: Recipe) -> Iterator[Problem]:
    """Check that the recipe has the models that a study names, and that sampler and pruner fit the objectives."""
    if recipe.study is None:
        return
    known = {recipe.names[i] for i in recipe.fine_tunes}
    several = isinstance(recipe.study.objective, tuple)
    for number, goal in enumerate(recipe.study.goals):
        at: Loc = ("study", "objective", number) if several else ("study", "objective")
        for key, names in (("of", [goal.of] if goal.of else []), ("weights", list(goal.weights))):
            for name in names:
                if name not in known:
                    yield recipe.problem((*at, key), f"{show(name)} is no fine-tune here", suggest(name, known))
        if goal.weights and not any(goal.weights.get(name, 1.0) for name in known):
            yield recipe.problem((*at, "weights"), "are all 0")
    if recipe.study.sampler == "cmaes" and len(recipe.study.goals) > 1:
        yield recipe.problem(("study", "sampler"), "cmaes has one objective", "sampler: nsga2, or tpe")
    if recipe.study.pruner != "none" and (several or any(goal.of_folder for goal in recipe.study.goals)):
        yield recipe.problem(
            ("study", "pruner"), "is for one objective that rows give, not a command's", "pruner: none"
        )


def _running_sum(recipe: Recipe) -> Iterator[Problem]:
    """Check that a running sum is of whole models, in float32, with weights that no later model changes."""
    if not recipe.output.rules.accumulates:
        return
    kind = ("output", "kind")
    method = known_method(recipe)
    if method is not None and method.name != "linear":
        yield recipe.problem(kind, f"a running sum is of linear, not {method.name}", "merge_method: linear")
    if recipe.slices or recipe.modules:
        yield recipe.problem(kind, "a running sum is of whole models", "models: run/step-*")
    for key in ("dtype", "out_dtype", "tokenizer", "tokenizer_source", "template", "chat_template"):
        if is_given(recipe, key):
            hint = "set it where the average is made"
            yield recipe.problem((key,), "is not for a running sum, which is float32 and no model", hint, key=True)
    if any(effective_prune(recipe, i).method != "none" for i in range(len(recipe.models))):
        yield recipe.problem(("prune",), "models of a running sum are whole", key=True)
    for loc, _, parameters in levels(recipe):
        if "normalize" in parameters:
            message = "is not for a running sum: the average that is made of it is divided"
            yield recipe.problem((*loc, "normalize"), message, key=True)
        if is_given(recipe, *loc, "weight"):
            message = "a running sum takes its weights from its schedule"
            yield recipe.problem((*loc, "weight"), message, "schedule: constant or ema", key=True)
    for i, model in enumerate(recipe.models):
        if model.window is not None:
            message = "a running sum has no window: the next checkpoint would take one away"
            yield recipe.problem(("models", i, "window"), message, ANEW, key=True)
            return
        if model.schedule == "minus_sqrt":
            message = "minus_sqrt has no running sum: each checkpoint changes the weights of all before it"
            yield recipe.problem(("models", i, "schedule"), message, ANEW)
            return
    for series in recipe.series:
        if series.schedule == "ema" and running("ema", 0, len(series.names), series.decay) is None:
            message = f"a running sum of {len(series.names)} models with decay {series.decay:g} leaves float32's range"
            yield recipe.problem(kind, message, ANEW)


def references(recipe: Recipe) -> frozenset[str]:
    """Return every model that a recipe may open, as written. Names of other documents are included."""
    tokens = recipe.tokenizer.tokens.values() if recipe.tokenizer is not None else ()
    sources = (getattr(token.source, "model", token.source) for token in tokens)
    bases = (recipe.base_model, *(part.base for part in recipe.parts))
    models = (model.model for model in recipe.models)
    tokenizers = (recipe.tokenizer_of, recipe.transplant)
    return frozenset(x for x in (*bases, *models, *tokenizers, *sources) if isinstance(x, str))


def problems_across(recipes: Sequence[Recipe]) -> Iterator[Problem]:
    """Check that every document but the output has its own name, and that a document used as a model makes one."""
    if len(recipes) == 1:
        return
    named: set[str] = set()
    unnamed = 0
    for recipe in recipes:
        if recipe.name is None:
            unnamed += 1
            if unnamed > 1:
                hint = "name: first; later documents may use that as a model"
                yield recipe.problem((), "a second document without a name", hint)
            continue
        if recipe.name in named:
            yield recipe.problem(("name",), f"another document is named {show(recipe.name)}")
        if not FOLDER_NAME.fullmatch(recipe.name):
            yield recipe.problem(("name",), "must be letters, digits, - _ and .", "it is a folder's name too")
        named.add(recipe.name)
    taken: set[str] = set()
    for recipe in recipes:
        output = recipe.output
        where = set() if output.path is None else {os.path.normpath(output.path)}
        if where & taken:
            hint = "a place of its own for each document; --set changes all of them"
            yield recipe.problem(("output", "path"), f"another document is written to {show(output.path)}", hint)
        taken |= where
        if not output.rules.reusable and any(recipe.name in references(other) for other in recipes):
            yield recipe.problem(("output", "kind"), f"other documents use it as a model, and {output.kind} is none")


def beyond_bounds(recipes: Sequence[Recipe]) -> Iterator[Problem]:
    """Yield the first bound that the documents of a file exceed. They are then not checked further."""
    models = layers = 0
    for recipe in recipes:
        if len(recipe.base_model or "") > NAME:
            yield recipe.problem(("base_model",), f"is longer than {NAME:,} characters", "a path or a hub id")
            return
        for part in recipe.parts:
            models += len(part.members)
            layers += part.layers * len(part.members) if part.ranges else 0
            if models > MODELS:
                yield recipe.problem(part.loc, f"more than {MODELS:,} models", "merge them in several runs")
                return
            if layers > LAYERS:
                message = f"more than {LAYERS:,} layers of all sources of the slices"
                yield recipe.problem(part.loc, message, "see layer_range: it counts the layers of the model")
                return
        for i, model in enumerate(recipe.models):
            if len(model.model) > NAME or len(model.name or "") > NAME:
                yield recipe.problem(("models", i), f"a name longer than {NAME:,} characters", "a path or a hub id")
                return


# -- mixtures of experts


def _mixture(recipe: Recipe) -> Iterator[Problem]:
    """Yield every fault of a mixture that the types of the keys cannot express."""
    if recipe.method_name != "moe":
        message = f"are merged by moe, not by {show(recipe.merge_method)}"
        yield recipe.problem(("experts",), message, "merge_method: moe, or leave it out", key=True)
        return
    if not is_given(recipe, "experts"):
        yield recipe.problem(("merge_method",), "moe needs experts", "experts: [{model: …, positive_prompts: […]}, …]")
        return
    if not is_given(recipe, "base_model"):
        yield recipe.problem((), "moe needs base_model", "attention, norms and embeddings are taken from it")
    for key in OF_MERGES:
        if is_given(recipe, key):
            yield recipe.problem((key,), "is not for moe", "remove it", key=True)
    if not recipe.output.rules.standalone:
        yield recipe.problem(("output", "kind"), "moe makes a model", "kind: model")
    if recipe.output.quantization != "none":
        yield recipe.problem(("output", "quantization"), "moe writes plain weights", "quantize its output", key=True)
    if recipe.output.gguf is not None:
        yield recipe.problem(("output", "gguf"), "no GGUF file is written of a mixture", "remove it", key=True)
    yield from _counts(recipe)
    yield from _prompts(recipe)
    yield from _names(recipe)


def _only_of_mixtures(recipe: Recipe) -> Iterator[Problem]:
    """Check that a recipe without experts has no keys of mixtures."""
    for key in OF_MIXTURES:
        if is_given(recipe, key):
            yield recipe.problem((key,), "is for moe, and there are no experts", "experts: […]", key=True)


def _counts(recipe: Recipe) -> Iterator[Problem]:
    count, wanted = len(recipe.experts), recipe.experts_per_token
    if count < LEAST:
        yield recipe.problem(("experts",), f"must be at least {LEAST} experts, got {count}")
    elif wanted > count:
        loc = ("experts_per_token",) if is_given(recipe, "experts_per_token") else ()
        yield recipe.problem(loc, f"experts_per_token is {wanted}, and there are {count} experts")


def _prompts(recipe: Recipe) -> Iterator[Problem]:
    """Check that routers made from prompts have prompts for every expert, and that the prompts differ."""
    shared = [bool(expert.positive_prompts) for expert in recipe.shared_experts]
    if recipe.gate_mode in DRAWN:
        return
    for i, expert in enumerate(recipe.experts):
        if not expert.positive_prompts:
            yield _without(recipe, i)
    for i, expert in enumerate(recipe.shared_experts):
        if expert.negative_prompts and not expert.positive_prompts:
            yield recipe.problem(("shared_experts", i), "has negative_prompts alone", "give positive_prompts too")
    if any(shared) and not all(shared):
        at = ("shared_experts", shared.index(False))
        yield recipe.problem(at, "has no positive_prompts, as others have", "give them to all shared experts or none")
    same = len(recipe.experts) >= LEAST and len({expert.prompts for expert in recipe.experts}) == 1
    if same and recipe.experts[0].positive_prompts:
        hint = "give each expert texts that it is good at, or gate_mode: random"
        yield recipe.problem(("experts",), "have the same prompts: their routers would be the same", hint)


def _without(recipe: Recipe, index: int) -> Problem:
    message = f"has no positive_prompts, which gate_mode {recipe.gate_mode} makes its router of"
    return recipe.problem(("experts", index), message, "give some, or gate_mode: random")


def _names(recipe: Recipe) -> Iterator[Problem]:
    """Check that no two experts have one name."""
    seen: set[str] = set()
    for key, experts in (("experts", recipe.experts), ("shared_experts", recipe.shared_experts)):
        for i, expert in enumerate(experts):
            if expert.name is not None and expert.name in seen:
                yield recipe.problem((key, i, "name"), f"another expert is named {show(expert.name)}")
            seen |= {expert.name} if expert.name else set()


def expert_names(experts: tuple[Expert, ...]) -> list[str]:
    """Return the name of every expert. A number is appended if an earlier expert has the same reference."""
    found: list[str] = []
    for expert in experts:
        name, number = expert.name or expert.reference, 1
        while name in found:
            number += 1
            name = f"{expert.name or expert.reference} ({number})"
        found.append(name)
    return found
