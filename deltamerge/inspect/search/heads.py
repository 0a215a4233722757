"""Which tensors of a model are its head, and so answer its own task alone."""

from __future__ import annotations

import re

from deltamerge.io.names import LM_HEAD, TASK_HEAD

_HEAD, _LANGUAGE = re.compile(TASK_HEAD), re.compile(r"(^|[./])(lm_head|embed_out)(\.|$)")


def is_of_head(name: str) -> bool:
    """Whether a tensor belongs to the head of a classifier or a regression. A language model's head is none: what is
    merged of language models has one of its own."""
    return name != LM_HEAD and _HEAD.search(name) is not None and _LANGUAGE.search(name) is None
