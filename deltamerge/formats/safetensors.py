"""Safetensors files: headers are checked before they are used, and files are written in place.

A file is 8 bytes (little-endian length n), n bytes of JSON, and the tensors' bytes without overlap or gap:
https://huggingface.co/docs/safetensors#format. Reading a header reads no byte of a weight. When writing, names, offsets
and headers are known before the first byte (`Layout`): the header comes first, and tensors go to their places.
"""

from __future__ import annotations

import json
import math
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise
from operator import attrgetter, mul
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from deltamerge import errors
from deltamerge.errors import DeltamergeError, InputError, OutputError
from deltamerge.errors.shown import human
from deltamerge.files.descriptors import (
    Descriptors,
    flat,
    opened,
    output_error,
    refuse_link,
    reserve,
    sync,
    sync_path,
    write_at,
    writing,
)
from deltamerge.files.journal import Journal, Spans
from deltamerge.files.outbox import Outbox
from deltamerge.files.strict_json import parse_json
from deltamerge.formats.audit import Audit, Findings, TensorSpan
from deltamerge.formats.components import Component, folders_of, split
from deltamerge.tensors.dtypes import FLOATING, ITEMSIZE, bits_of, nbytes_of
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo, stored

MAX_HEADER = 100_000_000
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 64
LARGEST = 1 << 63  # sizes and offsets are smaller
MOST_BITS = 1 << 64
PREFIX = 8

_ENTRY_KEYS = {"dtype", "shape", "data_offsets"}
_AGAIN = "download it again"


@dataclass(frozen=True, slots=True)
class Header:
    """A file's tensors in the order of its header. `size` is the file's; `aliases` are further names of the tensors."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    size: int
    aliases: frozenset[str] = frozenset()


def read_header(path: Path) -> Header:
    """Return the header of the safetensors file at `path`; errors name the file.

    InputError: the file is unreadable, a link that leaves its folder, a git-lfs pointer, truncated, or longer than its
    tensors; or its header is not valid (see `parse_header`).
    """
    with opened_weights(path, buffering=0) as (file, size):
        length = header_length(file.read(PREFIX), size)
        return parse_header(file.read(length), path, size)


@contextmanager
def opened_weights(path: Path, buffering: int = -1) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file of weights for as long as its header is read, and give it with its size; errors name the file.

    InputError: unreadable, no file, or a link that leaves its folder.
    """
    refuse_link(path)
    with errors.context(path.name):
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise InputError("is not a regular file")
            with path.open("rb", buffering=buffering) as file:
                yield file, os.fstat(file.fileno()).st_size
        except FileNotFoundError as error:
            raise InputError("no such file") from error
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error


def header_length(first: bytes, size: int) -> int:
    """Return the bytes of JSON that the `first` 8 bytes of a file of `size` bytes announce.

    InputError: an impossible length.
    """
    if first == b"version ":
        raise InputError("is a git-lfs pointer, not the weights", hint="fetch the weights with `git lfs pull`")
    if size < PREFIX or len(first) < PREFIX:
        raise InputError(f"the file is truncated: it has {size} bytes", hint=_AGAIN)
    length = int.from_bytes(first[:PREFIX], "little")
    if length > MAX_HEADER:
        raise InputError(f"is not a safetensors file: its header would have {length:,} bytes, more than {MAX_HEADER:,}")
    if PREFIX + length > size:
        raise InputError(
            f"the file is truncated: its header ends at byte {PREFIX + length}, file has {size}", hint=_AGAIN
        )
    return length


def parse_header(text: bytes, path: Path, size: int) -> Header:
    """Return the header with the JSON `text`, of the file at `path` of `size` bytes.

    The official reader accepts every header that is accepted here. tests/formats/test_safetensors_verdicts.py lists
    headers that only the official reader accepts.

    InputError, of the header: not a JSON object, a key twice, more than 200,000 tensors, names that do not print,
    unknown dtypes, shapes that are no lists of natural numbers. Of the places: shapes that do not fit the offsets,
    tensors that overlap or leave holes, a file that is shorter or longer than its tensors need.
    """
    if not text.startswith(b"{"):
        raise InputError("is not a safetensors file: its header does not begin with {")
    if text.count(b'"data_offsets"') > MAX_TENSORS:
        raise InputError(f"header has more than {MAX_TENSORS:,} tensors")
    with errors.context("header"):
        entries = parse_json(text, _integer if b"-0" in text else None)
    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError("header: __metadata__ is not a table of strings")
    data_begin = PREFIX + len(text)
    tensors = {name: _tensor(name, entry, path, data_begin) for name, entry in entries.items()}
    _check_places(entries, data_begin, size)
    return Header(tensors, metadata, size)


def _tensor(name: str, entry: Any, path: Path, data_begin: int) -> TensorInfo:
    if not (0 < len(name) <= 1000 and name.isprintable()):
        raise _wrong(name, "a name must have 1 to 1000 printable characters")
    if not isinstance(entry, dict) or entry.keys() != _ENTRY_KEYS:
        raise _wrong(name, "must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        raise _wrong(name, f"unknown dtype {str(dtype)[:80]!r}", hint=f"known are {', '.join(ITEMSIZE)}")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise _wrong(name, f"shape must be a list of at most {MAX_DIMENSIONS} natural numbers below 2**63")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _wrong(name, "data_offsets must be two natural numbers in ascending order")
    begin, end = offsets
    if _overflows(dtype, shape):
        raise _wrong(name, f"{dtype} of shape {str(shape)[:80]} has a size beyond 64 bits")
    nbytes, rest = divmod(bits_of(dtype, shape), 8)
    if rest:
        raise _wrong(name, f"{dtype} of shape {str(shape)[:80]} ends within a byte")
    if end - begin != nbytes:
        raise _wrong(name, f"{dtype} of shape {str(shape)[:80]} takes {nbytes} bytes, data_offsets give {end - begin}")
    return TensorInfo(name, stored(path, data_begin + begin, tuple(shape), dtype, name))


def _naturals(values: Any) -> bool:
    if type(values) is not list or not {int}.issuperset(map(type, values)):
        return False
    return not values or (min(values) >= 0 and max(values) < LARGEST)


def _overflows(dtype: str, shape: list[int]) -> bool:
    """Tell whether a size exceeds 64 bits before a 0 makes it nothing: readers that multiply in 64 bits refuse
    such shapes."""
    if math.prod(shape) and bits_of(dtype, tuple(shape)) < MOST_BITS:
        return False
    elements = list(accumulate(shape, mul, initial=1))
    return max(elements) >= MOST_BITS or bits_of(dtype, (elements[-1],)) >= MOST_BITS


def _integer(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no natural number")
    return int(text)


def _wrong(name: str, what: str, hint: str | None = None) -> InputError:
    return InputError(f"header: tensor {name[:80]!r}: {what}", hint=hint)


def _check_places(entries: Mapping[str, Any], data_begin: int, size: int) -> None:
    """InputError unless the tensors' bytes follow each other from the header to the end of the file."""
    end = 0
    for (begin, stop), name in sorted((entry["data_offsets"], name) for name, entry in entries.items()):
        if gap := begin - end:
            raise _wrong(name, f"leaves {gap} bytes before it unused" if gap > 0 else "overlaps the one before it")
        end = stop
    end += data_begin
    if end > size:
        raise InputError(f"the file is truncated: header promises {end} bytes, file has {size}", hint=_AGAIN)
    if end < size:
        raise InputError(f"header promises {end} bytes, file has {size}", hint=_AGAIN)


# The work that a crash may lose: after so many seconds written data is synced and recorded in the journal.
SAVE_SECONDS = 2.0
PIECE = 1 << 22


class Writer:
    """Writes the tensors of a layout into `folder`, each byte once, from any number of threads.

    Files are created at once, with headers and full size; space is reserved if the file system can. `files` selects
    some of them (default: all). With a `journal`, written data is synced every few seconds and then recorded. Recorded
    bytes of files that still exist need not be written again (`has`). `note` adds values to the next record. `room`
    bytes may be on their way, in memory that `allocate` makes (`outbox.Outbox`); `hashers` threads hash them together.

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
        self._notes: dict[str, dict[str, dict[Any, Any]]] = {}
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
        with self._saving:  # a running save decides whether there is work to keep
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
        """Tell whether bytes [offset, offset + nbytes) of tensor `name` are written already."""
        place = self._place(name, offset, nbytes)
        with self._lock:
            start = place.offset + offset
            return self._written[place.file].reach(start) >= start + nbytes

    def where(self, name: str, offset: int) -> tuple[str, int]:
        """Return the file and offset that byte `offset` of tensor `name` goes to; tasks are done in this order."""
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

    def note(self, key: str, name: str, values: Mapping[Any, Any]) -> None:
        """Add values of a tensor to `key` of the next record. Its bytes may still be on their way then."""
        with self._lock:
            self._notes.setdefault(key, {}).setdefault(name, {}).update(values)

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
                with self._lock:
                    notes, self._notes = self._notes, {}
                self._journal.append({"done": {name: list(spans) for name, spans in fresh.items()}, **notes})
                self._saved = True

    def finish(self, *, keep: bool = False) -> Findings:
        """Return the hashes of the files, once every byte is written; writes the index unless other parts write some of
        the files.

        `keep`: save even the work of a short run, because others will finish it. RuntimeError: a byte is missing (a
        bug).
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
        """Take over work that the journal lists as done, for files of full size."""
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
    """Return the byte ranges that a journal's records list as written, by file."""
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


# The order of tensors in a file that safetensors.torch.save_file makes: by dtype in this order, then by name.
DTYPE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ", "F8_E4M3FNUZ",
    "F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "F6_E3M2", "F6_E2M3", "F4", "BOOL",
)  # fmt: skip


class Meta(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes; `offset` counts from the start of the file."""

    file: str
    offset: int
    nbytes: int
    dtype: str


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A weight file: `header` is everything before the first tensor, `size` the whole file in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All weight files of a checkpoint, each tensor's place, and the texts of indexes by their paths, where there are
    shards."""

    files: tuple[FileLayout, ...]
    tensors: dict[str, Place]
    indexes: dict[str, str]
    total_size: int


def plan_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    shard_size: int | None,
    components: Sequence[Component] = (Component(),),
    weights: Mapping[str, str] | None = None,
) -> Layout:
    """Return the place of each (name, dtype, shape), in files with the bytes that transformers would write.

        tensors      in the order in which shards are filled
        shard_size   most bytes of a shard; a larger tensor gets its own shard; None: one file
        components   the tensors' folders, and the names of their files
        weights      the name of a weight for tensors that together store it: they follow one another, and share a shard

    Shards equal huggingface_hub.split_torch_state_dict_into_shards, files equal
    safetensors.torch.save_file(metadata={"format": "pt"}). `total_parameters` counts the floating tensors.
    """
    folders = folders_of(components)
    parts: dict[str, list[Meta]] = {component.folder: [] for component in components}
    places: dict[str, Place] = {}
    for name, dtype, shape in tensors:
        folder, own = split(name, folders)
        parts.setdefault(folder, []).append(Meta(own, dtype, shape, nbytes_of(dtype, shape)))
        places[name] = Place("", 0, 0, "")
    if len(places) != len(tensors):
        raise ValueError("two tensors have one name")
    known = {component.folder: component for component in components}
    files: list[FileLayout] = []
    indexes: dict[str, str] = {}
    for folder, metas in parts.items():
        if metas or len(parts) == 1:
            _lay_out(known.get(folder, Component(folder)), metas, shard_size, weights or {}, files, places, indexes)
    return Layout(tuple(files), places, indexes, sum(place.nbytes for place in places.values()))


def _lay_out(
    component: Component,
    metas: Sequence[Meta],
    shard_size: int | None,
    weights: Mapping[str, str],
    files: list[FileLayout],
    places: dict[str, Place],
    indexes: dict[str, str],
) -> None:
    """Add the files, places and index of one component."""
    kin = groupby(metas, lambda meta: weights.get(component.at(meta.name), meta.name))
    shards = [metas] if shard_size is None else _shards([tuple(group) for _, group in kin], shard_size)
    own = {meta.name: "" for meta in metas}  # in the order of the tensors
    for number, shard in enumerate(shards, start=1):
        file = component.single if len(shards) == 1 else component.shard(number, len(shards))
        ordered = sorted(shard, key=lambda meta: (DTYPE_ORDER.index(meta.dtype), meta.name))
        ends = list(accumulate((meta.nbytes for meta in ordered), initial=0))
        header = _header(ordered, ends)
        files.append(FileLayout(file, header, len(header) + ends[-1]))
        for meta, begin in zip(ordered, ends, strict=False):
            places[component.at(meta.name)] = Place(file, len(header) + begin, meta.nbytes, meta.dtype)
            own[meta.name] = file.rpartition("/")[2]
    if len(shards) > 1:
        total = sum(meta.nbytes for meta in metas)
        parameters = sum(math.prod(meta.shape) for meta in metas if meta.dtype in FLOATING)
        indexes[component.index] = _index(total, parameters, own)


def _shards(groups: Sequence[Sequence[Meta]], shard_size: int) -> list[Sequence[Meta]]:
    shards: list[Sequence[Meta]] = []
    current: list[Meta] = []
    filled = 0
    for group in groups:
        nbytes = sum(meta.nbytes for meta in group)
        if nbytes > shard_size:
            shards.append(group)
            continue
        if filled + nbytes > shard_size:
            shards.append(current)
            current, filled = [], 0
        current += group
        filled += nbytes
    return [*shards, current] if current or not shards else shards


def _header(metas: Sequence[Meta], ends: Sequence[int]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for meta, offsets in zip(metas, pairwise(ends), strict=True):
        entries[meta.name] = {"dtype": meta.dtype, "shape": meta.shape, "data_offsets": offsets}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _index(total_size: int, total_parameters: int, weight_map: dict[str, str]) -> str:
    metadata = {"total_parameters": total_parameters, "total_size": total_size}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2, sort_keys=True) + "\n"
