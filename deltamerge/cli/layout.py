"""Tables and paragraphs of plain text that fit a number of columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from deltamerge.errors.shown import CELL, shown

GAP = "  "
NAME = 32  # columns that names keep at least
NOTHING = ("", "–")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of figures: its head of one or two lines, and its rank. The largest is left out first; 0 stays."""

    head: str
    rank: int = 0

    @property
    def name(self) -> str:
        """Return the head on one line."""
        return self.head.replace("-\n", "").replace("\n", " ")


Row = tuple[str, Sequence[str]]
"""A name and a cell for each column."""


def table(columns: Sequence[Column], blocks: Sequence[Sequence[Row]], width: int) -> list[str]:
    """Return blocks of rows as lines of at most `width` columns.

    Names are aligned left, figures right. Blocks are separated by an empty line.

    Columns without any figure are left out. If there is no room, long names are cut, then columns are left out, and a
    last line names them. Cells may hold untrusted text.
    """
    rows = [(shown(name, CELL), [shown(cell, CELL) for cell in cells]) for block in blocks for name, cells in block]
    there = [i for i in range(len(columns)) if any(cells[i] not in NOTHING for _, cells in rows)]
    longest = max((len(name) for name, _ in rows), default=0)
    sizes = {i: max(len(text) for text in (*columns[i].head.split("\n"), *(c[i] for _, c in rows))) for i in there}
    fixed, left = min(longest, NAME), list(there)
    while fixed + sum(len(GAP) + sizes[i] for i in left) > width:
        last = max(reversed(left), key=lambda i: columns[i].rank)
        if columns[last].rank == 0:
            break
        left.remove(last)
    room = max(fixed, min(longest, width - sum(len(GAP) + sizes[i] for i in left)))

    def line(name: str, cells: Sequence[str]) -> str:
        figures = (cell.rjust(sizes[i]) for i, cell in zip(left, cells, strict=True))
        return GAP.join([cut(name, room).ljust(room), *figures]).rstrip()

    heads = [columns[i].head.split("\n") for i in left]
    high = max(map(len, heads), default=1)
    lines = [line("", [([""] * (high - len(head)) + head)[n] for head in heads]) for n in range(high)]
    at = 0
    for number, block in enumerate(blocks):
        lines += [""] * (number > 0)
        lines += [line(name, [cells[i] for i in left]) for name, cells in rows[at : at + len(block)]]
        at += len(block)
    if dropped := [columns[i].name for i in there if i not in left]:
        lines += ["", *paragraph(f"no room in {width} columns for: {', '.join(dropped)}; --json has them", width)]
    return lines


def align(rows: list[tuple[str, ...]]) -> list[str]:
    """Return rows of a table as lines. Long cells are cut; they may hold untrusted text."""
    rows = [tuple(shown(cell, CELL) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def cut(text: str, most: int) -> str:
    """Cut the middle out of a text that is longer than `most` characters."""
    if len(text) <= most:
        return text
    end = (most - 1) * 2 // 3
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def cut_at_word(text: str, most: int) -> str:
    """Cut a text to at most `most` characters, at the end of a word."""
    if len(text) <= most:
        return text
    room = most - 2
    return f"{text[: room + 1].rpartition(' ')[0].rstrip(' ,;:·(') or text[:room]} …"


def paragraph(text: str, width: int, *, first: str = "", then: str = "") -> list[str]:
    """Wrap words to lines of at most `width` columns.

    `first` stands before the first line, `then` before the others.
    """
    return textwrap.wrap(
        shown(text, 4000), width, initial_indent=first, subsequent_indent=then,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def stacked(name: str) -> str:
    """Return `./math.accuracy` as a head of two lines: the model, and below it the measure."""
    model, dot, measure = name.removeprefix("./").rpartition(".")
    return f"{model}\n{measure}" if dot else measure


def figure(number: float | None) -> str:
    """Return a number to three digits, or a dash."""
    return "-" if number is None else f"{number:.3g}"


def cell(number: float | None) -> str:
    """Return a number to three digits, or an en dash."""
    return "–" if number is None else figure(number)
