"""The errors that deltamerge raises: one tree, an exit code for each class, one line and a hint for each error.

DeltamergeError      1
├─ RecipeError       1   the recipe is wrong (carries every problem found)
├─ InputError        1   a model, a file or data cannot be used
├─ OutputError       1   the target cannot be written
├─ VerifyError       1   a file is not what its lock says
└─ UsageError        2   the command line is wrong
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from deltamerge.errors import shown as text

MOST = 50  # printed lines of one error


class DeltamergeError(Exception):
    """A fault: `message`, its place `where` (outermost first), the remedy `hint`, and lines of detail `also`.

    As text, foreign names and words are escaped and cut: it goes to terminals and logs.
    """

    exit_code = 1

    def __init__(
        self, message: str, *, hint: str | None = None, where: str | None = None, also: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message = message
        self.also = tuple(also)
        self.hint = hint
        self.where = [where] if where else []

    def __str__(self) -> str:
        more = [f"… and {len(self.also) - MOST} more"] * (len(self.also) > MOST)
        return text.lines([": ".join([*self.where, self.message]), *self.also[:MOST], *more], text.LONGEST)


NOTHING_KEPT = "nothing new is kept: run the command again"
GO_ON = "run the same command again"


@contextmanager
def interruptible(left: Callable[[str], str]) -> Iterator[None]:
    """Add a line to a Ctrl-C in this block: `left` of the line from an inner block, or of ""."""
    try:
        yield
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(left(str(stop))) from stop


@contextmanager
def after_folders(made: Iterable[object]) -> Iterator[None]:
    """Say of a Ctrl-C in this block that these folders are complete, besides the line from inside."""
    names = [str(folder) for folder in made]

    def left(said: str) -> str:
        whole = f"{text.some(names)} {'is' if len(names) == 1 else 'are'} complete"
        return f"{whole}; {said or f'nothing is kept of the next: {GO_ON}'}" if names else said

    with interruptible(left):
        yield


class InputError(DeltamergeError):
    """A model, a file or calibration data cannot be used."""


class OutputError(DeltamergeError):
    """The target cannot be written."""


class VerifyError(DeltamergeError):
    """A file differs from what its lock says."""


class UsageError(DeltamergeError):
    """The command line is wrong."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class Problem:
    """One fault of a recipe: `line` and `column` count from 1 in `text`, which was read; `location` is the key path
    (`models[0].prune`)."""

    message: str
    location: str = ""
    line: int | None = None
    column: int | None = None
    hint: str | None = None
    text: str | None = field(default=None, repr=False, compare=False)

    def render(self, path: str) -> str:
        """Return the problem as text: file, line, column, key path and message, with its hint below."""
        place = path if self.line is None else f"{path}:{self.line}:{self.column}"
        said = ": ".join(text.shown(part, 400) for part in (place, self.location, self.message) if part)
        return said if self.hint is None else f"{said}\nhint: {text.shown(self.hint, 400)}"


class RecipeError(DeltamergeError):
    """Every problem of one recipe at once. `hint` is the first hint of the problems."""

    def __init__(self, path: str, problems: Sequence[Problem]) -> None:
        hint = next((problem.hint for problem in problems if problem.hint), None)
        super().__init__(f"{path}: {len(problems)} problem{'s' if len(problems) != 1 else ''}", hint=hint)
        self.path = path
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, Sequence[Problem]]]:
        return type(self), (self.path, self.problems)  # Ray pickles errors to send them between machines

    def __str__(self) -> str:
        more = [f"{self.path}: … and {len(self.problems) - MOST} more problems"] * (len(self.problems) > MOST)
        return "\n".join([*(problem.render(self.path) for problem in self.problems[:MOST]), *map(text.shown, more)])

    def of(self, caller: str, within: str = "") -> RecipeError:
        """Return this error for a recipe that `caller` generated: without lines, and with keys relative to `within`."""
        problems = [
            replace(
                problem, line=None, column=None, text=None, location=problem.location.removeprefix(within).lstrip(".")
            )
            for problem in self.problems
        ]
        return RecipeError(caller, problems)


@contextmanager
def context(where: str) -> Iterator[None]:
    """Add a place (a file, a model, a tensor) to any error that passes through, unless its first place is the same."""
    try:
        yield
    except RecipeError:
        raise
    except DeltamergeError as error:
        if error.where[:1] != [where]:
            error.where.insert(0, where)
        raise


@contextmanager
def app(name: str) -> Iterator[None]:
    """Import an app in this block. InputError: its folder, or the folder of an app below it, is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if not f"{missing}.".startswith("deltamerge.apps."):
            raise
        where = f"deltamerge.apps.{name}" if missing == "deltamerge.apps" else missing
        raise InputError(f"this needs {where}, which is not installed", hint="install all of deltamerge") from None
