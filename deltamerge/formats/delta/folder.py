"""The folder of a delta artifact: its files are checked against the manifest before any tensor is read.

Arrays are read from their files when sliced. A truncated file is an error, where a memory map would end the process.
"""

from __future__ import annotations

import bz2
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.strict_json import MAX_BYTES, parse_json, read_json
from deltamerge.formats.delta.entry import NOTHING, Entry
from deltamerge.formats.delta.manifest import (
    FORMAT,
    VERSIONS,
    Manifest,
    Record,
    check_record,
    groups,
    parts_bytes,
    stored_arrays,
    version_of,
)
from deltamerge.formats.delta.parts import PARTS, TABLE
from deltamerge.formats.delta.positions import Array, Sliced, most_bytes
from deltamerge.formats.delta.steps import most_step_bytes
from deltamerge.formats.safetensors import read_header
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Read, Tensor, part_of

# The additions of each version.
NEWS = {2: "steps", 3: "parts", 4: "trellis codes", 5: "stochastically rounded tensors"}


@dataclass(frozen=True, slots=True, eq=False)
class StoredArray:
    """A stored tensor that is sliced like a numpy array; `read` reads it."""

    read: Read
    tensor: Tensor

    @property
    def size(self) -> int:
        return self.tensor.size

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def __getitem__(self, part: slice) -> Array:
        """The elements of a contiguous slice, a copy. InputError: the file is gone, or has become too short."""
        start, stop, step = part.indices(self.size)
        assert step == 1
        signed = self.tensor.name.endswith(INDICES)
        out: Array = np.empty(max(0, stop - start), f"<{'i' if signed else 'u'}{ITEMSIZE[self.tensor.dtype]}")
        if out.size:
            self.read.read_into(self.tensor, start, out)
        return out


MANIFEST = "delta.json"
VALUES, INDICES = ".values", ".indices"
SINGLE = "delta.safetensors"
INDEX = "delta.safetensors.index.json"

_SHARD = re.compile(r"delta-\d{5}-of-\d{5}\.safetensors")


def open_folder(folder: Path) -> tuple[Manifest, dict[str, Entry], tuple[Path, ...]]:
    """Return the manifest, the entries in its order, and the artifact's files.

    InputError: it does not follow the format.
    """
    raw, reader = _raw_manifest(folder), Reader()
    stored: dict[str, Tensor] = {}
    shards = _files(folder)
    for file in shards:
        stored |= {name: info.tensor for name, info in read_header(folder / file).tensors.items()}
    manifest = _manifest(raw, stored, reader)
    sums = _Parts(_array(PARTS, ("U8", None), stored.pop(PARTS)) if PARTS in stored else None)
    entries = {}
    for name, record in manifest.tensors.items():
        with errors.context(f"{MANIFEST}: {name}"):
            check_record(record)
            arrays = [
                _array(name + suffix, expected, stored.pop(name + suffix, None))
                for suffix, expected in stored_arrays(record).items()
            ]
            if (needed := version_of([record])) > manifest.version:
                what = NEWS[needed]
                raise InputError(f"{what} are of version {needed}, this is version {manifest.version}")
            if record.parts:
                arrays = [sums.next(parts_bytes(record))]
            entries[name] = entry = entry_of(name, record, arrays, reader)
            index, scales = entry.index, entry.scales
            size = math.prod(record.shape)
            if record.encoding == "steps":
                most = most_step_bytes(size)
            else:
                most = most_bytes(record.encoding, record.count, size, record.k)
            if index is not None and record.encoding != "indices" and index.size > most:
                raise InputError(f"{record.encoding} of {index.size} bytes, at most {most} can be needed")
            if scales is not None and scales.size > (most := -(-groups(record) * len(record.ranks or "0000") // 8)):
                raise InputError(f"scales of {scales.size} bytes, at most {most} can be needed")
    sums.end()
    if stored:
        raise InputError(f"{MANIFEST} does not describe the stored tensor {min(stored)!r}")
    files = (MANIFEST, *(() if shards == [SINGLE] else (INDEX,)), *shards)
    return manifest, entries, tuple(folder / file for file in files)


def entry_of(name: str, record: Record, stored: Sequence[Tensor], read: Read) -> Entry:
    """Return an entry of stored tensors, in the order of `stored_arrays`; of parts their bytes."""
    arrays: dict[str, Sliced] = dict(
        zip([*stored_arrays(record)] or [VALUES], (StoredArray(read, one) for one in stored), strict=False)
    )
    values, scales = arrays.pop(VALUES, NOTHING), arrays.pop(".scales", None)
    return Entry(name, record, values, next(iter(arrays.values()), None), scales)


def stored_of(entry: Entry) -> list[Tensor]:
    """Return the stored tensors of an artifact's entry, in the order of `stored_arrays`."""
    arrays = (entry.values, entry.scales, entry.index)
    return [one.tensor for one in arrays if isinstance(one, StoredArray)]


def _array(name: str, expected: tuple[str, int | None], tensor: Tensor | None) -> Tensor:
    dtype, length = expected
    if tensor is None:
        raise InputError(f"{name} is not stored")
    if tensor.dtype != dtype or len(tensor.shape) != 1 or length not in (None, tensor.shape[0]):
        wanted = dtype if length is None else f"{dtype} of length {length}"
        raise InputError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {wanted}")
    return tensor


@dataclass(slots=True)
class _Parts:
    """The array of all tensors' parts, given out from its beginning."""

    stored: Tensor | None
    at: int = 0

    def next(self, nbytes: int) -> Tensor:
        """Return the next bytes. InputError: there are fewer."""
        whole = self.stored
        if whole is None or self.at + nbytes > whole.size:
            raise InputError(f"its parts end at byte {self.at + nbytes} of {0 if whole is None else whole.size}")
        self.at += nbytes
        return part_of(whole, self.at - nbytes, (nbytes,))

    def end(self) -> None:
        """InputError: some bytes are of no tensor."""
        if self.stored is not None and self.at != self.stored.size:
            raise InputError(f"the array {PARTS} has {self.stored.size} bytes, the tensors have {self.at}")


def _raw_manifest(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / MANIFEST):
        what = f"has no {MANIFEST}" if folder.is_dir() else "is not there"
        raise InputError(what, hint="name the folder of a delta, as deltamerge extract makes it")
    raw: dict[str, Any] = read_json(folder / MANIFEST)
    with errors.context(MANIFEST):
        if raw.get("format") != FORMAT:
            raise InputError("is not the manifest of a deltamerge delta")
        if raw.get("version") not in VERSIONS or isinstance(raw["version"], bool):
            raise InputError(
                f"has version {raw.get('version')!r}, this deltamerge reads versions {VERSIONS[0]} to {VERSIONS[-1]}",
                hint="upgrade deltamerge",
            )
    return raw


def _manifest(raw: dict[str, Any], stored: dict[str, Tensor], reader: Reader) -> Manifest:
    """Return the manifest; of version 3 its records may be an array of the artifact, which leaves `stored`."""
    with errors.context(MANIFEST):
        if raw["version"] >= 3 and "tensors" not in raw and TABLE in stored:
            raw |= {"tensors": _table(StoredArray(reader, _array(TABLE, ("U8", None), stored.pop(TABLE))))}
        try:
            return Manifest.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


def _table(stored: StoredArray) -> Any:
    """Return the records in a bzip2 stream of JSON. InputError: it is none, or longer than MAX_BYTES."""
    inflate = bz2.BZ2Decompressor()
    try:
        text = inflate.decompress(stored[:].tobytes(), MAX_BYTES)
    except OSError as error:
        raise InputError(f"the array {TABLE} is no bzip2 stream: {error}") from None
    if not inflate.eof or inflate.unused_data:
        raise InputError(f"the array {TABLE} is cut short, followed by something, or above {MAX_BYTES} bytes")
    return parse_json(text)


def _files(folder: Path) -> list[str]:
    single, index = (folder / SINGLE).exists(), (folder / INDEX).exists()
    if single == index:
        raise InputError(f"has {'both' if single else 'neither'} {SINGLE} {'and' if single else 'nor'} {INDEX}")
    if single:
        return [SINGLE]
    table = read_json(folder / INDEX).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    for name in names:
        if not isinstance(name, str) or not _SHARD.fullmatch(name):
            raise InputError(f"{INDEX}: {str(name)[:80]!r} is not the name of a shard")
    return sorted(set(names))
