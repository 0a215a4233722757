"""The stages before the first tile, as nodes: activations, calibrated q's, the threshold of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from deltamerge import errors
from deltamerge.calibrate import stage
from deltamerge.calibrate.merge import coefficients, second_moments
from deltamerge.calibrate.merge.second_moments import InputMeasurement, MeasuredInput, squares
from deltamerge.calibrate.rows.heads import LANGUAGE, check_base, task_of
from deltamerge.calibrate.rows.splits import split
from deltamerge.calibrate.spec import (
    KEPT_WEIGHT,
    CalibrationInput,
    ModelTensors,
    Pruned,
    Share,
    Spec,
    TensorHeader,
    headers,
    mask_seeds,
    memory,
    within,
)
from deltamerge.calibrate.values import spool
from deltamerge.errors import InputError, RecipeError
from deltamerge.files.strict_json import read_json
from deltamerge.formats.peft.lora import is_dora, is_low_rank
from deltamerge.methods.merge.passthrough import passthrough
from deltamerge.methods.ops import dense, is_difference
from deltamerge.methods.rate import MOST_LEARNED
from deltamerge.methods.registry import PRUNE
from deltamerge.plan.delta_graph import Deltas, Merge, Stages, Tuned, matrix_form
from deltamerge.plan.inputs import Input, Inputs, refuse_unrunnable
from deltamerge.recipe.problems import is_given
from deltamerge.recipe.prune import effective_prune
from deltamerge.recipe.schema import CalibratedQ, Calibration, Recipe
from deltamerge.tensors.names import has_columns, is_linear
from deltamerge.tensors.patterns import finds
from deltamerge.tensors.tensor import Node, Tensor, TensorInfo
from deltamerge.tensors.views import moves_rows

CALIBRATE = "deltamerge.calibrate.q.choices:calibrate"  # torch comes with it, when it runs


@dataclass(frozen=True, slots=True)
class StageMaker:
    """Makes the stages of a recipe's models.

    Calibration data lies in `folder`. A stage computes on `device` and takes at most `memory` bytes.
    """

    folder: Path
    device: str
    memory: int | None

    def make(self, deltas: Deltas, merges: Sequence[Merge]) -> Stages:
        """Return the stages that the models need: to calibrate q, to measure activations, to find thresholds."""
        stages = Stages()
        for index in range(len(deltas.prunes)):
            tunes = (t for merge in merges for t in merge.tunes if t.index == index)
            stages = self._of_model(replace(deltas, stages=stages), index, tunes)
        shares = any(PRUNE[prune.method].shares for prune in deltas.prunes)
        if not ((deltas.recipe.output.lora or shares) and deltas.recipe.calibration is not None):
            return stages
        tunes = (t for merge in merges if merge.base is not None for t in merge.tunes)
        weights = (t for t in tunes if is_linear(t.tensor.name, t.tensor.shape))
        by_model: dict[int, list[Tuned]] = {}
        for tuned in weights:
            by_model.setdefault(tuned.index, []).append(tuned)
        return replace(stages, inputs={index: self._measured(deltas, some) for index, some in by_model.items()})

    def _measured(self, deltas: Deltas, tunes: Sequence[Tuned]) -> InputMeasurement:
        """Return the measurement of the inputs of a model's layers."""
        refuse_gathered(tunes, "leave calibration out")
        source, tensors = self._source(deltas, tunes)
        prune, codes = deltas.prune_of(tunes[0]), 0.0
        if PRUNE[prune.method].shares:
            codes = prune.bytes or sum(one.nbytes for one in source.tensors) / (prune.ratio or 1.0)
        return InputMeasurement(
            source, tensors, {t.name: t.tensor.name for t in tunes}, codes if codes <= MOST_LEARNED else 0.0
        )

    def _of_model(self, deltas: Deltas, index: int, tunes: Iterable[Tuned]) -> Stages:
        """Return the stages so far and the stages of model `index`, whose tensors are `tunes`."""
        prune, stages = deltas.prunes[index], deltas.stages
        massive = prune.protect is not None and prune.protect.columns is None
        measured = PRUNE[prune.method].needs_activations or massive
        q = prune.q if isinstance(prune.q, CalibratedQ) and not deltas.whole_merge else None
        weighed = prune.budget is not None and deltas.recipe.calibration_of(index) is not None
        if not (measured or q or weighed or prune.protect or prune.group == "model"):
            return stages
        masked = [t for t in tunes if deltas.is_masked(t)]
        pruned = [t for t in masked if deltas.density(t) not in (0.0, 1.0)]
        guarded = [t for t in masked if prune.protect and has_columns(t.name, t.tensor.shape)]
        _find_columns(deltas.recipe, index, [t.name for t in guarded])
        if pruned and prune.group == "model":
            if prune.protect:
                raise InputError("prune.protect: does not go with group: model yet", hint="group: tensor")
            stages = replace(stages, cuts={**stages.cuts, index: self._cut(deltas, pruned)})
        seen = [t for t in masked if t in pruned or (massive and t in guarded)]
        if not seen or not (measured or q or weighed):
            return stages
        refuse_gathered(seen, "leave it out, prune: {exclude: [embed, lm_head]}, or use dare or magnitude")
        products = factor_pairs(deltas.recipe, seen)
        if products and q is not None:
            return self._of_factors(replace(deltas, stages=stages), index, q, products)
        source, tensors = self._source(deltas, seen)
        made = deltas.graph.node(stage.activations, tensors.inputs, kind="stage", source=source)
        if weighed:
            stages = replace(stages, weighing={**stages.weighing, index: made})
        if measured:
            stages = replace(stages, activations={**stages.activations, index: made})
        if pruned and q is not None:
            made = _calibration(replace(deltas, stages=stages), source, tensors, q, pruned)
            stages = replace(stages, calibrated={**stages.calibrated, index: made})
        return stages

    def together(self, deltas: Deltas, merges: Sequence[Merge], merged_delta: Callable[[Merge, int], Node]) -> Node:
        """Return the stage that finds the λ of the merge.

        `merged_delta` gives every fine-tune's merged delta for a mask seed.
        """
        recipe, stages = deltas.recipe, deltas.stages
        refuse_gathered([t for merge in merges for t in merge.tunes], "calibrate per: model")
        searched = [prune.q for prune in deltas.prunes if isinstance(prune.q, CalibratedQ)]
        objective = searched[0].objective if searched else "output_change"
        assert recipe.calibration is not None
        random = any(PRUNE[prune.method].random for prune in deltas.prunes)
        seeds = recipe.calibration.seeds if random and objective == "output_change" else 1
        masked = {m.name: tuple(merged_delta(m, recipe.seed + s) for s in range(seeds)) for m in merges}
        parts, tensors = self._shares(deltas, merges, seeds)
        low, high = 1.0, 1.0  # of the factor of λ
        for tuned in (t for merge in merges for t in merge.tunes):
            density = deltas.density(tuned) or 1.0
            plain = deltas.plain_q(tuned, density)
            low, high = min(low, plain), max(high, plain / density)
        shared = stages.of_masks
        method, bounds = recipe.method.name, (low / 4.0, high * 2.0)
        source, pruned = parts[0].source, parts[0].pruned
        spec = Spec(source, method, pruned, random, objective, "global", "auto", bounds, len(shared), parts)
        inputs = [*(node for merge in merges for node in masked[merge.name]), *shared, *tensors]
        return deltas.graph.node(coefficients.calibrate_lambda, inputs, kind="stage", spec=spec)

    def inputs(self, deltas: Deltas, merges: Sequence[Merge], *, gradients: bool = False) -> Node:
        """Return the stage that measures the inputs of every fine-tune's layers, or the gradients of all its
        tensors."""
        layers = set(_layers(merges))
        wanted = [merge for merge in merges if gradients or merge.name in layers]
        refuse_gathered([t for merge in wanted for t in merge.tunes], "use a method without data")
        parts, tensors = self._shares(deltas, wanted, 0, share=1)
        function = squares if gradients else second_moments.inputs
        node = deltas.graph.node
        files = node(spool, kind="small", of=(function.__name__, parts))
        return node(function, [files, *tensors], kind="stage", parts=parts)

    def merged_inputs(
        self, deltas: Deltas, merges: Sequence[Merge], merged_delta: Callable[[Merge, int], Node], filled: Node
    ) -> Node:
        """Return the stage that measures inputs in the merged model.

        `merged_delta` gives the merged delta from the moments that the spool `filled` has so far.
        """
        refuse_gathered([t for merge in merges for t in merge.tunes], "use regmean")
        parts, tensors = self._shares(deltas, merges, 1)
        merged = (merged_delta(m, deltas.recipe.seed) for m in merges)
        inputs = [filled, *merged, *deltas.stages.of_deltas, *tensors]
        return deltas.graph.node(second_moments.merged, inputs, kind="stage", parts=parts, wanted=_layers(merges))

    def of_result(
        self, deltas: Deltas, template: Input, roots: Mapping[str, Node], wanted: Mapping[str, MeasuredInput]
    ) -> Node:
        """Return the stage that measures the inputs of the result's layers `wanted`.

        The result runs like `template`.
        """
        calibration, stages = deltas.recipe.calibration, deltas.stages
        assert calibration is not None
        source = self._input(deltas, template, calibration)
        shared = (n for n in (stages.rows, stages.totals, stages.together) if n is not None)
        own = ModelTensors.of(template.checkpoint.tensors.values()).inputs
        inputs = [deltas.graph.node(spool, kind="small"), *roots.values(), *shared, *stages.of_deltas, *own]
        names, layers = tuple(roots), tuple(wanted.items())
        return deltas.graph.node(
            second_moments.of_result, inputs, kind="stage", source=source, names=names, wanted=layers
        )

    def fitted(
        self,
        deltas: Deltas,
        merges: Sequence[Merge],
        parts_of: Callable[[Merge], dict[str, Node]],
        starts: Sequence[float],
        base: Input | None,
    ) -> Node:
        """Return the stage that fits coefficients of deltas. `parts_of` gives the deltas by name, `starts` the first
        values. The base runs, too, if the recipe has rows of it."""
        refuse_gathered([t for merge in merges for t in merge.tunes], "leave coefficients out")
        deltas_of = {m.name: parts_of(m) for m in merges}
        names = tuple(next(iter(deltas_of.values()), {}))
        kept, count = deltas.recipe.kept, len(merges[0].sources)
        (first, *others), tensors = self._shares(deltas, merges, len(names), count + (kept is not None))
        weight = 0.0
        if kept is not None and base is not None:
            share, own = self._share_of_base(deltas, merges, base, kept)
            others.append(share)
            tensors += own
            weight = share.source.calibration.weight or KEPT_WEIGHT
        # the first reads the deltas of all, so it gets the others' memory
        first = replace(first, source=replace(first.source, cache=first.source.cache * (1 + len(others))))
        others = [Share(replace(one.source, cache=0), tuple(replace(p, masks=0) for p in one.pruned)) for one in others]
        shared = [*deltas.stages.of_masks, *(n for n in (deltas.stages.rows, deltas.stages.totals) if n is not None)]
        spec = Spec(
            first.source, deltas.recipe.method.name, first.pruned, False, "agreement", deltas.coefficients or "",
            "gradient", None, len(shared), (first, *others), names, tuple(starts),
            sum(all(is_difference(found[name]) for found in deltas_of.values()) for name in names), weight,
        )  # fmt: skip
        inputs = [*(node for found in deltas_of.values() for node in found.values()), *shared, *tensors]
        return deltas.graph.node(coefficients.calibrate, inputs, kind="stage", spec=spec)

    def _shares(
        self, deltas: Deltas, merges: Sequence[Merge], masks: int, share: int | None = None
    ) -> tuple[tuple[Share, ...], list[Tensor]]:
        """Return every fine-tune, with `masks` masked deltas for each of its tensors, and the tensors of all.

        Each gets one of `share` parts of the memory; None: they run side by side.
        """
        parts, inputs = [], list[Tensor]()
        for own in zip(*(merge.tunes for merge in merges), strict=True):
            source, tensors = self._source(deltas, own, share or len(merges[0].sources))
            parts.append(Share(source, tuple(_whole(t, masks) for t in own)))
            inputs += tensors.inputs
        return tuple(parts), inputs

    def _share_of_base(
        self, deltas: Deltas, merges: Sequence[Merge], base: Input, index: int
    ) -> tuple[Share, list[Tensor]]:
        """Return the base, of that index in the recipe, on its own rows, without deltas, and its tensors. InputError:
        it is no language model."""
        calibration = deltas.recipe.calibration_of(index)
        assert calibration is not None
        check_base(calibration, base.checkpoint.config)
        own = [merge.base for merge in merges if merge.base is not None]
        source = self._input(deltas, base, calibration, headers(own), share=len(merges[0].sources) + 1)
        pruned = tuple(Pruned(m.name, one.name, one.shape, 1.0, 1.0, 0) for m, one in zip(merges, own, strict=True))
        tensors = ModelTensors.of(base.checkpoint.tensors.values(), [(one, one) for one in own])
        return Share(source, pruned), [*tensors.inputs]

    def _cut(self, deltas: Deltas, pruned: Sequence[Tuned]) -> Node:
        """Return the single threshold of a model, for as many entries as the tensors' densities add up to."""
        whole, names = [deltas.whole(t) for t in pruned], tuple(t.name for t in pruned)
        k = sum(round((deltas.density(t) or 0.0) * math.prod(t.base.shape)) for t in pruned)
        return deltas.graph.node(stage.model_cut, whole, kind="stage", names=names, k=k, device=self.device)

    def _of_factors(self, deltas: Deltas, index: int, q: CalibratedQ, products: Sequence[Product]) -> Stages:
        """Return the existing stages, and the calibration of an adapter's own A and B."""
        stages, first = deltas.stages, next(iter(products[0].factors.values()))
        pairs = [(p.weight, replace(p.weight, tensor=p.update.inputs[0])) for p in products]
        source, tensors = self._source(deltas, [first], pairs=pairs)
        made = factor_calibration(products, source, tensors, q, deltas, index)
        return replace(
            stages, calibrated={**stages.calibrated, index: made}, roots={**stages.roots, **factor_roots(products)}
        )

    def _source(
        self,
        deltas: Deltas,
        tunes: Sequence[Tuned],
        share: int = 1,
        pairs: Sequence[tuple[TensorInfo, TensorInfo]] | None = None,
    ) -> tuple[CalibrationInput, ModelTensors]:
        """Return a fine-tune to be run on calibration data, with one of `share` parts of the memory, and its tensors.

        `pairs` are its pruned tensors with the base's, by default from `tunes`.
        """
        tuned, pairs = tunes[0], [(t.tensor, t.base) for t in tunes] if pairs is None else pairs
        recipe, q = deltas.recipe, deltas.prune_of(tuned).q
        calibration = recipe.calibration_of(tuned.index)
        assert calibration is not None
        labelled = isinstance(q, CalibratedQ) and (q.objective == "validation" or calibration.metric is not None)
        source = self._input(deltas, tuned.model, calibration, headers(tune for tune, _ in pairs), labelled, share)
        return source, ModelTensors.of(tuned.model.checkpoint.tensors.values(), pairs)

    def _input(
        self,
        deltas: Deltas,
        model: Input,
        calibration: Calibration,
        pairs: tuple[TensorHeader, ...] = (),
        labelled: bool = False,
        share: int = 1,
    ) -> CalibrationInput:
        """Return a model that runs on calibration data. InputError: it cannot, or there is too little memory."""
        refuse_unrunnable(model.name, model.checkpoint)
        refuse_changed_config(model)
        own, seed = headers(model.checkpoint.tensors.values()), deltas.recipe.seed
        tokens = task_of(calibration, model.checkpoint.config) in LANGUAGE
        source = CalibrationInput(
            model.name, model.checkpoint.path, own, pairs, calibration, self.folder, seed, self.device, labelled,
            tokens=tokens,
        )  # fmt: skip
        return within(source, self.memory, share)


def _whole(tuned: Tuned, masks: int) -> Pruned:
    """Return a tensor that is not pruned, with `masks` deltas."""
    return Pruned(tuned.name, tuned.tensor.name, tuned.base.shape, 1.0, 1.0, masks)


def _calibration(
    deltas: Deltas, source: CalibrationInput, model: ModelTensors, q: CalibratedQ, tensors: Sequence[Tuned]
) -> Node:
    """Return the stage that calibrates a model's q's, of its pruned `tensors`."""
    random, seeds = _masks(deltas, source, q, tensors[0].index)
    pruned, masked, protected = [], list[Node](), list[Node]()
    for t in tensors:
        density, columns = deltas.density(t), deltas.protected(t)[0]
        assert density is not None
        masked += [deltas.masked(t, seed) for seed in seeds]
        protected += [] if columns is None else [columns]
        plain, guarded = density if random else 1.0, columns is not None
        pruned.append(Pruned(t.name, t.tensor.name, t.base.shape, density, plain, len(seeds), guarded))
    return _search(deltas, source, model, q, tensors[0].index, pruned, [*masked, *protected])


def _masks(deltas: Deltas, source: CalibrationInput, q: CalibratedQ, index: int) -> tuple[bool, list[int]]:
    """Return whether a model's masks are random, and the seeds of the masks that a search averages over."""
    method = deltas.prunes[index].method
    return PRUNE[method].random, [deltas.recipe.seed + s for s in range(mask_seeds(source, method, q))]


def _search(
    deltas: Deltas,
    source: CalibrationInput,
    model: ModelTensors,
    q: CalibratedQ,
    index: int,
    pruned: Sequence[Pruned],
    inputs: Sequence[Node],
) -> Node:
    """Return the stage that searches the q's of the `pruned` tensors of model `index`; `inputs` are masked deltas, and
    protected columns."""
    method, stages = deltas.prunes[index].method, deltas.stages
    shared = [known[index] for known in (stages.activations, stages.cuts) if index in known]
    how = PRUNE[method].random, q.objective, q.scope_or_default, q.search, q.limits, len(shared)
    spec = Spec(source, method, tuple(pruned), *how)
    return deltas.graph.node(CALIBRATE, [*inputs, *shared, *model.inputs], kind="stage", spec=spec)


@dataclass(frozen=True, slots=True)
class Product:
    """An adapted weight, as expanded, and its pruned factors, "a" and "b"."""

    weight: TensorInfo
    update: Tensor
    factors: dict[str, Tuned]


def factor_pairs(recipe: Recipe, pruned: Sequence[Tuned]) -> list[Product]:
    """Return the adapted weights whose factors are `pruned`; none if whole weights are pruned.

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
    """Return name of a pruned factor -> (the weight whose q is divided among factors, the number of these factors)."""
    return {t.name: (p.weight.name, len(p.factors)) for p in products for t in p.factors.values()}


def factor_calibration(
    products: Sequence[Product],
    source: CalibrationInput,
    model: ModelTensors,
    q: CalibratedQ,
    deltas: Deltas,
    index: int,
) -> Node:
    """Return the stage that calibrates an adapter's own A and B.

    Masks and q are for their product, the update of the weight.
    """
    node, stages = deltas.graph.node, deltas.stages
    shared = [known[index] for known in (stages.activations, stages.cuts) if index in known]
    random, seeds = _masks(deltas, source, q, index)

    def product_node(product: Product, seed: int) -> Node:
        update, factors = product.update, []
        for side, info in (("a", update.inputs[1]), ("b", update.inputs[2])):
            if side in product.factors:
                factor = node(dense, [deltas.masked(product.factors[side], seed)], shape=info.shape)
            else:
                factor = node(passthrough, [deltas.graph.read(info)], shape=info.shape, scales=(1.0,))
            factors.append(node(stage.whole, [factor, *shared], kind="stage", shape=info.shape))
        return node(stage.product, factors, shape=update.shape, **dict(update.parameters))

    pruned, masked = [], list[Node]()
    for product in products:
        masked += [product_node(product, seed) for seed in seeds]
        density = math.prod(deltas.density(tuned) or 1.0 for tuned in product.factors.values())
        name, plain = product.weight.name, density if random else 1.0
        pruned.append(Pruned(name, name, product.update.shape, density, plain, len(seeds)))
    return _search(deltas, source, model, q, index, pruned, masked)


def refuse_changed_config(tune: Input) -> None:
    """Raise InputError if an adapter changes the config, which calibration reads from the base's folder."""
    checkpoint = tune.checkpoint
    if checkpoint.adapter is not None and checkpoint.config != read_json(checkpoint.path / "config.json"):
        message = f"{tune.name}: calibration on an adapter that changes the base's head or config"
        raise InputError(message, hint="merge it first: a recipe of its own with merge_method: passthrough")


def refuse_gathered(tensors: Sequence[Tuned], hint: str) -> None:
    """Raise InputError if a tensor has other rows than its file, because a stage keeps the fine-tune's vocabulary."""
    for tuned in tensors:
        if any(info is not None and moves_rows(info) for info in (tuned.tensor, tuned.merge.base)):
            message = f"{tuned.name}: its vocabulary changes, and this calibration runs models with their own"
            raise InputError(message, hint=hint)
        if tuned.model.regroups(tuned.tensor):
            message = f"{tuned.name}: {tuned.model.name} stores its experts otherwise than the output"
            raise InputError(f"{message}, and calibration runs it as it is", hint=f"template: {tuned.model.name}")


def _layers(merges: Sequence[Merge]) -> tuple[str, ...]:
    """Return the names of single matrices, whose inputs are measured."""
    forms = ((merge.name, matrix_form(merge.name, merge.shape, len(merge.sources))) for merge in merges)
    return tuple(name for name, form in forms if form is not None and form[0] == 1)


def _find_columns(recipe: Recipe, index: int, linear: Sequence[str]) -> None:
    """Raise RecipeError if a pattern of protected columns matches no pruned linear weight of a model."""
    protect = effective_prune(recipe, index).protect
    for pattern in (protect and protect.columns) or {}:
        if not any(finds(pattern, name) for name in linear):
            own = ("models", index) if is_given(recipe, "models", index, "prune", "protect") else ()
            loc = (*own, "prune", "protect", "columns", pattern)
            what = f"{pattern!r} finds no pruned weight of a linear layer"
            hint = "a part of its name, as `deltamerge plan --tensors` lists them"
            raise RecipeError(recipe.source.path, [recipe.problem(loc, what, hint, key=True)])


def sources_of(stages: Stages, inputs: Inputs, kept: int | None) -> dict[int, CalibrationInput]:
    """Return the data that stages run on, by the fine-tune's index in the recipe, or the base's, `kept`."""
    alone = {**stages.activations, **stages.weighing, **stages.calibrated}
    sources = {index: _sources(node)[0] for index, node in alone.items()}
    sources |= {index: one.source for index, one in stages.inputs.items()}
    tunes = [tune.index for tune in inputs.tunes]
    for node, indices in ((stages.rows, tunes), (stages.together, tunes if kept is None else [*tunes, kept])):
        of_models = () if node is None else zip(indices, _sources(node), strict=True)
        sources |= {index: source for index, source in of_models if index is not None}
    return sources


def _sources(stage: Node) -> tuple[CalibrationInput, ...]:
    """Return the models that a stage runs."""
    parameters = dict(stage.parameters)
    if (spec := parameters.get("spec")) is not None:
        return tuple(spec.sources)
    parts: tuple[Share, ...] = parameters.get("parts", ())
    return tuple(part.source for part in parts) or (parameters["source"],)


def stage_bytes(stages: Stages, sources: Mapping[int, CalibrationInput]) -> list[int]:
    """Return the bytes of every stage that runs a model, beside the process."""
    found = [node.parameter("spec").memory for node in stages.calibrations]
    found += [one.memory + memory(Share(one.source)) for one in stages.inputs.values()]
    if stages.rows is not None:
        found.append(second_moments.memory(stages.rows.parameter("parts")))
    return found + [memory(Share(source)) for source in sources.values()]


def result_bytes(stage: Node) -> int:
    """Return the bytes of the stage that measures the inputs of a result's layers, beside the process."""
    source, wanted = stage.parameter("source"), {name for name, _ in stage.parameter("wanted")}
    return second_moments.block_bytes(source, wanted) + memory(Share(source))


def check_data(sources: Mapping[int, CalibrationInput], inputs: Inputs) -> None:
    """Raise InputError unless the rows exist, with the fields and labels that the model's head needs."""
    tunes = {tune.index: tune for tune in inputs.tunes}
    for index, source in sources.items():
        model = tunes.get(index, inputs.base)
        assert model is not None
        with errors.context(f"calibration of {source.model}"):
            config = model.checkpoint.config
            split(source.calibration, source.folder, source.seed, config, labelled=source.labelled)
