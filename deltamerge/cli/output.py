"""Text on stdout and stderr: results, JSON, CSV, messages, and errors with the faulty line of a recipe."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from deltamerge.cli import progress, streams
from deltamerge.errors import MOST, DeltamergeError, Problem, RecipeError
from deltamerge.errors.shown import LINE, printed, shown

if TYPE_CHECKING:
    from pydantic import BaseModel
    from rich.console import Console
    from rich.text import Text


_OF_RECIPE = re.compile(r"models\[\d+\]|base_model")
BREAKS = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # YAML's
PLACE, MESSAGE, HINT, QUIET = "bold", "red", "cyan", "dim"


def say(text: str) -> None:
    """Print a command's result on stdout."""
    click.echo(printed(text))


def say_json(value: Any) -> None:
    """Print a result as one JSON object on stdout. As ASCII, nothing in it acts on a terminal or a CI log."""
    _say_ascii(json.dumps(value, sort_keys=True))


def say_model(model: BaseModel) -> None:
    """Print the fields of a report as one JSON object on stdout, in order; NaN becomes null."""
    _say_ascii(json.dumps(_finite(model.model_dump(mode="json")), separators=(",", ":")))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def say_table(rows: Iterable[BaseModel]) -> None:
    """Print records as CSV on stdout: a column for each field, or for each key of a mapping, or of each of a list."""
    say_csv([dict(_columns(row.model_dump(mode="json"))) for row in rows])


def say_csv(flat: Sequence[Mapping[str, Any]]) -> None:
    """Print mappings as CSV on stdout: a column for each key that any of them has."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in flat for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(flat)
    say(text.getvalue().removesuffix("\n"))


def _columns(value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, inner in value.items():
        if isinstance(inner, list) and any(isinstance(one, dict) for one in inner):
            inner = {str(i): one for i, one in enumerate(inner)}
        if isinstance(inner, dict):
            yield from ((f"{name}.{key}", one) for key, one in _columns(inner))
        else:
            yield name, "x".join(map(str, inner)) if isinstance(inner, list) else inner


def _say_ascii(text: str) -> None:
    click.echo(text.replace("##[", "#\\u0023["))


def tell(line: str) -> None:
    """Print a line on stderr."""
    _to_stderr(printed(shown(line, LINE)))


def _to_stderr(text: str) -> None:
    progress.aside(lambda: streams.to_stderr(f"{text}\n"))


def annotate(level: str, message: str, path: str, line: int | None = None, column: int | None = None) -> None:
    """Print a line that GitHub shows beside a line of a file: an error, a warning or a notice."""

    def escape(text: str, also: str = "") -> str:
        return "".join(f"%{ord(c):02X}" if c in "%\r\n" + also else c for c in shown(text))

    place = f"file={escape(path, ',:')}" + (f",line={line},col={column}" if line else "")
    click.echo(f"::{level} {place},title=deltamerge::{escape(message)}")


def error_as_json(error: DeltamergeError, where: str) -> dict[str, Any]:
    """Return an error as `--json` prints it.

    It holds the error's line, hint and exit code, and the problems of a recipe with their places.
    """
    problems = error.problems if isinstance(error, RecipeError) else ()
    return {
        "message": str(error) if isinstance(error, RecipeError) else f"{where}: {error}" if where else str(error),
        "hint": error.hint,
        "exit_code": error.exit_code,
        "problems": [_problem(problem) | {"path": getattr(error, "path", where)} for problem in problems],
    }


def _problem(problem: Problem) -> dict[str, Any]:
    return {key: value for key, value in asdict(problem).items() if key != "text"}


@contextmanager
def of_command_line() -> Iterator[None]:
    """Leave recipe lines out of errors in this block, because the command generated the recipe. Models are named."""
    try:
        yield
    except DeltamergeError as error:
        error.where = [place for place in error.where if not _OF_RECIPE.fullmatch(place)]
        raise


def complain(error: DeltamergeError, where: str) -> None:
    """Print one error on stderr with its hint. Problems of a recipe carry their own places.

    On a terminal the error is in colour, with the recipe's lines.
    """
    if streams.is_terminal():
        progress.aside(partial(_show, error, where))
        return
    _to_stderr(printed(str(error) if isinstance(error, RecipeError) else f"{shown(where)}: {error}"))
    if error.hint and not isinstance(error, RecipeError):
        tell(f"hint: {shown(error.hint)}")


def _show(error: DeltamergeError, where: str) -> None:
    """Print an error in colour. `where` is the file it is about; recipe errors carry their own place."""
    with suppress(OSError):
        show(error, where, streams.console())


def show(error: DeltamergeError, where: str, console: Console) -> None:
    """Print an error. `where` is the file it is about; recipe errors carry their own place."""
    from rich.text import Text

    if isinstance(error, RecipeError):
        for problem in error.problems[:MOST]:
            _print(console, _in_colour(problem, error.path, console.width))
        if len(error.problems) > MOST:
            _print(console, Text(f"{error.path}: … and {len(error.problems) - MOST} more problems"))
    else:
        first, *more = str(error).split("\n")
        _print(console, Text.assemble((f"{shown(where)}: ", f"{PLACE} {MESSAGE}"), (first, "")))
        for line in more:
            _print(console, Text(line))
    if error.hint and not isinstance(error, RecipeError):
        _print(console, Text.assemble(("hint: ", HINT), shown(error.hint)))


def _print(console: Console, text: Text) -> None:
    console.print(text, soft_wrap=True)


def excerpt(line: str, column: int, width: int) -> tuple[str, int]:
    """Return the part of a line around a column (from 1) that fits `width` columns of a terminal.

    The second value is the number of terminal columns before the column.
    """
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


def _in_colour(problem: Problem, path: str, width: int) -> Text:
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
