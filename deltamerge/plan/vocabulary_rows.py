"""Tensors with one row per token, recognised by name and number of rows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from deltamerge.tensors.names import TOKEN_EMBEDDING, TOKEN_HEAD, layer_index

# Tensors that never have a row per token, whatever their size.
OTHER = re.compile(r"position|token_type|segment|wpe|norm|classifier|score|qa_outputs|pooler")


def sizes(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield every place of a config that states the vocabulary's size, as (mapping, key); the outermost first."""
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

    It is outside numbered blocks and has `rows` rows. It has the name of an embedding or a head; or any name, if no
    other size in the config is that number.
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
