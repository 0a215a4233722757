"""Progress of long work: phases with a name, a total and the part that is done.

The working function opens a `phase` and steps it, and a listener sees phases. Without a listener nothing is shown.
Functions deep below get the phase of their thread from `here`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

BYTES = "bytes"
PASSES = "passes"


@dataclass(eq=False, slots=True)
class Phase:
    """A piece of work. Thread-safe.

    name    the work, such as "hashing"
    total   its amount in `unit`; 0 if unknown
    unit    "bytes", or the counted things, such as "passes"
    bound   whether `total` is only an upper bound
    done    the amount done
    ahead   the amount done of the next step
    begun   its start by `time.monotonic`
    """

    name: str
    total: float
    unit: str
    bound: bool = False
    done: float = 0.0
    ahead: float = 0.0
    begun: float = field(default_factory=time.monotonic)
    _changed: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def step(self, count: float = 1.0) -> None:
        """Count `count` more as done."""
        with self._changed:
            self.done += count
            self.ahead = 0.0

    def begin(self, count: float) -> None:
        """Say that `count` of the next step has been done."""
        self.ahead = count

    @property
    def reached(self) -> float:
        """The work that is done, with the part of the next step."""
        return self.done + self.ahead

    def skip(self, count: float) -> None:
        """Take `count` off the total: so much need not be done."""
        with self._changed:
            self.total -= count


class Listener(Protocol):
    """The receiver of every phase's begin and end, on the thread that works."""

    def begun(self, phase: Phase) -> None: ...
    def ended(self, phase: Phase) -> None: ...


class _Here(threading.local):
    """The phases that a thread works for, the innermost last."""

    def __init__(self) -> None:
        self.phases: list[Phase] = []


_here = _Here()
_listeners: list[Listener] = []


@contextmanager
def heard(listener: Listener) -> Iterator[None]:
    """Tell `listener`, and no other, of the phases of all threads."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


@contextmanager
def phase(name: str, total: float, unit: str = BYTES, *, bound: bool = False) -> Iterator[Phase]:
    """Yield a phase that lasts as long as the block, for which this thread works; see `Phase`."""
    one = Phase(name, total, unit, bound)
    listener = _listeners[-1] if _listeners else None
    if listener is not None:
        listener.begun(one)
    try:
        with joined(one):
            yield one
    finally:
        if listener is not None:
            listener.ended(one)


@contextmanager
def joined(one: Phase) -> Iterator[None]:
    """Let this thread work for a phase that another one opened."""
    _here.phases.append(one)
    try:
        yield
    finally:
        _here.phases.pop()


def here(unit: str = BYTES) -> Phase:
    """Return the phase that this thread works for, if it counts in `unit`; otherwise a phase without listeners."""
    one = _here.phases[-1] if _here.phases else None
    return one if one is not None and one.unit == unit else Phase("", 0, unit)
