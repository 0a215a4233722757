"""Text that others wrote, made fit for a line that people or a CI log read: nothing in it acts, hides or breaks out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST = 800  # characters of a line of ours that has foreign text in it
LINE = 4000  # of a line of a table or a report
CELL = 400  # of a table's cell, which all cells of its column are padded to
# Controls, formats (direction, zero width), surrogates, private and unassigned characters, separators of lines.
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_COMMAND = re.compile(r"\s*::")  # of a GitHub workflow; the older form, ##[name], may stand anywhere in a line


def shown(text: str, most: int = LONGEST) -> str:
    """`text` on one line: what is not seen is written as an escape, and the middle of what is too long left out."""
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"
    return text if text.isprintable() else "".join(map(_escaped, text))


def lines(several: Iterable[str], most: int = LINE) -> str:
    """Lines of ours, each of which may hold foreign text, as one text."""
    return "\n".join(shown(line, most) for line in several)


def printed(text: str) -> str:
    """A whole text as it may be printed where CI reads along: no controls, and no line is a workflow command."""
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
