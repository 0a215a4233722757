"""A mirror of a chain in another project's layout: its versions, numbered from 1, each published by one rename."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.delta.positions import Array
from deltamerge.models.chain.dialect import Dialect
from deltamerge.models.chain.diffs import CodedTensor, DiffFile, code
from deltamerge.models.chain.folder import Version
from deltamerge.models.chain.publish import one_writer, publishing
from deltamerge.models.chain.skyrl import SKYRL
from deltamerge.models.chain.slime import SLIME
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.delta_over_base import check_complete, folded
from deltamerge.tensors.dtypes import PACKED
from deltamerge.tensors.reader import Reader, elements
from deltamerge.tensors.tensor import TensorInfo

DIALECTS: dict[str, Dialect] = {dialect.name: dialect for dialect in (SLIME, SKYRL)}
ALGORITHM = "xxh3-128"
STATE, NAME = "deltamerge_state", "deltamerge_version"
BATCH = 64  # versions that are written together
Kind = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclass(frozen=True, slots=True)
class WrittenDiffs:
    """A published version: its folder, its changed tensors, and its bytes."""

    path: Path
    tensors: int
    nbytes: int


def style_of(text: str) -> tuple[Dialect, str]:
    """Return the dialect and the encoding of "slime", "slime:overwrite" or "skyrl". InputError: another text."""
    name, _, encoding = text.partition(":")
    dialect = DIALECTS.get(name)
    if dialect is None or (encoding and encoding not in dialect.encodings):
        known = [f"{d.name}:{e}" if e != d.encodings[0] else d.name for d in DIALECTS.values() for e in d.encodings]
        raise InputError(f"{text!r}: no dialect that is written", hint=f"known: {', '.join(known)}")
    return dialect, encoding or dialect.encodings[0]


class Mirror:
    """A folder of versions in a dialect, to which this process alone adds.

    folder   made if it is not there
    style    "slime", "slime:overwrite" or "skyrl"

    InputError: no such style. OutputError: another process adds versions.
    """

    def __init__(self, folder: Path, style: str) -> None:
        self.folder = folder
        self.dialect, self.encoding = style_of(style)
        self._held = ExitStack()
        self._held.enter_context(one_writer(folder, "adding"))

    def __enter__(self) -> Mirror:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._held.close()

    @property
    def newest(self) -> int:
        """Return the number of the newest version; 0: there is none."""
        return max(self.dialect.numbers(self.folder), default=0)

    def is_at(self, state: str | None) -> bool:
        """Return whether the newest version mirrors the version with this resulting state.

        For None: whether there is no version.
        """
        if not (number := self.newest):
            return state is None
        return state is not None and self.dialect.open(self.folder / self.dialect.title(number)).state == state

    def code(self, name: str, dtype: str, shape: Sequence[int], old: Array, new: Array) -> CodedTensor | None:
        """Code the change of a tensor. None: there is none."""
        return code(name, dtype, shape, old, new, self.encoding, ALGORITHM)

    def follow(
        self, version: Version, kinds: Mapping[str, Kind], old: Mapping[str, Array], new: Mapping[str, Array]
    ) -> None:
        """Publish a version, from the model's bits before and after it. OutputError: the disk."""
        self.write((self.code(name, *kind, old[name], new[name]) for name, kind in kinds.items()), notes_of(version))

    def write(self, tensors: Iterable[CodedTensor | None], notes: Mapping[str, str]) -> WrittenDiffs:
        """Publish the next version. OutputError: the disk."""
        (written,) = self._write(((tensor,) for tensor in tensors), [notes])
        return written

    def missing(self, versions: Sequence[Version]) -> Sequence[Version]:
        """Return the versions of a line that follow the newest version here.

        InputError: the newest is not in the line.
        """
        number = self.newest
        if not number:
            return versions
        path = self.folder / self.dialect.title(number)
        state = self.dialect.open(path).state
        for at, version in enumerate(versions):
            if version.state == state:
                return versions[at + 1 :]
        raise InputError(
            f"{path}: is of no version of {versions[-1].path.parent}", hint="keep each chain in a folder of its own"
        )

    def catch_up(self, versions: Sequence[Version], origin: Checkpoint, workers: int) -> list[WrittenDiffs]:
        """Publish the missing versions of a line over the base `origin`, and return them.

        InputError: the newest version here is not in the line, or a version is damaged or changes more than values.
        OutputError: the disk.
        """
        missing = self.missing(versions)
        first = len(versions) - len(missing)
        if not missing:
            return []
        check_complete(versions[0], origin)
        _refuse_more(versions[0], origin)
        written = []
        for begin in range(first, len(versions), BATCH):
            batch = versions[begin : begin + BATCH]
            notes = [notes_of(version) for version in batch]
            before = folded(versions[:begin]) if begin else None
            with ThreadPoolExecutor(workers) as pool, Reader() as reader:
                lines = pool.map(lambda name: self._line(name, before, batch, origin, reader), origin.tensors)  # noqa: B023
                written += self._write(lines, notes)
        return written

    def _line(
        self, name: str, before: DeltaFile | None, batch: Sequence[Version], origin: Checkpoint, reader: Reader
    ) -> list[CodedTensor | None]:
        """Return the changes of a tensor by each version of a batch."""
        info = origin.tensors[name]
        read = elements(reader, info)
        with errors.context(name):
            if any(version.delta.entries[name].record.count for version in batch):
                bits: Array = before.entries[name].whole(read) if before else read(0, math.prod(info.shape))
            found: list[CodedTensor | None] = []
            for version in batch:
                entry = version.delta.entries[name]
                if not entry.record.count:
                    found.append(None)
                    continue
                with errors.context(str(version.path)):
                    new = entry.whole(lambda start, stop: bits[start:stop])  # noqa: B023
                found.append(self.code(name, info.dtype, info.shape, bits, new))
                bits = new
        return found

    def _write(
        self, lines: Iterable[Iterable[CodedTensor | None]], notes: Sequence[Mapping[str, str]]
    ) -> list[WrittenDiffs]:
        """Publish a version for each note. Each of `lines` has a tensor's changes, one for each version."""
        numbers = range(self.newest + 1, self.newest + 1 + len(notes))
        written = []
        with ExitStack() as stack:
            files, ends = list[DiffFile](), list[ExitStack]()
            for number in numbers:
                end = stack.enter_context(ExitStack())
                folder = end.enter_context(publishing(self.folder, self.dialect.title(number), "adding"))
                files.append(DiffFile(folder / self.dialect.payload()))
                end.callback(files[-1].close)
                ends.append(end)
            for line in lines:
                for file, tensor in zip(files, line, strict=True):
                    if tensor is not None:
                        file.add(tensor)
            for number, file, end, note in zip(numbers, files, ends, notes, strict=True):
                size = self.dialect.finish(file, number, self.encoding, ALGORITHM, note)
                end.close()  # in order: a version never appears before the version that it changes
                written.append(WrittenDiffs(self.folder / self.dialect.title(number), len(file.tensors), size))
        return written


def notes_of(version: Version) -> dict[str, str]:
    """Return the note on a version that is stored beside its diffs, for `Mirror.missing`."""
    return {NAME: version.name, STATE: version.state}


def write_difference(mirror: Mirror, old: Checkpoint, new: Checkpoint, workers: int) -> WrittenDiffs:
    """Publish the next version: the change from `old` to `new`. InputError: they differ in more than values."""
    with errors.context(new.reference):
        for name in sorted(old.tensors.keys() ^ new.tensors.keys()):
            what = "lacks" if name in old.tensors else "adds"
            raise InputError(f"{what} {name}: {mirror.dialect.name}'s versions keep the base's tensors")
        for name, info in new.tensors.items():
            _refuse_other(name, info, old.tensors[name])
    with Reader() as reader, ThreadPoolExecutor(workers) as pool:

        def one(name: str) -> CodedTensor | None:
            before, after = old.tensors[name], new.tensors[name]
            size = math.prod(before.shape)
            bits = elements(reader, before)(0, size), elements(reader, after)(0, size)
            return mirror.code(name, before.dtype, before.shape, *bits)

        return mirror.write(pool.map(one, old.tensors), {})


def _refuse_more(first: Version, origin: Checkpoint) -> None:
    """Raise InputError if the first version of a chain changes more of its base than values."""
    with errors.context(str(first.path)):
        for name in sorted(first.delta.entries.keys() ^ origin.tensors.keys()):
            what = "adds" if name in first.delta.entries else "lacks"
            raise InputError(f"{what} {name}, and other projects' versions keep the base's tensors")
        for name, entry in first.delta.entries.items():
            if entry.kind != entry.base_kind or entry.record.base_name is not None:
                raise InputError(f"{name}: becomes another tensor, and other projects' versions keep the base's")
            _refuse_other(name, origin.tensors[name], origin.tensors[name])


def _refuse_other(name: str, info: TensorInfo, base: TensorInfo) -> None:
    if (info.dtype, tuple(info.shape)) != (base.dtype, tuple(base.shape)):
        raise InputError(f"{name} is {info.dtype} {list(info.shape)}, in the base {base.dtype} {list(base.shape)}")
    if info.dtype in PACKED:
        raise InputError(f"{name} is {info.dtype}, whose elements are no whole bytes")
