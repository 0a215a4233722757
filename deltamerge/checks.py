"""What a recipe must be beyond its types: methods and their parameters, names, pruning; and what is yet to come."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Literal

from deltamerge.chat_templates import BUILT_IN, is_literal
from deltamerge.errors import Problem
from deltamerge.faults import show, suggest
from deltamerge.methods import (
    COMMON_KEYS,
    MERGE,
    NO_EFFECT,
    PRUNE,
)
from deltamerge.parameters import Value, leaves
from deltamerge.parts import written
from deltamerge.pruning import effective_prune
from deltamerge.registry import MergeMethod, Param
from deltamerge.source import Loc, place

if TYPE_CHECKING:
    from deltamerge.recipe import Prune, Recipe

_PRUNE_PARAMS = {name: param for method in reversed(list(PRUNE.values())) for name, param in method.parameters.items()}


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Every fault that the types of the keys do not show."""
    checks = (
        _inputs, _slices, _merge_method, _parameters, _required, _template, _tokens, _prune_keys, _pruning, _calibrated,
        _whole_merge, _output, _adapter, _budget,
    )  # fmt: skip
    return (problem for check in checks for problem in check(recipe))


def unsupported(recipe: Recipe) -> list[tuple[Loc, str]]:
    """What this version cannot run yet, and where the recipe asks for it."""
    asked: list[tuple[bool, Loc, str]] = []
    parted = bool(recipe.slices or recipe.modules)
    for at, prune in _prunes(recipe):
        massive = prune.protect is not None and prune.protect.massive_activations is not None
        calibrated = prune.calibrated_q is not None or prune.method == "wanda" or massive
        asked.append((parted and calibrated, at, "calibration of the sources of slices and modules"))
        searched = prune.budget is not None and prune.calibrated_q is not None
        asked.append((searched, (*at, "q"), "a calibrated q beside a budget"))
    return [(at, message) for wanted, at, message in asked if wanted]


def _prunes(recipe: Recipe) -> Iterator[tuple[Loc, Prune]]:
    """Every `prune` of the recipe and where it stands, the recipe's own first."""
    if recipe.prune is not None:
        yield ("prune",), recipe.prune
    for i, model in enumerate(recipe.models):
        if model.prune is not None:
            yield ("models", i, "prune"), model.prune


Level = Literal["merge", "model"]


def _levels(recipe: Recipe) -> Iterator[tuple[Loc, Level, Mapping[str, Value]]]:
    """Every `parameters` of the recipe: where it stands, and whether it is for one model or for the merge."""
    yield ("parameters",), "merge", recipe.parameters
    for name, module in recipe.modules.items():
        yield ("modules", name, "parameters"), "merge", module.parameters
    for part in recipe.parts:
        if part.ranges is not None:
            yield (*part.loc, "parameters"), "merge", part.levels[0]
    for i, model in enumerate(recipe.models):
        yield ("models", i, "parameters"), "model", model.parameters


def _given(recipe: Recipe, *loc: str | int) -> bool:
    """Whether the text has a value there, sound or not: what is broken has been reported, and is not missing."""
    value = recipe.source.data
    for part in written(recipe.parts, loc):
        if isinstance(part, int):
            value = value[part] if isinstance(value, list) and part < len(value) else None
        else:
            value = value.get(part) if isinstance(value, dict) else None
    return value is not None


def _known_method(recipe: Recipe) -> MergeMethod | None:
    return MERGE.get(recipe.method_name or "")


def _inputs(recipe: Recipe) -> Iterator[Problem]:
    """One of models, slices, modules; as many models as the method takes; distinct names."""
    given = [key for key in ("models", "slices", "modules") if _given(recipe, key)]
    if not given:
        yield recipe.problem((), "needs models", "models: a list of {model: path or hub id}")
    for key in given[1:]:
        message = f"cannot stand beside {given[0]}"
        yield recipe.problem((key,), message, "keep one of models, slices, modules", key=True)
    for key in given:
        if recipe.source.data[key] in ([], {}):
            yield recipe.problem((key,), "must not be empty", "name at least one model")
    for name in recipe.modules:
        if _given(recipe, "modules", name, "models") == _given(recipe, "modules", name, "slices"):
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
    """The sources of a slice lend the same number of layers; a base that is not among them has the same range."""
    for part in recipe.parts:
        if part.ranges is None:
            continue
        for (first, end), at in zip(part.ranges, part.places, strict=True):
            if end - first != part.layers:
                message = f"has {end - first} layers, the first source of the slice has {part.layers}"
                yield recipe.problem((*at, "layer_range"), message, "layers are merged one to one")
        method = _known_method(recipe)
        listed = any(recipe.is_base(i) for i in part.members)
        if method is not None and method.deltas and part.base and not listed and len(set(part.ranges)) > 1:
            message = f"its sources lend different layers, so those of the base {show(part.base)} are not clear"
            yield recipe.problem(part.loc, message, "list the base as a source, with its layer_range")


def _merge_method(recipe: Recipe) -> Iterator[Problem]:
    """A known method, its base, and as many models as it takes."""
    name, method = recipe.method_name, _known_method(recipe)
    if name is None:
        if not _given(recipe, "merge_method") and recipe.models:
            hint = "slerp, ties, dare_linear, … (the recipe schema lists them); only a single fine-tune has a default"
            yield recipe.problem((), "needs merge_method", hint)
        return
    if method is None:
        message = f"unknown merge method {show(name)}"
        yield recipe.problem(("merge_method",), message, suggest(name, MERGE))
        return
    loc: Loc = ("merge_method",) if recipe.merge_method else ()
    based = bool(recipe.parts) and all(part.base for part in recipe.parts)
    if method.needs_base and not based and not _given(recipe, "base_model"):
        yield recipe.problem(loc, f"{name} needs base_model", "name what the models were fine-tuned from")
    for part in recipe.parts:
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


def _parameters(recipe: Recipe) -> Iterator[Problem]:
    """Every parameter is one of the method's, at a level where it means something, and in its range."""
    method = _known_method(recipe)
    if method is None:
        yield from _unknown_anywhere(recipe)
        return
    pruned = {i for i in range(len(recipe.models)) if effective_prune(recipe, i).method != "none"}
    for loc, level, parameters in _levels(recipe):
        known = {**method.parameters, **NO_EFFECT}
        if method.deltas and pruned and (loc[0] != "models" or loc[1] in pruned):
            known.setdefault("density", _PRUNE_PARAMS["density"])
        for name, value in parameters.items():
            at = (*loc, name)
            if name not in known:
                hint = suggest(name, known)
                if name == "density":
                    hint = "it prunes: set prune.method, or merge_method to ties, dare_ties or dare_linear"
                elif name in _PRUNE_PARAMS:
                    hint = "it belongs under prune"
                yield recipe.problem(at, f"unknown parameter of {method.name}", hint, key=True)
            elif level == "model" and name in method.parameters and not method.parameters[name].per_model:
                yield recipe.problem(at, "is for the whole merge", "move it to the recipe's parameters", key=True)
            else:
                yield from _out_of_range(recipe, at, known[name], value)


def _unknown_anywhere(recipe: Recipe) -> Iterator[Problem]:
    """Parameters that no method has, for a recipe whose method is not known."""
    known = NO_EFFECT.keys() | {name for method in MERGE.values() for name in method.parameters}
    for loc, _, parameters in _levels(recipe):
        for name in parameters.keys() - known:
            yield recipe.problem((*loc, name), "unknown parameter", suggest(name, known), key=True)


def _out_of_range(recipe: Recipe, loc: Loc, param: Param, value: Value) -> Iterator[Problem]:
    if param.scalar and not isinstance(value, bool | int | float):
        yield recipe.problem(loc, f"must be {param.wanted()}, the same for every tensor, got {show(value)}")
        return
    for inner, scalar in leaves(value):
        in_gradient = bool(inner) and inner[-1] != "value"
        # mergekit reads 0 and 1 as booleans; as points of a gradient they would be ambiguous
        if not param.accepts(scalar) or (param.kind == "bool" and in_gradient and not isinstance(scalar, bool)):
            yield recipe.problem((*loc, *inner), f"must be {param.wanted()}, got {show(scalar)}")


def _required(recipe: Recipe) -> Iterator[Problem]:
    """Parameters without a default are given for each model, or for all."""
    method = _known_method(recipe)
    if method is None:
        return
    for part in recipe.parts:
        counted = [i for i in part.members if not (method.base_apart(part.base) and recipe.is_base(i))]
        levels = dict.fromkeys(loc[:n] for loc in [part.loc] for n in (0, 2, len(loc)))
        for name, param in method.parameters.items():
            if param.default_for(len(counted)) is not None:
                continue
            if any(_given(recipe, *level, "parameters", name) for level in levels):
                continue
            message = f"needs a {name}: {method.name} has no default"
            if not param.per_model:
                yield recipe.problem(("merge_method",), message, f"parameters: {{{name}: 0.5}}")
            for i in counted if param.per_model else ():
                if not _given(recipe, "models", i, "parameters", name):
                    yield recipe.problem(("models", i), message, f"parameters: {{{name}: 1.0}}")


def _template(recipe: Recipe) -> Iterator[Problem]:
    """`template` names an input, and the tokenizer is described once."""
    known = {*recipe.names, *(model.model for model in recipe.models)}
    method = _known_method(recipe)
    if recipe.base_model is not None and (
        method is None or method.base_apart(recipe.base_model) or recipe.base_model in known
    ):
        known |= {recipe.base_model, "base"}
    if recipe.template is not None and recipe.template not in known and recipe.models:
        message = f"must be the name of a model, or base, got {show(recipe.template)}"
        yield recipe.problem(("template",), message, suggest(recipe.template, known))
    if recipe.tokenizer_of == "base" and not _given(recipe, "base_model"):
        loc: Loc = ("tokenizer_source",) if recipe.tokenizer is None else ("tokenizer", "source")
        yield recipe.problem(loc, "base needs base_model")
    if _given(recipe, "tokenizer") and _given(recipe, "tokenizer_source"):
        yield recipe.problem(("tokenizer_source",), "cannot stand beside tokenizer", "keep one of the two", key=True)


def _tokens(recipe: Recipe) -> Iterator[Problem]:
    """A forced token has a source, and a chat template is a name that is known, or a text."""
    for token, wanted in (recipe.tokenizer.tokens if recipe.tokenizer is not None else {}).items():
        if wanted.force and not _given(recipe, "tokenizer", "tokens", token, "source"):
            yield recipe.problem(("tokenizer", "tokens", token, "force"), "needs a source", "source: MODEL", key=True)
    known = {"auto", *BUILT_IN, *recipe.names, *(model.model for model in recipe.models)}
    known |= {"base", recipe.base_model} if recipe.base_model is not None else set()
    wanted_chat = recipe.chat_template
    if wanted_chat is not None and wanted_chat not in known and not is_literal(wanted_chat):
        message = f"must be auto, a model, {', '.join(BUILT_IN)}, or a Jinja text, got {show(wanted_chat)}"
        yield recipe.problem(("chat_template",), message, suggest(wanted_chat, known))


def _prune_keys(recipe: Recipe) -> Iterator[Problem]:
    """What can be said of one `prune` by itself."""
    for loc, prune in _prunes(recipe):
        if prune.method is not None and prune.method not in PRUNE:
            message = f"unknown pruning method {show(prune.method)}"
            yield recipe.problem((*loc, "method"), message, suggest(prune.method, PRUNE))
        if prune.q is not None and prune.rescale is not None:
            yield recipe.problem((*loc, "rescale"), "cannot stand beside q", "keep one of the two", key=True)
        method = PRUNE.get(prune.method or "")
        for name, param in {**_PRUNE_PARAMS, **(method.parameters if method else {})}.items():
            value = prune.number_q if name == "q" else getattr(prune, name)
            if value is not None:
                yield from _out_of_range(recipe, (*loc, name), param, value)


def _pruning(recipe: Recipe) -> Iterator[Problem]:
    """What each model's pruning, defaults and all, lacks or has too much."""
    merge = _known_method(recipe)
    if merge is None:
        return
    used: set[str] = set(COMMON_KEYS)
    methods: list[str] = []
    for i, model in enumerate(recipe.models):
        effective = effective_prune(recipe, i)
        method = PRUNE.get(effective.method)
        own = model.prune
        loc: Loc = ("models", i, "prune") if own is not None and own.method is not None else ("prune",)
        if method is None or _lost(recipe, ("prune",), recipe.prune) or _lost(recipe, ("models", i, "prune"), own):
            return  # reported, and which keys it knows is not clear
        apart = merge.base_apart(recipe.part_of[i].base)
        if apart and recipe.is_base(i):
            if own is not None:
                yield recipe.problem(("models", i, "prune"), "the base has no delta to prune", key=True)
            continue
        known = COMMON_KEYS | method.parameters.keys() | method.options
        used |= known
        methods.append(method.name)
        if own is not None and own.method != "none":
            yield from _no_effect(recipe, ("models", i, "prune"), own, known, [method.name])
        if method.name == "none":
            continue
        if not (merge.deltas and apart):
            hint = "give base_model" if merge.deltas else "use task_arithmetic"
            yield recipe.problem((*loc, "method"), f"{merge.name} has no deltas to prune", hint)
            continue
        if method.groups and effective.group not in method.groups:
            yield recipe.problem((*loc, "group"), f"must be one of {', '.join(method.groups)}")
        if method.name == "structured":
            yield from _columns(recipe, i, loc)
        elif effective.density is None and effective.budget is None and not _density_given(recipe, i):
            yield recipe.problem(loc, f"{method.name} needs a density", "density: 0.1 keeps a tenth of the delta")
        if method.name != "structured":
            for name in (key for key, value in effective.parameters.items() if value is None):
                yield recipe.problem(loc, f"{method.name} needs {name}", method.parameters[name].summary)
    if recipe.prune is not None and recipe.prune.method != "none" and methods:
        yield from _no_effect(recipe, ("prune",), recipe.prune, used, methods)


def _calibrated(recipe: Recipe) -> Iterator[Problem]:
    """What a calibrated q and wanda need: data, and a search that fits the objective and the scope."""
    for loc, prune in _prunes(recipe):
        q = prune.calibrated_q
        wanted = "a calibrated q" if q is not None else "wanda" if prune.method == "wanda" else None
        if wanted is not None and not _given(recipe, "calibration"):
            key = "q" if q is not None else "method"
            yield recipe.problem((*loc, key), f"{wanted} needs calibration", "calibration: {data: calib.jsonl}")
        yield from _protect(recipe, loc, prune)
        if q is None or isinstance(prune.q, str):
            continue
        if q.objective == "layer_mse" and q.search != "auto":
            yield recipe.problem((*loc, "q", "search"), "layer_mse is solved in closed form", "leave search out")
        elif q.search == "gradient" and q.objective != "output_change":
            yield recipe.problem((*loc, "q", "search"), "gradient needs objective output_change", "or search: auto")
        elif q.search == "gradient" and q.scope == "global":
            yield recipe.problem((*loc, "q", "search"), "gradient needs scope layer or row", "scope: layer")


def _protect(recipe: Recipe, loc: Loc, prune: Prune) -> Iterator[Problem]:
    """protect names columns or counts massive activations, which are measured on calibration data."""
    if prune.protect is None:
        return
    given = [key for key in ("massive_activations", "columns") if _given(recipe, *loc, "protect", key)]
    if len(given) != 1:
        message = "needs massive_activations or columns" if not given else "takes one of massive_activations, columns"
        yield recipe.problem((*loc, "protect"), message, "protect: {massive_activations: 3}")
    elif prune.protect.massive_activations is not None and not _given(recipe, "calibration"):
        place = (*loc, "protect", "massive_activations")
        yield recipe.problem(place, "needs calibration", "calibration: {data: calib.jsonl}, or name columns")


def _output(recipe: Recipe) -> Iterator[Problem]:
    """A delta has a base, and one that adds comes from a method that adds to it."""
    output, method = recipe.output, _known_method(recipe)
    if output.kind != "delta":
        for key in ("semantics", "values"):
            if getattr(output, key) is not None:
                yield recipe.problem(("output", key), "is of delta artifacts", "output: {kind: delta}", key=True)
        return
    if output.values is not None and output.semantics == "replace":
        hint = "semantics: add, or leave values out"
        yield recipe.problem(("output", "values"), "replace stores final values, in the output's dtype", hint, key=True)
    if not _given(recipe, "base_model"):
        yield recipe.problem(("output", "kind"), "a delta needs base_model", "name what the output is a change of")
    elif output.adds and method is not None and not method.deltas:
        loc: Loc = ("output", "semantics" if output.semantics else "values")
        yield recipe.problem(loc, f"{method.name} adds nothing to the base", "semantics: replace")


def _budget(recipe: Recipe) -> Iterator[Problem]:
    """A budget is the size of an artifact of one fine-tune, and takes the place of its density."""
    for loc, prune in _prunes(recipe):
        if prune.budget is None:
            continue
        at = (*loc, "budget")
        if recipe.output.kind != "delta":
            yield recipe.problem(at, "is the size of a delta artifact", "output: {kind: delta}", key=True)
        if len(recipe.fine_tunes) > 1:
            yield recipe.problem(at, "needs a single fine-tune", "give each model a density", key=True)
        for i in recipe.fine_tunes:
            effective = effective_prune(recipe, i)
            if _density_given(recipe, i):
                yield recipe.problem(at, "cannot stand beside a density", "keep one of the two", key=True)
            if effective.sampling != "uniform" or effective.group in ("row", "model"):
                yield recipe.problem(at, "needs uniform sampling, and groups that are tensors", key=True)


def _whole_merge(recipe: Recipe) -> Iterator[Problem]:
    """per: merge calibrates one λ, so what single q's are searched by must be one objective and nothing else."""
    calibration, method = recipe.calibration, _known_method(recipe)
    if calibration is None:
        return
    exact = calibration.metric == "exact_match"
    for key in ("answer", "new_tokens"):
        if key in calibration.model_fields_set and not exact:
            yield recipe.problem(("calibration", key), "has no effect without metric: exact_match", key=True)
    if calibration.per == "model":
        return
    loc: Loc = ("calibration", "per")
    if method is not None and not (method.deltas and method.needs_base):
        yield recipe.problem(loc, f"merge needs deltas, but {method.name} has none", "use task_arithmetic or ties")
    searched = [(at, prune.calibrated_q) for at, prune in _prunes(recipe) if prune.calibrated_q is not None]
    if len({q.objective for _, q in searched if q}) > 1:
        yield recipe.problem(loc, "merge needs one objective for all models")
    for at, q in searched:
        if q is not None and (q.objective == "layer_mse" or q.model_fields_set - {"objective"}):
            hint = "q: output_change or validation, without scope, search and bounds"
            yield recipe.problem((*at, "q"), "with per: merge one lambda is searched, and no q", hint)


def _adapter(recipe: Recipe) -> Iterator[Problem]:
    """What an adapter is made from: deltas of a base."""
    method = _known_method(recipe)
    if recipe.output.kind == "peft" and method is not None and not method.deltas:
        hint = "merge_method: task_arithmetic, or another that works on deltas"
        yield recipe.problem(("output", "kind"), f"peft needs the deltas of a base, {method.name} has none", hint)


def _lost(recipe: Recipe, loc: Loc, prune: Prune | None) -> bool:
    """Whether the text has a `prune` there, or a method in it, that was too broken to keep."""
    return _given(recipe, *loc) and (prune is None or (prune.method is None and _given(recipe, *loc, "method")))


def _density_given(recipe: Recipe, index: int) -> bool:
    places: tuple[Loc, ...] = (("prune",), ("parameters",))
    part = recipe.part_of[index]
    in_part = any("density" in level for level in part.levels)
    return in_part or any(
        _given(recipe, *at, "density") or _given(recipe, "models", index, *at, "density") for at in places
    )


def _no_effect(recipe: Recipe, loc: Loc, prune: Prune, known: Iterable[str], methods: list[str]) -> Iterator[Problem]:
    names = ", ".join(dict.fromkeys(methods))
    for key in prune.model_fields_set.difference(known):
        if names == "none":
            message, hint = "has no effect without a method", "set method: dare, magnitude or structured"
        else:
            message, hint = f"has no effect with method {names}", suggest(key, known)
        yield recipe.problem((*loc, key), message, hint, key=True)


def _columns(recipe: Recipe, index: int, loc: Loc) -> Iterator[Problem]:
    """structured: a and b, and a density that is their product."""
    effective = effective_prune(recipe, index)
    for name in ("a", "b"):
        if not _given(recipe, "prune", name) and not _given(recipe, "models", index, "prune", name):
            yield recipe.problem(loc, f"structured needs {name}", "density = a · b: give a and b")
    a, b, density = effective.parameters["a"], effective.parameters["b"], effective.density
    if density is None or a is None or b is None:
        return
    where = ("models", index, "prune") if _given(recipe, "models", index, "prune", "density") else ("prune",)
    if not (isinstance(a, float | int) and isinstance(b, float | int) and isinstance(density, float | int)):
        hint = "leave density out where a or b varies"
        yield recipe.problem((*where, "density"), "of structured is a · b", hint)
    elif abs(density - a * b) > 1e-6 * density:
        message = f"must be a · b = {a * b:.6g}, got {density:g}"
        yield recipe.problem((*where, "density"), message, "leave density out, or correct a or b")
