"""The config.json of the output if the models' configs differ: the written values, the messages, the refusals.

If all fine-tunes agree against the base, their value is written, because they were trained with it. Otherwise the
template's value is written. The recipe's `config:` overrides a key.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from deltamerge.errors import InputError, Problem, RecipeError
from deltamerge.errors.shown import some
from deltamerge.formats.components import PIPELINE
from deltamerge.formats.quantised.detect import without_keys
from deltamerge.models.config_class import UNKNOWN, class_of_type
from deltamerge.models.config_differences import (
    ABSENT,
    ACTIVATION,
    FULL,
    LOCAL,
    LOCAL_SCALING,
    LOCALS,
    PARAMETERS,
    PARTIAL,
    SCALING,
    SLIDING,
    THETA,
    THETAS,
    WINDOW,
    Difference,
    differences,
    in_words,
    known_keys,
    same,
)
from deltamerge.models.tokenizer_files import GENERATION
from deltamerge.plan.inputs import Input, Inputs, input_named
from deltamerge.recipe.problems import suggest
from deltamerge.recipe.schema import Recipe
from deltamerge.tensors.names import LM_HEAD

BESIDE = (
    "config_changes.json"  # file in an adapter's folder: the keys in which its model's config differs from the base's
)
TIE, TYPE = "tie_word_embeddings", "model_type"
WITH_TYPE = ("architectures", "auto_map")  # keys that go with the type of a model
LENGTHS = (THETA, SCALING, "max_position_embeddings", "original_max_position_embeddings")
LONGER = (
    "a fine-tune for longer texts scales its rotary positions on purpose, and its weights work with those alone; a "
    "merge with a model that has others is a compromise in either"
)
ENDS = ("eos_token_id", "decoder_start_token_id")  # ids that change what a model writes
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")  # keys that count layers
SIZES = frozenset({*COUNTS, "vocab_size", "hidden_size", "intermediate_size", "n_embd", "d_model", "d_ff", TIE})


@dataclass(frozen=True, slots=True)
class ConfigDifference:
    """A key in which models differ, and its value in the output's config.

    value   the output's value, by meaning
    whose   the name of the model with this value; None: the recipe states the value
    chosen  whether the recipe names the key
    agreed  whether all fine-tunes agree on it, against the base
    """

    difference: Difference
    value: Any
    whose: str | None
    chosen: bool
    agreed: bool = False

    def describe(self) -> dict[str, Any]:
        """Return its entry in a lock."""
        values = {name: _plain(value) for name, value in self.difference.values.items()}
        whose = {} if self.whose is None else {"of": self.whose}
        return {"written": _plain(self.value), **whose, "values": values}


@dataclass(frozen=True, slots=True)
class OutputConfig:
    """The configs of the output, and the differences between the models' configs.

    config    the output's own config
    parts     the configs of its components, by their folders
    keys      the keys in which models differ, with their components' folders
    refused   keys by which weights mean different things, and which the recipe does not choose
    beside    keys in which an adapter's model differs from its base, on which it is loaded
    """

    config: dict[str, Any]
    parts: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    keys: Mapping[str, ConfigDifference] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    beside: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise InputError if the same places of models' weights mean different things."""
        if self.refused:
            first, *also = self.refused
            names = [line.partition(" is ")[0] for line in self.refused]
            lines = ", ".join(f"{name}: MODEL" for name in names)
            hint = f"such a merge is hardly meant; if it is, write config: {{{lines}}} in a recipe"
            raise InputError(first, also=also, hint=hint)

    def describe(self) -> dict[str, Any]:
        """Return the entry in a lock of the keys in which models differ."""
        return {key: written.describe() for key, written in self.keys.items()}


@dataclass(frozen=True, slots=True)
class _Choice:
    """The recipe's choice for a key: a model's value, or its own."""

    owner: Input | None
    value: Any


def settle(recipe: Recipe, inputs: Inputs, config: Mapping[str, Any], *, stacked: bool = False) -> OutputConfig:
    """Return the output's configs.

    `config` is the template's, adapted to the output's layers; `stacked`: they are a stack.

    RecipeError: `config` of the recipe names an unknown key, or gives neither a model nor a value for it.
    """
    template, done = inputs.template, OutputConfig(dict(config))
    models = _models(inputs)
    folders = [component.folder for component in template.checkpoint.components if component.folder]
    of_whole = template.checkpoint.config_file != PIPELINE
    everywhere: dict[str, dict[str, Mapping[str, Any]]] = {}
    if of_whole:
        everywhere[""] = {model.name: without_keys(model.checkpoint.config) for model in models}
    for folder in folders:
        found = {m.name: c.config for m in models for c in m.checkpoint.components if c.folder == folder and c.config}
        if folder and template.name in found:
            everywhere[folder] = found
    choices = _choices(recipe, inputs, everywhere)
    keys: dict[str, ConfigDifference] = {}
    parts: dict[str, dict[str, Any]] = {}
    for folder, configs in everywhere.items():
        start = f"{folder}/" if folder else ""
        own = {key.removeprefix(start): one for key, one in choices.items() if key.rpartition("/")[0] == folder}
        settled = _Settled(recipe, inputs, configs, own, stacked=stacked and not folder)
        made = settled.config(config if not folder else configs[template.name])
        if folder:
            parts[folder] = made
        elif lost := [key for key in own if key != TYPE and key not in known_keys(made)]:
            message = f"{lost[0]} is no key of model type {made.get(TYPE)!r}, which is written"
            problem = recipe.problem(("config", lost[0]), message, f"{TYPE}: a model that has it", key=True)
            raise RecipeError(recipe.source.path, [problem])
        else:
            done = OutputConfig(made)
        keys |= {f"{start}{key}": written for key, written in settled.keys.items()}
    told = [key for key, written in keys.items() if not written.chosen]
    refused = [key for key in told if _is_refused(keys[key].difference, recipe)]
    return OutputConfig(
        done.config,
        parts,
        keys,
        tuple(_refusal(key, keys[key].difference) for key in refused),
        tuple(_warnings(inputs, {key: keys[key] for key in told if key not in refused})),
        (*_types(everywhere.get("", {}), template.name, keys), *_notes(keys, choices)),
        _beside(recipe, inputs, keys),
    )


def adapter_warnings(settled: OutputConfig, inputs: Inputs) -> Iterator[str]:
    """Warn that an adapter lacks the keys in which its model differs from its base."""
    if settled.beside and inputs.base is not None:
        told = ", ".join(f"{key}: {in_words(value)}" for key, value in settled.beside.items())
        yield (
            f"the adapter does not hold {told}: PEFT loads it on {inputs.base.name}, whose config says otherwise, and "
            f"will not apply {BESIDE}, which keeps it; set it in the base's config before loading, or write kind: model"
        )


def remarks_on_configs(inputs: Inputs, *, refuse: bool = False) -> Iterator[str]:
    """Yield a message for every key in which models differ that are inspected, not merged.

    InputError, if `refuse`: the same places of their weights mean different things.
    """
    found = differences([(model.name, without_keys(model.checkpoint.config)) for model in _models(inputs)])
    refused = [_refusal(one.key, one) for one in found if one.kind == "positions"]
    if refused and refuse:
        raise InputError(refused[0], also=refused[1:], hint="name models of one architecture")
    yield from (f"config.json: {line}; what is said of Δ means little" for line in refused)
    for one in found:
        if one.kind == "function" and not (one.key == TIE and _is_untied(inputs)):
            yield f"config.json: {one.key} is {one.said()}: weights alone do not make one of the other"


def generation_of(recipe: Recipe, inputs: Inputs) -> Input:
    """Return the model whose generation_config.json the output gets.

    It is a model whose end of text the recipe takes, or else the template. If the template is the base, and all
    fine-tunes agree against it, it is the first fine-tune.
    """
    template, base = inputs.template, inputs.base
    if recipe.tokenizer_of is not None or recipe.transplant is not None or recipe.is_moe:
        return template
    named = recipe.config.get("eos_token_id")
    chosen = input_named(named, recipe, base, inputs.tunes) if isinstance(named, str) else None
    if chosen is not None and (chosen.checkpoint.path / GENERATION).is_file():
        return chosen
    tunes = _tunes(inputs)
    if recipe.template is not None or base is None or template.name != base.name or not tunes:
        return template
    files = [_read(model) for model in tunes]
    agree = files[0] is not None and all(one == files[0] for one in files)
    return tunes[0] if agree else template


def _read(model: Input) -> dict[str, Any] | None:
    from deltamerge.files.strict_json import read_json

    path = model.checkpoint.path / GENERATION
    if not path.is_file():
        return None
    content = read_json(path)
    return {key: value for key, value in content.items() if key not in ("transformers_version", "_from_model_config")}


class _Settled:
    """One config of the output: the keys in which the models differ, and the sources of its values."""

    def __init__(
        self,
        recipe: Recipe,
        inputs: Inputs,
        configs: Mapping[str, Mapping[str, Any]],
        choices: Mapping[str, _Choice],
        *,
        stacked: bool,
    ) -> None:
        self.recipe, self.inputs, self.configs, self.choices = recipe, inputs, configs, choices
        self.keys: dict[str, ConfigDifference] = {}
        self.tunes = [tune.name for tune in _tunes(inputs) if configs.get(tune.name)]
        for one in differences(list(configs.items())):
            if self._is_told(one, stacked):
                self.keys[one.key] = self._written(one)

    def config(self, template: Mapping[str, Any]) -> dict[str, Any]:
        """Return the template's config, with the values that come from other models."""
        made, name = deepcopy(dict(template)), self.inputs.template.name
        owners = {key: one.whose for key, one in self.keys.items() if not one.chosen and self._moves(one, name)}
        for key in sorted(owners, key=lambda one: one != TYPE):
            _put(made, key, self.keys[key].value, self.configs[str(owners[key])])
        for key, choice in sorted(self.choices.items(), key=lambda item: item[0] != TYPE):
            if choice.owner is None:
                _put(made, key, choice.value, None)
            elif key not in self.keys or not self._is_like(key, choice.owner.name, name):
                theirs = self.configs[choice.owner.name]
                told = self.keys[key].value if key in self.keys else known_keys(theirs).get(key, ABSENT)
                _put(made, key, told, theirs)
        return made

    def _is_told(self, one: Difference, stacked: bool) -> bool:
        name = one.key.rpartition(".")[2]
        if one.kind == "tokens" and (self.recipe.tokenizer_of is not None or self.recipe.transplant is not None):
            return False  # ids follow their tokens
        if name == TIE and _is_untied(self.inputs):
            return False  # the output's head is its own, whatever configs say
        return not (stacked and ("layer" in name or any(isinstance(value, list) for value in one.values.values())))

    def _written(self, one: Difference) -> ConfigDifference:
        choice = self.choices.get(one.key)
        if choice is not None:
            name = None if choice.owner is None else choice.owner.name
            return ConfigDifference(
                one, choice.value if name is None else one.values.get(name, ABSENT), name, chosen=True
            )
        base, template = self.inputs.base, self.inputs.template.name
        whose = template if template in one.values else next(iter(one.values))
        tunes = [name for name in self.tunes if name in one.values]
        agreed = base is not None and bool(tunes) and one.agrees(tunes) and not self._is_kept(one)
        if agreed and base is not None and template == base.name:
            whose = tunes[0]
        return ConfigDifference(one, one.values.get(whose, ABSENT), whose, chosen=False, agreed=agreed)

    def _is_kept(self, one: Difference) -> bool:
        """Tell whether the template's value stays, whatever the fine-tunes say."""
        name = self.inputs.template.name
        is_known = class_of_type(str(self.configs[name].get(TYPE))) is not None
        has_none = is_known and one.values.get(name, ABSENT) is ABSENT  # its class has no such key
        is_set = self.recipe.template is not None or self.recipe.is_moe
        return is_set or has_none or one.key.rpartition(".")[2] in SIZES

    def _moves(self, written: ConfigDifference, template: str) -> bool:
        values = written.difference.values
        return written.whose is not None and not same(values.get(template, ABSENT), values[written.whose])

    def _is_like(self, key: str, owner: str, template: str) -> bool:
        values = self.keys[key].difference.values
        return same(values.get(owner, ABSENT), values.get(template, ABSENT))


def _models(inputs: Inputs) -> list[Input]:
    """Return every model with a config once, including the base of a written delta artifact."""
    named: dict[str, Input] = {}
    for model in inputs.all:
        if model.checkpoint.config:
            named.setdefault(model.name, model)
    return list(named.values())


def _tunes(inputs: Inputs) -> list[Input]:
    """Return the merged models but the base, each once."""
    base = inputs.base
    found: dict[str, Input] = {}
    for tune in inputs.tunes:
        if tune.checkpoint.config and (base is None or tune.checkpoint.reference != base.checkpoint.reference):
            found.setdefault(tune.name, tune)
    return list(found.values())


def _is_untied(inputs: Inputs) -> bool:
    """Tell whether the output has its own head, as some model has one."""
    return inputs.untied and LM_HEAD in inputs.template.tensors


def _is_refused(one: Difference, recipe: Recipe) -> bool:
    """Tell whether weights mean different things. Of a mixture's experts only their MLPs are taken."""
    if one.kind != "positions":
        return False
    return not recipe.is_moe or ACTIVATION.fullmatch(one.key.rpartition(".")[2]) is not None


def _refusal(key: str, one: Difference) -> str:
    return f"{key} is {one.said()}: the same places of their weights mean different things"


def _warnings(inputs: Inputs, keys: Mapping[str, ConfigDifference]) -> Iterator[str]:
    explained = False
    for key, written in keys.items():
        one = written.difference
        if one.kind == "tokens" and (written.agreed or key.rpartition(".")[2] not in ENDS):
            continue
        why = ""
        if written.agreed:
            why = ", as all fine-tunes agree" if len(_tunes(inputs)) > 1 else ", the fine-tune"
        name = key.rpartition(".")[2]
        line = "template: MODEL" if name in SIZES else f"config: {{{key}: MODEL or a value}}"
        told = f"{key} is {one.said()}; the output has {in_words(written.value)}, that of {written.whose}{why}"
        if name in LENGTHS and not explained and name != "max_position_embeddings":
            told, explained = f"{told} ({LONGER})", True
        yield f"config.json: {told}; to choose, write in the recipe {line}"


def _notes(keys: Mapping[str, ConfigDifference], choices: Mapping[str, _Choice]) -> Iterator[str]:
    for key, choice in choices.items():
        whose = "as the recipe says" if choice.owner is None else f"that of {choice.owner.name}, as the recipe says"
        value = choice.value if key not in keys else keys[key].value
        yield f"config.json: {key} is {in_words(value)}, {whose}"
    for key, written in keys.items():
        if written.difference.kind == "tokens" and written.agreed:
            said = f"config.json: {key} is {written.difference.said()}"
            yield f"{said}; the output has {in_words(written.value)}, that of {written.whose}"


def _types(
    configs: Mapping[str, Mapping[str, Any]], template: str, keys: Mapping[str, ConfigDifference]
) -> Iterator[str]:
    kinds = dict.fromkeys(str(config[TYPE]) for config in configs.values() if config.get(TYPE))
    if len(kinds) > 1 and TYPE not in keys:
        written = configs.get(template, {}).get(TYPE)
        yield f"config.json: {TYPE} is {some(list(kinds))}, which compute the same; {written} is written"


def _beside(recipe: Recipe, inputs: Inputs, keys: Mapping[str, ConfigDifference]) -> dict[str, Any]:
    """Return the keys in which an adapter's model differs from the base that loads it."""
    base = inputs.base
    if not recipe.output.rules.adapts or base is None:
        return {}
    values = {key: (one.value, one.difference.values.get(base.name, ABSENT)) for key, one in keys.items()}
    return {key: _plain(value) for key, (value, of_base) in values.items() if not same(value, of_base)}


def _plain(value: Any) -> Any:
    return None if value is ABSENT or value is UNKNOWN else deepcopy(value)


# -- the recipe's choices


def _choices(
    recipe: Recipe, inputs: Inputs, everywhere: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> dict[str, _Choice]:
    """Return the choices of the recipe's `config`, by dotted key. RecipeError: as `settle`."""
    if not recipe.config:
        return {}
    known: dict[str, list[Any]] = {}
    for folder, configs in everywhere.items():
        for config in configs.values():
            for key, value in known_keys(config).items():
                known.setdefault(f"{folder}/{key}" if folder else key, []).append(value)
    problems: list[Problem] = []
    found: dict[str, _Choice] = {}
    for loc, key, value in _flat(recipe.config, known):
        if key.rpartition(".")[2] in SIZES:
            problems.append(recipe.problem(loc, f"{key} follows the weights", "leave it out", key=True))
        elif key != TYPE and key not in known:
            message = f"{key} is no key of these models' configs"
            problems.append(recipe.problem(loc, message, _near(key, known), key=True))
        elif isinstance(value, str) and (owner := _named(value, recipe, inputs)) is not None:
            found[key] = _Choice(owner, value)
        elif key == TYPE or (isinstance(value, str) and not _is_text(known[key])):
            names = ["base"] * (inputs.base is not None) + [model.name for model in _models(inputs)]
            problems.append(recipe.problem(loc, f"{value!r} is no model of this recipe", suggest(str(value), names)))
        else:
            found[key] = _Choice(None, value)
    if problems:
        raise RecipeError(recipe.source.path, problems)
    return found


def _flat(
    said: Mapping[str, Any], known: Iterable[str], loc: tuple[str, ...] = ("config",), at: str = ""
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield dotted keys, also of sections that are written as mappings."""
    for key, value in said.items():
        full = f"{at}{key}"
        if isinstance(value, Mapping) and full not in known and any(one.startswith(f"{full}.") for one in known):
            yield from _flat(value, known, (*loc, key), f"{full}.")
        else:
            yield (*loc, key), full, value


def _near(key: str, known: Iterable[str]) -> str:
    if key.rpartition(".")[2] == PARAMETERS:
        return f"write {THETA} and {SCALING}"
    ends = [one for one in known if one.endswith(f".{key}")]
    return suggest(key, ends or known)


def _named(value: str, recipe: Recipe, inputs: Inputs) -> Input | None:
    everyone = (model for model in _models(inputs) if value == model.name)
    return input_named(value, recipe, inputs.base, inputs.tunes) or next(everyone, None)


def _is_text(values: Sequence[Any]) -> bool:
    return any(isinstance(value, str) for value in values)


# -- a value put into a config


def _put(config: dict[str, Any], key: str, value: Any, source: Mapping[str, Any] | None) -> None:
    """Set in a config, in its own form, the meaning of `key` in the config `source`.

    None: the recipe gives the value.
    """
    *path, name = key.split(".")
    if path and path[-1] == PARAMETERS:  # for one kind of layer
        path = path[:-1]
    section, theirs = _section(config, path), _section(source, path) if source is not None else None
    if name == TYPE:
        _take(section, theirs or {}, (TYPE, *WITH_TYPE))
        more = class_of_type(str((theirs or {}).get(TYPE)))
        kept = [one for one in (theirs or {}) if one not in section and more is not None and one in more.keys]
        _take(section, theirs or {}, kept)
    elif name in (THETA, SCALING, LOCAL, LOCAL_SCALING) or f"{PARAMETERS}.{name}" in key:
        _put_rope(section, name, value)
    elif name in ("sliding_window", "layer_types"):
        if theirs is not None and theirs.get(TYPE) == section.get(TYPE):
            _take(section, theirs, WINDOW)
        else:
            section[name] = _plain(value)
            if name == "sliding_window" and "use_sliding_window" in section:
                section["use_sliding_window"] = value is not None
    else:
        _put_plain(section, name, value, theirs)


def _put_plain(section: dict[str, Any], name: str, value: Any, theirs: Mapping[str, Any] | None) -> None:
    holder = section.get(PARAMETERS)
    if name == PARTIAL and isinstance(holder, dict):
        holder[PARTIAL] = value
        return
    known = class_of_type(str(section.get(TYPE)))
    names = [name] if known is None else [*(one for one, own in known.aliases.items() if own == name), name]
    ours = next((one for one in names if one in section), name)
    if theirs is None:
        section[ours] = value
        return
    stated = next((one for one in names if one in theirs), None)
    if stated is not None:
        section[ours] = deepcopy(theirs[stated])
    elif theirs.get(TYPE) == section.get(TYPE) or value is ABSENT or value is UNKNOWN:
        section.pop(ours, None)  # as it is in theirs: the default
    else:
        section[ours] = _plain(value)


def _put_rope(section: dict[str, Any], name: str, value: Any) -> None:
    """Set the base of rotary positions, or their scaling, in the form of the config."""
    whole = section.get(PARAMETERS)
    nested = isinstance(whole, dict) and any(isinstance(one, dict) for one in whole.values())
    if name not in (THETA, SCALING, LOCAL, LOCAL_SCALING):
        if isinstance(whole, dict):
            whole[name] = {"rope_type": "default", **(value[SCALING] or {}), THETA: value[THETA]}
        return
    is_local = name in (LOCAL, LOCAL_SCALING)
    kind = SLIDING if is_local else FULL
    holder = whole.get(kind) if nested and isinstance(whole, dict) else None if is_local else whole
    spelled = LOCALS if is_local else THETAS
    older = section.get(SCALING) if not is_local else None
    if name in (THETA, LOCAL):
        top = [one for one in spelled if one in section]
        if isinstance(holder, dict):
            holder[THETA] = value
        elif not top:
            top = [name]
        for one in top:
            section[one] = value
        if isinstance(older, dict) and THETA in older:
            older[THETA] = value
        return
    scaling = dict(value) if isinstance(value, Mapping) else None
    if isinstance(holder, dict):
        kept = {one: holder[one] for one in (THETA, PARTIAL) if one in holder}
        holder.clear()
        holder.update(kept | (scaling or {"rope_type": "default"}))
    if not is_local and (SCALING in section or not isinstance(holder, dict)):
        section[SCALING] = scaling


def _take(section: MutableMapping[str, Any], theirs: Mapping[str, Any], names: Iterable[str]) -> None:
    """Copy keys from another config. Keys that it lacks are removed."""
    for name in names:
        if name in theirs:
            section[name] = deepcopy(theirs[name])
        else:
            section.pop(name, None)


def _section(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    """Return the section of a config that dotted keys lead to, or the config itself in an older form."""
    for key in path:
        inner = config.get(key)
        if not isinstance(inner, dict):
            return config
        config = inner
    return config
