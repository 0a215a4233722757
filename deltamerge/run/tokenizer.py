"""Output tokenizer files: those of the vocabulary's model, with the tokens and chat template that the merge adds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deltamerge.io.strict_json import read_json
from deltamerge.io.tokenizer_files import CONFIG, JINJA, TOKENIZER, tokenizer_config
from deltamerge.plan.chat_template import ChatTemplate
from deltamerge.plan.vocabulary import Vocabulary

ADDED = "added_tokens.json"


def write_tokenizer(folder: Path, vocabulary: Vocabulary | None, chat: ChatTemplate | None) -> None:
    """Change the tokenizer files in `folder`, copied from the vocabulary's model, where the merge changes them."""
    if vocabulary is not None and vocabulary.entries:
        _add_tokens(folder, vocabulary)
    if chat is not None:
        _set_chat_template(folder, chat.text)


def _add_tokens(folder: Path, vocabulary: Vocabulary) -> None:
    """Every added token with its id in tokenizer.json, and in the other files where those list them."""
    first, ids = vocabulary.first, vocabulary.ids
    entries = {token: {"id": ids[token], **entry} for token, entry in first.added.items() if token in ids}
    entries |= {str(entry["content"]): entry for entry in vocabulary.entries}
    ordered = sorted(entries.values(), key=lambda entry: entry["id"])
    # in one line: the indenting encoder takes seconds for a large vocabulary
    _write(folder / TOKENIZER, read_json(folder / TOKENIZER) | {"added_tokens": ordered}, indent=None)
    config = tokenizer_config(folder)
    if isinstance(config.get("added_tokens_decoder"), dict):
        decoder = {str(entry["id"]): {k: v for k, v in entry.items() if k != "id"} for entry in ordered}
        _write(folder / CONFIG, config | {"added_tokens_decoder": decoder})
    if (folder / ADDED).is_file():
        known = {token: i for token, i in read_json(folder / ADDED).items() if token in ids}
        _write(folder / ADDED, known | {str(entry["content"]): entry["id"] for entry in vocabulary.entries})


def _set_chat_template(folder: Path, text: str) -> None:
    """In the form that the tokenizer has it: the key of tokenizer_config.json, else chat_template.jinja."""
    config = tokenizer_config(folder)
    if "chat_template" in config and not (folder / JINJA).is_file():
        _write(folder / CONFIG, config | {"chat_template": text})
        return
    (folder / JINJA).write_text(text, encoding="utf-8")
    if "chat_template" in config:
        _write(folder / CONFIG, {key: value for key, value in config.items() if key != "chat_template"})


def _write(path: Path, value: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(value, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
