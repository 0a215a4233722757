"""The format of a delta artifact: its manifest, checked against its files, and tensors made from base and entry.

docs/delta-format.md is its description. The manifest is checked against the headers before any tensor is read,
and decoding checks every position. An array of *bits* is flat and unsigned: the stored bytes of a dtype.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from blake3 import blake3
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.io.encodings import LARGEST_K, Array, Coding, Sliced, decode, index_itemsize, most_bytes
from deltamerge.io.files import Descriptors, flat, input_error, refuse_link
from deltamerge.io.safetensors_file import MAX_DIMENSIONS, TensorInfo, read_header
from deltamerge.io.stored import StoredArray
from deltamerge.io.strict_json import read_json
from deltamerge.io.values import SCALE_BITS, SCALED, UNITS, Values, cast, narrow, scale_values, widen
from deltamerge.tensors import FLOATING, ITEMSIZE, VALUE_BITS

FORMAT = "deltamerge-delta"
VERSION = 1
MANIFEST = "delta.json"
SINGLE = "delta.safetensors"
INDEX = "delta.safetensors.index.json"
TILE = 1 << 20
LARGEST_SIZE = 1 << 61
SHARD_SIZE = 5 * 10**9
STORED_VALUES: dict[Values, str] = {"float32": "F32", "bfloat16": "BF16", "int8": "I8", "sign": "U8"}

_SHARD = re.compile(r"delta-\d{5}-of-\d{5}\.safetensors")

_NOTHING = np.empty(0, np.uint8)

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Natural = Annotated[int, Field(ge=0, lt=LARGEST_SIZE)]
Shape = Annotated[list[Natural], Field(max_length=MAX_DIMENSIONS)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Read = Callable[[int, int], Any]
"""Flat elements [start, stop) of a tensor, as a numpy array of its dtype or of equally wide integers."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Base(_Strict):
    """The checkpoint that an artifact changes: `id` is a path or hub id, `commit` its resolved revision."""

    id: str
    commit: str | None = None

    def __str__(self) -> str:
        return self.id if self.commit is None else f"{self.id}@{self.commit}"


class Record(_Strict):
    """One tensor of the result.

    shape, dtype   of the result; dtype is safetensors' code ("BF16")
    encoding, k    how positions are stored, and rice's k
    count          entries listed; 0: nothing is stored, the tensor is the base's
    values         None: final values, in `dtype`; else the coding of float32 values to add
    group, unit    elements that share a scale, and the scales' unit (int8, sign)
    error          ‖v − stored v‖ / ‖v‖ of a lossy coding
    base, result   blake3 (128 bits) of the tensors' bytes; base is None for a tensor that the base lacks
    base_*         of the base's tensor, where it differs from the result's
    """

    shape: Shape
    dtype: str
    encoding: Coding
    k: Annotated[int, Field(ge=0, le=LARGEST_K)] = 0
    count: Natural
    values: Values | None = None
    group: Annotated[int, Field(ge=1, lt=LARGEST_SIZE)] = 1
    unit: int = 0
    error: float | None = None
    base: Digest | None = None
    base_name: Name | None = None
    base_shape: Shape | None = None
    base_dtype: str | None = None
    result: Digest


class Manifest(_Strict):
    """delta.json. Tensors of the base that neither `tensors` nor `removed` names are in the result unchanged."""

    format: Literal["deltamerge-delta"] = "deltamerge-delta"
    version: Literal[1] = 1
    semantics: Literal["replace", "add"]
    base: Base
    shard_size: Annotated[int, Field(ge=1, lt=LARGEST_SIZE)] = SHARD_SIZE
    removed: list[Name] = []
    tensors: dict[Name, Record]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an artifact: its record, and what is stored of it (bits; None where nothing is)."""

    name: str
    record: Record
    values: Sliced
    index: Sliced | None = None
    scales: Sliced | None = None

    @property
    def size(self) -> int:
        return math.prod(self.record.shape)

    @property
    def base_dtype(self) -> str:
        return self.record.base_dtype or self.record.dtype

    @property
    def base_size(self) -> int:
        shape = self.record.base_shape
        return self.size if shape is None else math.prod(shape)

    def positions(self) -> Iterator[Array]:
        """Flat int64 positions in ascending pieces. InputError: they are not what the record says."""
        if self.index is not None:
            return decode(self.record.encoding, self.index, self.record.count, self.size, self.record.k)
        stops = range(TILE, self.record.count + TILE, TILE)
        return (np.arange(stop - TILE, min(stop, self.record.count)) for stop in stops)

    def scale_values(self) -> Array:
        """Float32 scales, one per group; none where values have no scales."""
        record = self.record
        if self.scales is None or record.values is None:
            return np.empty(0, np.float32)
        return scale_values(self.scales[:], groups(record), record.unit)

    def codes(self, start: int, stop: int) -> Array:
        """Values [start, stop) before scales: bits of final values, float32, int8, or int8 1 and -1 for signs."""
        coding = self.record.values
        if coding == "sign":
            bits = np.unpackbits(self.values[start >> 3 : -(-stop // 8)], bitorder="little").view(np.int8)
            return 1 - (bits[start & 7 :][: stop - start] << 1)
        values = self.values[start:stop]
        if coding == "bfloat16":
            return widen(values, "BF16")
        return values if coding is None else values.view(np.int8 if coding == "int8" else np.float32)

    def pieces(self) -> Iterator[tuple[Array, Array]]:
        """Positions, with bits of final values, or float32 values to add."""
        scales, done = self.scale_values(), 0
        for positions in self.positions():
            values = self.codes(done, done + positions.size)
            if scales.size:
                values = scales[positions // self.record.group] * values
            yield positions, values
            done += positions.size

    def tiles(self, read: Read | None, *, check: bool = True, tile: int = TILE) -> Iterator[Array]:
        """The result as bits, tile by tile, from the base's tensor (None where the base has none).

        InputError: with `check`, the base's or the result's bytes have not the hash of the record; the latter is
        known after the last tile only.
        """
        record, dtype = self.record, self.record.dtype
        if (read is None) != (record.base is None):
            raise InputError(f"{self.name}: the base {'lacks it' if read is None else 'must not have it'}")
        dense = self.index is None and record.count > 0 and record.values is None
        pieces = iter(()) if dense else self.pieces()
        held: tuple[Array, Array] | None = next(pieces, None)
        base_hash, result_hash = blake3(), blake3()
        for start in range(0, self.size, tile):
            stop = min(start + tile, self.size)
            base = np.empty(0, bits_type(self.base_dtype))
            if read is not None:
                base = as_bits(read(min(start, self.base_size), min(stop, self.base_size)), self.base_dtype)
                if check:
                    base_hash.update(flat(base))
            if dense:
                out = self.values[start:stop]
            else:
                base = extend(base, stop - start)
                out = base.copy() if dtype == self.base_dtype else cast(base, self.base_dtype, dtype)
                while held is not None:
                    positions, values = held
                    cut = int(np.searchsorted(positions, stop))
                    self._put(out, base, positions[:cut] - start, values[:cut])
                    if cut < positions.size:
                        held = positions[cut:], values[cut:]
                        break
                    held = next(pieces, None)
            if check:
                result_hash.update(flat(out))
            yield out
        if not check:
            return
        if record.base is not None and digest(base_hash) != record.base:
            raise InputError(f"{self.name}: the base's tensor is not the one this delta was made from")
        if digest(result_hash) != record.result:
            raise InputError(f"{self.name}: the result is not the tensor this delta was made for")

    def _put(self, out: Array, base: Array, positions: Array, values: Array) -> None:
        """Into `out`, which is `base` in the result's dtype (and may be `base` itself)."""
        if self.record.values is None:
            out[positions] = values
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if self.record.dtype == self.base_dtype == "F32":
                np.add.at(out.view(np.float32), positions, values)  # one pass, where indexing takes two
            else:
                out[positions] = narrow(widen(base[positions], self.base_dtype) + values, self.record.dtype)

    def apply(self, base: Array | None) -> Array:
        """The whole result as flat bits, from the base tensor's flat array; not checked by hash."""
        read = None if base is None else lambda start, stop: base[start:stop]
        parts = list(self.tiles(read, check=False, tile=max(1, self.size)))
        return parts[0] if parts else np.empty(0, bits_type(self.record.dtype))

    def apply_in_place(self, bits: Array) -> None:
        """Turn the base tensor's flat bits into the result's, of the same dtype and size."""
        record = self.record
        if not record.count:
            return
        if self.index is None and record.values is None:
            bits[:] = self.values[:]
        elif self.index is not None and self._fits_kernel():
            from deltamerge.io.delta_kernels import apply_rice

            out = bits if record.values is None else bits.view(np.float32)
            values = self.values[:]
            values = values.view({"float32": "f4", "int8": "i1"}.get(record.values or "", values.dtype))
            scales, group = self.scale_values(), record.group
            apply_rice(self.index[:], record.k, record.count, values, record.values, scales, group, out)
        else:
            for positions, values in self.pieces():
                self._put(bits, bits, positions, values)

    def _fits_kernel(self) -> bool:
        record = self.record
        is_simple = record.values is None or record.dtype == "F32"
        return "numba" in sys.modules and record.encoding == "rice" and record.k < 16 and is_simple


def digest(hasher: Any) -> str:
    """The first 128 bits of a BLAKE3, in hex: enough against a chosen second text, and half the manifest."""
    return str(hasher.hexdigest(length=16))


def bits_type(dtype: str) -> str:
    """The unsigned numpy dtype of a safetensors dtype's bits."""
    return f"<u{ITEMSIZE[dtype]}"


def as_bits(array: Any, dtype: str) -> Array:
    """A numpy array (or buffer) of a safetensors dtype's values as flat bits."""
    return np.asarray(array).reshape(-1).view(bits_type(dtype))


def extend(bits: Array, size: int) -> Array:
    """`bits` and then zeros, `size` in all."""
    if bits.size == size:
        return bits
    out = np.zeros(size, bits.dtype)
    out[: bits.size] = bits
    return out


def groups(record: Record) -> int:
    """Scales of a tensor."""
    return -(-math.prod(record.shape) // record.group)


def stored_arrays(record: Record) -> dict[str, tuple[str, int | None]]:
    """What is stored of a tensor: suffix of the name -> (dtype, length; None where only decoding can tell)."""
    count, size = record.count, math.prod(record.shape)
    if not count:
        return {}
    if record.values is None:
        arrays: dict[str, tuple[str, int | None]] = {".values": (record.dtype, count)}
    else:
        bits = VALUE_BITS[record.values]
        arrays = {".values": (STORED_VALUES[record.values], count if bits > 1 else -(-count // 8))}
        if record.values in SCALED:
            arrays[".scales"] = ("U8", -(-groups(record) * SCALE_BITS // 8))
    if record.encoding == "indices":
        arrays[".indices"] = (f"I{8 * index_itemsize(size)}", count)
    elif record.encoding != "dense":
        arrays[f".{record.encoding}"] = ("U8", -(-size // 8) if record.encoding == "bitmask" else None)
    return arrays


def open_folder(folder: Path) -> tuple[Manifest, dict[str, Entry], tuple[Path, ...]]:
    """The manifest, the entries in its order, and the artifact's files. InputError: it is not as the format says."""
    refuse_link(folder / MANIFEST)
    manifest = _manifest(folder)
    stored: dict[str, TensorInfo] = {}
    shards = _files(folder)
    for file in shards:
        refuse_link(folder / file)
        stored |= read_header(folder / file).tensors
    opened = Descriptors(os.O_RDONLY, input_error)
    entries = {}
    for name, record in manifest.tensors.items():
        try:
            _check(record)
            arrays: dict[str, Sliced] = {
                suffix: _array(name + suffix, expected, stored.pop(name + suffix, None), opened)
                for suffix, expected in stored_arrays(record).items()
            }
            values, scales = arrays.pop(".values", _NOTHING), arrays.pop(".scales", None)
            index = next(iter(arrays.values()), None)
            most = most_bytes(record.encoding, record.count, math.prod(record.shape), record.k)
            if index is not None and record.encoding != "indices" and index.size > most:
                raise InputError(f"{record.encoding} of {index.size} bytes, at most {most} can be needed")
        except InputError as error:
            error.where.insert(0, f"{MANIFEST}: {name}")
            raise
        entries[name] = Entry(name, record, values, index, scales)
    if stored:
        raise InputError(f"{MANIFEST} does not describe the stored tensor {min(stored)!r}")
    files = (MANIFEST, *(() if shards == [SINGLE] else (INDEX,)), *shards)
    return manifest, entries, tuple(folder / file for file in files)


def _check(record: Record) -> None:
    """InputError: the fields of a record contradict each other."""
    size = math.prod(record.shape)
    base_dtype = record.base_dtype or record.dtype
    if record.dtype not in ITEMSIZE or base_dtype not in ITEMSIZE:
        raise InputError(f"unknown dtype {record.dtype if base_dtype in ITEMSIZE else base_dtype!r}")
    if size >= LARGEST_SIZE or record.count > size:
        raise InputError(f"count is {record.count}, the tensor has {size} elements")
    if record.encoding == "dense" and record.count not in (0, size):
        raise InputError(f"dense, but count is {record.count} of {size} elements")
    if record.base is None:
        extra = record.base_name or record.base_shape or record.base_dtype or record.values
        if extra or record.count != size or record.encoding != "dense":
            raise InputError("has no base, so it must be dense, with final values")
    elif record.base_shape is not None:
        _check_growth(record.base_shape, record.shape)
    adds_or_casts = record.values is not None or base_dtype != record.dtype
    if adds_or_casts and not {base_dtype, record.dtype} <= FLOATING:
        raise InputError(f"cannot make {record.dtype} of {base_dtype}: not both are floating")
    if record.values in SCALED:
        lowest, highest = UNITS
        if not lowest <= record.unit <= highest:
            raise InputError(f"unit must be in [{lowest}, {highest}], got {record.unit}")


def _check_growth(old: list[int], new: list[int]) -> None:
    if len(old) != len(new) or not new or old[1:] != new[1:] or old[0] > new[0]:
        raise InputError(f"base_shape {old} is not {new} with fewer rows")


def _array(name: str, expected: tuple[str, int | None], info: TensorInfo | None, opened: Descriptors) -> StoredArray:
    dtype, length = expected
    if info is None:
        raise InputError(f"{name} is not stored")
    if info.dtype != dtype or len(info.shape) != 1 or length not in (None, info.shape[0]):
        wanted = dtype if length is None else f"{dtype} of length {length}"
        raise InputError(f"{name} is {info.dtype} {list(info.shape)}, not {wanted}")
    kind = f"<{'i' if name.endswith('.indices') else 'u'}{ITEMSIZE[dtype]}"
    return StoredArray(opened, info.path, info.begin, info.shape[0], kind)


def _manifest(folder: Path) -> Manifest:
    raw = read_json(folder / MANIFEST)
    with errors.context(MANIFEST):
        if raw.get("format") != FORMAT:
            raise InputError("is not the manifest of a deltamerge delta")
        if raw.get("version") != VERSION:
            raise InputError(
                f"has version {raw.get('version')!r}, this deltamerge reads version {VERSION}",
                hint="upgrade deltamerge",
            )
        try:
            return Manifest.model_validate(raw)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InputError(f"{place}: {first['msg'][:1].lower()}{first['msg'][1:]}") from None


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
