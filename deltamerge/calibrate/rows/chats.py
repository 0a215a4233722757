"""Rows that are chats, and their texts as a tokenizer's chat template writes them.

Templates are Jinja, which transformers runs in a sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamerge.calibrate.model.transformers_code import running
from deltamerge.errors import InputError

READ = ("role", "content")  # keys of a message


@dataclass(frozen=True, slots=True)
class Chat:
    """Messages, each (role, content). As text it is the last one's content."""

    messages: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return self.messages[-1][1]


def chat_of(number: int, values: Sequence[Any]) -> tuple[Chat, str | None]:
    """Return a chat of row `number`, up to its answer, and the answer: the last message, if it is the assistant's.

    InputError: a value is no message of a role and a text, or there is none before the answer.
    """
    messages = [_message(number, place, value) for place, value in enumerate(values, 1)]
    answered = bool(messages) and messages[-1][0] == "assistant"
    asked = messages[:-1] if answered else messages
    if not asked:
        raise InputError(f"row {number}: no message asks for an answer", hint="take the row out")
    return Chat(tuple(asked)), messages[-1][1] if answered else None


def _message(number: int, place: int, value: Any) -> tuple[str, str]:
    where = f"row {number}: message {place}"
    if not isinstance(value, Mapping) or not all(isinstance(value.get(key), str) for key in READ):
        raise InputError(f"{where} has no role and content that are texts")
    if more := [key for key, some in value.items() if key not in READ and some]:
        hint = "take it out, or apply the chat template: prompt and completion"
        raise InputError(f"{where} has {more[0]!r}, which is not read", hint=hint)
    return value["role"], value["content"]


def as_texts(number: int, chat: Chat, answer: str | None, tokenizer: Any, *, asks: bool) -> tuple[str, str | None]:
    """Return a chat and its answer as texts, for `tokenizer` to read as it reads others.

        asks   the text ends where an answer begins, even if none is given

    A mark of the beginning that the tokenizer adds itself is left out. InputError: it has no template, or the template
    cannot take the messages, or the text of an answered chat does not begin with that of the chat alone.
    """
    if tokenizer.chat_template is None:
        hint = "give texts, or prompt and completion"
        raise InputError(f"row {number}: a chat, but the model's tokenizer has no chat template", hint=hint)
    messages = [dict(zip(READ, message, strict=True)) for message in chat.messages]
    begins = tokenizer.bos_token is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    def written(some: Sequence[Mapping[str, str]], *, asks: bool) -> str:
        with running(f"row {number}: its chat template cannot take the messages"):
            text: str = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=asks)
        return text.removeprefix(tokenizer.bos_token) if begins else text

    prompt = written(messages, asks=asks or answer is not None)
    if answer is None:
        return prompt, None
    whole = written([*messages, {"role": "assistant", "content": answer}], asks=False)
    if not whole.startswith(prompt):
        hint = "give prompt and completion as texts"
        raise InputError(f"row {number}: its chat template writes a chat otherwise once it is answered", hint=hint)
    return prompt, whole[len(prompt) :]
