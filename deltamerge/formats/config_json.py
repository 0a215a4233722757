"""config.json, read and checked: the keys that deltamerge uses have the types that transformers writes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from deltamerge.errors import InputError, context
from deltamerge.files.strict_json import read_json

CONFIG = "config.json"
LONGEST = 80


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """The config in `folder`, by its file's `name`. InputError: no such file, not JSON, or a key of another type."""
    config = read_json(folder / name)
    with context(name):
        check_config(config)
    return config


def check_config(config: Mapping[str, Any]) -> None:
    """InputError: a key that deltamerge uses has a value of another type. null counts as an absent key."""
    for key, (is_right, wanted) in KEYS.items():
        value = config.get(key)
        if value is not None and not is_right(value):
            raise InputError(f"{key} must be {wanted}, got {kind(value)}")
    for name, value in (config.get("label2id") or {}).items():
        if not _counts(value):
            raise InputError(f"label2id: {name[:LONGEST]!r} must be an integer, got {kind(value)}")
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, dict):
            with context(key[:LONGEST]):
                for inner in ("vocab_size", "model_type", "tie_word_embeddings"):
                    is_right, wanted = KEYS[inner]
                    if value.get(inner) is not None and not is_right(value[inner]):
                        raise InputError(f"{inner} must be {wanted}, got {kind(value[inner])}")


def code_of(config: Mapping[str, Any]) -> list[str]:
    """The modules that a config's `auto_map` names, as files; one of another repository with its name."""
    found = []
    table = config.get("auto_map")
    for value in table.values() if isinstance(table, dict) else ():
        for name in value if isinstance(value, list | tuple) else [value]:
            if isinstance(name, str) and re.fullmatch(r"[\w./-]+(--[\w.-]+)?", name):
                found.append(name.rpartition(".")[0] + ".py")
    return list(dict.fromkeys(found))


def kind(value: Any) -> str:
    """The type of a JSON value in words."""
    if isinstance(value, bool):
        return str(value).lower()
    names = {str: "text", dict: "an object", list: "a list", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _counts(value: Any) -> bool:
    """Whether a value is an integer, or a string of its digits."""
    if isinstance(value, str):
        return value.isdecimal() and len(value) < 10
    return isinstance(value, int) and not isinstance(value, bool)


Check = tuple[Callable[[Any], bool], str]
INTEGER: Check = (_is(int), "an integer")
NUMBER: Check = (_is(int, float), "a number")
TEXT: Check = (_is(str), "text")
OBJECT: Check = (_is(dict), "an object")
FLAG: Check = (_is(bool), "true or false")
KEYS: Mapping[str, Check] = {
    "architectures": (_texts, "a list of texts"),
    "model_type": TEXT,
    "problem_type": TEXT,
    "vocab_size": INTEGER,
    "num_labels": INTEGER,
    "id2label": OBJECT,
    "label2id": OBJECT,
    "max_position_embeddings": NUMBER,
    "n_positions": NUMBER,
    "tie_word_embeddings": FLAG,
    "is_encoder_decoder": FLAG,
}
