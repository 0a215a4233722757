"""What a model card says of its model between two lines of ---."""

from __future__ import annotations

from pathlib import Path

import yaml

MATTER_BYTES = 1 << 16


def front_matter(card: Path) -> dict[str, object]:
    """The front matter of the card at `card`; nothing where there is no card, or a stranger wrote nonsense."""
    if not card.is_file():  # a pipe would be waited for
        return {}
    try:
        with card.open("rb") as file:
            text = file.read(MATTER_BYTES).decode("utf-8", "replace")
    except OSError:
        return {}
    if not text.startswith("---\n"):
        return {}
    try:
        content = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
        return {}
    return content if isinstance(content, dict) else {}
