"""Log the figures of a command to trackio or Weights & Biases as they come."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeAlias

from deltamerge.errors import InputError, UsageError
from deltamerge.errors.shown import shown

PROJECT = "deltamerge"
LIBRARIES = {
    "trackio": ("Trackio", "trackio show"),
    "wandb": ("Weights & Biases", "wandb login, or WANDB_MODE=offline"),
}

Log: TypeAlias = Callable[[Mapping[str, Any], int], None]
"""Is given figures by name, and their step: a trial's number, a point's, bytes done in percent."""


def unlogged(figures: Mapping[str, Any], step: int) -> None:
    """Log nowhere."""


def place_of(where: str) -> tuple[str, str]:
    """Return the library and the project of `trackio`, `wandb:PROJECT` and the like. UsageError: no such library."""
    library, _, project = where.partition(":")
    if library not in LIBRARIES:
        raise UsageError(f"{where}: is no tracker", hint="trackio or wandb, with a project: trackio:merges")
    return library, project or PROJECT


def load_tracker(library: str) -> Any:
    """Import a tracker's library. InputError: it is not installed."""
    try:
        return importlib.import_module(library)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        hint = f"pip install 'deltamerge[{library}]'"
        raise InputError(f"{LIBRARIES[library][0]} is not installed", hint=hint) from None


class Tracker:
    """A run of a tracker, which `log` adds figures to.

    A tracker that fails later never ends the work: `failure` has its line, and nothing more is logged.
    """

    def __init__(self, where: str, name: str, config: Mapping[str, Any]) -> None:
        library, project = place_of(where)
        module = load_tracker(library)
        more = {"embed": False} if library == "trackio" else {}
        try:
            with redirect_stdout(io.StringIO()):  # results alone go to stdout
                self._run = module.init(project=project, name=name, config=dict(config), **more)
        except Exception as error:
            raise InputError(f"{library}: {_line(error)}", hint=LIBRARIES[library][1]) from None
        self.failure = ""

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Log the finite numbers and the words among `figures`."""
        self._try(lambda: self._run.log(plain_figures(figures), step=step))

    def close(self) -> None:
        """End the run, and send pending figures."""
        self._try(lambda: self._run.finish())

    def _try(self, act: Callable[[], Any]) -> None:
        if not self.failure:
            try:
                with redirect_stdout(io.StringIO()):
                    act()
            except Exception as error:
                self.failure = f"nothing more is logged: {_line(error)}"


def _line(error: Exception) -> str:
    return shown((str(error) or type(error).__name__).splitlines()[0], 200)


def plain_figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return finite numbers, words and truth values by name. Mappings become names with a slash between."""
    found: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= {f"{name}/{key}" if name else key: one for key, one in plain_figures(value).items()}
        elif isinstance(value, str) or (isinstance(value, int | float) and math.isfinite(value)):
            found[name] = value
    return found


@contextmanager
def tracker(where: str, name: str, config: Mapping[str, Any]) -> Iterator[Tracker]:
    """Open a tracker, and end its run whatever comes."""
    made = Tracker(where, name, config)
    try:
        yield made
    finally:
        made.close()
