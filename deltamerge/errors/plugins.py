"""Code of other packages: their entry points, and whose code raised an error.

A package adds methods by the group `deltamerge.methods` and commands by `deltamerge.commands`. An entry point that
cannot be used is a warning, so that a broken package stops only runs that need it.
"""

from __future__ import annotations

import inspect
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

METHODS = "deltamerge.methods"
COMMANDS = "deltamerge.commands"


class PluginWarning(UserWarning):
    """Says which declaration of another package is left out, and why."""


def points(group: str) -> tuple[EntryPoint, ...]:
    """Return the entry points of a group, by name; none is imported."""
    from importlib.metadata import entry_points

    return tuple(sorted(entry_points(group=group), key=lambda point: (point.name, point.value)))


def package_of(point: EntryPoint) -> str:
    """Return the name of the package that declares an entry point."""
    return point.dist.name if point.dist is not None else "?"


def refuse(point: EntryPoint, why: str) -> None:
    """Warn that an entry point is left out."""
    message = f"entry point {point.value} of {package_of(point)} is left out: {why}"
    warnings.warn(f"{message}; update or remove {package_of(point)}", PluginWarning, stacklevel=2)


def loaded(point: EntryPoint) -> Any:
    """Return the object of an entry point. Warns and returns None if it cannot be imported."""
    try:
        return point.load()
    except Exception as error:  # importing another package may raise anything
        refuse(point, f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
        return None


def misfit(function: object, inputs: Sequence[str], named: Iterable[str]) -> str | None:
    """Return why a package's function cannot be called with these positional and named arguments. None: it can."""
    if not callable(function):
        return "its function is none"
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # a wrapper may add arguments
    except ValueError:  # of compiled functions
        return None
    named, name = list(named), getattr(function, "__name__", "its function")
    try:
        signature.bind(*inputs, **dict.fromkeys(named))
    except TypeError as error:
        called = ", ".join([*inputs, *(f"{key}=…" for key in named)])
        plain = signature.replace(return_annotation=signature.empty, parameters=[
            one.replace(annotation=one.empty) for one in signature.parameters.values()
        ])  # fmt: skip
        return f"{name}{plain} cannot be called as {name}({called}): {error}"
    return None


@dataclass(frozen=True, slots=True)
class Culprit:
    """A package of methods or commands whose code raised an error, and where."""

    package: str
    file: str
    line: int
    function: str


def culprit(error: BaseException) -> Culprit | None:
    """Return the package with entry points whose code raised an error. None: no such package was involved."""
    owners = {point.module.partition(".")[0]: package_of(point) for point in _all_points()}
    found = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        owner = owners.get(frame.f_globals.get("__name__", "").partition(".")[0])
        if owner is not None:
            found = Culprit(owner, frame.f_code.co_filename, line, frame.f_code.co_name)
    return found


def _all_points() -> Iterator[EntryPoint]:
    for group in (METHODS, COMMANDS):
        yield from (point for point in points(group) if point.module.partition(".")[0] != "deltamerge")
