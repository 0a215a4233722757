"""Buffers on their way to files: threads write them past the page cache and keep them until they are hashed."""

from __future__ import annotations

import os
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltamerge import errors
from deltamerge.files.descriptors import (
    DIRECT,
    PAGE,
    Descriptors,
    flat,
    output_error,
    start_writing,
    takes_direct,
    write_at,
    write_direct,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Smaller pieces are written at once, by the thread that made them.
LEAST = 1 << 18
# Bytes on their way, of as many pieces as a few threads make; beyond this `lend` waits.
ROOM = 1 << 24
SLAB = 1 << 22
WRITERS = 2
# The smallest piece that is read back from a file, unless the file ends.
READ = 1 << 20


def _pages(nbytes: int) -> NDArray[np.uint8]:
    import numpy as np

    return np.empty(nbytes, np.uint8)


def room_for(workers: int) -> int:
    """Return the bytes that may be on their way from `workers` threads: two pieces of each.

    A late piece finds the later pieces still in memory, if they fit there; none is then read back from its file.
    """
    return max(ROOM, 2 * workers * SLAB)


@dataclass(eq=False, slots=True)
class Sent:
    """Bytes for a file from `position` on; their memory is free again once they are written and hashed."""

    file: str
    position: int
    data: NDArray[np.uint8]
    written: bool = False
    read: bool = False


class Outbox:
    """Writes to existing files of full size in `folder`, from any number of threads.

    The disk reads a buffer's memory itself. A copy in the page cache would cost more time than the merge where memory
    is short. The page cache serves where direct writes are impossible: a file system in memory, a system other than
    Linux, the partial pages at a buffer's ends.

        wrote(file, position, nbytes)   is called for written bytes
        reach(file, position)           returns up to where the bytes that follow have been written
        room                            most bytes on their way
        allocate(nbytes)                makes memory, for example for a GPU
    """

    def __init__(
        self,
        folder: Path,
        wrote: Callable[[str, int, int], None],
        reach: Callable[[str, int], int],
        sample: Path | None,
        room: int | None = None,
        allocate: Callable[[int], NDArray[np.uint8]] = _pages,
    ) -> None:
        self._room, self._allocate = ROOM if room is None else room, allocate
        self._folder, self._wrote, self._reach = folder, wrote, reach
        self._cached = Descriptors(os.O_WRONLY, output_error)
        self._direct = Descriptors(os.O_WRONLY | DIRECT, output_error)
        self._takes_direct = sample is not None and takes_direct(sample)
        self._queue: deque[Sent] = deque()
        self._held: defaultdict[str, dict[int, Sent]] = defaultdict(dict)
        # Up to where each file has been hashed; bytes before that, which a resumed run sends again, are not waited for.
        self._claimed: defaultdict[str, int] = defaultdict(int)
        self._free: list[NDArray[np.uint8]] = []
        self._bytes = self._busy = 0
        self._closed = False
        self._awaited: tuple[str, int, int] | None = None  # the position that `follow` waits for
        self._failure: BaseException | None = None
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []

    def lend(self, position: int, nbytes: int) -> NDArray[np.uint8]:
        """Lend memory for the bytes of a file from `position` on, to be sent. Waits while too much is on its way."""
        if nbytes < LEAST:
            return _pages(nbytes)
        with self._changed:
            while self._bytes >= self._room and self._failure is None:
                if not self._busy and not self._queue and self._is_starved():
                    self._forget()
                else:
                    self._changed.wait()
            self._raise_failure()
            slab = self._free.pop() if self._free else None
        if slab is None or len(slab) < nbytes + PAGE:
            slab = self._allocate(max(nbytes, SLAB) + PAGE)
        begin = (position - slab.ctypes.data) % PAGE  # aligns pages of memory with pages of the file
        return slab[begin : begin + nbytes]

    def send(self, file: str, position: int, data: NDArray[np.uint8]) -> None:
        """Write lent memory to a file; the memory belongs to the outbox from now on. OutputError: an earlier piece
        failed."""
        if len(data) < LEAST:
            self._write_cached(file, position, flat(data))
            self._tell(file, position, len(data))
            return
        with self._changed:
            self._raise_failure()
            if not self._threads:
                self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(WRITERS)]
                for thread in self._threads:
                    thread.start()
            sent = Sent(file, position, data, read=position < self._claimed[file])
            self._queue.append(sent)
            if not sent.read:
                self._held[file][position] = sent
            self._bytes += len(data)
            self._changed.notify_all()

    def follow(self, file: str, position: int, size: int) -> NDArray[np.uint8] | int | None:
        """Wait for the bytes at `position` of a file of `size` bytes, for hashing. None: the outbox is closed.

        They are the memory sent for it, to be released with `finished`, or are read back from the file.
        """
        with self._changed:
            while not self._closed:
                found = self._found(file, position, size)
                if found is not None:
                    self._claimed[file] = found if isinstance(found, int) else position + len(found)
                    self._awaited = None
                    return found
                self._awaited = file, position, size
                self._changed.notify_all()
                self._changed.wait()
        return None

    def finished(self, file: str, position: int) -> None:
        """Release the memory that `follow` gave for `position`."""
        with self._changed:
            sent = self._held[file].pop(position)
            sent.read = True
            self._release(sent)

    def fail(self, failure: BaseException) -> None:
        """Record that hashing failed: whoever lends, sends or drains gets `failure`."""
        with self._changed:
            self._failure = self._failure or failure
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything sent is written. OutputError: some of it could not be."""
        with self._changed:
            while (self._queue or self._busy) and self._failure is None:
                self._changed.wait()
            self._raise_failure()

    def close(self) -> None:
        """Stop; pieces that were sent and not yet begun are dropped."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()
        self._cached.close()
        self._direct.close()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _found(self, file: str, position: int, size: int) -> NDArray[np.uint8] | int | None:
        """Return the bytes for `follow`, if they are there."""
        held = self._held[file]
        if position in held:
            return held[position].data
        stop = min(held, default=size)
        ready = min(self._reach(file, position), stop)
        return ready if ready == stop or ready - position >= READ else None

    def _is_starved(self) -> bool:
        """Return whether the hasher waits for missing bytes. It does not count if it only has not woken yet."""
        return self._awaited is not None and self._found(*self._awaited) is None

    def _forget(self) -> None:
        """Release the piece that will be hashed last; it can be read back from the file."""
        sent = max((s for held in self._held.values() for s in held.values()), key=lambda s: (s.file, s.position))
        del self._held[sent.file][sent.position]
        sent.read = True
        self._release(sent)

    def _release(self, sent: Sent) -> None:
        if sent.written and sent.read:
            self._bytes -= len(sent.data)
            slab = sent.data.base
            assert slab is not None
            self._free.append(slab)
        self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                sent = self._queue.popleft()
                self._busy += 1
            try:
                if self._failure is None:
                    self._write(sent)
                    self._tell(sent.file, sent.position, len(sent.data))
            except BaseException as failure:
                self.fail(failure)
            with self._changed:
                self._busy -= 1
                sent.written = True
                self._release(sent)

    def _tell(self, file: str, position: int, nbytes: int) -> None:
        """Report written bytes, and wake `follow` if it waits for them."""
        self._wrote(file, position, nbytes)
        with self._changed:
            if self._awaited is None or not self._is_starved():
                self._changed.notify_all()

    def _write(self, sent: Sent) -> None:
        view = flat(sent.data)
        begin, end = -sent.position % PAGE, len(view) - (sent.position + len(view)) % PAGE
        if self._takes_direct:
            with errors.context(sent.file):
                file = self._direct.get(self._folder / sent.file)
                done = write_direct(file.fd, sent.position + begin, view[begin:end])
            self._takes_direct = done > 0
        else:
            done = 0
        self._write_cached(sent.file, sent.position, view[:begin])
        self._write_cached(sent.file, sent.position + begin + done, view[begin + done :])

    def _write_cached(self, file: str, position: int, view: memoryview) -> None:
        with errors.context(file):
            descriptor = self._cached.get(self._folder / file)
            write_at(descriptor.fd, position, view)
            if len(view) >= LEAST:
                start_writing(descriptor.fd, position, len(view))
