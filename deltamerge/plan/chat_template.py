"""The output's chat template: the models' most common one, one model's, a built-in one, or a text in the recipe."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from deltamerge.errors import InputError
from deltamerge.models.tokenizer_files import read_chat_template
from deltamerge.plan.inputs import Input, Inputs, input_named
from deltamerge.recipe.output_keys import BUILT_IN, is_literal
from deltamerge.recipe.schema import Recipe


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """A Jinja text, and a description of its origin."""

    text: str
    origin: str


def choose_chat_template(recipe: Recipe, inputs: Inputs) -> ChatTemplate | None:
    """The template that the recipe asks for. None: it asks for none, or `auto` finds none, and the tokenizer keeps its
    own.

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
    """The template that most models have, the first of equals; surrounding white space is ignored."""
    read = ((model.name, (read_chat_template(model.checkpoint) or "").strip()) for model in models)
    found = [(text, name) for name, text in read if text]
    if not found:
        return None
    best = Counter(text for text, _ in found).most_common(1)[0][0]
    return ChatTemplate(best, "auto: " + ", ".join(name for text, name in found if text == best))
