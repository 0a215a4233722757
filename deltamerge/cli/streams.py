"""stdin, stdout and stderr as a shell may leave them: closed, full, a pipe without a reader, not UTF-8."""

from __future__ import annotations

import io
import os
import shutil
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console

LEAST = 20  # columns that a terminal is taken to have, whatever it says
PLAIN = 80  # columns if the terminal does not say


def prepare() -> None:
    """Open every closed stream, so that no other file gets its number.

    Streams escape characters that they cannot encode.
    """
    for number, mode in enumerate((os.O_RDONLY, os.O_RDONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # writing to a closed stdout fails, as it must; stderr may be closed on purpose
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, mode), True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # for as long as there is a process
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # as stdout
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            with suppress(ValueError, OSError):
                stream.reconfigure(errors="backslashreplace")


def finish() -> OSError | None:
    """Flush the streams. Text that cannot be written is dropped, because the interpreter would complain on exit."""
    failed = None
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError as error:
            failed = error if stream is sys.stdout else failed
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
                stream.flush()
    return failed


def to_stderr(text: str) -> None:
    """Write text to stderr as it is."""
    with suppress(OSError, ValueError):  # stderr itself fails; only the exit code is left
        click.echo(text, nl=False, err=True)


def is_terminal() -> bool:
    """Return whether stderr is a terminal."""
    try:
        return sys.stderr.isatty()
    except ValueError:  # it is closed
        return False


def moves() -> bool:
    """Return whether stderr is a terminal whose cursor can be moved."""
    return is_terminal() and os.environ.get("TERM", "").lower() not in ("", "dumb", "unknown")


def console() -> Console:
    """Return a console for stderr that suits the terminal. With NO_COLOR it has no colour or weight."""
    from rich.console import Console

    plain = bool(os.environ.get("NO_COLOR")) or not moves()
    shown = Console(
        file=sys.stderr, force_terminal=True, color_system=None if plain else "auto", highlight=False, markup=False,
        emoji=False, legacy_windows=False,
    )  # fmt: skip
    if shown.width < LEAST:
        shown.width = LEAST
    return shown


def columns() -> int:
    """Return the width of text on stdout: COLUMNS, or the terminal's columns. A pipe or a file has 80."""
    return max(40, shutil.get_terminal_size((PLAIN, 24)).columns)
