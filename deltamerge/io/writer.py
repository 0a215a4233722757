"""Weight files whose every name, offset and shard is known before the first byte: header first, tensors in place."""

from __future__ import annotations

import json
import math
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.io.checkpoint import INDEX, SINGLE, Reader, TensorInfo
from deltamerge.io.files import Descriptors, flat, output_error, write_at
from deltamerge.tensors import FLOATING, ITEMSIZE

# The order of tensors in a file that safetensors.torch.save_file makes: by dtype in this order, then by name.
DTYPE_ORDER = (
    "U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip


class Meta(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: `offset` counts from the start of the file."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class FileLayout:
    """A weight file: `header` is everything before the first tensor, `size` the whole in bytes."""

    name: str
    header: bytes
    size: int


@dataclass(frozen=True, slots=True)
class Layout:
    """All weight files of a checkpoint, the place of each tensor, and the text of the index if there are shards."""

    files: tuple[FileLayout, ...]
    tensors: dict[str, Place]
    index: str | None
    total_size: int


def plan_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], shard_size: int | None, single: str = SINGLE
) -> Layout:
    """Where each (name, dtype, shape) goes, in files that have the bytes that transformers would write.

    Shards as in huggingface_hub.split_torch_state_dict_into_shards: filled in the given order up to
    `shard_size` bytes; a larger tensor has a shard of its own. Files as in
    safetensors.torch.save_file(metadata={"format": "pt"}). `total_parameters` counts the floating tensors. With a
    `shard_size` of None there is one file; `single` is its name where there is only one.
    """
    metas = [Meta(name, dtype, shape, math.prod(shape) * ITEMSIZE[dtype]) for name, dtype, shape in tensors]
    shards = [metas] if shard_size is None else _shards(metas, shard_size)
    files = []
    places = dict.fromkeys((meta.name for meta in metas), Place("", 0, 0))
    if len(places) != len(metas):
        raise ValueError("two tensors have one name")
    for number, shard in enumerate(shards, start=1):
        file = single if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        ordered = sorted(shard, key=lambda meta: (DTYPE_ORDER.index(meta.dtype), meta.name))
        ends = list(accumulate((meta.nbytes for meta in ordered), initial=0))
        header = _header(ordered, ends)
        files.append(FileLayout(file, header, len(header) + ends[-1]))
        for meta, begin in zip(ordered, ends, strict=False):
            places[meta.name] = Place(file, len(header) + begin, meta.nbytes)
    total = sum(meta.nbytes for meta in metas)
    index = None
    if len(files) > 1:
        parameters = sum(math.prod(meta.shape) for meta in metas if meta.dtype in FLOATING)
        index = _index(total, parameters, {name: place.file for name, place in places.items()})
    return Layout(tuple(files), places, index, total)


def _shards(metas: Sequence[Meta], shard_size: int) -> list[Sequence[Meta]]:
    shards: list[Sequence[Meta]] = []
    current: list[Meta] = []
    filled = 0
    for meta in metas:
        if meta.nbytes > shard_size:
            shards.append([meta])
            continue
        if filled + meta.nbytes > shard_size:
            shards.append(current)
            current, filled = [], 0
        current.append(meta)
        filled += meta.nbytes
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


class Writer:
    """Writes the tensors of a layout into `folder`, each byte once, from any number of threads.

    The files are made at once, with their headers and at their full size. OutputError: a file that is there already,
    too little free space, no permission, a read-only or full disk.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self._folder = folder
        self._layout = layout
        self._files = Descriptors(os.O_WRONLY, output_error)
        self._written: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._check_space(sum(file.size for file in layout.files))
        for file in layout.files:
            self._create(file)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._files.close()

    def write(self, name: str, offset: int, data: Any) -> None:
        """Write a contiguous buffer to the bytes of tensor `name` from byte `offset`."""
        view = flat(data)
        place = self._place(name, offset, len(view))
        with errors.context(place.file):
            write_at(self._files.get(self._folder / place.file).fd, place.offset + offset, view)
        self._count(name, len(view))

    def copy(self, name: str, offset: int, source: TensorInfo, start: int, nbytes: int, reader: Reader) -> None:
        """Copy bytes [start, start + nbytes) of `source` to the bytes of tensor `name` from byte `offset`."""
        place = self._place(name, offset, nbytes)
        file = self._files.get(self._folder / place.file)
        reader.copy_range(source, start, nbytes, file.fd, place.offset + offset)
        self._count(name, nbytes)

    def finish(self) -> None:
        """Write the index, once every byte of every tensor is written. RuntimeError: one is not (a bug)."""
        for name, place in self._layout.tensors.items():
            if self._written[name] != place.nbytes:
                raise RuntimeError(f"{self._written[name]} of {place.nbytes} bytes of {name} were written")
        if self._layout.index is not None:
            with errors.context(INDEX):
                try:
                    (self._folder / INDEX).write_text(self._layout.index, encoding="utf-8")
                except OSError as error:
                    raise output_error(error) from error
        self.close()

    def _place(self, name: str, offset: int, nbytes: int) -> Place:
        place = self._layout.tensors[name]
        if offset < 0 or offset + nbytes > place.nbytes:
            raise ValueError(f"bytes [{offset}, {offset + nbytes}) of {name}, which has {place.nbytes}")
        return place

    def _count(self, name: str, nbytes: int) -> None:
        with self._lock:
            self._written[name] += nbytes

    def _check_space(self, needed: int) -> None:
        with errors.context(str(self._folder)):
            try:
                disk = os.statvfs(self._folder)
            except OSError as error:
                raise output_error(error) from error
            free = disk.f_bavail * disk.f_frsize
            if needed > free:
                raise OutputError(
                    f"the output needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free",
                    hint="free space, or choose another folder with --out",
                )

    def _create(self, file: FileLayout) -> None:
        with errors.context(file.name):
            try:
                fd = os.open(self._folder / file.name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            except OSError as error:
                raise output_error(error) from error
            try:
                os.ftruncate(fd, file.size)
                write_at(fd, 0, memoryview(file.header))
            except OSError as error:
                raise output_error(error) from error
            finally:
                os.close(fd)
