"""Checkpoints of torch.distributed.checkpoint (DCP), read without torch and without unpickling.

    step-1000/.metadata        a pickle of torch's classes: each tensor's dtype, size and chunks, and their places
    step-1000/__0_0.distcp     the file of one writer: a torch.save of each chunk, one after another

The pickle is read by a machine that knows the classes of `CLASSES` as records and calls nothing. Chunks are read in
place, and a tensor that ranks share is put together as it is read. Of
{"model": …, "optimizer": …} the model's tensors are taken, under their own names; optimizers are passed over.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.errors.shown import some
from deltamerge.files.descriptors import refuse_link
from deltamerge.formats.safetensors import LARGEST, MAX_DIMENSIONS, MAX_TENSORS
from deltamerge.formats.torch_bin import (
    BOUNDS,
    BY_TORCH,
    MAX_OPERATIONS,
    OPERATIONS,
    Bound,
    Machine,
    PickledName,
    read_torch_tensor,
    run,
)
from deltamerge.formats.weight_files import DISTRIBUTED
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

METADATA = ".metadata"
HINT = "write it again with torch.distributed.checkpoint.save"
OPTIMIZERS = re.compile(r"^(optim|opt(_|$)|lr_scheduler|sched)", re.IGNORECASE)
MODELS = ("model", "module", "state_dict", "model_state_dict")
MAX_FIELDS = 64  # attributes of an object; each of torch's has five at most
_HOME = "torch.distributed.checkpoint.metadata"
CLASSES = frozenset({
    *((_HOME, name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata", "TensorProperties",
        "MetadataIndex", "StorageMeta",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
})  # fmt: skip
PATHS = frozenset({"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"})
CALLS = frozenset({
    ("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict"),
    (_HOME, "_MEM_FORMAT_ENCODING"), ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in PATHS),
})  # fmt: skip

Opener = Callable[[str], tuple[Path, BinaryIO]]


class PickledRecord:
    """An object of one of torch's classes: its attributes, or its pickled tuple."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: dict[str, Any] = {}
        self.values: tuple[Any, ...] = ()


class _Metadata(Machine):
    """The machine of a .metadata file."""

    functions = CALLS
    bounds: Mapping[str, Bound] = {  # of small objects: a tensor takes 200 bytes, 37 entries of the memo and 47 objects
        "operations": Bound(1, MAX_OPERATIONS),
        "entries in its memo": Bound(5.2, 6_000_000),
        "tables, lists and tuples": Bound(3, 10_000_000),
        "tables and lists": Bound(8, 3_000_000),
        "places on its stack": BOUNDS["places on its stack"],
    }
    what = "checkpoint's metadata"
    hint = HINT

    def protocol(self) -> None:
        if self.number(1) > 5:
            raise InputError("its pickle has a later protocol than 5")

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.top(object)

    def global_name(self) -> None:
        name, module = self.pop(), self.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise IndexError
        self.named(module, name)

    def is_class(self, module: str, name: str) -> bool:
        return (module, name) in CLASSES

    def new_object(self) -> None:
        arguments, named = self.pop(), self.pop()
        if not isinstance(named, PickledName) or (named.module, named.name) not in CLASSES or arguments != ():
            raise InputError("its pickle makes an object that no checkpoint's metadata needs", hint=HINT)
        self.push(PickledRecord(named.name))

    def reduce(self) -> None:
        function, arguments = self.call()
        if function.name == "Size":
            if len(arguments) != 1 or not _are_sizes(arguments[0]) or len(arguments[0]) > MAX_DIMENSIONS:
                raise InputError("its pickle has a size that is none")
            self.push(tuple(arguments[0]))
        else:
            self.push({} if function.name == "OrderedDict" else None)

    def build(self) -> None:
        state = self.pop()
        if isinstance(state, tuple) and len(state) == 2 and state[0] is None and isinstance(state[1], dict):
            state = state[1]  # of a class with slots
        record = self.stack[-1]
        if isinstance(state, dict) and len(state) > MAX_FIELDS and isinstance(record, PickledRecord):
            raise InputError(f"its pickle has an object with {len(state):,} attributes", hint=HINT)
        if isinstance(record, PickledRecord) and isinstance(state, dict):
            record.state.update(state)
        elif isinstance(record, PickledRecord) and isinstance(state, tuple):
            record.values = state
        elif not isinstance(record, dict):
            raise IndexError

    def set_items(self, found: list[Any]) -> None:
        table = self.top(dict)
        if len(found) % 2 or not all(isinstance(key, str | int | PickledRecord) for key in found[::2]):
            raise InputError("its pickle has a table with keys that no checkpoint's metadata needs", hint=HINT)
        table.update(zip(found[::2], found[1::2], strict=True))

    operations = {code: does for code, does in OPERATIONS.items() if code != ord("Q")} | {
        0x80: protocol, 0x95: lambda r: r.number(8), 0x94: memoize, 0x93: global_name, 0x81: new_object,
        0x8C: lambda r: r.text(1), 0x8D: lambda r: r.text(8), ord("R"): reduce, ord("b"): build,
        ord("s"): Machine.set_item, ord("u"): lambda r: r.set_items(r.since_mark()),
    }  # fmt: skip


def read_distributed(folder: Path, names: Collection[str]) -> tuple[dict[str, TensorInfo], tuple[Path, ...]]:
    """Return the model's tensors in a folder of these file names, and the files that hold them; the metadata's is one.

    InputError: no metadata, as while it is still written; a file that is missing, short or foreign; no model in it.
    """
    if METADATA not in names:
        raise InputError(
            f"has {DISTRIBUTED} files and no {METADATA}, which is written last", hint="the save did not end"
        )
    path = folder / METADATA
    refuse_link(path)
    with errors.context(METADATA):
        try:
            with path.open("rb") as file:
                root = run(_Metadata(file, {}))
                if file.read(1):
                    raise InputError("has bytes behind its pickle")
        except OSError as error:
            raise InputError(f"cannot be read: {error.strerror}") from error
        if not isinstance(root, PickledRecord) or root.name != "Metadata":
            raise InputError("is no metadata of a distributed checkpoint")
        described, stored = (_table(root, key) for key in ("state_dict_metadata", "storage_data"))
        chosen = _model(described, root.state.get("planner_data"))
        places = _places(stored)
    ends: dict[str, int] = {}
    for name, begin, nbytes in places.values():
        ends[name] = max(begin + nbytes, ends.get(name, 0))
    with ExitStack() as stack:
        opened: dict[str, tuple[Path, BinaryIO]] = {}
        tensors = {}
        for name, key in chosen.items():
            with errors.context(name[:80]):
                tensors[name] = _tensor(name, key, described[key], places, _opener(folder, names, ends, opened, stack))
    return tensors, (path, *sorted(place for place, _ in opened.values()))


def _table(root: PickledRecord, key: str) -> dict[Any, Any]:
    found = root.state.get(key)
    if not isinstance(found, dict):
        raise InputError(f"has no {key}")
    if len(found) > MAX_TENSORS:
        raise InputError(f"has more than {MAX_TENSORS:,} entries")
    return found


def _model(described: Mapping[Any, Any], planned: Any) -> dict[str, str]:
    """Return the names of the model's tensors, and the keys that they are stored by.

    `planned` has the path of each key in the nested tables that were saved: the last is a tensor's own name.
    """
    groups: dict[tuple[str, ...], dict[str, str]] = {}
    for key, entry in described.items():
        if not isinstance(key, str) or not isinstance(entry, PickledRecord):
            raise InputError("describes an object that is no tensor")
        if entry.name != "TensorStorageMetadata":
            continue
        path = planned.get(key) if isinstance(planned, dict) else None
        if not (isinstance(path, tuple) and path and all(isinstance(part, str | int) for part in path)):
            path = (key,)
        outer, own = tuple(map(str, path[:-1])), str(path[-1])
        if any(OPTIMIZERS.search(part) for part in outer) or OPTIMIZERS.search(own.split(".")[0]):
            continue
        if not (0 < len(own) <= 1000 and own.isprintable()):
            raise InputError(f"{own[:80]!r}: a name must have 1 to 1000 printable characters")
        groups.setdefault(outer, {})[own] = key
    models = [outer for outer in groups if outer and outer[-1] in MODELS]
    chosen = models or list(groups)
    if len(chosen) != 1:
        listed = some(".".join(outer) or "tensors without a name before them" for outer in chosen)
        raise InputError(f"has several state dicts, and which is the model's is not known: {listed}" if chosen else
                         "has no tensors of a model", hint='save {"model": model.state_dict()}')  # fmt: skip
    return groups[chosen[0]]


def _places(stored: Mapping[Any, Any]) -> dict[tuple[str, tuple[int, ...]], tuple[str, int, int]]:
    """Return the file, offset and bytes of each chunk, by its tensor's key and its offsets."""
    places: dict[tuple[str, tuple[int, ...]], tuple[str, int, int]] = {}
    for index, info in stored.items():
        if not (isinstance(index, PickledRecord) and index.name == "MetadataIndex"):
            raise InputError("has no places of chunks")
        if not (isinstance(info, PickledRecord) and info.name == "_StorageInfo"):
            raise InputError("stores its chunks in a way that is not known", hint=HINT)
        key, offsets = index.state.get("fqn"), index.state.get("offset") or ()
        place: list[Any] = [info.state.get(field) for field in ("relative_path", "offset", "length")]
        name, begin, nbytes = place
        numbers = all(type(n) is int and 0 <= n < LARGEST for n in (begin, nbytes))
        if not (isinstance(key, str) and _are_sizes(offsets) and isinstance(name, str) and numbers):
            raise InputError("has a place of a chunk that is none")
        if info.state.get("transform_descriptors"):
            raise InputError(f"{key[:80]} is stored transformed (compressed, encrypted): not read", hint=HINT)
        places[key, tuple(offsets)] = name, begin, nbytes
    return places


def _opener(
    folder: Path,
    names: Collection[str],
    ends: Mapping[str, int],
    opened: dict[str, tuple[Path, BinaryIO]],
    stack: ExitStack,
) -> Opener:
    """Return a function that opens a file of the checkpoint, once: its path, the file; `ends` is where its last chunk
    ends."""

    def get(name: str) -> tuple[Path, BinaryIO]:
        if name not in opened:
            if name not in names or not name.endswith(DISTRIBUTED):
                what = f"lacks {name[:80]!r}, which its metadata names"
                raise InputError(what, hint="copy all files of the checkpoint, of every node")
            path = folder / name
            refuse_link(path)
            try:
                opened[name] = path, stack.enter_context(path.open("rb"))
                size = path.stat().st_size
            except OSError as error:
                raise InputError(f"{name}: cannot be read: {error.strerror}") from error
            if ends[name] > size:
                raise InputError(f"{name}: the file is truncated: a chunk ends at byte {ends[name]} of {size}")
        return opened[name]

    return get


def _tensor(name: str, key: str, entry: PickledRecord, places: Mapping[Any, Any], opened: Opener) -> TensorInfo:
    properties, shape, chunks = (entry.state.get(field) for field in ("properties", "size", "chunks"))
    values = properties.values or tuple(properties.state.values()) if isinstance(properties, PickledRecord) else ()
    dtype = next((value.name for value in values if isinstance(value, PickledName)), None)
    code = BY_TORCH.get(dtype or "")
    if code is None or ITEMSIZE.get(code) is None:
        raise InputError(f"dtype {str(dtype)[:40]} is not one of safetensors")
    if not _are_sizes(shape) or len(shape) > MAX_DIMENSIONS or math.prod(shape) >= LARGEST:
        raise InputError("has a size that is none")
    if not isinstance(chunks, list) or not chunks:
        raise InputError("has no chunks")
    placed = [_chunk(key, chunk, shape, code, places, opened) for chunk in chunks]
    if not covers(shape, [(offsets, info.shape) for offsets, info in placed]):
        raise InputError("its chunks overlap or leave holes", hint=HINT)
    first = placed[0][1]
    if len(placed) == 1:
        return replace(first, name=name)
    filled = [(offset, chunk) for offset, chunk in placed if chunk.nbytes]
    offsets = tuple(offset for offset, _ in filled)
    together = viewed(from_chunks, [chunk for _, chunk in filled], tuple(shape), code, offsets=offsets, path=first.path)
    return TensorInfo(name, together)


def _chunk(
    key: str, chunk: Any, shape: Sequence[int], code: str, places: Mapping[Any, Any], opened: Opener
) -> tuple[tuple[int, ...], TensorInfo]:
    """Return a chunk's offsets, and its tensor in its file."""
    offsets, sizes = (
        chunk.state.get(field) if isinstance(chunk, PickledRecord) else None for field in ("offsets", "sizes")
    )
    if not (_are_sizes(offsets) and _are_sizes(sizes) and len(offsets) == len(sizes) == len(shape)):
        raise InputError("has a chunk without offsets and sizes")
    if (place := places.get((key, tuple(offsets)))) is None:
        raise InputError(f"its chunk at {list(offsets)} lies nowhere", hint=HINT)
    file_name, begin, nbytes = place
    path, file = opened(file_name)
    with errors.context(file_name):
        info = read_torch_tensor(file, path, begin, nbytes)
    if info.dtype != code or info.shape != tuple(sizes):
        raise InputError(f"its chunk is {info.dtype} {list(info.shape)}, its metadata says {code} {list(sizes)}")
    return tuple(offsets), info


def _are_sizes(value: Any) -> TypeGuard[Sequence[int]]:
    return isinstance(value, tuple | list) and all(type(n) is int and 0 <= n < LARGEST for n in value)


# Chunks, put together as they are read.


Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a chunk."""
AT_ONCE = 1 << 18  # elements


@view()
def from_chunks(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, offsets: tuple[tuple[int, ...], ...], path: Path
) -> None:
    """Put the inputs together, each from its offsets on."""
    size = ITEMSIZE[tensor.dtype]
    stop = start + len(out) // size
    for offset, chunk in zip(offsets, tensor.inputs, strict=True):
        for first in range(start, stop, AT_ONCE):
            last = min(stop, first + AT_ONCE)
            begins, ends, sources = _runs(tensor.shape, offset, chunk.shape, first, last)
            if len(begins) == 0:
                continue
            if len(begins) == 1:
                begin, end = int(begins[0]), int(ends[0])
                read.read_into(chunk, int(sources[0]), out[(begin - start) * size : (end - start) * size])
                continue
            lengths = np.cumsum(ends - begins) * size
            held = memoryview(bytearray(int(lengths[-1])))
            read.read_runs(chunk, sources * size, lengths, held)
            done = 0
            for begin, end in zip(((begins - start) * size).tolist(), ((ends - start) * size).tolist(), strict=True):
                out[begin:end] = held[done : done + end - begin]
                done += end - begin


def _runs(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], first: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the elements [first, last) of a tensor that a chunk has, as runs.

    Of each run: where it begins and ends in the tensor, and where it begins in the chunk.
    """
    outer = len(sizes)
    while outer > 0 and sizes[outer - 1] == shape[outer - 1]:
        outer -= 1
    inner = max(outer - 1, 0)  # dimensions before it are walked, the rest of a chunk is contiguous in both
    length = math.prod(sizes[inner:])
    starts = np.zeros(1, np.int64)
    numbers = np.zeros(1, np.int64)
    for at in range(inner):
        stride, rows = math.prod(shape[at + 1 :]), np.arange(sizes[at], dtype=np.int64)
        if at == 0:  # only rows that the range touches
            low, high = first // stride - offsets[0], -(-last // stride) - offsets[0]
            rows = rows[max(0, low) : max(0, high)]
        starts = (starts[:, None] + (rows + offsets[at]) * stride).reshape(-1)
        numbers = (numbers[:, None] * sizes[at] + rows).reshape(-1)
    if shape:
        starts = starts + offsets[inner] * math.prod(shape[inner + 1 :])
    begins, ends = np.maximum(starts, first), np.minimum(starts + length, last)
    some = begins < ends
    return begins[some], ends[some], (numbers * length + begins - starts)[some]


def covers(shape: Sequence[int], chunks: Sequence[Place]) -> bool:
    """Tell whether chunks make up a tensor of that shape, without holes and overlaps."""
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(shape):
        return False
    inside = all(o + s <= n for offsets, sizes in chunks for o, s, n in zip(offsets, sizes, shape, strict=True))
    return inside and not any(_overlapping([chunk for chunk in chunks if math.prod(chunk[1])]))


def _overlapping(chunks: Sequence[Place]) -> Iterator[bool]:
    """Tell of each chunk whether it overlaps: its neighbour if chunks are rows, else any that begins before it ends."""
    ordered = sorted(chunks)
    if all(offsets[1:] == (0,) * len(offsets[1:]) for offsets, _ in ordered):
        yield from (a[0] + sizes[0] > b[0] if a else True for (a, sizes), (b, _) in pairwise(ordered))
        return
    begins, ends = (np.array(x, np.int64) for x in ([o for o, _ in ordered],
                    [[a + b for a, b in zip(o, s, strict=True)] for o, s in ordered]))  # fmt: skip
    for i in range(len(ordered)):
        yield bool(((begins[i + 1 :] < ends[i]) & (ends[i + 1 :] > begins[i])).all(1).any())
