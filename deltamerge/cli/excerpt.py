"""Errors on a terminal: in colour, and of a recipe with the line that is wrong and a caret under the column."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from deltamerge.errors import MOST, DeltamergeError, Problem, RecipeError
from deltamerge.errors.shown import shown

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # YAML's
PLACE, MESSAGE, HINT, QUIET = "bold", "red", "cyan", "dim"


def show(error: DeltamergeError, where: str, console: Console) -> None:
    """Print an error, of which `where` says whose it is unless it is a recipe's, which says so itself."""
    from rich.text import Text

    if isinstance(error, RecipeError):
        for problem in error.problems[:MOST]:
            _print(console, _problem(problem, error.path, console.width))
        if len(error.problems) > MOST:
            _print(console, Text(f"{error.path}: … and {len(error.problems) - MOST} more problems"))
    else:
        first, *more = str(error).split("\n")
        _print(console, Text.assemble((f"{shown(where)}: ", f"{PLACE} {MESSAGE}"), (first, "")))
        for line in more:
            _print(console, Text(line))
    if error.hint:
        _print(console, Text.assemble(("hint: ", HINT), shown(error.hint)))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def _problem(problem: Problem, path: str, width: int) -> Text:
    from rich.text import Text

    place = shown(path) if problem.line is None else f"{shown(path)}:{problem.line}:{problem.column}"
    text = Text.assemble((f"{place}: ", PLACE))
    if problem.location:
        text.append(f"{shown(problem.location, 400)}: ")
    text.append(shown(problem.message, 400), MESSAGE)
    source = BREAKS.split(problem.text or "")
    if problem.line is not None and problem.column is not None and problem.text and problem.line <= len(source):
        gutter = f"{problem.line:>4} | "
        line, column = excerpt(source[problem.line - 1], problem.column, max(20, width - len(gutter) - 1))
        text.append(f"\n{gutter}", QUIET).append(line)
        text.append(f"\n{'|':>{len(gutter) - 1}} ", QUIET).append(f"{' ' * column}^", f"bold {MESSAGE}")
    if problem.hint is not None:
        text.append("\nhint: ", HINT).append(shown(problem.hint, 400))
    return text


def excerpt(line: str, column: int, width: int) -> tuple[str, int]:
    """The part of a line around a column (from 1) that fits `width` columns of a terminal, and how many of these are
    before that place."""
    from rich.cells import cell_len, set_cell_size

    before, after = shown(line[: column - 1].expandtabs(4), 1 << 20), shown(line[column - 1 :].expandtabs(4), 1 << 20)
    room = max(8, width * 2 // 3)
    if cell_len(before) > room:
        while cell_len(before) > room - 1:
            before = before[max(1, (len(before) - room) // 2) :]
        before = f"…{before}"
    rest = width - cell_len(before)
    if cell_len(after) > rest:
        after = f"{set_cell_size(after, max(1, rest - 1)).rstrip()}…"
    return f"{before}{after}".rstrip(), cell_len(before)
