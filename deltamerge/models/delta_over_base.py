"""A delta artifact over its base, read like a checkpoint: any range of any tensor, from any thread."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.formats.delta.entry import TILE, Entry, as_bits, extend
from deltamerge.formats.delta.entry import Read as ReadElements
from deltamerge.formats.delta.positions import Array, Positions
from deltamerge.formats.delta.recent import Kept
from deltamerge.formats.delta.steps import STEP_TILE
from deltamerge.models.checkpoint import Checkpoint, with_configs
from deltamerge.tensors.dtypes import ITEMSIZE, bits_type, cast
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Read, TensorInfo

if TYPE_CHECKING:
    from deltamerge.models.delta_file import DeltaFile

HELD = 16  # tensors whose positions stay decoded, at most an eighth of a byte per element; and as many tiles of steps


def over(delta: Checkpoint, opened: DeltaFile, base: Checkpoint) -> Checkpoint:
    """The checkpoint that `delta`, whose folder is `opened`, makes of `base`; its tensors are computed when read.

    InputError: the base lacks tensors that the delta was made from (their content is not checked).
    """
    if base.is_delta:
        raise InputError(f"its base {base.reference} is a delta too", hint="apply that first: deltamerge apply")
    held = Kept(HELD)
    tensors: dict[str, TensorInfo] = {}
    planned = opened.result({name: (info.dtype, info.shape) for name, info in base.tensors.items()})
    for source in planned:
        info = None if source.base_name is None else base.tensors[source.base_name]
        entry = source.entry
        is_base = info is not None and (info.dtype, info.shape) == (source.dtype, source.shape)
        if info is not None and is_base and (entry is None or not entry.record.count):
            tensors[source.name] = replace(info, name=source.name)
            continue
        assert entry is not None
        nbytes = entry.size * ITEMSIZE[source.dtype]
        path = opened.path / "delta.json"
        made = _Layer(entry, info, held, path)
        tensors[source.name] = TensorInfo(source.name, source.dtype, source.shape, path, 0, nbytes, made)
    components = with_configs(opened.manifest.as_components(), delta.path)
    return replace(delta, tensors=tensors, files=opened.files, base=base, components=components)


def added(info: TensorInfo) -> TensorInfo | None:
    """The float32 values that a delta artifact adds to the base's tensor to make `info`; None if it stores none."""
    layer = info.made
    if not isinstance(layer, _Layer) or layer.entry.record.values is None:
        return None
    begin, nbytes = (4 * (size // ITEMSIZE[info.dtype]) for size in (info.begin, info.nbytes))
    return replace(info, dtype="F32", begin=begin, nbytes=nbytes, made=_Added(layer))


def check(delta: DeltaFile, base: Checkpoint, reader: Reader, workers: int, tile: int = TILE) -> None:
    """InputError: a base tensor, or a resulting tensor, does not have the hash that the delta records.

    delta     the artifact
    base      the base's tensors by name
    reader    reads them
    workers   threads
    tile      elements of a tile
    """

    def look(entry: Entry) -> None:
        record = entry.record
        read = None if record.base is None else elements(reader, base.tensors[record.base_name or entry.name])
        with errors.context(entry.name):
            for _ in entry.tiles(read, tile=tile):
                pass
        checking.step()

    of_all = progress.phase("checking the delta", len(delta.entries), "tensors")
    with of_all as checking, ThreadPoolExecutor(workers) as pool:
        try:
            for _ in pool.map(look, delta.entries.values()):
                pass
        except InputError as error:
            error.hint = error.hint or f"this delta belongs to {delta.manifest.base}"
            raise


def elements(reader: Reader, info: TensorInfo) -> ReadElements:
    """A function that reads flat elements [start, stop) of a tensor as bits."""

    def read(start: int, stop: int) -> Array:
        out = np.empty(stop - start, bits_type(info.dtype))
        reader.read_into(info, start, out)
        return out

    return read


@dataclass(slots=True)
class _Index:
    """A tensor's positions in pieces: the first position of each, and the number of entries before it."""

    positions: Positions
    firsts: list[int]
    before: list[int]

    def between(self, start: int, stop: int) -> Iterator[tuple[Array, int]]:
        """Positions in [start, stop), and the number of the first of them."""
        for i in range(max(0, bisect_right(self.firsts, start) - 1), len(self.firsts)):
            if self.firsts[i] >= stop:
                return
            piece = self.positions.piece(i)
            low, high = np.searchsorted(piece, [start, stop])
            if low < high:
                yield piece[low:high], self.before[i] + int(low)


def _index_of(entry: Entry) -> _Index:
    index = _Index(Positions(), [], [])
    for piece in entry.positions():
        index.before.append(index.positions.count)
        index.positions.add(piece)
        index.firsts.append(int(piece[0]))
    return index


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """An entry of the delta at `path` over the base's tensor `info` (None: the base has none)."""

    entry: Entry
    info: TensorInfo | None
    held: Kept
    path: Path

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        with errors.context(f"{self.path}: {self.entry.name}"):
            self._fill(read, start, out)

    def _fill(self, read: Read, start: int, out: memoryview) -> None:
        record = self.entry.record
        target = np.frombuffer(out, bits_type(record.dtype))
        stop = start + target.size
        if self.entry.index is None and record.count and record.values is None:
            target[:] = self.entry.values[start:stop]
            return
        base = extend(self._base(read, start, stop), target.size)
        target[:] = cast(base, self.entry.base_dtype, record.dtype)
        for where, values in self.entries(read, start, stop):
            self.entry.put(target, base, where, values)

    def _base(self, read: Read, start: int, stop: int) -> Array:
        assert self.info is not None
        base = np.empty(max(0, min(stop, self.entry.base_size) - start), bits_type(self.info.dtype))
        if base.size:
            read.read_into(self.info, start, base)
        return base

    def _steps(self, read: Read, start: int, stop: int) -> Iterator[tuple[Array, Array]]:
        for number in range(start // STEP_TILE, -(-stop // STEP_TILE)):
            begin = number * STEP_TILE
            positions, values = self.held.get((self.entry.name, number), partial(self._step_tile, read, number))
            low, high = np.searchsorted(positions, [start - begin, stop - begin])
            yield positions[low:high] + (begin - start), values[low:high]

    def _step_tile(self, read: Read, number: int) -> tuple[Array, Array]:
        begin, end = number * STEP_TILE, min((number + 1) * STEP_TILE, self.entry.size)
        base = self.entry.converted(self._base(read, begin, end), end - begin)
        return self.entry.step_tile(number, base)

    def entries(self, read: Read, start: int, stop: int) -> Iterator[tuple[Array, Any]]:
        """Positions relative to `start`, with bits of final values or float32 values to add."""
        entry = self.entry
        if not entry.record.count:
            return
        if entry.has_steps:
            yield from self._steps(read, start, stop)
            return
        scales = entry.scale_values()
        if entry.index is None:
            pieces: Any = [(np.arange(start, stop), start)]
        else:
            pieces = self.held.get((entry.name, None), partial(_index_of, entry)).between(start, stop)
        for positions, first in pieces:
            yield positions - start, entry.values_at(positions, first, scales)


@dataclass(frozen=True, slots=True)
class _Added:
    """The float32 values that a layer adds; zero where it adds nothing."""

    layer: _Layer

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        target = np.frombuffer(out, np.float32)
        target[:] = 0
        with errors.context(f"{self.layer.path}: {self.layer.entry.name}"):
            for where, values in self.layer.entries(read, start, start + target.size):
                target[where] = as_bits(values, "F32").view(np.float32)
