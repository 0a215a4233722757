"""A delta artifact, or a line of versions, over its base: read like a checkpoint, or written and checked by hash.

A changed tensor is a view of the base's tensor and of the artifact's stored arrays. A version over a version is a view
of the view below. Tiles of a version are cached, because the next version builds on them: the versions of a soup, read
one after the other, cost one patch each.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.formats.delta.entry import NOTHING, TILE, Decoder, Entry, as_bits
from deltamerge.formats.delta.folder import entry_of, stored_of
from deltamerge.formats.delta.manifest import Record
from deltamerge.formats.delta.parts import matrix_shape
from deltamerge.formats.delta.positions import Array
from deltamerge.formats.delta.steps import STEP_TILE
from deltamerge.models.chain.folder import Version
from deltamerge.models.checkpoint import Checkpoint, with_configs
from deltamerge.models.delta_file import DeltaFile
from deltamerge.tensors.dtypes import bits_type
from deltamerge.tensors.reader import Reader, RecentParts, elements
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, part_of, view, viewed

PARTS = 128 << 20  # bytes of decoded parts that a reader keeps
POSITIONS = 32 << 20  # bytes of decoded positions that it keeps
TILES = max(4, os.cpu_count() or 1)  # tiles of steps of an artifact that it keeps, one for each worker
VERSIONS = 4 * TILES  # tiles of versions over others that it keeps


def folded(versions: Sequence[Version], *, every: bool = False) -> DeltaFile:
    """Return the single artifact that equals a line of versions over the base.

    With `every`, each version is checked by hash when it is applied, otherwise only the last.
    """
    first, last = versions[0].delta, versions[-1].delta
    if len(versions) == 1:
        return last
    entries: dict[str, Entry] = {}
    for name, end in last.entries.items():
        parts = tuple((version.name, version.delta.entries[name]) for version in versions)
        begin = parts[0][1].record
        changed = sum(entry.record.count for _, entry in parts)
        same = {"encoding": "dense", "count": end.size if changed else 0, "result": end.record.result}
        same |= {"values": None, "parts": []}
        entries[name] = Entry(name, begin.model_copy(update=same), NOTHING, versions=parts, every=every)
    whole = first.manifest.model_copy(update={"tensors": {n: entry.record for n, entry in entries.items()}})
    return DeltaFile(last.path, whole, entries, last.files)


def covers(longer: DeltaFile, shorter: DeltaFile) -> bool:
    """Tell whether checking one folded artifact also checks another: it passes through the other's last version."""
    if longer.path == shorter.path or longer.path.parent != shorter.path.parent:
        return False
    entry = next(iter(longer.entries.values()), None)
    return entry is not None and entry.every and shorter.path.name in {version for version, _ in entry.versions}


def check_complete(first: Version, base: Checkpoint) -> None:
    """Raise InputError if a base has tensors that the first version of a chain neither lists nor removes."""
    manifest = first.delta.manifest
    known = {record.base_name or name for name, record in manifest.tensors.items()} | {*manifest.removed}
    if unknown := base.tensors.keys() - known:
        raise InputError(
            f"{first.path}: does not mention the base's {min(unknown)}",
            hint="extract it again: the first version of a chain lists every tensor",
        )


def check(delta: DeltaFile, base: Checkpoint, reader: Reader, workers: int, tile: int = TILE) -> None:
    """Raise InputError if a base tensor, or a result, does not have the hash that the delta records.

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
class Layers:
    """Puts versions over bases. Versions of one chain and one base share their tensors."""

    _made: dict[Any, Mapping[str, TensorInfo]] = field(default_factory=dict)

    def over(self, delta: Checkpoint, versions: Sequence[Version], base: Checkpoint) -> Checkpoint:
        """Return the checkpoint of the last of `versions`, in the folder `delta`, over `base`.

        Its tensors are computed when read. InputError: the base lacks tensors that the delta was made from (their
        content is not checked), or has tensors that the first version of a chain does not mention.
        """
        if base.is_delta:
            raise InputError(f"its base {base.reference} is a delta too", hint="apply that first: deltamerge apply")
        first, last = versions[0], versions[-1]
        if len(versions) > 1:
            check_complete(first, base)
        tensors: Mapping[str, TensorInfo] = base.tensors
        for version in versions:
            key = (str(version.path), version.state, base.reference, str(base.path), base.revision)
            if key not in self._made:
                self._made[key] = _over(version.delta, tensors)
            tensors = self._made[key]
        if last.note is not None and first is last:
            check_complete(first, base)
        components = with_configs(first.delta.manifest.as_components(), delta.path)
        files = last.delta.files
        return replace(delta, tensors=dict(tensors), files=files, base=base, components=components)


def _over(opened: DeltaFile, below: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors of an artifact over the tensors `below` it."""
    tensors: dict[str, TensorInfo] = {}
    for source in opened.result({name: (info.dtype, info.shape) for name, info in below.items()}):
        name, entry = source.name, source.entry
        info = None if source.base_name is None else below[source.base_name]
        is_base = info is not None and (info.dtype, info.shape) == (source.dtype, source.shape)
        if info is not None and is_base and (entry is None or not entry.record.count):
            tensors[name] = info if info.name == name else replace(info, name=name)
            continue
        assert entry is not None
        inputs = [*([] if info is None else [info.tensor]), *stored_of(entry)]
        own = {"name": name, "path": opened.path / "delta.json", "record": entry.record}
        tensors[name] = TensorInfo(name, viewed(over_base, inputs, source.shape, source.dtype, **own))
    return tensors


def added(info: TensorInfo) -> TensorInfo | None:
    """Return the float32 values that a delta adds to the base's tensor to make `info`.

    None: it stores none, or it changes another version's result.
    """
    whole, first = info.tensor.whole, 0
    if whole.function != over_base.__name__ or whole.parameter("record").values is None or _below(whole) is not None:
        return None
    if whole is not info.tensor:
        first = info.tensor.parameter("first")
    addends = viewed(added_values, whole.inputs[1:], whole.shape, "F32", **dict(whole.parameters))
    return TensorInfo(info.name, part_of(addends, first, info.shape))


@view(whole_inputs=True)
def over_base(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, name: str, path: Path, record: Record
) -> None:
    """Put an entry of the delta at `path` over the base's tensor.

    The first input is that tensor, if the base has it; the others are the artifact's stored arrays. A tensor over
    others of this kind is computed from the highest cached version below, upwards, without recursion, because a chain
    may have thousands of versions. Steps are computed in whole tiles, because they cannot be read in part.
    """
    target = np.frombuffer(out, bits_type(tensor.dtype))
    stop = start + target.size
    if record.encoding != "steps" and _below(tensor) is None:
        target[:] = _made(read, tensor, start, stop, None)
        return
    for begin in range(start // STEP_TILE * STEP_TILE, stop, STEP_TILE):
        low, high = max(start, begin), min(stop, begin + STEP_TILE)
        target[low - start : high - start] = _tile(read, tensor, begin)[low - begin : high - begin]


@view(whole_inputs=True)
def added_values(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, name: str, path: Path, record: Record
) -> None:
    """Compute the float32 values that an entry adds to the base; zero where it adds nothing."""
    target = np.frombuffer(out, np.float32)
    target[:] = 0
    with errors.context(f"{path}: {name}"):
        for where, values in _decoder(read, tensor, tensor.inputs).changes(start, start + target.size, NOTHING):
            target[where] = as_bits(values, "F32").view(np.float32)


def _below(tensor: Tensor) -> Tensor | None:
    """Return the tensor of the version below. None: the first input is the base's, or there is none."""
    first = tensor.inputs[0] if tensor.inputs else None
    return first if first is not None and first.function == over_base.__name__ else None


def _decoder(read: Read, tensor: Tensor, stored: Sequence[Tensor]) -> Decoder:
    def make() -> Decoder:
        record = tensor.parameter("record")
        kind, most = ("parts", PARTS) if record.parts else ("positions", POSITIONS)
        recent = read.once(f"{kind} of deltas", lambda: RecentParts(most, _weigh))
        return Decoder(entry_of(tensor.name, record, stored, read), recent)

    found: Decoder = read.once(tensor, make)
    return found


def _weigh(decoded: Any) -> int:
    return int(decoded.nbytes)


def decoded_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of decoded parts and positions that a reader of deltas' tensors keeps, at most."""
    records: list[Record] = [tensor.parameter("record") for tensor in tensors]
    parts = sum(part.decoded_bytes(*matrix_shape(record.shape)) for record in records for part in record.parts)
    positions = sum(8 * record.count for record in records if record.encoding not in ("dense", "steps"))
    return min(PARTS, parts) + min(POSITIONS, positions)


def _tile(read: Read, tensor: Tensor, start: int) -> Array:
    """Return the tile of STEP_TILE elements that begins at `start`."""
    stack, made = [tensor], _kept(read, tensor).known((tensor, start))
    while made is None and (below := _below(stack[-1])) is not None:
        stack.append(below)
        made = _kept(read, below).known((below, start))
    if made is not None:
        stack.pop()
    while stack:
        one = stack.pop()
        stop = min(start + STEP_TILE, one.size)
        made = _kept(read, one).get((one, start), partial(_made, read, one, start, stop, made))
    found: Array = made
    return found


def _kept(read: Read, tensor: Tensor) -> RecentParts:
    """Return the cache of tiles of an artifact over a base. All versions over others share one."""
    is_first = _below(tensor) is None
    key = ("tiles of a delta", tensor.path) if is_first else "tiles of versions"
    kept: RecentParts = read.once(key, lambda: RecentParts(TILES if is_first else VERSIONS))
    return kept


def _made(read: Read, tensor: Tensor, start: int, stop: int, below: Array | None) -> Array:
    """Compute elements [start, stop) from the elements of the version below, or of the base."""
    record: Record = tensor.parameter("record")
    base = below
    with errors.context(f"{tensor.path}: {tensor.name}"):
        if base is None:
            size = 0
            if record.base is not None:
                size = max(0, min(stop, tensor.inputs[0].size) - start)
            base = np.empty(size, bits_type(record.base_kind[0]))
            if size:
                read.read_into(tensor.inputs[0], start, base)
        stored = tensor.inputs[record.base is not None :]
        return _decoder(read, tensor, stored).over(base, start, stop, fresh=below is None)
