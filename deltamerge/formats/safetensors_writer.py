"""Weight files whose names, offsets and shards are all known before the first byte: header first, tensors in place."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.errors import DeltamergeError, OutputError
from deltamerge.errors.shown import human
from deltamerge.files.descriptors import (
    Descriptors,
    flat,
    opened,
    output_error,
    reserve,
    sync,
    sync_path,
    write_at,
    writing,
)
from deltamerge.files.journal import Journal, Spans
from deltamerge.files.outbox import Outbox
from deltamerge.formats.audit import Audit, Findings, TensorSpan
from deltamerge.formats.layout import FileLayout, Layout, Place
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

# The work that a crash may lose: after so many seconds written data is synced and recorded in the journal.
SAVE_SECONDS = 2.0
PIECE = 1 << 22


class Writer:
    """Writes the tensors of a layout into `folder`, each byte once, from any number of threads.

    Files are created at once, with headers and full size; space is reserved where the file system can. `files` selects
    some of them (default: all). With a `journal`, written data is synced every few seconds and then recorded; what its
    records list, of files that still exist, is kept and need not be written again (`has`). What `notes` returns is
    recorded with it. `room` bytes may be on their way, in memory that `allocate` makes (`outbox.Outbox`);
    `hashers` threads hash them together.

    OutputError: a file exists and is not in the journal, too little space, no permission, a read-only or full disk.
    """

    def __init__(
        self,
        folder: Path,
        layout: Layout,
        *,
        files: Collection[str] | None = None,
        journal: Journal | None = None,
        room: int | None = None,
        hashers: int = 1,
        allocate: Callable[[int], NDArray[np.uint8]] | None = None,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._own = [file for file in layout.files if files is None or file.name in files]
        self._files = Descriptors(os.O_WRONLY, output_error)
        self._journal = journal
        self._written = {file.name: Spans() for file in self._own}
        self._fresh: dict[str, Spans] = {}
        self._saved = False
        self._failure: DeltamergeError | None = None
        self.notes: Callable[[], dict[str, Any]] = dict
        self._lock, self._saving = threading.Lock(), threading.Lock()
        self._closed = threading.Event()
        self._resume()
        for file in self._own:
            self._create(file)
        sample = folder / self._own[0].name if self._own else None
        more = {} if allocate is None else {"allocate": allocate}
        self._outbox = Outbox(folder, self._wrote, self._reach, sample, room, **more)
        self._audit = Audit(folder, self._contents(), self._outbox, hashers)
        self._saver = threading.Thread(target=self._save_regularly, daemon=True)
        if journal is not None:
            self._saver.start()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._saving:  # a save in progress decides whether there is work to keep
            lasted = self._saved
        self._outbox.close()
        if kind is not None and lasted:  # save the last seconds too
            with suppress(DeltamergeError):
                self.save()
        self.close()

    def close(self) -> None:
        self._closed.set()
        if self._saver.is_alive():
            self._saver.join()
        self._outbox.close()
        self._files.close()

    @property
    def records(self) -> Sequence[Mapping[str, Any]]:
        """The journal's."""
        return () if self._journal is None else self._journal.records

    def has(self, name: str, offset: int, nbytes: int) -> bool:
        """Whether bytes [offset, offset + nbytes) of tensor `name` are written already."""
        place = self._place(name, offset, nbytes)
        with self._lock:
            start = place.offset + offset
            return self._written[place.file].reach(start) >= start + nbytes

    def where(self, name: str, offset: int) -> tuple[str, int]:
        """The file and offset that byte `offset` of tensor `name` goes to; tasks are done in this order."""
        place = self._layout.tensors[name]
        return place.file, place.offset + offset

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer to the bytes of tensor `name` from byte `offset`."""
        raw = np.frombuffer(flat(data), np.uint8)
        self._place(name, offset, len(raw))
        for start in range(0, len(raw), PIECE):
            piece = raw[start : start + PIECE]
            buffer = self.lend(name, offset + start, len(piece))
            buffer[:] = piece
            self.give(name, offset + start, buffer)

    def copy(self, name: str, source: TensorInfo, reader: Reader) -> None:
        """Write all bytes of `source` to tensor `name`."""
        for start in range(0, source.nbytes, PIECE):
            buffer = self.lend(name, start, min(PIECE, source.nbytes - start))
            reader.read_into(source, start // ITEMSIZE[source.dtype], buffer)
            self.give(name, start, buffer)

    def lend(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Memory for the bytes of tensor `name` from byte `offset`; return it with `give`."""
        return self._outbox.lend(self._place(name, offset, nbytes).offset + offset, nbytes)

    def give(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Write lent memory to the bytes of tensor `name` from byte `offset`, in the background."""
        place = self._place(name, offset, len(buffer))
        self._raise_failure()
        self._outbox.send(place.file, place.offset + offset, buffer)

    def save(self) -> None:
        """Make everything written so far survive a crash: sync the data, then record it in the journal."""
        if self._journal is None:
            return
        with self._saving:
            with self._lock:
                fresh, self._fresh = self._fresh, {}
            for name in fresh:
                with errors.context(name):
                    sync(self._files.get(self._folder / name).fd)
            if fresh and not self._saved:  # the entries of the files, and of the journal
                inner = {(self._folder / file.name).parent for file in self._own}
                for path in (*inner, self._folder, self._journal.path.parent, self._journal.path.parent.parent):
                    sync_path(path)
            if fresh:
                self._journal.append({"done": {name: list(spans) for name, spans in fresh.items()}, **self.notes()})
                self._saved = True

    def finish(self, *, keep: bool = False) -> Findings:
        """The hashes of the files, once every byte is written; writes the index unless other parts write some of the
        files.

        `keep`: save even what a short run wrote, since others will finish it. RuntimeError: a byte is missing (a bug).
        """
        self._outbox.drain()
        for name, place in self._layout.tensors.items():
            spans = self._written.get(place.file)
            if spans is not None and spans.reach(place.offset) < place.offset + place.nbytes:
                there = spans.count(place.offset, place.offset + place.nbytes)
                raise RuntimeError(f"{there} of {place.nbytes} bytes of {name} were written")
        if keep or self._saved:
            self.save()
        self._raise_failure()
        found = self._audit.result()
        if len(self._own) == len(self._layout.files):
            write_index(self._folder, self._layout)
        self.close()
        return found

    def _place(self, name: str, offset: int, nbytes: int) -> Place:
        place = self._layout.tensors[name]
        if offset < 0 or offset + nbytes > place.nbytes:
            raise ValueError(f"bytes [{offset}, {offset + nbytes}) of {name}, which has {place.nbytes}")
        return place

    def _wrote(self, file: str, start: int, nbytes: int) -> None:
        with self._lock:
            self._written[file].add(start, start + nbytes)
            if self._journal is not None:
                self._fresh.setdefault(file, Spans()).add(start, start + nbytes)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _save_regularly(self) -> None:
        while not self._closed.wait(SAVE_SECONDS):
            try:
                self.save()
            except DeltamergeError as error:
                self._failure = error  # a failed sync may have dropped data: the run cannot go on
                return

    def _reach(self, file: str, position: int) -> int:
        with self._lock:
            return self._written[file].reach(position)

    def _contents(self) -> Iterable[tuple[str, int, list[TensorSpan]]]:
        stored: dict[str, list[TensorSpan]] = {file.name: [] for file in self._own}
        for name, place in self._layout.tensors.items():
            if place.file in stored:
                stored[place.file].append(TensorSpan(name, place.dtype, place.offset, place.nbytes))
        return [(file.name, file.size, sorted(stored[file.name], key=attrgetter("begin"))) for file in self._own]

    def _resume(self) -> None:
        """Take over what the journal lists as done, of files that have their full size."""
        sizes = {file.name: file.size for file in self._own}
        done = done_spans(self._journal.records) if self._journal is not None else {}
        needed = 0
        for name, size in sizes.items():
            path = self._folder / name
            fits = name in done and done[name].end <= size
            if fits and path.is_file() and path.stat().st_size == size:
                self._written[name] = done[name]
                needed += max(0, size - path.stat().st_blocks * 512)
            else:
                needed += size
                if self._journal is not None:
                    path.unlink(missing_ok=True)
        self._check_space(needed)

    def _check_space(self, needed: int) -> None:
        with errors.context(str(self._folder)):
            with writing():
                disk = os.statvfs(self._folder)
            free = disk.f_bavail * disk.f_frsize
            if needed > free:
                raise OutputError(
                    f"the output needs {human(needed)}, {human(free)} are free",
                    hint="free space, or choose another folder with --out",
                )

    def _create(self, file: FileLayout) -> None:
        there = any(self._written[file.name])
        flags = os.O_WRONLY | (0 if there else os.O_CREAT | os.O_EXCL)
        path = self._folder / file.name
        with errors.context(file.name), writing():
            path.parent.mkdir(parents=True, exist_ok=True)
            with opened(path, flags) as fd:
                reserve(fd, file.size)
                write_at(fd, 0, memoryview(file.header))
        self._written[file.name].add(0, len(file.header))


def done_spans(records: Iterable[Mapping[str, Any]]) -> dict[str, Spans]:
    """The byte ranges that a journal's records list as written, by file."""
    done: dict[str, Spans] = {}
    for record in records:
        for name, spans in record.get("done", {}).items():
            for start, stop in spans:
                done.setdefault(name, Spans()).add(start, stop)
    return done


def write_index(folder: Path, layout: Layout) -> None:
    """Write the indexes of a layout, where it has shards."""
    for name, text in layout.indexes.items():
        with errors.context(name), writing():
            (folder / name).write_text(text, encoding="utf-8")
