"""Config, tokenizer, chat template and processor files: copied, changed only where the merge changes them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import DEEPEST, is_plain_folder, refuse_link
from deltamerge.files.strict_json import parse_json, read_json
from deltamerge.formats.components import (
    CONFIG,
    MODULES,
    PIPELINE,
    Component,
    check_folder,
    code_of,
    folders_of,
    listed_folders,
    split,
)
from deltamerge.formats.quantised.detect import without_keys
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.tokenizer_files import JINJA, TEMPLATES, is_described
from deltamerge.models.tokenizer_files import TOKENIZER as TOKENIZER_JSON
from deltamerge.plan.inputs import TOKENIZER_CONFIG
from deltamerge.plan.output_config import generation_of
from deltamerge.plan.planner import Plan
from deltamerge.plan.vocabulary import ChatTemplate, Vocabulary, edit_config
from deltamerge.tensors.dtypes import PLAIN, TORCH_NAMES

TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "spiece*", "sentencepiece*", "tekken*.json",
)  # fmt: skip
GENERATION = "generation_config.json"
RECIPE = "recipe.yaml"  # files of a run that lie beside its result
MODEL = (
    GENERATION, "preprocessor_config.json", "processor_config.json", "image_processor*.json",
    "video_processor*.json", "feature_extractor*.json",
)  # fmt: skip
# Further files, if the model has them: lists of components, sentence-transformers' settings, Mistral's own config.
LISTS = (PIPELINE, MODULES, "config_sentence_transformers.json", "sentence_*_config.json")
MISTRAL = "params.json"
CODE = "*.py"
# From component folders, every file with these endings except weights and their indexes.
ENDINGS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".py")
ADDED = "added_tokens.json"
INDEXES = re.compile(r".*\.index(\.[\w-]+)?\.json")


# Output name -> the file to copy, or the content to write.
Files: TypeAlias = dict[str, Path | bytes]


def asset_files(plan: Plan) -> dict[str, Path]:
    """Return output name -> source of every file copied as it is; config.json is written by `config`."""
    template = plan.inputs.template.checkpoint
    own = [MISTRAL] * (template.config_file == "")
    found = {**_matching(template.path, (*MODEL, *own)), **_of_components(template.path), **tokenizer_files(plan)}
    lender = generation_of(plan.recipe, plan.inputs).checkpoint
    return found if lender is template else found | _matching(lender.path, (GENERATION,))


def tokenizer_files(plan: Plan) -> dict[str, Path]:
    """Return output name -> source of the tokenizer's files, and of the code that they name.

    An adapter that is pruned itself has its own files beside it.
    """
    source = plan.pruned_adapter or _vocabulary(plan)
    config = source.path / TOKENIZER_CONFIG
    code = code_of(read_json(config)) if config.is_file() else []
    return _matching(source.path, (*TOKENIZER, *[name for name in code if "/" not in name])) | _templates(source.path)


def _templates(folder: Path) -> dict[str, Path]:
    """Return a tokenizer's named chat templates. InputError: a link that leaves the folder."""
    with errors.context(str(folder)):
        there = check_folder(folder, TEMPLATES)
    return dict(_below(folder, TEMPLATES, 0)) if there else {}


def _vocabulary(plan: Plan) -> Checkpoint:
    """Return the model whose tokenizer the output has."""
    return (plan.inputs.vocabulary or plan.inputs.template).checkpoint


def left_out(plan: Plan, files: Files) -> Iterator[str]:
    """Yield notes on files that the output should have and does not."""
    source = _vocabulary(plan)
    if is_described(source) and TOKENIZER_JSON not in files:
        yield f"{source.reference} describes a tokenizer that transformers cannot make: none is written"


def copied_files(folder: Path) -> dict[str, Path]:
    """Return the files beside the weights of a finished run in `folder`: config, tokenizer, processor files, recipe."""
    own = _matching(folder, (*MODEL, *TOKENIZER, MISTRAL, "config.json", RECIPE))
    return own | _templates(folder) | _of_components(folder)


def _of_components(folder: Path) -> dict[str, Path]:
    """Return the files of a model's components but weights, and its own code, by their paths below it."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    if any((folder / name).is_file() for name in (PIPELINE, MODULES)):
        found = _matching(folder, (*LISTS, CODE))
        for inner in listed_folders(folder):
            if inner and check_folder(folder, inner):
                found |= {name: path for name, path in _below(folder, inner) if not INDEXES.fullmatch(path.name)}
    elif (folder / CONFIG).is_file() and code_of(read_json(folder / CONFIG)):
        found = _matching(folder, (CODE,))
    return found


def _below(folder: Path, inner: str, depth: int = DEEPEST) -> Iterator[tuple[str, Path]]:
    """Yield the files in a component's folder and in the folders there. InputError: a link that leaves them."""
    for path in sorted((folder / inner).iterdir()):
        name = f"{inner}/{path.name}"
        with errors.context(str(folder)):
            refuse_link(path)
        if path.is_dir() and is_plain_folder(name) and depth:
            yield from _below(folder, name, depth - 1)
        elif path.is_file() and path.name.endswith(ENDINGS):
            yield name, path


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    if not folder.is_dir():  # a lone weight file
        return {}
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    found = {n: folder / n for n in names if any(fnmatchcase(n, p) for p in patterns)}
    found = {n: p for n, p in found.items() if not n.endswith((".safetensors", ".index.json"))}
    for path in found.values():
        with errors.context(str(folder)):
            refuse_link(path)
    return found


def config(plan: Plan) -> dict[str, Any]:
    """Return the template's config with the output's dtype and vocabulary size.

    A pipeline's list of components stays as it is.
    """
    if plan.inputs.template.checkpoint.config_file == PIPELINE:
        return dict(plan.config)
    result = _with_dtype(plan, "", plan.config) if plan.running_sum is None else dict(plan.config)
    if plan.vocabulary is not None:
        result = edit_config(result, plan.vocabulary, plan.inputs.template)
    elif plan.inputs.vocabulary is not None:
        size = plan.inputs.vocabulary.checkpoint.config.get("vocab_size")
        if size is not None and "vocab_size" in result:
            result["vocab_size"] = size
    return result


def _with_dtype(plan: Plan, folder: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a component with the dtype of its output; diffusers' configs do not have one."""
    result, folders = dict(config), folders_of(plan.inputs.template.checkpoint.components)
    own = [output for output in plan.outputs if split(output.name, folders)[0] == folder]
    dtypes = {output.dtype for output in own if output.dtype in PLAIN}
    wanted = TORCH_NAMES[dtypes.pop()] if len(dtypes) == 1 else None
    stated = result.get("dtype", result.get("torch_dtype"))
    if wanted is not None and stated != wanted and not (stated is None and "_class_name" in result):
        result["dtype"] = result["torch_dtype"] = wanted
    return result


def _component_config(plan: Plan, component: Component) -> dict[str, Any]:
    """Return the config of a component that lies in a folder. Modules of sentence-transformers have no dtype either."""
    config = without_keys(plan.settled.parts.get(component.folder, component.config))
    described = {"architectures", "model_type", "dtype", "torch_dtype"} & config.keys()
    return _with_dtype(plan, component.folder, config) if described else config


def assets(plan: Plan) -> Files:
    """Return every file of a checkpoint without weights, card, recipe and lock: copied, or written if it changes."""
    files: Files = dict(asset_files(plan))
    template = plan.inputs.template.checkpoint
    if template.config_file:
        source, merged = template.path / template.config_file, config(plan)
        files[template.config_file] = source if merged == read_json(source) else as_json(merged, ascii=True)
    elif template.config:  # of a GGUF file, whose config is told by its metadata
        files[CONFIG] = as_json(config(plan), ascii=True)
    source_of_words = _vocabulary(plan)
    if is_described(source_of_words):
        from deltamerge.models.gguf_tokenizer import described

        files |= described(source_of_words)
    for component in template.components:
        own = _component_config(plan, component) if component.folder else {}
        if component.folder and own != component.config:
            files[component.at(CONFIG)] = as_json(own, ascii=True)
    if plan.vocabulary is not None and GENERATION in files:
        stated = content_of(files, GENERATION)
        edited = edit_config(stated, plan.vocabulary, plan.inputs.template, generation=True)
        if edited != stated:
            files[GENERATION] = as_json(edited, ascii=True)
    edit_tokenizer(files, plan.vocabulary, plan.chat_template)
    return files


def write_files(files: Files, folder: Path) -> None:
    """Put `files` into `folder`. InputError: a file to copy has vanished."""
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
            continue
        try:
            shutil.copyfile(source, folder / name)
        except FileNotFoundError as error:
            raise InputError(f"{source}: vanished during the run") from error


# -- the tokenizer's files


def edit_tokenizer(files: Files, vocabulary: Vocabulary | None, chat: ChatTemplate | None) -> None:
    """Apply the merge's changes to `files`, the tokenizer files of the vocabulary's model."""
    if vocabulary is not None and vocabulary.entries:
        _add_tokens(files, vocabulary)
    if chat is not None:
        _set_chat_template(files, chat.text)


def content_of(files: Files, name: str) -> dict[str, Any]:
    """Return the JSON object that the file holds; empty if there is none."""
    found = files.get(name)
    if found is None:
        return {}
    return read_json(found) if isinstance(found, Path) else parse_json(found)


def as_json(value: dict[str, Any], indent: int | None = 2, *, ascii: bool = False) -> bytes:
    """Return `value` as the text of a JSON file. `ascii`: with escapes, as transformers writes configs."""
    return (json.dumps(value, indent=indent, ensure_ascii=ascii) + "\n").encode()


def _add_tokens(files: Files, vocabulary: Vocabulary) -> None:
    """Put every added token with its id into tokenizer.json, and into the other files that list them."""
    first, ids = vocabulary.first, vocabulary.ids
    entries = {token: {"id": ids[token], **entry} for token, entry in first.added.items() if token in ids}
    entries |= {str(entry["content"]): entry for entry in vocabulary.entries}
    ordered = sorted(entries.values(), key=lambda entry: entry["id"])
    # in one line: the indenting encoder takes seconds for a large vocabulary
    files[TOKENIZER_JSON] = as_json(content_of(files, TOKENIZER_JSON) | {"added_tokens": ordered}, indent=None)
    config = content_of(files, TOKENIZER_CONFIG)
    if isinstance(config.get("added_tokens_decoder"), dict):
        decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in ordered}
        files[TOKENIZER_CONFIG] = as_json(config | {"added_tokens_decoder": decoder})
    if ADDED in files:
        known = {token: i for token, i in content_of(files, ADDED).items() if token in ids}
        files[ADDED] = as_json(known | {str(entry["content"]): entry["id"] for entry in vocabulary.entries})


def _set_chat_template(files: Files, text: str) -> None:
    """Set the default chat template where the tokenizer stores it: in tokenizer_config.json, or in chat_template.jinja.

    Named templates in a list beside it stay.
    """
    config = content_of(files, TOKENIZER_CONFIG)
    if "chat_template" in config and JINJA not in files:
        stored: Any = text
        if isinstance(named := config["chat_template"], list):
            others = [one for one in named if isinstance(one, dict) and one.get("name") != "default"]
            stored = [{"name": "default", "template": text}, *others]
        files[TOKENIZER_CONFIG] = as_json(config | {"chat_template": stored})
        return
    files[JINJA] = text.encode()
    if "chat_template" in config:
        files[TOKENIZER_CONFIG] = as_json({key: value for key, value in config.items() if key != "chat_template"})
