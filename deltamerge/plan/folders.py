"""What is said of models that are no plain folder of transformers: pipelines, lone files, pickles, code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.files.strict_json import read_json
from deltamerge.formats.components import CONFIG, MODULES, PIPELINE, check_folder, listed_folders
from deltamerge.formats.config_json import code_of as code_of
from deltamerge.formats.weight_files import PICKLES
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.recipe.schema import Recipe

TOKENIZER_CONFIG = "tokenizer_config.json"


def refuse_apart(named: Sequence[tuple[str, int | None, Checkpoint]]) -> None:
    """InputError: two models have no component in common, so that one is a part of the other, or of another kind."""
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
    """InputError: a tokenizer or chat template is asked for, and those of the output lie in folders of components."""
    key = next((k for k in ("tokenizer_source", "tokenizer", "chat_template") if getattr(recipe, k) is not None), None)
    if key is not None and template.config_file != CONFIG:
        what = "is a pipeline" if template.config_file == PIPELINE else "has no config.json"
        raise InputError(f"{key}: {name} {what}, whose tokenizers are copied as they are", hint=f"remove {key}")


def refuse_partial(recipe: Recipe, name: str, template: Checkpoint) -> None:
    """InputError: a pipeline's list names folders that are not there, and the output would have that list; of the hub
    only what is needed is there before a run."""
    if not recipe.output.rules.standalone or template.config_file != PIPELINE or template.hub_id is not None:
        return
    lost = [folder for folder in listed_folders(template.path) if not (template.path / folder).is_dir()]
    if lost:
        hint = "download it whole, or name a complete pipeline as the template"
        raise InputError(f"{name}: {PIPELINE} lists {', '.join(lost[:4])}, which is not there", hint=hint)


def refuse_unrunnable(name: str, checkpoint: Checkpoint) -> None:
    """InputError: a model that calibration would run is none that transformers makes from a config.json."""
    hint = "give q a number, or a method without calibration (magnitude, dare)"
    if checkpoint.config_file == PIPELINE or "_class_name" in checkpoint.config:
        kind = checkpoint.config.get("_class_name", "a pipeline")
        raise InputError(f"{name}: is of diffusers ({kind}), which calibration does not run", hint=hint)
    if checkpoint.config_file != CONFIG:
        raise InputError(f"{name}: has no config.json, without which calibration cannot run it", hint=hint)


def refuse_adapter(name: str, checkpoint: Checkpoint) -> None:
    """InputError: a PEFT adapter is asked for of what PEFT does not load it on."""
    if checkpoint.config_file != CONFIG or not checkpoint.is_simple or "_class_name" in checkpoint.config:
        raise InputError(f"output.kind peft: {name} is no model of transformers alone", hint="write kind: delta")


def remarks(name: str, template: Checkpoint, models: Sequence[tuple[str, Checkpoint]]) -> Iterator[str]:
    """Notes on the folders of a merge, from names and configs alone; `name` is the template's."""
    if not template.is_simple:
        kind = "diffusers pipeline" if template.config_file == PIPELINE else "sentence-transformers model"
        parts = ", ".join(component.folder or "its own folder" for component in template.components)
        yield f"{name} is a {kind}, merged component by component: {parts}"
    elif not template.config_file and template.config:
        yield f"{name} is a GGUF file: config.json is made of what it says, and so is the tokenizer, by transformers"
    elif not template.config_file:
        yield f"{name} has no config.json, so the output has none: its weights alone are written"
    for other, checkpoint in models:
        if any(file.suffix in PICKLES for file in checkpoint.files):
            yield f"{other} is read from torch's own files: tables of tensors alone, nothing in them is run"
    code = sorted(dict.fromkeys(_code(template)))
    if code:
        yield f"{name} brings its own code ({some(code)}): copied, never run; whoever loads the output must trust it"


def _code(checkpoint: Checkpoint) -> Iterator[str]:
    """The modules that a model's configs name as its own code, and the .py files of its components."""
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
