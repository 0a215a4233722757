"""The models that a recipe names, opened by their headers and matched tensor by tensor.

Folders that cannot be merged are refused here. If an adapter itself is pruned, its own A and B are the deltas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge import errors
from deltamerge.errors import InputError, RecipeError
from deltamerge.errors.shown import some
from deltamerge.files.strict_json import read_json
from deltamerge.formats.components import CONFIG, MODULES, PIPELINE, check_folder, listed_folders
from deltamerge.formats.components import code_of as code_of
from deltamerge.formats.weight_files import PICKLES, is_distributed
from deltamerge.methods.registry import PRUNE
from deltamerge.models.checkpoint import Checkpoint, by_component, decoded
from deltamerge.models.matching import ExpertForm, form_of, in_order, regrouped, shared_names
from deltamerge.models.references import Models
from deltamerge.recipe import yaml_source
from deltamerge.recipe.output_keys import UNION
from deltamerge.recipe.prune import effective_prune
from deltamerge.recipe.schema import CalibratedQ, Recipe, Section, model_name
from deltamerge.tensors.experts import is_joined, is_turned_stack
from deltamerge.tensors.names import LM_HEAD, TOKEN_EMBEDDING, TOKEN_HEAD, layer_index
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import zeros_like

if TYPE_CHECKING:
    from deltamerge.models.delta_file import DeltaFile


TOKENIZER_CONFIG = "tokenizer_config.json"


def refuse_apart(named: Sequence[tuple[str, int | None, Checkpoint]]) -> None:
    """Raise InputError if two models have no component in common: one is a part of the other, or of another kind."""
    read = [(name, {c.folder for c in checkpoint.components}) for name, _, checkpoint in named if checkpoint.tensors]
    for name, theirs in read[1:]:
        first, ours = read[0]
        if ours.isdisjoint(theirs):
            whole, part = (first, name) if any(ours) else (name, first)
            raise InputError(
                f"{whole} has components ({', '.join(sorted((ours | theirs) - {''}))}), {part} is one model",
                hint=f"name the folder of the component that it is: {whole}/…",
            )


def refuse_vocabulary(recipe: Recipe, name: str, template: Checkpoint) -> None:
    """Raise InputError if the recipe sets a tokenizer or chat template, but the output's lie in component folders."""
    key = next((k for k in ("tokenizer_source", "tokenizer", "chat_template") if getattr(recipe, k) is not None), None)
    if key is not None and template.config_file != CONFIG:
        what = "is a pipeline" if template.config_file == PIPELINE else "has no config.json"
        raise InputError(f"{key}: {name} {what}, whose tokenizers are copied as they are", hint=f"remove {key}")


def refuse_partial(recipe: Recipe, name: str, template: Checkpoint) -> None:
    """Raise InputError if a pipeline that becomes the output lists missing folders.

    Hub models are not refused, because before a run only their needed files are present.
    """
    if not recipe.output.rules.standalone or template.config_file != PIPELINE or template.hub_id is not None:
        return
    lost = [folder for folder in listed_folders(template.path) if not (template.path / folder).is_dir()]
    if lost:
        hint = "download it whole, or name a complete pipeline as the template"
        raise InputError(f"{name}: {PIPELINE} lists {', '.join(lost[:4])}, which is not there", hint=hint)


def refuse_unrunnable(name: str, checkpoint: Checkpoint) -> None:
    """Raise InputError if calibration would run a model that transformers cannot build from a config.json."""
    hint = "give q a number, or a method without calibration (magnitude, dare)"
    if checkpoint.config_file == PIPELINE or "_class_name" in checkpoint.config:
        kind = checkpoint.config.get("_class_name", "a pipeline")
        raise InputError(f"{name}: is of diffusers ({kind}), which calibration does not run", hint=hint)
    if checkpoint.config_file != CONFIG:
        raise InputError(f"{name}: has no config.json, without which calibration cannot run it", hint=hint)


def refuse_adapter(name: str, checkpoint: Checkpoint) -> None:
    """Raise InputError if PEFT does not load an adapter on this model."""
    if checkpoint.config_file != CONFIG or not checkpoint.is_simple or "_class_name" in checkpoint.config:
        raise InputError(f"output.kind peft: {name} is no model of transformers alone", hint="write kind: delta")


def remarks(name: str, template: Checkpoint, models: Sequence[tuple[str, Checkpoint]]) -> Iterator[str]:
    """Yield notes on the folders of a merge, from names and configs alone; `name` is the template's."""
    if not template.is_simple:
        kind = "diffusers pipeline" if template.config_file == PIPELINE else "sentence-transformers model"
        parts = ", ".join(component.folder or "its own folder" for component in template.components)
        yield f"{name} is a {kind}, merged component by component: {parts}"
    elif not template.config_file and template.config:
        yield f"{name} is a GGUF file: transformers makes config.json and the tokenizer from it"
    elif not template.config_file:
        yield f"{name} has no config.json, so the output has none: its weights alone are written"
    for other, checkpoint in models:
        if any(file.suffix in PICKLES for file in checkpoint.files):
            yield f"{other} is read from torch's own files: tables of tensors alone, nothing in them is run"
    code = sorted(dict.fromkeys(_code(template)))
    if code:
        yield f"{name} brings its own code ({some(code)}): copied, never run; whoever loads the output must trust it"


def _code(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the modules that a model's configs name as its own code, and the .py files of its components."""
    folder = checkpoint.path
    for config in (checkpoint.config, _tokenizer(checkpoint)):
        yield from code_of(config)
    if checkpoint.config_file == PIPELINE or (folder / MODULES).is_file():
        with errors.context(checkpoint.reference):
            for inner in listed_folders(folder):
                if not inner or check_folder(folder, inner):
                    yield from (f"{inner}/{p.name}".lstrip("/") for p in sorted((folder / inner).glob("*.py")))


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    file = checkpoint.path / TOKENIZER_CONFIG
    return read_json(file) if file.is_file() else {}


Opener = Callable[[str, Path], Checkpoint]
SOURCES = 600_000  # tensors of all models, and of an output, each counted for every model that it comes from
LANGUAGE_MODEL = re.compile(r"LM|ForConditionalGeneration")


@dataclass(frozen=True, slots=True)
class Input:
    """One model of the recipe: its name, its index in the recipe (None: the base), its tensors by canonical name."""

    name: str
    index: int | None
    checkpoint: Checkpoint
    tensors: dict[str, TensorInfo]
    stored: dict[str, str]
    _containers: dict[str, str] = field(init=False, default_factory=dict, compare=False, repr=False)

    def get(self, canonical_name: str) -> TensorInfo | None:
        """Return the tensor of a canonical name, or None."""
        return self.tensors.get(canonical_name)

    def container(self, prefix: str) -> str:
        """Return the name in the model's files of the numbered container `prefix`; `prefix` if the model has none."""
        if not self._containers:
            self._containers.update(_containers(self.stored))
        return self._containers.get(prefix, prefix)

    def regroups(self, tensor: TensorInfo) -> bool:
        """Tell whether a tensor of this model is of experts that its files store otherwise: fused, apart or
        transposed."""
        adapter, own = self.checkpoint.adapter, tensor.tensor.whole
        known = tensor.name in self.checkpoint.tensors or (adapter is not None and tensor.name in adapter.tensors)
        return is_joined(own) or is_turned_stack(own) or (".experts." in tensor.name and not known)


def _containers(stored: Mapping[str, str]) -> dict[str, str]:
    """Return the name of every numbered container in a model's files, from the container's first tensor."""
    found: dict[str, str] = {}
    for name, own in stored.items():
        parts = name.split(".")
        places = [i for i, part in enumerate(parts) if i and part.isdigit()]
        prefixes = [".".join(parts[:i]) for i in places]
        if all(prefix in found for prefix in prefixes):
            continue
        there = own.split(".")
        numbers = [i for i, part in enumerate(there) if i and part.isdigit()]
        for depth, prefix in enumerate(prefixes):
            found.setdefault(prefix, ".".join(there[: numbers[depth]]) if depth < len(numbers) else prefix)
    return found


@dataclass(frozen=True, slots=True, eq=False)
class InputGroup:
    """The inputs of one part of the output: its base (None: no base, or an unused base) and the merged models.

    `base_member` is the base's index among the part's members; 0 if it is not listed, because all ranges are then
    equal.
    """

    part: Section
    base: Input | None
    tunes: tuple[Input, ...]
    base_member: int = 0

    @property
    def all(self) -> tuple[Input, ...]:
        """Return the base, if there is one, and the models."""
        return self.tunes if self.base is None else (self.base, *self.tunes)

    def range_of(self, model: Input) -> tuple[int, int]:
        """Return the layers [first, end) that a model contributes to a slice."""
        assert self.part.ranges is not None
        return self.part.ranges[self.base_member if model.index is None else self.part.members.index(model.index)]


@dataclass(frozen=True, slots=True)
class Inputs:
    """All models of a recipe, opened.

    groups       the inputs of each part of the output, in its order
    template     the model whose tensors, names and files the output has
    vocabulary   the model whose tokenizer the output has or, for a union, extends; perhaps opened only for that
    stand_ins    names of models that tie their head, so that their embedding serves as their head
    untied       whether some model has a head of its own
    origin       the base of a written delta artifact, whether it is merged or not
    deltas       the open delta artifacts among the models, by reference
    notes        how the models' names were matched, if they differ
    donor        the model whose tokenizer a transplant gives the output, with its embeddings alone; also `vocabulary`
    """

    groups: tuple[InputGroup, ...]
    template: Input
    vocabulary: Input | None
    stand_ins: tuple[str, ...] = ()
    untied: bool = False
    origin: Input | None = None
    deltas: Mapping[str, DeltaFile] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    donor: Input | None = None

    @property
    def base(self) -> Input | None:
        """Return the base of the first part."""
        return self.groups[0].base

    @property
    def tunes(self) -> tuple[Input, ...]:
        """Return the merged models, one for each place in the recipe."""
        return tuple(tune for group in self.groups for tune in group.tunes)

    @property
    def all(self) -> tuple[Input, ...]:
        """Return every model once, the base first."""
        everyone = (model for group in self.groups for model in group.all)
        return tuple({(model.name, model.checkpoint.reference): model for model in everyone}.values())

    @property
    def canonical(self) -> dict[str, str]:
        """Return the names of the output's tensors -> the canonical names by which models are compared."""
        return {stored: name for name, stored in self.template.stored.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names of the merged models, without repetition."""
        return tuple(dict.fromkeys(tune.name for tune in self.tunes))

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Return every checkpoint that is read, once: the models, and the bases of delta artifacts."""
        models = self.all if self.origin is None else (self.origin, *self.all)
        models = models if self.donor is None else (*models, self.donor)
        found = [c for m in models for c in (m.checkpoint.base, m.checkpoint) if c is not None]
        return tuple({checkpoint.reference: checkpoint for checkpoint in found}.values())


def open_inputs(recipe: Recipe, folder: Path, opener: Opener) -> Inputs:
    """Open every model of the recipe once, match their names, choose the template."""
    opened: dict[str, Checkpoint] = {}
    deltas: dict[str, DeltaFile] = {}
    models = Models()

    def checkpoint(reference: str, place: str) -> Checkpoint:
        if reference not in opened:
            with errors.context(place):
                found = opener(reference, folder)
                if found.is_delta and found.base is None:
                    found = over_base(found)
                elif found.is_delta:
                    deltas[reference] = models.artifact(found.path)
                opened[reference] = found
                if (count := sum(len(one.tensors) for one in opened.values())) > SOURCES:
                    what = f"the models have {count:,} tensors up to here, more than {SOURCES:,}"
                    raise InputError(what, hint="merge fewer models at a time")
        return opened[reference]

    def merged(reference: str, place: str) -> Checkpoint:
        """Open a checkpoint whose weights are read: quantised weights are decoded."""
        found = checkpoint(reference, place)
        if not found.config_file and recipe.base_model not in (None, reference) and is_distributed(found.files):
            base = checkpoint(str(recipe.base_model), "base_model")
            found = replace(found, path=base.path, config=base.config, config_file=base.config_file)
            opened[reference] = found
        with errors.context(place), errors.context(reference):
            opened[reference] = decoded(found)
        return opened[reference]

    def over_base(delta: Checkpoint) -> Checkpoint:
        belongs = models.artifact(delta.path).manifest.base
        if recipe.base_model is None or recipe.base_model == delta.reference:
            what = "cannot be the base" if recipe.base_model else "needs base_model"
            raise InputError(f"{delta.reference} is a delta of {belongs}, and {what}", hint=f"base_model: {belongs}")
        with errors.context(delta.reference):
            found, deltas[delta.reference] = models.over(delta, merged(recipe.base_model, "base_model"))
        return found

    def apart(part: Section) -> bool:
        return recipe.method.base_apart(part.base)

    named: list[tuple[str, int | None, Checkpoint]] = []
    own = {"base", recipe.base_model}
    lends = recipe.tokenizer_of in own or recipe.tokenizer_of == UNION
    bases = dict.fromkeys(part.base for part in recipe.parts if part.base is not None and apart(part))
    read = set(bases)
    if recipe.base_model is not None and (recipe.template in own or recipe.output.rules.patches):
        read.add(recipe.base_model)
    if recipe.base_model is not None and (lends or recipe.base_model in read):
        bases.setdefault(recipe.base_model)
    named += [(base, None, (merged if base in read else checkpoint)(base, "base_model")) for base in bases]
    for index, model in enumerate(recipe.models):
        if not (apart(recipe.part_of[index]) and recipe.is_base(index)):
            at = recipe.place(("models", index))
            named.append((model_name(model), index, merged(model.model, yaml_source.place(at))))
    refuse_apart(named)
    if any(checkpoint.running_sum is not None for _, _, checkpoint in named):
        from deltamerge.plan.running_sum import check_sums

        check_sums(recipe, named)
    matched, notes = _match(named)
    matched, stand_ins, untied = (matched, (), False) if recipe.is_moe else _untie(matched)
    base, tunes, groups = _grouped(recipe, bases, matched, apart)
    named_template = "base" if recipe.is_moe else recipe.template
    template = input_named(named_template, recipe, base, tunes) or _template(groups, tunes)
    like = base if base is not None and not recipe.output.rules.standalone else template
    form = form_of(like.tensors, like.checkpoint.tensors)
    matched = [_regrouped(model, form) for model in matched]
    notes += tuple(f"{model.name}: {note}" for model in matched if (note := _regrouping(model)))
    base, tunes, groups = _grouped(recipe, bases, matched, apart)
    template = next(m for m in matched if (m.name, m.index) == (template.name, template.index))
    donor = None
    if recipe.transplant is not None:
        donor = donor_of(recipe.transplant, input_named(recipe.transplant, recipe, base, tunes), merged)
    vocabulary = donor or _vocabulary(recipe, base, tunes, checkpoint)
    origin = base if recipe.output.rules.patches else None
    refuse_vocabulary(recipe, template.name, template.checkpoint)
    refuse_partial(recipe, template.name, template.checkpoint)
    notes = tuple(dict.fromkeys(notes))
    return Inputs(tuple(groups), template, vocabulary, stand_ins, untied, origin, deltas, notes, donor)


def _grouped(
    recipe: Recipe, bases: Collection[str], matched: Sequence[Input], apart: Callable[[Section], bool]
) -> tuple[Input | None, tuple[Input, ...], list[InputGroup]]:
    """Return the base, the merged models, and the inputs of each part of the output."""
    by_index = {model.index: model for model in matched if model.index is not None}
    by_base = dict(zip(bases, matched, strict=False))
    groups = []
    for part in recipe.parts:
        base = by_base[part.base] if apart(part) and part.base is not None else None
        listed = next((n for n, i in enumerate(part.members) if recipe.is_base(i)), 0)
        groups.append(InputGroup(part, base, tuple(by_index[i] for i in part.members if i in by_index), listed))
    base = None if recipe.base_model is None else by_base.get(recipe.base_model)
    return base, tuple(by_index.values()), groups


def _untie(models: list[Input]) -> tuple[list[Input], tuple[str, ...], bool]:
    """If some model has a head of its own, give models that tie their head the embedding as a head.

    Also return the names of models that tie their head, and whether any model has a head of its own.
    """
    own = [m for m in models if LM_HEAD in m.tensors and not ties(m.checkpoint.config, default=False)]
    if not own:
        return models, (), False
    result, names = [], []
    for model in models:
        twin = None if LM_HEAD in model.tensors else _embedding_of(model, own[0].tensors[LM_HEAD])
        if twin is not None:
            names.append(model.name)
            model = replace(
                model,
                tensors={**model.tensors, LM_HEAD: twin},
                stored={**model.stored, LM_HEAD: own[0].stored[LM_HEAD]},
            )
        result.append(model)
    return result, tuple(dict.fromkeys(names)), True


def ties(config: Mapping[str, Any], *, default: bool) -> bool:
    """Tell whether a config ties the head to the embedding; `default` if it does not say."""
    inner = config.get("text_config")
    said = config.get("tie_word_embeddings", inner.get("tie_word_embeddings") if isinstance(inner, dict) else None)
    return default if said is None else said is True


def has_tied_head(model: Input) -> bool:
    """Tell whether a language model's file omits the head because its config ties it to the embedding."""
    config = model.checkpoint.config
    return LM_HEAD not in model.tensors and ties(config, default=False) and _is_language_model(config)


def _is_language_model(config: Mapping[str, Any]) -> bool:
    return any(map(LANGUAGE_MODEL.search, config.get("architectures") or ()))


def _embedding_of(model: Input, head: TensorInfo) -> TensorInfo | None:
    """Return the embedding to which a model without a head of its own ties its head. None: it is no language model."""
    config = model.checkpoint.config
    if not ties(config, default=True) or not _is_language_model(config):
        return None
    twins = (t for n, t in model.tensors.items() if TOKEN_EMBEDDING.search(n) and t.shape[1:] == head.shape[1:])
    return next(twins, None)


def _match(named: Sequence[tuple[str, int | None, Checkpoint]]) -> tuple[list[Input], tuple[str, ...]]:
    """Return the inputs of models, whose names are matched component by component, and a note for each that differs."""
    if all(checkpoint.is_simple for _, _, checkpoint in named):
        return _match_part(named)
    inputs = [Input(name, index, checkpoint, {}, {}) for name, index, checkpoint in named]
    notes: tuple[str, ...] = ()
    for folder, parts in by_component([checkpoint for _, _, checkpoint in named]):
        start = f"{folder}/" if folder else ""
        there = [(i, part) for i, part in enumerate(parts) if part is not None and part.tensors]
        matched, own_notes = _match_part([(inputs[i].name, inputs[i].index, part) for i, part in there])
        notes += own_notes
        for (i, _), own in zip(there, matched, strict=True):
            inputs[i].tensors.update({start + name: info for name, info in own.tensors.items()})
            inputs[i].stored.update({start + name: start + stored for name, stored in own.stored.items()})
    return inputs, notes


def _match_part(named: Sequence[tuple[str, int | None, Checkpoint]]) -> tuple[list[Input], tuple[str, ...]]:
    tensors, names = shared_names([checkpoint.tensors for _, _, checkpoint in named], [name for name, _, _ in named])
    inputs = []
    for (name, index, checkpoint), own, known in zip(named, tensors, names, strict=True):
        stored = {known.canonical[tensor]: tensor for tensor in own}
        inputs.append(Input(name, index, checkpoint, {c: own[tensor] for c, tensor in stored.items()}, stored))
    told = ((name, known.describe()) for (name, _, _), known in zip(named, names, strict=True))
    return inputs, tuple(f"{name}: names are matched: {rules}" for name, rules in told if rules)


def _regrouped(model: Input, form: ExpertForm) -> Input:
    """Return a model with its experts in another form, in the order of its own files."""
    tensors, stored = regrouped(model.tensors, model.stored, form)
    stored = in_order(stored, model.checkpoint.tensors)
    return replace(model, tensors={name: tensors[name] for name in stored}, stored=stored)


def _regrouping(model: Input) -> str:
    """Describe the change of a model's experts; "" if there is none."""
    changed = next((tensor.name for tensor in model.tensors.values() if model.regroups(tensor)), None)
    return f"experts are read as the output stores them: {changed}, …" if changed else ""


def input_named(name: str | None, recipe: Recipe, base: Input | None, tunes: tuple[Input, ...]) -> Input | None:
    """Return the input that `template` or a token's source names: by name, by reference, or as "base".

    None: there is none.
    """
    if name is None:
        return None
    if base is not None and name in ("base", base.name):
        return base
    return next((t for t in tunes if t.index is not None and name in (t.name, recipe.models[t.index].model)), None)


def _vocabulary(
    recipe: Recipe, base: Input | None, tunes: tuple[Input, ...], checkpoint: Callable[[str, str], Checkpoint]
) -> Input | None:
    """Return the model that `tokenizer_source` names; for a union the base, or without a base the first model."""
    wanted = recipe.tokenizer_of
    if wanted is None:
        return None
    if wanted == UNION:
        return base or tunes[0]
    found = input_named(wanted, recipe, base, tunes)
    return found or Input(wanted, None, checkpoint(wanted, "tokenizer_source"), {}, {})


def donor_of(reference: str, among: Input | None, merged: Callable[[str, str], Checkpoint]) -> Input:
    """Return the donor of a transplanted tokenizer, with only its tensors that have a row per token."""
    found = merged(reference, "tokenizer.transplant") if among is None else among.checkpoint
    if found.config_file == PIPELINE:
        raise InputError(
            "is a pipeline, and has no tokenizer of its own", where=reference, hint="name a language model"
        )
    rows = config_rows(found.config)
    tensors = {
        name: info
        for name, info in found.tensors.items()
        if len(info.shape) == 2 and rows is not None and has_vocabulary_rows(name, info.shape, rows, found.config)
    }
    plain = all(info.kind == "stored" for info in tensors.values())
    read = {info.path for info in tensors.values()}
    files = tuple(path for path in found.files if path in read) if plain else found.files
    return Input(reference, None, replace(found, tensors=tensors, files=files), tensors, {n: n for n in tensors})


def _template(groups: Sequence[InputGroup], tunes: tuple[Input, ...]) -> Input:
    """Return the template.

    It is the only fine-tune, or the base. If a fine-tune has tensors (a task head) that the base lacks, or there is no
    base, it is the first fine-tune. In stacks only tensors outside layers count.
    """
    base = groups[0].base
    if base is None or len({tune.name for tune in tunes}) == 1:
        return tunes[0]
    stacked = any(group.part.ranges is not None for group in groups)
    more = {name for tune in tunes for name in tune.tensors.keys() - base.tensors.keys()}
    return tunes[0] if any(not stacked or layer_index(name) is None for name in more) else base


def own_weights(recipe: Recipe, inputs: Inputs) -> Inputs | None:
    """Return the inputs of a run on A and B of a LoRA adapter, the only fine-tune. None: there is no such adapter.

    A and B are the deltas, on a base of zeros. The adapter's other tensors are in both, and are copied.

    InputError: the adapter has another base than the recipe, or the base itself has an adapter. RecipeError: a weight
    or λ other than 1, a q or a mask from calibration.
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
    from deltamerge.formats.peft.adapter import DERIVED, factor_names

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


# Tensors that never have a row per token, whatever their size.
OTHER = re.compile(r"position|token_type|segment|wpe|norm|classifier|score|qa_outputs|pooler")


def sizes(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every place of a config with the vocabulary's size, as (mapping, key), the outermost first."""
    if isinstance(config, dict) and isinstance(config.get("vocab_size"), int):
        yield config, "vocab_size"
    for value in config.values():
        if isinstance(value, dict):
            yield from sizes(value)


def config_rows(config: Mapping[str, Any]) -> int | None:
    """Return the vocabulary's size in config.json; for a multimodal model its text part's."""
    return next((holder[key] for holder, key in sizes(config)), None)


def vocabularies(config: Mapping[str, Any], inside: str = "") -> dict[str, int]:
    """Return every size of a vocabulary that a config states, by its key: vocab_size, vocab_size_per_layer_input, …"""
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= vocabularies(value, f"{inside}{key}.")
        elif "vocab_size" in key and key != "type_vocab_size" and isinstance(value, int) and value > 0:
            found[f"{inside}{key}"] = value
    return found


def has_vocabulary_rows(name: str, shape: tuple[int, ...], rows: int, config: Mapping[str, Any]) -> bool:
    """Tell whether a tensor has a row per token.

    Such a tensor is outside numbered blocks and has `rows` rows. It has the name of an embedding or a head, or any name
    if no other size in the config is this number.
    """
    if layer_index(name) is not None or not 1 <= len(shape) <= 2 or shape[0] != rows:
        return False
    if TOKEN_EMBEDDING.search(name) or TOKEN_HEAD.search(name):
        return True
    return not OTHER.search(name) and rows not in _other_sizes(config)


def _other_sizes(config: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            found |= _other_sizes(value)
        elif isinstance(value, int) and key != "vocab_size" and not key.endswith(("_id", "_index")):
            found.add(value)
    return found
