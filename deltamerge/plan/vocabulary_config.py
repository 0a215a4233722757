"""Changes of config.json and generation_config.json under a new vocabulary: its size, and ids of tokens that moved."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from deltamerge.plan.inputs import Input
from deltamerge.plan.vocabulary import Vocabulary
from deltamerge.plan.vocabulary_rows import sizes

ID_KEYS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")


def edit_config(config: Mapping[str, Any], vocabulary: Vocabulary, template: Input) -> dict[str, Any]:
    """A config of `template` under the output's vocabulary; equal to the given one if nothing moved.

    An id follows its token. For a token that the output lacks, the id is that of the vocabulary's own model, or null.
    """
    result = copy.deepcopy(dict(config))
    for holder, key in sizes(result):
        holder[key] = vocabulary.total
    if template.checkpoint.reference != vocabulary.start.checkpoint.reference:
        names = {i: token for token, i in vocabulary.template_ids.items()}
        _move(result, names, vocabulary, vocabulary.start.checkpoint.config)
    return result


def _move(config: dict[str, Any], names: Mapping[int, str], vocabulary: Vocabulary, other: Mapping[str, Any]) -> None:
    def moved(value: int, key: str) -> Any:
        if value not in names:
            return value
        return vocabulary.ids.get(names[value], other.get(key))

    for key, value in config.items():
        if isinstance(value, dict):
            inner = other.get(key)
            _move(value, names, vocabulary, inner if isinstance(inner, dict) else other)
        elif key.endswith(ID_KEYS):
            if isinstance(value, int) and not isinstance(value, bool):
                config[key] = moved(value, key)
            elif isinstance(value, list) and all(isinstance(item, int) for item in value):
                found = [moved(item, key) for item in value]
                config[key] = [item for item in found if isinstance(item, int)]
