"""Output tokenizer files: those of the vocabulary's model, with the tokens and chat template that the merge adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

from deltamerge.files.strict_json import parse_json, read_json
from deltamerge.models.tokenizer_files import CONFIG, JINJA, TOKENIZER
from deltamerge.plan.vocabulary import Vocabulary
from deltamerge.plan.vocabulary_config import ChatTemplate

ADDED = "added_tokens.json"

# Output name -> the file that is copied, or what is written.
Files: TypeAlias = dict[str, Path | bytes]


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
