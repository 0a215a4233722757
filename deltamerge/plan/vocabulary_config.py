"""Changes of config.json and generation_config.json under a new vocabulary: its size, and ids of tokens that moved."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamerge.errors import InputError
from deltamerge.models.tokenizer_files import ROLES, read_chat_template
from deltamerge.plan.inputs import Input, Inputs, input_named
from deltamerge.plan.transplant import Transplant
from deltamerge.plan.vocabulary import Vocabulary
from deltamerge.plan.vocabulary_rows import sizes
from deltamerge.recipe.output_keys import BUILT_IN, is_literal
from deltamerge.recipe.schema import Recipe

ID_KEYS = ("_token_id", "_token_ids", "_token_index", "suppress_tokens")


def edit_config(
    config: Mapping[str, Any], vocabulary: Vocabulary, template: Input, *, generation: bool = False
) -> dict[str, Any]:
    """Return a config, or generation config, of `template` under the output's vocabulary; as it was if nothing moved.

    An id follows its token. For a token that the output lacks, the id is that of the vocabulary's own model, or null.
    """
    result = copy.deepcopy(dict(config))
    for holder, key in sizes(result):
        holder[key] = vocabulary.total
    if isinstance(vocabulary, Transplant):
        return _transplanted(result, vocabulary, generation=generation)
    if template.checkpoint.reference != vocabulary.start.checkpoint.reference:
        names = {i: token for token, i in vocabulary.template_ids.items()}
        _move(result, names, vocabulary, vocabulary.start.checkpoint.config)
    return result


def _transplanted(config: dict[str, Any], vocabulary: Transplant, *, generation: bool) -> dict[str, Any]:
    """Return a config whose ids are the donor's: of purposes as the donor's own config, then its tokenizer, has them;
    other ids follow their tokens.

    InputError: one of a token that the donor lacks.
    """
    theirs = dict(vocabulary.start.checkpoint.config) | (dict(vocabulary.generation) if generation else {})
    roles: dict[str, int | None] = {}
    for role in ROLES:
        key, token = f"{role}_id", vocabulary.roles.get(role)
        own = None if token is None else vocabulary.ids.get(token)
        roles[key] = own if theirs.get(key) is None else theirs[key]
        if key in config or theirs.get(key) is not None or (own is not None and role in ("eos_token", "bos_token")):
            config[key] = roles[key]
    _follow(config, vocabulary, roles)
    return config


def _follow(config: dict[str, Any], vocabulary: Transplant, roles: Mapping[str, int | None]) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            value |= {role: own for role, own in roles.items() if value.get(role) is not None}
            _follow(value, vocabulary, roles)
        elif key.removesuffix("_id") in ROLES or not key.endswith(ID_KEYS):
            continue
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            config[key] = _found(key, value, vocabulary)
        elif isinstance(value, list) and all(isinstance(item, int) for item in value):
            config[key] = [vocabulary.shared[item] for item in value if item in vocabulary.shared]


def _found(key: str, value: int, vocabulary: Transplant) -> int | None:
    if value in vocabulary.shared:
        return vocabulary.shared[value]
    names = {i: token for token, i in vocabulary.union.ids.items()}
    if value not in names:
        return None
    message = f"{key} is of {names[value]!r}, a token that {vocabulary.start.name} lacks"
    raise InputError(message, hint="add it to that tokenizer, with a row of its model's embedding")


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


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja text, and a description of its origin."""

    text: str
    origin: str


def choose_chat_template(recipe: Recipe, inputs: Inputs) -> ChatTemplate | None:
    """Return the template that the recipe asks for. None: it asks for none, or `auto` finds none, and the tokenizer
    keeps its own.

    InputError: the model that the recipe names has none.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None
    if wanted == "auto":
        return _most_common(inputs.all)
    model = input_named(wanted, recipe, inputs.base, inputs.tunes)
    if model is not None:
        text = read_chat_template(model.checkpoint)
        if text is None:
            raise InputError("has no chat template", where=model.name)
        return ChatTemplate(text, model.name)
    if is_literal(wanted):
        return ChatTemplate(wanted, "the recipe")
    return ChatTemplate(BUILT_IN[wanted], f"built-in {wanted}")


def _most_common(models: Sequence[Input]) -> ChatTemplate | None:
    """Return the template that most models have, the first of equals; surrounding white space is ignored."""
    read = ((model.name, (read_chat_template(model.checkpoint) or "").strip()) for model in models)
    found = [(text, name) for name, text in read if text]
    if not found:
        return None
    best = Counter(text for text, _ in found).most_common(1)[0][0]
    return ChatTemplate(best, "auto: " + ", ".join(name for text, name in found if text == best))
