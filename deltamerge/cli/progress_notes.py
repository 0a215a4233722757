"""Log messages of the package, shown above the progress line; imported only where there is such a line."""

from __future__ import annotations

import logging
from contextlib import suppress

import click

from deltamerge.errors.shown import LINE, printed, shown


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):
            click.echo(f"\r\x1b[K{printed(shown(record.getMessage(), LINE))}", err=True)


_LOGGER, _NOTES = logging.getLogger("deltamerge"), _Notes()


def show() -> None:
    """Show further log messages of the package, each as a line on stderr."""
    _LOGGER.addHandler(_NOTES)
    _LOGGER.setLevel(logging.INFO)


def hide() -> None:
    """Stop showing them."""
    _LOGGER.removeHandler(_NOTES)
