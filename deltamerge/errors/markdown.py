"""Foreign text escaped for Markdown and Mermaid, so that it stays plain text."""

from __future__ import annotations

import re

from deltamerge.errors.shown import shown

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#!&~$])")
_IN_WORD = re.compile(r"(?<=\w)\\_(?=\w)")  # no emphasis inside a word
_MERMAID = {'"': "#quot;", "#": "#35;", "<": "#lt;", ">": "#gt;", "`": "#96;", "&": "#38;"}


def plain(text: str) -> str:
    """Escape text for a paragraph, a heading or a table's cell."""
    return _IN_WORD.sub("_", _SPECIAL.sub(r"\\\1", shown(text))).replace("://", ":&#47;/").replace("@", "&#64;")


def code(text: str) -> str:
    """Return a name as inline code, for a paragraph or a table's cell."""
    text = shown(text)
    if "`" not in text and "|" not in text:
        return f"`{text}`"
    return f"<code>{_entities(text)}</code>"


def fenced(text: str, language: str = "") -> list[str]:
    """Return a fenced block of code, whose fence the text cannot close."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    body = ("\t".join(shown(part, len(part) + 1) for part in line.split("\t")) for line in text.split("\n"))
    return [f"{fence}{language}", *body, fence]


def label(text: str) -> str:
    """Escape text for the quotes of a Mermaid node."""
    return "".join(_MERMAID.get(character, character) for character in shown(text))


def _entities(text: str) -> str:
    return "".join(c if c.isalnum() or c in " ./-_" else f"&#{ord(c)};" for c in text)
