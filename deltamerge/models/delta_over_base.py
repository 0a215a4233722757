"""A delta artifact over its base, read like a checkpoint: any range of any tensor, from any thread."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.formats.delta.entry import TILE, Entry, as_bits, extend
from deltamerge.formats.delta.positions import Array, Positions
from deltamerge.formats.delta.steps import STEP_TILE
from deltamerge.models.checkpoint import Checkpoint, with_configs
from deltamerge.models.delta_file import DeltaFile
from deltamerge.tensors.dtypes import bits_type, cast
from deltamerge.tensors.reader import Reader, RecentParts, elements
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, part_of, unique, view, viewed

HELD = 16  # tensors whose positions stay decoded, at most an eighth of a byte per element; and as many tiles of steps


def over(delta: Checkpoint, opened: DeltaFile, base: Checkpoint) -> Checkpoint:
    """Return the checkpoint that `delta` makes of `base`. Its tensors are computed when read; `opened` is its folder.

    InputError: the base lacks tensors that the delta was made from (their content is not checked).
    """
    if base.is_delta:
        raise InputError(f"its base {base.reference} is a delta too", hint="apply that first: deltamerge apply")
    held = RecentParts(HELD)
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
        path = opened.path / "delta.json"
        below = [] if info is None else [info]
        own = {"layer": Layer(entry, held), "name": source.name, "path": path}
        made = unique(over_base, below, source.shape, source.dtype, **own)
        tensors[source.name] = TensorInfo(source.name, made)
    components = with_configs(opened.manifest.as_components(), delta.path)
    return replace(delta, tensors=tensors, files=opened.files, base=base, components=components)


def added(info: TensorInfo) -> TensorInfo | None:
    """Return the float32 values that a delta adds to the base's tensor to make `info`; None if it stores none."""
    whole, first = info.tensor.whole, 0
    if whole.function != over_base.__name__ or whole.parameter("layer").entry.record.values is None:
        return None
    if whole is not info.tensor:
        first = info.tensor.parameter("first")
    addends = viewed(added_values, whole.inputs, whole.shape, "F32", **dict(whole.parameters))
    return TensorInfo(info.name, part_of(addends, first, info.shape))


def check(delta: DeltaFile, base: Checkpoint, reader: Reader, workers: int, tile: int = TILE) -> None:
    """Raise InputError for a base tensor, or a result, that does not have the hash that the delta records.

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
            error.hint = error.hint or f"this delta was made from {delta.manifest.base}"
            raise


@dataclass(slots=True)
class _Index:
    """A tensor's positions in pieces: the first position of each, and the number of entries before it."""

    positions: Positions
    firsts: list[int]
    before: list[int]

    def between(self, start: int, stop: int) -> Iterator[tuple[Array, int]]:
        """Yield positions in [start, stop), and the number of the first of them."""
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
class Layer:
    """An entry of a delta. `held` has the positions that were decoded last."""

    entry: Entry
    held: RecentParts


@view()
def over_base(read: Read, tensor: Tensor, start: int, out: memoryview, *, layer: Layer, name: str, path: Path) -> None:
    """Put an entry of the delta at `path` over the base's tensor, the input; without one the base has none."""
    entry = layer.entry
    with errors.context(f"{path}: {entry.name}"):
        record = entry.record
        target = np.frombuffer(out, bits_type(record.dtype))
        stop = start + target.size
        if entry.index is None and record.count and record.values is None:
            target[:] = entry.values[start:stop]
            return
        base = extend(_base(read, tensor, entry, start, stop), target.size)
        target[:] = cast(base, entry.base_dtype, record.dtype)
        for where, values in _entries(read, tensor, layer, start, stop):
            entry.put(target, base, where, values)


@view()
def added_values(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, layer: Layer, name: str, path: Path
) -> None:
    """Compute the float32 values that an entry adds to the base; zero where it adds nothing."""
    target = np.frombuffer(out, np.float32)
    target[:] = 0
    with errors.context(f"{path}: {layer.entry.name}"):
        for where, values in _entries(read, tensor, layer, start, start + target.size):
            target[where] = as_bits(values, "F32").view(np.float32)


def _base(read: Read, tensor: Tensor, entry: Entry, start: int, stop: int) -> Array:
    (info,) = tensor.inputs
    base = np.empty(max(0, min(stop, entry.base_size) - start), bits_type(info.dtype))
    if base.size:
        read.read_into(info, start, base)
    return base


def _steps(read: Read, tensor: Tensor, layer: Layer, start: int, stop: int) -> Iterator[tuple[Array, Array]]:
    entry = layer.entry

    def tile(number: int) -> tuple[Array, Array]:
        begin, end = number * STEP_TILE, min((number + 1) * STEP_TILE, entry.size)
        base = entry.converted(_base(read, tensor, entry, begin, end), end - begin)
        return entry.step_tile(number, base)

    for number in range(start // STEP_TILE, -(-stop // STEP_TILE)):
        begin = number * STEP_TILE
        positions, values = layer.held.get((entry.name, number), partial(tile, number))
        low, high = np.searchsorted(positions, [start - begin, stop - begin])
        yield positions[low:high] + (begin - start), values[low:high]


def _entries(read: Read, tensor: Tensor, layer: Layer, start: int, stop: int) -> Iterator[tuple[Array, Any]]:
    """Yield positions relative to `start`, with bits of final values or float32 values to add."""
    entry = layer.entry
    if not entry.record.count:
        return
    if entry.has_steps:
        yield from _steps(read, tensor, layer, start, stop)
        return
    if entry.record.parts:
        entry = layer.held.get((entry.name, "parts"), entry.with_parts)
    scales = entry.scale_values()
    if entry.index is None:
        pieces: Any = [(np.arange(start, stop), start)]
    else:
        pieces = layer.held.get((entry.name, None), partial(_index_of, entry)).between(start, stop)
    for positions, first in pieces:
        yield positions - start, entry.values_at(positions, first, scales)
