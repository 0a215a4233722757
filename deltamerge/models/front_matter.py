"""The front matter of a model card: the YAML between two lines of ---, read and written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

MATTER_BYTES = 1 << 16


def front_matter(card: Path) -> dict[str, object]:
    """The front matter of the file `card`; empty where there is no card or no valid YAML mapping."""
    if not card.is_file():  # reading a pipe would wait
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
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: an impossible date
        return {}
    return content if isinstance(content, dict) else {}


def card(matter: Mapping[str, object], title: str) -> list[str]:
    """The first lines of a card: its front matter, and `title`, in Markdown, as its heading."""
    return ["---", yaml.safe_dump(dict(matter), sort_keys=False).rstrip(), "---", "", f"# {title}", ""]
