"""Versions of a chain as one delta: applied to the base in one pass, tile by tile, with nothing in between stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from blake3 import blake3

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.entry import DAMAGED, OTHER_BASE, TILE, Entry, Read, as_bits, damage_told, digest
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.steps import STEP_TILE, starts_of
from deltamerge.models.chain.version import Version
from deltamerge.models.delta_file import DeltaFile

_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class FoldedEntry(Entry):
    """A tensor through several versions. Of the entry itself only the record is used.

    parts   the entry of each version, and its version's name
    every   check the hash of what every version makes, not of the last alone
    """

    parts: tuple[tuple[str, Entry], ...] = ()
    every: bool = False

    def tiles(self, read: Read | None, *, check: bool = True, tile: int = TILE) -> Iterator[Array]:
        """The result of the last version, as `Entry.tiles`; memory holds a tile (of STEP_TILE elements at least) and a
        piece of the positions of each version. InputError: as there, and names the version."""
        self._check_presence(read)
        with self._base_blamed(read, check):
            yield from self._tiles(read, check, tile)

    def _tiles(self, read: Read | None, check: bool, tile: int) -> Iterator[Array]:
        span = -(-tile // STEP_TILE) * STEP_TILE  # no version reads beyond it for what lies in it
        levels = [_Level(version, entry) for version, entry in self.parts if entry.record.count]
        levels = levels or [_Level(*self.parts[0])]
        if levels[0].entry is not self.parts[0][1]:  # the first version casts or grows it, and changes no entry
            levels.insert(0, _Level(*self.parts[0]))
        for number, level in enumerate(levels):
            level.hashes = check and (self.every or number == len(levels) - 1)
            level.begin(read if number == 0 else None, span)
        for start in range(0, self.size, span):
            stop = min(start + span, self.size)
            made: Array | None = None
            for level in levels:  # from the base upwards, without recursion: there may be thousands
                made = level.next(start, stop, made)
            assert made is not None
            for at in range(0, made.size, tile):
                yield made[at : at + tile]
        for level in levels:
            level.finish()
        if check and self.record.base is not None and levels[0].base != self.record.base:
            raise InputError(OTHER_BASE)


@dataclass(slots=True)
class _Level:
    """One version's changes of a tensor, made range by range of what the version below has made of it.

    Between two ranges it holds a piece of the positions, or of steps nothing but where their tiles begin.
    """

    version: str
    entry: Entry
    hashes: bool = False
    base: str = ""
    _below: tuple[int, Array] = (0, _NOTHING)
    _read: Read | None = None
    _made: Iterator[Array] = field(default_factory=lambda: iter(()))
    _starts: Array | None = None
    _count: int = 0
    _of_base: Any = None
    _of_result: Any = None

    def begin(self, read: Read | None, span: int) -> None:
        """Begin to make it, of the base's tensor that is `read`, or of what `next` is given."""
        self._of_base, self._of_result = blake3(), blake3()

        def of_base(start: int, stop: int) -> Array:
            assert read is not None
            bits = as_bits(read(start, stop), self.entry.base_dtype)
            self._of_base.update(flat(bits))
            return bits

        def of_below(start: int, stop: int) -> Array:
            first, bits = self._below
            return bits[start - first : stop - first]

        has_base = self.entry.record.base is not None
        self._read = (of_base if read is not None else of_below) if has_base else None
        if self.entry.has_steps and self.entry.index is not None:
            with errors.context(self.version), damage_told():
                self._starts = starts_of(self.entry.index, self.entry.size)
        else:
            self._made = self.entry.tiles(self._read, check=False, tile=span)

    def next(self, start: int, stop: int, below: Array | None) -> Array:
        """Elements [start, stop), the next ones."""
        if below is not None:
            self._below = (start, below)
        with errors.context(self.version):
            made = next(self._made) if self._starts is None else self._stepped(start, stop, self._starts)
        self._below = (0, _NOTHING)
        if self.hashes:
            self._of_result.update(flat(made))
        return made

    def _stepped(self, start: int, stop: int, starts: Array) -> Array:
        entry, read = self.entry, self._read
        assert read is not None
        own = read(min(start, entry.base_size), min(stop, entry.base_size))
        base = entry.converted(own, stop - start)
        made = base.copy()
        for begin in range(start, stop, STEP_TILE):
            part = slice(begin - start, min(begin + STEP_TILE, stop) - start)
            positions, values = entry.step_tile(begin // STEP_TILE, base[part], starts)
            made[part][positions] = values
            self._count += positions.size
        return made

    def finish(self) -> None:
        """InputError: there is more of it, or it is not what the version was made for."""
        with errors.context(self.version):
            next(self._made, None)
            if self._starts is not None and self._count != self.entry.record.count:
                raise InputError(f"steps list {self._count} entries, not {self.entry.record.count}", hint=DAMAGED)
        self.base = digest(self._of_base)
        if self.hashes and digest(self._of_result) != self.entry.record.result:
            raise InputError(f"{self.version}: the result is not the tensor this delta was made for", hint=DAMAGED)


def folded(versions: Sequence[Version], *, every: bool = False) -> DeltaFile:
    """The artifact that a line of versions, from the base on, amounts to; with `every` each of them is checked by hash
    when it is applied, not the last alone."""
    first, last = versions[0].delta, versions[-1].delta
    if len(versions) == 1:
        return last
    entries: dict[str, Entry] = {}
    for name, end in last.entries.items():
        parts = tuple((version.name, version.delta.entries[name]) for version in versions)
        begin = parts[0][1].record
        changed = sum(entry.record.count for _, entry in parts)
        same = {"encoding": "dense", "count": end.size if changed else 0, "result": end.record.result}
        entries[name] = FoldedEntry(name, begin.model_copy(update=same), _NOTHING, parts=parts, every=every)
    whole = first.manifest.model_copy(update={"tensors": {n: entry.record for n, entry in entries.items()}})
    return DeltaFile(last.path, whole, entries, last.files)


def covers(longer: DeltaFile, shorter: DeltaFile) -> bool:
    """Whether what is checked of one folded artifact checks another too: it goes through that one's last version."""
    if longer.path == shorter.path or longer.path.parent != shorter.path.parent:
        return False
    entries = [entry for entry in longer.entries.values() if isinstance(entry, FoldedEntry)]
    return bool(entries) and entries[0].every and shorter.path.name in {version for version, _ in entries[0].parts}
