"""Progress on stderr: bars on a terminal, elsewhere a line every ten seconds."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deltamerge.cli import streams
from deltamerge.errors.shown import human, printed
from deltamerge.files.progress import BYTES, Phase, heard

EVERY = 10.0  # seconds between lines
TICK = 0.125  # seconds between drawings
SLOW = 0.5  # seconds before a phase is shown
SURE_SECONDS, SURE_SHARE = 2.0, 0.02  # seconds and share that must have passed before the time left is estimated
APART, ALIKE = 1.0, 1.5  # seconds between two estimates that must agree, and how far the whole time may differ
RECENT = 20.0  # seconds that a rate is measured over, or half of the time so far, if that is longer


@dataclass(frozen=True, slots=True)
class State:
    """A phase in words: its name, the share done, the amount, the speed, and the time left.

    The share is None if only a bound is known. Unknown texts are "".
    """

    name: str
    share: float | None
    amount: str
    rate: str
    left: str


@dataclass(slots=True)
class PhaseHistory:
    """A phase with its past amounts and its past estimates of the whole time, each with the time it was taken."""

    phase: Phase
    samples: deque[tuple[float, float]] = field(default_factory=deque)
    estimates: deque[tuple[float, float]] = field(default_factory=deque)

    def look(self, now: float) -> State:
        """Return the state at a time."""
        phase, done, total = self.phase, self.phase.reached, self.phase.total
        if not self.samples:
            self.samples.append((phase.begun, 0.0))
        if now - self.samples[-1][0] > TICK / 2:
            self.samples.append((now, done))
        span = max(RECENT, (now - phase.begun) / 2)
        while len(self.samples) > 2 and self.samples[1][0] <= now - span:
            self.samples.popleft()
        since, had = self.samples[0]
        rate = (done - had) / max(now - since, 1e-3)
        share = min(1.0, done / total) if total > 0 else None
        sure = share is not None and now - phase.begun >= SURE_SECONDS and share >= SURE_SHARE and rate > 0
        rest = max(total - done, 0.0) / rate if sure else 0.0
        left = lasting(rest) if sure and share != 1.0 and self._steady(now, now - phase.begun + rest) else ""
        most = "at most" if phase.bound else "about"
        return State(
            phase.name,
            None if phase.bound else share,
            amount(phase),
            f"{human(rate)}/s" if phase.unit == BYTES and rate > 0 and now - phase.begun >= SURE_SECONDS else "",
            f"{most} {left} left" if left else "",
        )

    def _steady(self, now: float, whole: float) -> bool:
        """Return whether an earlier estimate agrees that the phase lasts `whole` seconds, and keep this estimate."""
        while len(self.estimates) > 1 and self.estimates[1][0] <= now - APART:
            self.estimates.popleft()
        known = [earlier for at, earlier in self.estimates if at <= now - APART]
        self.estimates.append((now, whole))
        return bool(known) and max(known[0], whole) <= ALIKE * min(known[0], whole)


def amount(phase: Phase) -> str:
    """Return the amount done and the total as text, or "" if neither is known."""
    done = phase.reached
    if phase.total <= 0 and not done:
        return ""
    of = "of at most" if phase.bound else "of"
    if phase.unit == BYTES:
        return f"{human(done)} {of} {human(max(phase.total, done))}"
    return f"{int(done + 1e-6):,} {of} {int(max(phase.total, done)):,} {phase.unit}"


def lasting(seconds: float) -> str:
    """Return a duration as text, such as "2 h 5 min", to about a tenth."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(round(seconds / 300) * 5, 60)
    return f"{hours} h {minutes} min" if minutes and hours < 10 else f"{seconds / 3600:.0f} h"


def line(state: State) -> str:
    """Return a phase as one line of a log."""
    share = "" if state.share is None else f"{int(100 * state.share)} %"
    parts = ", ".join(part for part in (share, state.amount, state.rate, state.left) if part)
    return f"{state.name}: {parts}" if parts else f"{state.name} …"


class Display(ABC):
    """Shows phases that last: a listener of phases, with a thread that prints."""

    def __init__(self) -> None:
        self.seen: list[PhaseHistory] = []
        self._changed = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def begun(self, phase: Phase) -> None:
        with self._changed:
            self.seen.append(PhaseHistory(phase))
            if self._thread is None:
                self._thread = threading.Thread(target=self._go, daemon=True)
                self._thread.start()

    def ended(self, phase: Phase) -> None:
        with self._changed:
            self.seen = [one for one in self.seen if one.phase is not phase]
            if not self.seen:
                self.clear()

    def aside(self, say: Callable[[], None]) -> None:
        """Let `say` write to stderr between two drawings."""
        with self._changed:
            self.clear()
            say()

    def close(self) -> None:
        """Stop the thread and clear the display."""
        self._ended.set()
        with self._changed:
            self.clear()

    def _go(self) -> None:
        while not self._ended.wait(self.every):
            with self._changed:
                now = time.monotonic()
                states = [one.look(now) for one in self.seen if now - one.phase.begun >= SLOW]
                if states and not self._ended.is_set():
                    self.show(states)

    @property
    @abstractmethod
    def every(self) -> float:
        """Return the seconds between two updates."""

    @abstractmethod
    def show(self, states: list[State]) -> None:
        """Print the state of the phases."""

    @abstractmethod
    def clear(self) -> None:
        """Erase lines that shall not stay."""


class LineDisplay(Display):
    """A line for each phase now and then, for logs, and for terminals that cannot move a cursor; none is repeated."""

    @property
    def every(self) -> float:
        return EVERY

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()

    def show(self, states: list[State]) -> None:
        lines = list(map(line, states))
        if fresh := [one for one in lines if one not in self._said]:
            streams.to_stderr(printed("\n".join(fresh)) + "\n")
        self._said = set(lines)

    def clear(self) -> None:
        """Do nothing: lines stay."""


class BarDisplay(Display):
    """A line for each phase at the bottom of a terminal, drawn again and again."""

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0
        self._console: Any = None

    @property
    def every(self) -> float:
        return TICK

    def show(self, states: list[State]) -> None:
        drawn = bars(states, self._get_console())
        above = self._erasing()
        self._drawn = len(drawn)
        streams.to_stderr(above + "\n".join(drawn))

    def clear(self) -> None:
        if self._drawn:
            streams.to_stderr(self._erasing())
            self._drawn = 0

    def _get_console(self) -> Any:
        if self._console is None:
            self._console = streams.console()
        return self._console

    def _erasing(self) -> str:
        """Return the control text that moves to the first drawn line and erases all lines."""
        return "\r\x1b[2K" + "\x1b[1A\x1b[2K" * (self._drawn - 1) if self._drawn else ""


def bars(states: list[State], console: Any) -> list[str]:
    """Return the phases as lines that fit the terminal.

    On a narrow terminal the rate is left out first, then the bar, then the time left.
    """
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    width = max(streams.LEAST, console.width) - 1
    name = min(max(len(state.name) for state in states), max(12, width // 3))
    room = width - name - 2
    fits = (one for one in LAYOUTS if room >= one.bar + 2 + max(len(_words(state, one)) for state in states))
    layout = next(fits, LAYOUTS[-1])
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis", width=name)
    table.add_column(no_wrap=True, overflow="ellipsis")
    if layout.bar:
        table.add_column(no_wrap=True, overflow="ellipsis")
    for state in states:
        bar = "" if state.share is None else ProgressBar(1.0, state.share, layout.bar, complete_style="cyan")
        table.add_row(Text(state.name, "bold"), *([bar] if layout.bar else []), Text(_words(state, layout)))
    with console.capture() as captured:
        console.print(table, width=width, end="", crop=True, soft_wrap=False)
    return [text.rstrip() for text in captured.get().rstrip("\n").split("\n")]


class BarLayout(NamedTuple):
    """The parts of a phase to show: columns of its bar, its rate, the time left."""

    bar: int
    rate: bool
    left: bool


LAYOUTS = (
    BarLayout(24, True, True), BarLayout(12, True, True), BarLayout(12, False, True), BarLayout(6, False, True),
    BarLayout(0, False, True), BarLayout(0, False, False),
)  # fmt: skip


def _words(state: State, layout: BarLayout) -> str:
    share = "" if state.share is None else f"{int(100 * state.share):>2} %"
    parts = (share, state.amount, state.rate * layout.rate, state.left * layout.left)
    return "  ".join(part for part in parts if part)


_displays: list[Display] = []


def aside(say: Callable[[], None]) -> None:
    """Let `say` write to stderr where progress may be shown."""
    if _displays:
        _displays[-1].aside(say)
    else:
        say()


@contextmanager
def display(*, quiet: bool, machine: bool) -> Iterator[None]:
    """Show phases on stderr while the block runs, unless it is `quiet`.

    With `machine`, results are data on stdout, and phases are shown only on a terminal.
    """
    if quiet or (machine and not streams.is_terminal()):
        yield
        return
    display: Display = BarDisplay() if streams.moves() else LineDisplay()
    _displays.append(display)
    try:
        with heard(display):
            yield
    finally:
        _displays.remove(display)
        display.close()
