"""Versions of a chain as one delta: applied to the base in one pass, tile by tile, with nothing in between stored."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from deltamerge import errors
from deltamerge.chain.version import Version
from deltamerge.delta.entry import DAMAGED, TILE, Entry, Read, as_bits, digest
from deltamerge.delta.file import DeltaFile
from deltamerge.delta.positions import Array
from deltamerge.errors import InputError
from deltamerge.io.files import flat

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
        """The result of the last version, as `Entry.tiles`; memory holds a tile and a piece of the positions of each
        version. InputError: as there, and names the version."""
        if (read is None) != (self.record.base is None):
            raise InputError(f"the base {'lacks it' if read is None else 'must not have it'}")
        base_hash = blake3()
        held: list[Array] = [_NOTHING]

        def from_base(start: int, stop: int) -> Array:
            assert read is not None
            bits = as_bits(read(start, stop), self.base_dtype)
            if check:
                base_hash.update(flat(bits))
            return bits

        changing = [part for part in self.parts[1:] if part[1].record.count]
        first = self.parts[0][1].tiles(None if read is None else from_base, check=False, tile=tile)
        later = [entry.tiles(lambda start, stop: held[0], check=False, tile=tile) for _, entry in changing]
        hashes = [blake3() for _ in (self.parts[0], *changing)]
        for bits in first:
            held[0] = bits
            if check and (self.every or not later):
                hashes[0].update(flat(bits))
            for number, ((version, _), one) in enumerate(zip(changing, later, strict=True), 1):
                with errors.context(version):
                    held[0] = next(one)
                if check and (self.every or number == len(later)):
                    hashes[number].update(flat(held[0]))
            yield held[0]
        for (version, _), one in zip(changing, later, strict=True):
            with errors.context(version):
                next(one, None)
        if not check:
            return
        if self.record.base is not None and digest(base_hash) != self.record.base:
            raise InputError("the base's tensor is not the one this delta was made from")
        made = [self.parts[0], *changing]
        for number, (version, entry) in enumerate(made):
            is_checked = self.every or number == len(made) - 1
            if is_checked and digest(hashes[number]) != entry.record.result:
                raise InputError(f"{version}: the result is not the tensor this delta was made for", hint=DAMAGED)


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
