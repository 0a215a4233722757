"""Config, tokenizer, chat template and processor files: copied, changed only where the merge changes them."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeAlias

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.dtypes import PLAIN, TORCH_NAMES
from deltamerge.io.files import refuse_link
from deltamerge.io.strict_json import parse_json, read_json
from deltamerge.io.tokenizer_files import CONFIG, JINJA, TOKENIZER
from deltamerge.plan.chat_template import ChatTemplate
from deltamerge.plan.planner import Plan
from deltamerge.plan.vocabulary import Vocabulary
from deltamerge.plan.vocabulary_config import edit_config

OF_TOKENIZER = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "chat_template*", "spiece*", "sentencepiece*",
)  # fmt: skip
GENERATION = "generation_config.json"
OF_MODEL = (
    GENERATION, "preprocessor_config.json", "processor_config.json", "image_processor*.json",
    "video_processor*.json", "feature_extractor*.json",
)  # fmt: skip

ADDED = "added_tokens.json"

# Output name -> the file that is copied, or what is written.
Files: TypeAlias = dict[str, Path | bytes]


def asset_files(plan: Plan) -> dict[str, Path]:
    """Output name -> source of every file copied as it is; config.json is written by `config`."""
    template = plan.inputs.template.checkpoint.path
    return {**_matching(template, OF_MODEL), **tokenizer_files(plan)}


def tokenizer_files(plan: Plan) -> dict[str, Path]:
    """Output name -> source of the tokenizer's files; those of an adapter that is pruned itself lie beside it."""
    source = plan.pruned_adapter or (plan.inputs.vocabulary or plan.inputs.template).checkpoint
    return _matching(source.path, OF_TOKENIZER)


def copied_files(folder: Path) -> dict[str, Path]:
    """What goes with the weights of a finished run in `folder`: config, tokenizer, processor files, recipe."""
    return _matching(folder, (*OF_MODEL, *OF_TOKENIZER, "config.json", "recipe.yaml"))


def _matching(folder: Path, patterns: tuple[str, ...]) -> dict[str, Path]:
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    found = {n: folder / n for n in names if any(fnmatchcase(n, p) for p in patterns)}
    found = {n: p for n, p in found.items() if not n.endswith((".safetensors", ".index.json"))}
    for path in found.values():
        with errors.context(str(folder)):
            refuse_link(path)
    return found


def config(plan: Plan) -> dict[str, Any]:
    """The template's config with the output's dtype and vocabulary size."""
    result = dict(plan.config)
    dtypes = {output.dtype for output in plan.outputs if output.dtype in PLAIN}
    wanted = TORCH_NAMES[dtypes.pop()] if len(dtypes) == 1 else None
    stated = result.get("dtype", result.get("torch_dtype"))
    if wanted is not None and stated != wanted:
        result["dtype"] = result["torch_dtype"] = wanted
    if plan.vocabulary is not None:
        result = edit_config(result, plan.vocabulary, plan.inputs.template)
    elif plan.inputs.vocabulary is not None:
        size = plan.inputs.vocabulary.checkpoint.config.get("vocab_size")
        if size is not None and "vocab_size" in result:
            result["vocab_size"] = size
    return result


def assets(plan: Plan) -> Files:
    """Every output file but weights, card, recipe and lock: copied, or written where the merge changes it."""
    files: Files = dict(asset_files(plan))
    source = plan.inputs.template.checkpoint.path / "config.json"
    merged = config(plan)
    files["config.json"] = source if merged == read_json(source) else as_json(merged, ascii=True)
    if plan.vocabulary is not None and GENERATION in files:
        stated = content_of(files, GENERATION)
        edited = edit_config(stated, plan.vocabulary, plan.inputs.template)
        if edited != stated:
            files[GENERATION] = as_json(edited, ascii=True)
    edit_tokenizer(files, plan.vocabulary, plan.chat_template)
    return files


def write_files(files: Files, folder: Path) -> None:
    """Put `files` into `folder`. InputError: one that is copied has vanished."""
    for name, source in files.items():
        if isinstance(source, bytes):
            (folder / name).write_bytes(source)
            continue
        try:
            shutil.copyfile(source, folder / name)
        except FileNotFoundError as error:
            raise InputError(f"{source}: vanished during the run") from error


def edit_tokenizer(files: Files, vocabulary: Vocabulary | None, chat: ChatTemplate | None) -> None:
    """Put into `files`, the tokenizer files of the vocabulary's model, what the merge changes of them."""
    if vocabulary is not None and vocabulary.entries:
        _add_tokens(files, vocabulary)
    if chat is not None:
        _set_chat_template(files, chat.text)


def content_of(files: Files, name: str) -> dict[str, Any]:
    """The JSON object that the file holds; empty if there is none."""
    found = files.get(name)
    if found is None:
        return {}
    return read_json(found) if isinstance(found, Path) else parse_json(found)


def as_json(value: dict[str, Any], indent: int | None = 2, *, ascii: bool = False) -> bytes:
    """`value` as the text of a JSON file; configs have escapes for what is not ASCII, as transformers writes them."""
    return (json.dumps(value, indent=indent, ensure_ascii=ascii) + "\n").encode()


def _add_tokens(files: Files, vocabulary: Vocabulary) -> None:
    """Every added token with its id in tokenizer.json, and in the other files where those list them."""
    first, ids = vocabulary.first, vocabulary.ids
    entries = {token: {"id": ids[token], **entry} for token, entry in first.added.items() if token in ids}
    entries |= {str(entry["content"]): entry for entry in vocabulary.entries}
    ordered = sorted(entries.values(), key=lambda entry: entry["id"])
    # in one line: the indenting encoder takes seconds for a large vocabulary
    files[TOKENIZER] = as_json(content_of(files, TOKENIZER) | {"added_tokens": ordered}, indent=None)
    config = content_of(files, CONFIG)
    if isinstance(config.get("added_tokens_decoder"), dict):
        decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in ordered}
        files[CONFIG] = as_json(config | {"added_tokens_decoder": decoder})
    if ADDED in files:
        known = {token: i for token, i in content_of(files, ADDED).items() if token in ids}
        files[ADDED] = as_json(known | {str(entry["content"]): entry["id"] for entry in vocabulary.entries})


def _set_chat_template(files: Files, text: str) -> None:
    """In the form that the tokenizer has it: the key of tokenizer_config.json, else chat_template.jinja."""
    config = content_of(files, CONFIG)
    if "chat_template" in config and JINJA not in files:
        files[CONFIG] = as_json(config | {"chat_template": text})
        return
    files[JINJA] = text.encode()
    if "chat_template" in config:
        files[CONFIG] = as_json({key: value for key, value in config.items() if key != "chat_template"})
