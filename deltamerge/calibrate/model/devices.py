"""Devices of calibration: weights that are read ahead and sent to a GPU, and work that several GPUs share.

A thread reads stored tensors before they are asked for. On a GPU they stay if they fit in a third of its free memory.
Others stream by: the next block's tensors are sent while a block is computed, and freed when the walk has left it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch

from deltamerge.engine.devices import KEPT_SHARE, Room, current, free_bytes, new_stream, pinned_tensor
from deltamerge.files import progress
from deltamerge.tensors.dtypes import ITEMSIZE, torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor

T = TypeVar("T")

Job = TypeVar("Job")
Place = TypeVar("Place")

There = TypeVar("There", bound="OnDevice")


class Ahead(Generic[T]):
    """`read` on a thread. Tensors are begun in lists; the last two lists are held until they are asked for."""

    def __init__(self, read: Callable[[Tensor], T]) -> None:
        self._read = read
        self._thread: ThreadPoolExecutor | None = None
        self._before: dict[Tensor, Future[T]] = {}
        self._begun: dict[Tensor, Future[T]] = {}

    def begin(self, infos: Iterable[Tensor]) -> None:
        """Begin to read tensors, in this order. Forget the tensors of the list before the last that nobody asked
        for."""
        _cancel(self._before)
        self._before, self._begun = self._begun, {}
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "read-ahead")
        self._begun = {info: self._thread.submit(self._read, info) for info in infos if info not in self._before}

    def __call__(self, info: Tensor) -> T:
        """Return a tensor. The caller reads it itself if the thread has not begun it."""
        begun = self._before.pop(info, None) or self._begun.pop(info, None)
        return self._read(info) if begun is None or begun.cancel() else begun.result()

    def forget(self) -> None:
        """Free the tensors that nobody asked for."""
        _cancel(self._before)
        _cancel(self._begun)

    def close(self) -> None:
        """Forget, and end the thread."""
        self.forget()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


def _cancel(futures: dict[Tensor, Future[T]]) -> None:
    for future in futures.values():
        future.cancel()
    futures.clear()


SLAB = 1 << 26


@dataclass(frozen=True, slots=True, eq=False)
class Arriving:
    """A flat tensor on a GPU, whose values are there after `event`."""

    tensor: torch.Tensor
    event: Any

    def here(self) -> torch.Tensor:
        """Return the tensor, for use on this thread's stream."""
        stream = torch.cuda.current_stream(self.tensor.device)
        stream.wait_event(self.event)
        self.tensor.record_stream(stream)  # its memory is not used anew before that stream has come so far
        return self.tensor


class Arrivals:
    """Sends tensors to a device. Thread-safe; a slab is filled while the other one is on its way."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.stream = new_stream(device)
        self._slabs = [_Slab(), _Slab()]
        self._lock = threading.Lock()

    def send(self, info: Tensor) -> Arriving:
        """Read a stored tensor and send it to the device."""
        with self._lock, torch.no_grad(), torch.cuda.stream(self.stream):
            made = torch.empty(info.nbytes, dtype=torch.uint8, device=self.device)
            for start in range(0, info.nbytes, SLAB):
                self._slabs.reverse()
                part = self._slabs[0].room(min(SLAB, info.nbytes - start))
                self.reader.read_into(info, start // ITEMSIZE[info.dtype], part.numpy())
                made[start : start + len(part)].copy_(part, non_blocking=True)
                self._slabs[0].sent = self.stream.record_event()
            return Arriving(made.view(torch_dtype(info.dtype)), self.stream.record_event())


class _Slab:
    """Pinned memory, and the event after which it may be filled again."""

    def __init__(self) -> None:
        self.memory = torch.empty(0, dtype=torch.uint8)
        self.sent: Any = None

    def room(self, nbytes: int) -> torch.Tensor:
        if self.sent is not None:
            self.sent.synchronize()
        if len(self.memory) < nbytes:
            self.memory = pinned_tensor(nbytes)
        return self.memory[:nbytes]


class Resident:
    """Stored tensors on a GPU. `share` models share the room."""

    def __init__(self, reader: Reader, device: torch.device, share: int = 1) -> None:
        self.device = device
        self.room = Room(free_bytes(device) // (KEPT_SHARE * share))
        self.there: dict[Tensor, torch.Tensor] = {}
        self.passing: dict[Tensor, torch.Tensor] = {}
        self.ahead = Ahead(Arrivals(reader, device).send)
        self._next: set[Tensor] = set()
        self._entered: Any = None

    def begin(self, infos: Iterable[Tensor]) -> None:
        """Send the next block's tensors while the present block is computed. Free the tensors of the block before."""
        self.passing = {info: tensor for info, tensor in self.passing.items() if info in self._next}
        self._next = {info for info in infos if info not in self.there}
        if self._next and self._entered is not None:
            self._entered.synchronize()  # the host is one block ahead of the device at most, and so is its memory
        self._entered = torch.cuda.current_stream(self.device).record_event()
        self.ahead.begin(info for info in self._next if info not in self.passing)

    def stored(self, info: Tensor) -> torch.Tensor:
        """Return a flat stored tensor on the GPU, which stays if there is room."""
        for kept in (self.there, self.passing):
            if info in kept:
                return kept[info]
        made = self.ahead(info).here()
        kept = self.there if self.room.take(info.nbytes) else self.passing
        kept[info] = made
        return made

    def shed(self) -> bool:
        """Free the tensors that stay there, and keep no more. Return whether there were any."""
        found = bool(self.there)
        self.clear()
        self.room = Room(0)
        return found

    def clear(self) -> None:
        """Free them."""
        self.ahead.close()
        for info in self.there:
            self.room.give(info.nbytes)
        self.there.clear()
        self.passing.clear()


class OnDevice(Protocol):
    """A place that computes on a device."""

    @property
    def device(self) -> torch.device: ...


class ShareStop(Exception):
    """Another device's share has failed."""


def shares(jobs: Sequence[Job], count: int) -> list[Sequence[Job]]:
    """Cut jobs, in order, into `count` runs, none empty. Their lengths differ by one at most."""
    count = max(1, min(count, len(jobs)))
    return [jobs[len(jobs) * i // count : len(jobs) * (i + 1) // count] for i in range(count)]


def spread(
    places: Sequence[Place],
    jobs: Sequence[Job],
    work: Callable[[Place, Sequence[Job]], Sequence[T]],
    stop: threading.Event,
) -> list[T]:
    """Return the results of `work(place, share)` for all jobs, in their order; the first share is this thread's.

    `stop` is set once a share has failed. Work that sees it set raises `ShareStop`.
    """
    some, phase = shares(jobs, len(places)), progress.here(progress.PASSES)
    stop.clear()

    def one(place: Place, share: Sequence[Job]) -> Sequence[T]:
        try:
            with progress.joined(phase):
                return work(place, share)
        except BaseException:
            stop.set()
            raise

    if len(some) == 1:
        return list(work(places[0], jobs))
    with ThreadPoolExecutor(len(some) - 1, "device") as pool:
        begun = [pool.submit(one, place, share) for place, share in zip(places[1:], some[1:], strict=False)]
        try:
            found = [one(places[0], some[0])]
        except ShareStop:  # the error that stopped it is raised
            found = []
        found += [future.result() for future in begun if not isinstance(future.exception(), ShareStop)]
    return [value for share in found for value in share]


def in_turns(places: Sequence[There], jobs: Sequence[Job], work: Callable[[There, Job], T]) -> Iterator[T]:
    """Yield the results of `work(place, job)`, in the order of the jobs; job j goes to place j % len(places).

    One job a place runs at a time. Their results are taken before the next ones begin.
    """

    stop = threading.Event()

    def one(place: There, share: Sequence[Job]) -> list[T]:
        (job,) = share
        if stop.is_set():
            raise ShareStop
        with current(place.device):
            return [work(place, job)]

    for start in range(0, len(jobs), len(places)):
        yield from spread(places, jobs[start : start + len(places)], one, stop)


def add_gradients(
    leaves: Sequence[torch.Tensor],
    places: Sequence[There],
    jobs: Sequence[Job],
    descend: Callable[[There, Job, Sequence[torch.Tensor]], None],
) -> None:
    """Add the jobs' gradients to the leaves' in the order of the jobs: the sums do not depend on the number of places.

    descend   adds a job's gradients to copies of the leaves on the place's device
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
