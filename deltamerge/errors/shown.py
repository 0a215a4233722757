"""Foreign text made safe for a terminal or a CI log: no control characters, no workflow commands, bounded length."""

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
