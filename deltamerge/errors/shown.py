"""Foreign text made safe: for a terminal or a CI log, and for Markdown and Mermaid.

No control characters, no workflow commands, bounded length.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping

LONGEST = 800  # characters of a message that quotes foreign text
LINE = 4000  # characters of a line of a table or a report
CELL = 400  # characters of a table's cell; all cells of a column are padded to the longest
# Controls, formats (direction, zero width), surrogates, private and unassigned characters, separators of lines.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_COMMAND = re.compile(r"\s*::")  # a GitHub workflow command; the older form, ##[name], may stand anywhere in a line


def shown(text: str, most: int = LONGEST) -> str:
    """Return `text` on one line, with escapes for invisible characters, and cut in the middle beyond `most`."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"
    return text if text.isprintable() else "".join(map(_escaped, text))


def lines(several: Iterable[str], most: int = LINE) -> str:
    """Join several messages by line breaks; each may quote foreign text."""
    return "\n".join(shown(line, most) for line in several)


def some(names: Iterable[str], most: int = 4) -> str:
    """Return the first of several names, and the number of the others."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def printed(text: str) -> str:
    """Return a text of several lines as it may be printed in CI: control characters are escaped, no line is a workflow
    command."""
    return "\n".join(map(_inert, text.split("\n")))


def _inert(line: str) -> str:
    if not line.isprintable():
        line = "".join(c if c == "\t" else _escaped(c) for c in line)
    if _COMMAND.match(line):
        line = line.replace("::", r"\x3a:", 1)
    return line.replace("##[", r"#\x23[")


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _UNSEEN:
        return character
    if "\udc80" <= character <= "\udcff":  # a byte of a name that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def human(size: float) -> str:
    """Return a number of bytes in decimal units, as shard_size and the hub use them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def as_html(title: str, rows: Mapping[str, str]) -> str:
    """Return a title and labelled lines as a table, for notebooks."""
    from html import escape

    cells = (f"<tr><th>{escape(shown(k))}</th><td>{escape(shown(v))}</td></tr>" for k, v in rows.items())
    return f"<table><caption>{escape(shown(title))}</caption>{''.join(cells)}</table>"


# Markdown.


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
