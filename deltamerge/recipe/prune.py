"""The pruning of every model, from its own keys, the recipe's keys and the merge method; checks and advice."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltamerge.errors import Problem
from deltamerge.methods.parameters import KEPT, Q
from deltamerge.methods.registry import COMMON_KEYS, MERGE, PRUNE, Param, PruneMethod
from deltamerge.recipe.problems import is_given, known_method, prune_params, prunes, suggest
from deltamerge.recipe.schema import MERGED, CalibratedQ, Calibration, Protect, Prune, Recipe
from deltamerge.recipe.values import Value, chain, show, value_for
from deltamerge.recipe.yaml_source import Loc, place
from deltamerge.tensors.names import SMALL_HEAD, TASK_HEAD
from deltamerge.tensors.patterns import finds

# keys of a prune without a range
OPTIONS = frozenset({"rescale", "sampling", "protect", "group", "budget", "bytes", "ratio", "length"})


@dataclass(frozen=True, slots=True)
class Pruning:
    """How one model's delta is pruned. Values are evaluated later, per tensor (`recipe.values.value_for`).

    method       name in the table of pruning methods, or "none"
    density      fraction in (0, 1]; None for method none, or if the method's parameters multiply to it
    q            divisor in (0, 1]; None, or a value that evaluates to None: the tensor's density. Unused with `rescale`
    parameters   the method's other parameters
    bytes, ratio   of method budget: the size of the artifact, or how many times smaller than the checkpoint it is
    length         of method budget: 0, parts as long as least squares makes them, to 1, as the delta; None: components
                   as long as before their codes
    include, exclude   patterns of tensor names
    """

    method: str
    density: Value | None = None
    q: Value | CalibratedQ | None = None
    rescale: str | None = None
    sampling: str = "uniform"
    group: str | None = None
    parameters: Mapping[str, Value | None] = field(default_factory=dict)
    protect: Protect | None = None
    budget: int | None = None
    bytes: int | None = None
    ratio: float | None = None
    length: float | None = None
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = (TASK_HEAD,)

    def size_of(self, whole: int) -> int:
        """Return the bytes that method budget gives to the delta of a checkpoint of so many bytes."""
        if self.bytes is not None:
            return self.bytes
        assert self.ratio is not None
        return math.floor(whole / self.ratio)


def effective_prune(recipe: Recipe, index: int) -> Pruning:
    """Return the pruning of `recipe.models[index]`; for each key the model's own value comes before the recipe's.

    The default method is implied by merge_method. The default density is mergekit's `parameters.density` (the model's,
    the slice's, then the recipe's), which then no longer trims inside ties. Tensors that no filter of a density matches
    are kept whole. Pruning that is only implied applies to every tensor, also the task head, as in mergekit. A language
    model's head shares a budget.
    """
    model, part, merge = recipe.models[index], recipe.part_of[index], MERGE.get(recipe.method_name or "")
    levels = [prune for prune in (model.prune, recipe.prune) if prune is not None]

    def first(key: str) -> Any:
        return next((value for prune in levels if (value := getattr(prune, key)) is not None), None)

    def value(key: str, *fallbacks: Value | None) -> Value | None:
        return chain(*(getattr(prune, key) for prune in levels), *fallbacks)

    def parameter(key: str) -> Value | None:
        """Return a pruning parameter from the merge's parameters, as in mergekit, or the method's default."""
        default = PRUNE[name].parameters[key].default
        if merge is None or key not in merge.parameters or not merge.parameters[key].prunes:
            return value(key, default)
        return value(key, model.parameters.get(key), *(level.get(key) for level in part.levels), default)

    implied = merge.implies_prune if merge is not None else None
    name = first("method") or implied or "none"
    apart = merge is not None and merge.base_apart(part.base)
    if name == "none" or (apart and recipe.is_base(index)):
        return Pruning("none")
    own = model.prune
    method = PRUNE.get(name)
    if method is not None and method.factors:
        # a density for other models does not contradict the factors that a model gives itself
        alone = own is not None and any(getattr(own, key) is not None for key in method.factors)
        density = own.density if own is not None and alone else value("density")
    else:
        density = value("density", *(level.get("density") for level in (model.parameters, *part.levels)))
        if implied or density is not None:
            density = chain(density, 1.0)
    q, rescale = _divisor(part.levels, levels, name)
    exclude = first("exclude")
    head = SMALL_HEAD if method is not None and method.shares else TASK_HEAD
    heads = () if implied and first("method") is None else (head,)
    return Pruning(
        method=name,
        density=density,
        q=q,
        rescale=rescale,
        sampling=first("sampling") or "uniform",
        group=first("group") or next(iter(method.groups if method else ()), None),
        parameters={key: parameter(key) for key in (method.own_parameters if method else ())},
        protect=first("protect"),
        budget=first("budget"),
        bytes=first("bytes"),
        ratio=first("ratio"),
        length=first("length"),
        include=first("include"),
        exclude=heads if exclude is None else exclude,
    )


def _divisor(
    parameters: Sequence[Mapping[str, Value]], levels: list[Prune], name: str
) -> tuple[Value | CalibratedQ | None, str | None]:
    """Return q and rescale of the first level that has either. Filters of a numeric q fall through to the next level.

    mergekit's `parameters.rescale` comes last: false is q = 1, true is mergekit's rescaling where masks are not random.
    """
    numbers: list[Value] = []
    for prune in levels:
        if not numbers and (prune.rescale or prune.calibrated_q):
            return prune.calibrated_q, prune.rescale
        if prune.number_q is not None:
            numbers.append(prune.number_q)
    importance = name in PRUNE and not PRUNE[name].random
    rescaled = next((level["rescale"] for level in parameters if "rescale" in level), not importance)
    if importance and rescaled and not numbers:
        return None, "l1"
    if importance or (not numbers and not rescaled):
        numbers.append(1.0)
    return chain(*numbers), None


def problems(recipe: Recipe) -> Iterator[Problem]:
    """Yield every fault of the recipe's pruning that the types of the keys cannot express."""
    checks = (
        _prune_keys,
        _pruning,
        _calibrated,
        _names,
        _whole_merge,
        _budget,
        _shared,
        _rows,
        _data,
        _own_calibration,
        _rows_of_base,
    )
    return (problem for check in checks for problem in check(recipe))


def _prune_keys(recipe: Recipe) -> Iterator[Problem]:
    """Yield faults of one `prune` by itself."""
    for loc, prune in prunes(recipe):
        if prune.method is not None and prune.method not in PRUNE:
            message = f"unknown pruning method {show(prune.method)}"
            yield recipe.problem((*loc, "method"), message, suggest(prune.method, PRUNE))
        if prune.q is not None and prune.rescale is not None:
            yield recipe.problem((*loc, "rescale"), "cannot stand beside q", "keep one of the two", key=True)
        method = PRUNE.get(prune.method or "")
        for name, param in _ranges(prune, method).items():
            value = prune.number_q if name == "q" else getattr(prune, name)
            if value is not None:
                yield from recipe.out_of_range((*loc, name), param, value)


def _ranges(prune: Prune, method: PruneMethod | None) -> Mapping[str, Param]:
    """Return the parameters that give the ranges of a `prune`: its method's, and other methods' for other keys."""
    own = {"density": KEPT, "q": Q} if method is None else method.parameters
    return {**prune_params(), **own} if prune.model_fields_set - COMMON_KEYS - OPTIONS - own.keys() else own


def _pruning(recipe: Recipe) -> Iterator[Problem]:
    """Yield faults of each model's effective pruning: keys that are missing or superfluous."""
    merge = known_method(recipe)
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
            return  # an unknown method, reported before; its keys are unknown
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
        if method.factors:
            yield from _factors(recipe, i, loc)
        elif method.shares:
            sizes = [key for key in ("bytes", "ratio") if _pruning_given(recipe, i, key)]
            if not sizes:
                yield recipe.problem(loc, f"{method.name} needs bytes or a ratio", "bytes: 8MB, or ratio: 32")
            elif len(sizes) > 1:
                yield recipe.problem(loc, "bytes and ratio both say the size", "keep one of the two")
        elif effective.density is None and not _pruning_given(recipe, i, "budget") and not _density_given(recipe, i):
            yield recipe.problem(loc, f"{method.name} needs a density", "density: 0.1 keeps a tenth of the delta")
        for name, value in effective.parameters.items():
            if value is None and name not in method.factors:
                yield recipe.problem(loc, f"{method.name} needs {name}", method.parameters[name].summary)
    if recipe.prune is not None and recipe.prune.method != "none" and methods:
        yield from _no_effect(recipe, ("prune",), recipe.prune, used, methods)


def _calibrated(recipe: Recipe) -> Iterator[Problem]:
    """Check that a calibrated q and masks from activations have data, and that the search fits objective and scope."""
    for loc, prune in prunes(recipe):
        q = prune.calibrated_q
        method = PRUNE.get(prune.method or "")
        measured = method.name if method is not None and method.needs_activations else None
        wanted = "a calibrated q" if q is not None else measured
        if wanted is not None and not _has_rows(recipe, loc):
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


def _rows(recipe: Recipe) -> Iterator[Problem]:
    """Check that a merge method that measures rows has rows of every model, and one set of models."""
    method = known_method(recipe)
    if method is None or method.rows is None:
        return
    if not _has_rows(recipe, ()):
        hint = "models: - {model: A, calibration: {data: a.jsonl}}"
        yield recipe.problem(("merge_method",), f"{method.name} needs rows of every model", hint)
    if len(recipe.parts) > 1:
        yield recipe.problem(("merge_method",), f"{method.name} needs one set of models, whose layers it runs")


def _own_calibration(recipe: Recipe) -> Iterator[Problem]:
    """Check a model's own calibration: no keys of the merge, and no keys of answers if answers are not compared."""
    for i, model in enumerate(recipe.models):
        if model.calibration is None:
            continue
        at, whole = ("models", i, "calibration"), recipe.calibration_of(i)
        for key in ("per", "coefficients"):
            if key in model.calibration.model_fields_set:
                message = "is of the whole merge, and has no effect at a model"
                yield recipe.problem((*at, key), message, "move it to the recipe's calibration", key=True)
        if whole is None or whole.metric != "exact_match":
            yield from _of_answers(recipe, at, model.calibration)


def _rows_of_base(recipe: Recipe) -> Iterator[Problem]:
    """Check that rows of a listed base stand where coefficients are fitted, without a metric, and no others have a
    weight."""
    held: list[tuple[Loc, Calibration | None]] = [(("calibration",), recipe.calibration)]
    held += [(("models", i, "calibration"), one.calibration) for i, one in enumerate(recipe.models) if i != recipe.kept]
    for loc, calibration in held:
        if calibration is not None and "weight" in calibration.model_fields_set:
            hint = "models: - {model: BASE, calibration: {data: text.jsonl, weight: 0.5}}"
            yield recipe.problem((*loc, "weight"), "is of the base, where it is listed with rows", hint, key=True)
    if recipe.kept is None:
        return
    at, whole = ("models", recipe.kept, "calibration"), recipe.calibration
    if whole is None or whole.coefficients is None:
        hint = "calibration: {per: merge, coefficients: layer}, or leave them out"
        yield recipe.problem(at, "rows of the base have an effect where coefficients are fitted alone", hint, key=True)
    elif not is_given(recipe, *at, "data"):
        yield recipe.problem(at, "needs data of its own: texts that the base shall still answer as it does")
    calibrations = (whole, *(model.calibration for model in recipe.models))
    if any(one is not None and one.metric is not None for one in calibrations):
        yield recipe.problem(at, "rows of the base do not go with a metric", "leave metric out", key=True)


def _of_answers(recipe: Recipe, loc: Loc, calibration: Calibration) -> Iterator[Problem]:
    for key in ("answer", "new_tokens"):
        if key in calibration.model_fields_set:
            yield recipe.problem((*loc, key), "has no effect without metric: exact_match", key=True)


def _data(recipe: Recipe) -> Iterator[Problem]:
    """Check that calibration has data: a model's own, or the recipe's."""
    if is_given(recipe, "calibration") and not _has_rows(recipe, ()):
        yield recipe.problem(("calibration",), "needs data")
        return
    for i in recipe.fine_tunes:
        if is_given(recipe, "models", i, "calibration") and not _has_rows(recipe, ("models", i)):
            yield recipe.problem(("models", i, "calibration"), "needs data")


def _has_rows(recipe: Recipe, loc: Loc) -> bool:
    """Return whether the models of a `prune` have calibration rows: the recipe's, or each its own."""
    models = [loc[1]] if loc[:1] == ("models",) else recipe.fine_tunes
    return is_given(recipe, "calibration", "data") or (
        bool(models) and all(is_given(recipe, "models", i, "calibration", "data") for i in models)
    )


def _names(recipe: Recipe) -> Iterator[Problem]:
    """Check that a model that two slices or modules calibrate has two names, because a lock stores q's by name."""
    known: set[str] = set()
    for i in recipe.fine_tunes:
        name = recipe.names[i]
        if isinstance(effective_prune(recipe, i).q, CalibratedQ):
            if name in known:
                message = f"another slice or module calibrates a model of the same name, {show(name)}"
                yield recipe.problem(("models", i, "model"), message, "set a name of its own: the lock has its q by it")
            known.add(name)


def _protect(recipe: Recipe, loc: Loc, prune: Prune) -> Iterator[Problem]:
    """Check that `protect` names columns, or counts massive activations and has calibration data for them."""
    if prune.protect is None:
        return
    given = [key for key in ("massive_activations", "columns") if is_given(recipe, *loc, "protect", key)]
    if len(given) != 1:
        message = "needs massive_activations or columns" if not given else "takes one of massive_activations, columns"
        yield recipe.problem((*loc, "protect"), message, "protect: {massive_activations: 3}")
    elif prune.protect.massive_activations is not None and not _has_rows(recipe, loc):
        place = (*loc, "protect", "massive_activations")
        yield recipe.problem(place, "needs calibration", "calibration: {data: calib.jsonl}, or name columns")


def _shared(recipe: Recipe) -> Iterator[Problem]:
    """Check that method budget makes the delta artifact of one fine-tune, of values to add."""
    output = recipe.output
    for loc, prune in prunes(recipe):
        method = PRUNE.get(prune.method or "")
        if method is None or not method.shares:
            continue
        at = (*loc, "method")
        if not output.rules.patches or output.semantics != "add":
            hint = "output: {kind: delta, semantics: add}"
            yield recipe.problem(at, f"{method.name} makes a delta artifact of values to add", hint)
        elif output.values is not None:
            yield recipe.problem(("output", "values"), f"are chosen by prune: {method.name}", "leave it out", key=True)
        if len(recipe.fine_tunes) > 1:
            yield recipe.problem(at, f"{method.name} needs a single fine-tune", "merge first: output: {kind: model}")
        for i in recipe.fine_tunes:
            if _density_given(recipe, i):
                yield recipe.problem(at, f"{method.name} has no density", "leave density out")


def _budget(recipe: Recipe) -> Iterator[Problem]:
    """Check that `budget` stands at the delta artifact of one fine-tune, without a density."""
    for loc, prune in prunes(recipe):
        if prune.budget is None:
            continue
        at = (*loc, "budget")
        if not recipe.output.rules.patches:
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
    """Check that under `per: merge`, which calibrates one λ, all q's have one objective and state nothing else."""
    calibration, method = recipe.calibration, known_method(recipe)
    if calibration is None:
        return
    metrics = [calibration.metric, *(own.metric for own in map(recipe.calibration_of, recipe.fine_tunes) if own)]
    if "exact_match" not in metrics:
        yield from _of_answers(recipe, ("calibration",), calibration)
    if calibration.per == "model":
        if calibration.coefficients is not None:
            yield recipe.problem(("calibration", "coefficients"), "are of the merged model", "per: merge", key=True)
        return
    loc: Loc = ("calibration", "per")
    if len(recipe.parts) > 1:
        yield recipe.problem(loc, "merge needs one set of models: one lambda is searched", "per: model")
    if method is not None and not (method.deltas and method.needs_base):
        yield recipe.problem(loc, f"merge needs deltas, but {method.name} has none", "use task_arithmetic or ties")
    if calibration.coefficients is not None and MERGED in recipe.names:
        yield recipe.problem(loc, f"a model is called {MERGED}, the name of the merged model", "give it another name")
    searched = [(at, prune.calibrated_q) for at, prune in prunes(recipe) if prune.calibrated_q is not None]
    if len({q.objective for _, q in searched if q}) > 1:
        yield recipe.problem(loc, "merge needs one objective for all models")
    for at, q in searched:
        if q is not None and (q.objective == "layer_mse" or q.model_fields_set - {"objective"}):
            hint = "q: output_change or validation, without scope, search and bounds"
            yield recipe.problem((*at, "q"), "with per: merge one lambda is searched, and no q", hint)


def _lost(recipe: Recipe, loc: Loc, prune: Prune | None) -> bool:
    """Return whether the text has a `prune` at the place, or a method in it, that was invalid and left out."""
    return is_given(recipe, *loc) and (prune is None or (prune.method is None and is_given(recipe, *loc, "method")))


def _density_given(recipe: Recipe, index: int) -> bool:
    places: tuple[Loc, ...] = (("prune",), ("parameters",))
    part = recipe.part_of[index]
    in_part = any("density" in level for level in part.levels)
    return in_part or any(
        is_given(recipe, *at, "density") or is_given(recipe, "models", index, *at, "density") for at in places
    )


def _pruning_given(recipe: Recipe, index: int, key: str) -> bool:
    return is_given(recipe, "prune", key) or is_given(recipe, "models", index, "prune", key)


def _no_effect(recipe: Recipe, loc: Loc, prune: Prune, known: Iterable[str], methods: list[str]) -> Iterator[Problem]:
    names = ", ".join(dict.fromkeys(methods))
    for key in prune.model_fields_set.difference(known):
        if names == "none":
            message, hint = "has no effect without a method", "set method: dare, magnitude or structured"
        else:
            message, hint = f"has no effect with method {names}", suggest(key, known)
        yield recipe.problem((*loc, key), message, hint, key=True)


def _factors(recipe: Recipe, index: int, loc: Loc) -> Iterator[Problem]:
    """Check that all parameters that multiply to the density are given, and that a given density is their product."""
    effective = effective_prune(recipe, index)
    method = PRUNE[effective.method]
    product, names = " · ".join(method.factors), " and ".join(method.factors)
    for name in method.factors:
        if not is_given(recipe, "prune", name) and not is_given(recipe, "models", index, "prune", name):
            yield recipe.problem(loc, f"{method.name} needs {name}", f"density = {product}: give {names}")
    factors, density = [effective.parameters[name] for name in method.factors], effective.density
    if density is None or None in factors:
        return
    where = ("models", index, "prune") if is_given(recipe, "models", index, "prune", "density") else ("prune",)
    either = " or ".join(method.factors)
    numbers = [value for value in factors if isinstance(value, float | int)]
    if len(numbers) < len(factors) or not isinstance(density, float | int):
        hint = f"leave density out where {either} varies"
        yield recipe.problem((*where, "density"), f"of {method.name} is {product}", hint)
    elif abs(density - math.prod(numbers)) > 1e-6 * density:
        message = f"must be {product} = {math.prod(numbers):.6g}, got {density:g}"
        yield recipe.problem((*where, "density"), message, f"leave density out, or correct {either}")


# -- advice: which pruning keeps a fine-tune at a density, with and without rows (docs/measurements/pruning.md)

SAMPLED = {"method": "dare", "sampling": "magnitude"}
CALIBRATED = {"method": "magnitude", "q": "output_change"}
ROWS = "`calibration: {data: rows.jsonl}`"
BY_COMMAND = "--calibration rows.jsonl with extract"
# Densities below which q decides, for methods without a number in the table: importance sampling, and ties, which trims
# by magnitude with q = 1. A merge of two real encoders keeps 100, 97, 95, 87 and 76 % of its untrimmed score at 0.2,
# 0.1, 0.05, 0.02 and 0.01. A decoder's own delta keeps 79, 38 and 0 of 98 % at 0.1, 0.05 and 0.01.
SAMPLED_BELOW, TRIMMED_BELOW = 0.02, 0.1
SHOWN = 3  # models that a warning names


@dataclass(frozen=True, slots=True)
class Advice:
    """A recommended pruning at a density, as keys of `prune`, and the reason."""

    prune: dict[str, Any]
    why: str

    def __str__(self) -> str:
        keys = ", ".join(f"{key}: {value}" for key, value in self.prune.items())
        return f"prune: {{{keys}}}: {self.why}"


def choose(density: float, *, rows: bool) -> Advice:
    """Choose the pruning that keeps most of a fine-tune at `density`. `rows` says whether there is calibration data."""
    if rows:
        keys = {"method": CALIBRATED["method"], "density": density, "q": CALIBRATED["q"]}
        return Advice(keys, "with rows, magnitude with a calibrated q keeps most")
    return Advice({**SAMPLED, "density": density}, "without rows, importance sampling keeps most of a fine-tune")


def q_decides(pruning: Pruning, density: float) -> bool:
    """Return whether a calibrated q keeps much more of a fine-tune at this density than the pruning's own q.

    A pruning whose method is "none" stands for the trimming inside ties.
    """
    if pruning.method == "none":
        return 0 < density < TRIMMED_BELOW
    if pruning.sampling == "magnitude":
        return 0 < density < SAMPLED_BELOW
    return pruning.method in PRUNE and 0 < density < PRUNE[pruning.method].q_decides_below


def warnings(recipe: Recipe, kept: Mapping[int, Mapping[float, int]], *, factors: bool = False) -> Iterator[str]:
    """Warn of prunings that leave q at its default at densities where q decides.

        kept      the place of a model in the recipe -> a density -> the number of entries of its delta at that density
        factors   an adapter's A and B are pruned, so that their product has the square of the density

    A warning names a model if most entries of its delta have such a density.
    """
    found: dict[str, list[str]] = {}
    for i, entries in kept.items():
        pruning = effective_prune(recipe, i)
        if _is_divided(recipe, i):
            continue
        weak = {d: n for d, n in entries.items() if q_decides(pruning, d * d if factors else d)}
        if (count := sum(weak.values())) and 2 * count > sum(entries.values()):
            density = sum(d * n for d, n in weak.items()) / count
            found.setdefault(_said(recipe, i, pruning, density, factors=factors), []).append(recipe.names[i])
    for text, names in found.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield f"{', '.join(names[:SHOWN])}{more}: {text}"


def idle_keys(recipe: Recipe, names: Collection[str]) -> Iterator[str]:
    """Yield a warning for each key without effect: a pattern of `include` or `exclude` that finds none of the merged
    tensors, and a model's `parameters.density` that the recipe's `prune.density` hides."""
    shared = recipe.prune.density if recipe.prune is not None else None
    hides = shared is not None and value_for(shared, "", 0.0) is not None  # no filter leaves a tensor to others
    for i, model in enumerate(recipe.models):
        if hides and "density" in model.parameters and not is_given(recipe, "models", i, "prune", "density"):
            where = ("models", i, "parameters", "density")
            line, _ = recipe.source.locate(recipe.place(where))
            yield f"line {line}: {place(where)} has no effect beside prune.density; the model's own prune.density has"
    for loc, prune in prunes(recipe):
        for key, patterns in (("include", prune.include), ("exclude", prune.exclude)):
            for i, pattern in enumerate(patterns or ()):
                if not any(finds(pattern, name) for name in names):
                    line, _ = recipe.source.locate(recipe.place((*loc, key, i)))
                    yield f"line {line}: {place((*loc, key, i))}: {pattern!r} finds no tensor of the merge"


def _said(recipe: Recipe, i: int, pruning: Pruning, density: float, *, factors: bool) -> str:
    """Return the fault of a model's pruning, and the keys that fix it."""
    method = "magnitude" if pruning.method == "none" else pruning.method
    q = "q = density" if PRUNE[method].random else "q = 1"
    name = "importance sampling" if pruning.sampling == "magnitude" else method
    name = str(recipe.method_name) if pruning.method == "none" else name
    text = f"{name} at density {density:.3g} with {q} loses much of a fine-tune that a calibrated q keeps"
    if factors:
        text += " (the product of two pruned factors has the square of the density)"
    if pruning.method == "none":
        mend = f"`prune: {{method: magnitude, density: {density:.3g}, q: output_change}}` in the place of `density`"
    else:
        at: Loc = ("models", i, "prune") if is_given(recipe, "models", i, "prune", "method") else ("prune",)
        mend = f"`q: output_change` in {place(at)}"
    own = is_given(recipe, "models", i, "calibration", "data") or is_given(recipe, "calibration", "data")
    text += f": give {mend}" + ("" if own else f" and {ROWS}; {BY_COMMAND}")
    if pruning.method in ("none", "magnitude", "dare", "breadcrumbs", "magnitude_outliers") and not own:
        without = "`sampling: magnitude`" if method == "dare" else "`prune: {method: dare, sampling: magnitude}`"
        text += "" if pruning.sampling == "magnitude" else f"; without rows, {without} keeps more"
    return text


def _is_divided(recipe: Recipe, i: int) -> bool:
    """Return whether the recipe gives the divisor of a model's entries."""
    calibration = recipe.calibration
    if calibration is not None and calibration.per == "merge":
        return True  # its λ is calibrated
    model, part = recipe.models[i], recipe.part_of[i]
    prunes = [prune for prune in (model.prune, recipe.prune) if prune is not None]
    if any(prune.q is not None or prune.rescale is not None for prune in prunes):
        return True
    return any("rescale" in level for level in (model.parameters, *part.levels))
