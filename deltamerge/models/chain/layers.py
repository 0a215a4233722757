"""A version of a chain over its base, read like a checkpoint: any range of any tensor, from any thread.

What is read of one version is kept for a moment, since the next one is made of it: the versions of a soup, read one
after the other, cost one patch each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from blake3 import blake3

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.entry import DAMAGED, OTHER_BASE, TILE, Entry, as_bits, damage_told, digest
from deltamerge.formats.delta.entry import Read as ReadRange
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.steps import STEP_TILE, starts_of
from deltamerge.models.chain.folder import Version
from deltamerge.models.checkpoint import Checkpoint
from deltamerge.models.delta_file import DeltaFile
from deltamerge.models.delta_over_base import over
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.reader import RecentParts
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, fill, unique, view

_NOTHING = np.empty(0, np.uint8)


@dataclass(frozen=True, slots=True)
class FoldedEntry(Entry):
    """A tensor through several versions. Of the entry itself only the record is used.

    parts   the entry of each version, and its version's name
    every   check the hash of what every version makes, not of the last alone
    """

    parts: tuple[tuple[str, Entry], ...] = ()
    every: bool = False

    def tiles(self, read: ReadRange | None, *, check: bool = True, tile: int = TILE) -> Iterator[Array]:
        """The result of the last version, as `Entry.tiles`; memory holds a tile (of STEP_TILE elements at least) and a
        piece of the positions of each version. InputError: as there, and names the version."""
        self._check_presence(read)
        with self._base_blamed(read, check):
            yield from self._tiles(read, check, tile)

    def _tiles(self, read: ReadRange | None, check: bool, tile: int) -> Iterator[Array]:
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
    _read: ReadRange | None = None
    _made: Iterator[Array] = field(default_factory=lambda: iter(()))
    _starts: Array | None = None
    _count: int = 0
    _of_base: Any = None
    _of_result: Any = None

    def begin(self, read: ReadRange | None, span: int) -> None:
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


KEPT = 16  # parts of tensors, of STEP_TILE elements or of what is read at once


@dataclass(slots=True)
class Layers:
    """Puts versions over bases; those of one chain and one base share their layers."""

    _made: dict[Any, Mapping[str, TensorInfo]] = field(default_factory=dict)
    _recent: RecentParts = field(default_factory=partial(RecentParts, KEPT))

    def over(self, delta: Checkpoint, versions: Sequence[Version], base: Checkpoint) -> Checkpoint:
        """Return the checkpoint that the last of `versions`, whose folder is `delta`, makes of `base`.

        InputError: as `over_base.over`; or the base has tensors of which the first version says nothing.
        """
        last = versions[-1]
        top = over(delta, last.delta, base) if len(versions) == 1 else None
        if top is not None and last.note is None:
            return top
        check_complete(versions[0], base)
        if top is not None:
            return top
        below: Mapping[str, TensorInfo] = {}
        for number, version in enumerate(versions):
            key = (str(version.path), version.state, base.reference, str(base.path), base.revision)
            if key not in self._made:
                self._made[key] = self._level(delta, version, base, below if number else None, key)
            below = self._made[key]
        found = over(delta, versions[0].delta, base)
        return replace(found, tensors=dict(below), files=last.delta.files)

    def _level(
        self, delta: Checkpoint, version: Version, base: Checkpoint, below: Mapping[str, TensorInfo] | None, key: Any
    ) -> Mapping[str, TensorInfo]:
        under = base if below is None else replace(base, tensors=dict(below))
        made = dict(over(replace(delta, path=version.path), version.delta, under).tensors)
        for name, info in made.items():
            old = None if below is None else below[name]
            below_it = None if old is None else old.tensor
            if info.kind == "view" and info.tensor is not below_it:
                beneath = [below_it] if below_it is not None and below_it.function == chain_link.__name__ else []
                inputs = [info.tensor, *beneath]
                place = LayerPlace((key, name), self._recent)
                made[name] = replace(info, tensor=unique(chain_link, inputs, info.shape, info.dtype, place=place))
        return made


def check_complete(first: Version, base: Checkpoint) -> None:
    """Raise InputError for a base with tensors that the first version of a chain neither lists nor removes."""
    manifest = first.delta.manifest
    known = {record.base_name or name for name, record in manifest.tensors.items()} | {*manifest.removed}
    if unknown := base.tensors.keys() - known:
        raise InputError(
            f"{first.path}: says nothing of the base's {min(unknown)}",
            hint="extract it again: the first version of a chain lists every tensor",
        )


@dataclass(frozen=True, slots=True, eq=False)
class LayerPlace:
    """A tensor of a version, by a key, among what was made last."""

    key: Any
    recent: RecentParts


@view()
def chain_link(read: Read, tensor: Tensor, start: int, out: memoryview, *, place: LayerPlace) -> None:
    """Compute what a version makes of a tensor of the one before.

    The first input is the version's delta over the tensor before. A second one is that tensor, where a version made it.
    It is made from the highest version below that is still there, upwards, without recursion: a chain may have
    thousands of versions. Whole tiles of steps are made, which cannot be made in part.
    """
    size, width = len(out), ITEMSIZE[tensor.dtype]
    begin = start // STEP_TILE * STEP_TILE
    end = min(-(-(start + size // width) // STEP_TILE) * STEP_TILE, tensor.size)
    made = _whole(read, tensor, begin, (end - begin) * width)
    out[:] = flat(made)[(start - begin) * width :][:size]


def _whole(read: Read, tensor: Tensor, start: int, nbytes: int) -> Array:
    stack, held = [tensor], None
    while True:
        place: LayerPlace = stack[-1].parameter("place")
        held = place.recent.known((place.key, start, nbytes))
        if held is not None or len(stack[-1].inputs) == 1:
            break
        stack.append(stack[-1].inputs[1])
    if held is not None:
        stack.pop()
    while stack:
        one = stack.pop()
        place = one.parameter("place")
        source = read if held is None else _Held(read, held, start)
        held = place.recent.get((place.key, start, nbytes), partial(_filled, one.inputs[0], source, start, nbytes))
    assert held is not None
    return held


def _filled(layer: Tensor, read: Read, start: int, nbytes: int) -> Array:
    made: Array = np.empty(nbytes, np.uint8)
    fill(read, layer, start, flat(made))
    return made


@dataclass(frozen=True, slots=True)
class _Held:
    """Reads the tensor below from the part of it that was made."""

    read: Read
    part: Array
    start: int

    def read_into(self, info: Tensor | TensorInfo, start_elem: int, out: Any) -> None:
        view, begin = flat(out), (start_elem - self.start) * ITEMSIZE[info.dtype]
        view[:] = flat(self.part)[begin : begin + len(view)]

    def read_runs(self, info: Tensor | TensorInfo, offsets: Any, ends: Any, out: Any) -> None:
        self.read.read_runs(info, offsets, ends, out)

    def once(self, key: Any, compute: Any) -> Any:
        return self.read.once(key, compute)
