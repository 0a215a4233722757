"""Several GPUs for the candidates of a search: each values some of them, as one would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from deltamerge.io import progress

T = TypeVar("T")
Job = TypeVar("Job")
Place = TypeVar("Place")


class Stopped(Exception):
    """Another device's share has failed."""


def shares(jobs: Sequence[Job], count: int) -> list[Sequence[Job]]:
    """Jobs in order, cut into `count` runs that differ by one in length at most; none is empty."""
    count = max(1, min(count, len(jobs)))
    return [jobs[len(jobs) * i // count : len(jobs) * (i + 1) // count] for i in range(count)]


def spread(
    places: Sequence[Place],
    jobs: Sequence[Job],
    work: Callable[[Place, Sequence[Job], Callable[[], None]], Sequence[T]],
) -> list[T]:
    """What `work(place, share, check)` finds of all jobs, in their order; the first share is this thread's.

    `check` raises `Stopped` once another share has failed.
    """
    some = shares(jobs, len(places))
    stop, phase = threading.Event(), progress.here(progress.PASSES)

    def check() -> None:
        if stop.is_set():
            raise Stopped

    def one(place: Place, share: Sequence[Job]) -> Sequence[T]:
        try:
            with progress.joined(phase):
                return work(place, share, check)
        except BaseException:
            stop.set()
            raise

    if len(some) == 1:
        return list(work(places[0], jobs, check))
    with ThreadPoolExecutor(len(some) - 1, "device") as pool:
        begun = [pool.submit(one, place, share) for place, share in zip(places[1:], some[1:], strict=False)]
        try:
            found = [one(places[0], some[0])]
        except Stopped:  # what has stopped it is raised
            found = []
        found += [future.result() for future in begun if not isinstance(future.exception(), Stopped)]
    return [value for share in found for value in share]
