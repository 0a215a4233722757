"""A pseudo-terminal in the place of stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest


class Terminal:
    """What was written to a pseudo-terminal."""

    def __init__(self, ours: int) -> None:
        self._ours = ours

    def read(self) -> str:
        """All of it since the last call."""
        sys.stderr.flush()
        text = b""
        with suppress(OSError):  # there is nothing more
            while part := os.read(self._ours, 1 << 16):
                text += part
        return text.decode().replace("\r\n", "\n")

    def hang_up(self) -> None:
        """Close it, so that writing fails."""
        os.close(self._ours)
        self._ours = -1


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, columns: int, **environment: str) -> Iterator[Terminal]:
    """stderr is a terminal of so many columns, xterm unless TERM is given, for as long as the block."""
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    shown = Terminal(ours)
    with monkeypatch.context() as patch:
        for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": str(columns), **environment}.items():
            patch.setenv(name, value)
        stream = os.fdopen(theirs, "w", encoding="utf-8")
        patch.setattr(sys, "stderr", stream)
        try:
            yield shown
        finally:
            with suppress(OSError):
                stream.close()
            with suppress(OSError):
                os.close(shown._ours)
