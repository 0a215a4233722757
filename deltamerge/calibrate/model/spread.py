"""Several GPUs for the candidates of a search, or the fine-tunes of a fit: each takes some of them, as one would."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol, TypeVar

from deltamerge.engine.devices import current
from deltamerge.files import progress

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Job = TypeVar("Job")
Place = TypeVar("Place")


class OnDevice(Protocol):
    """A place that computes on a device."""

    @property
    def device(self) -> torch.device: ...


There = TypeVar("There", bound=OnDevice)


class ShareStop(Exception):
    """Another device's share has failed."""


def shares(jobs: Sequence[Job], count: int) -> list[Sequence[Job]]:
    """Return jobs in order, cut into `count` runs that differ by one in length at most; none is empty."""
    count = max(1, min(count, len(jobs)))
    return [jobs[len(jobs) * i // count : len(jobs) * (i + 1) // count] for i in range(count)]


def spread(
    places: Sequence[Place],
    jobs: Sequence[Job],
    work: Callable[[Place, Sequence[Job], Callable[[], None]], Sequence[T]],
) -> list[T]:
    """Return the results of `work(place, share, check)` for all jobs, in their order; the first share is this thread's.

    `check` raises `ShareStop` once another share has failed.
    """
    some = shares(jobs, len(places))
    stop, phase = threading.Event(), progress.here(progress.PASSES)

    def check() -> None:
        if stop.is_set():
            raise ShareStop

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
        except ShareStop:  # what has stopped it is raised
            found = []
        found += [future.result() for future in begun if not isinstance(future.exception(), ShareStop)]
    return [value for share in found for value in share]


def in_turns(places: Sequence[There], jobs: Sequence[Job], work: Callable[[There, Job], T]) -> Iterator[T]:
    """Yield the results of `work(place, job)` for all jobs, in their order; job j is that of place j % len(places).

    As many go at a time as there are places, and what they found is taken before others go.
    """

    def one(place: There, share: Sequence[Job], check: Callable[[], None]) -> list[T]:
        (job,) = share
        check()
        with current(place.device):
            return [work(place, job)]

    for start in range(0, len(jobs), len(places)):
        yield from spread(places, jobs[start : start + len(places)], one)


def add_gradients(
    leaves: Sequence[torch.Tensor],
    places: Sequence[There],
    jobs: Sequence[Job],
    descend: Callable[[There, Job, Sequence[torch.Tensor]], None],
) -> None:
    """Add to the leaves' gradients those of jobs, in the jobs' order: the sums do not depend on how many places there
    are.

    descend   adds a job's gradients to those of copies of the leaves on the place's device
    """

    def of_job(place: There, job: Job) -> list[torch.Tensor | None]:
        copies = [leaf.detach().to(place.device).requires_grad_() for leaf in leaves]
        descend(place, job, copies)
        return [copy.grad for copy in copies]

    for found in in_turns(places, jobs, of_job):
        for leaf, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                there = gradient.to(leaf.device)
                leaf.grad = there if leaf.grad is None else leaf.grad + there
