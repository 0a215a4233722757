"""Writes one tensor of a delta artifact: its pieces are compared with the base's, coded, and kept until the end.

Memory holds at most the open tensors' positions (size / 8 bytes each), pieces that came too early, and the values of
tensors that become int8 or sign codes.
"""

from __future__ import annotations

import math
import os
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from deltamerge import errors
from deltamerge.errors import OutputError
from deltamerge.files.descriptors import flat, read_at, sync_path, write_at, writing
from deltamerge.files.journal import Journal
from deltamerge.files.work_folder import SPOOL as SPOOL
from deltamerge.formats.audit import NonFinite, count_nonfinite
from deltamerge.formats.delta.entry import Entry, Read, as_bits, digest, extend
from deltamerge.formats.delta.manifest import Encoding, Record, stored_arrays
from deltamerge.formats.delta.parts import PARTS, Part
from deltamerge.formats.delta.positions import Array, ChosenCoding, Positions, choose, encode
from deltamerge.formats.delta.steps import MANTISSA, STEP_TILE, encode_tile, most_step_bytes, table_bytes
from deltamerge.formats.delta.values import (
    ARRAY_BYTES,
    SCALED,
    VALUE_BITS,
    Coded,
    Values,
    cheapest,
    encode_values,
    relative_error,
    scale_group,
)
from deltamerge.tensors.dtypes import FLOATING, ITEMSIZE, LOW_BITS, bits_type, cast

SECONDS = 2.0  # between two entries in the journal: syncing each tensor alone would cost more than it saves


class Spool:
    """A folder with a file for each tensor, beside the journal, or in `folder` without one.

    `kept` are the states of tensors that other processes have finished there. OutputError: the disk.
    """

    def __init__(self, folder: Path, journal: Journal | None, kept: Mapping[str, Any] | None = None) -> None:
        self.folder = (folder if journal is None else journal.path.parent) / SPOOL
        self._journal = journal
        records = [] if journal is None else journal.records
        self._kept: dict[str, Any] = {
            name: state for record in records for name, state in record.get("tensors", {}).items()
        } | dict(kept or {})
        self._lock = threading.Lock()
        self._waiting: dict[str, tuple[Path, Any]] = {}
        self._saved = time.monotonic()
        with writing():
            self.folder.mkdir(exist_ok=journal is not None or kept is not None)

    def kept(self, name: str) -> Any:
        """Return the state of a tensor that an earlier run had finished; None if it had not."""
        return self._kept.get(name)

    def finished(self, name: str, path: Path, state: Any) -> None:
        """Record that a tensor is in its file (which is missing if nothing is stored); `state` is everything else about
        it."""
        if self._journal is None:
            return
        with self._lock:
            self._waiting[name] = path, state
            if time.monotonic() - self._saved > SECONDS:
                self._save()

    def close(self, *, done: bool) -> None:
        """Remove the folder. With a journal keep it, even if the artifact is `done`, since the run may still be
        resumed."""
        if self._journal is None:
            shutil.rmtree(self.folder, ignore_errors=True)
        elif not done:
            with self._lock, suppress(OutputError):  # another error is being raised
                self._save()

    def _save(self) -> None:
        assert self._journal is not None
        if not self._waiting:
            return
        for path in (*(path for path, _ in self._waiting.values()), self.folder):
            if path.exists():
                sync_path(path)
        self._journal.append({"tensors": {name: state for name, (_, state) in self._waiting.items()}})
        self._waiting.clear()
        self._saved = time.monotonic()


IN_MEMORY = 1 << 20


class StepSpool:
    """The steps of a tensor of `size` elements of `dtype`. OutputError: the disk.

    Memory holds a tile of the base, one of the result, and up to a megabyte of steps; more are in the file at `path`.
    A coding that gets larger than the tensor itself is given up.
    """

    def __init__(self, path: Path, size: int, dtype: str) -> None:
        self.path = path
        self.nbytes = table_bytes(size)
        self._size, self._dtype = size, dtype
        self._lengths: list[int] = []
        self._done = self._filled = 0
        self._held = np.empty((2, 0), np.uint16)
        self._parts: list[Array] = []
        self._written = self.nbytes
        self._fd = -1

    def add(self, old: Array, new: Array) -> None:
        """The next bits (uint16) of the base, in the result's dtype, and of the result."""
        at = 0
        while at < new.size:
            tile = min(STEP_TILE, self._size - self._done)
            part = slice(at, at + min(tile - self._filled, new.size - at))
            at = part.stop
            if part.stop - part.start == tile:
                self._tile(old[part], new[part])
                continue
            if not self._held.size:
                self._held = np.empty((2, tile), np.uint16)
            filled = slice(self._filled, self._filled + part.stop - part.start)
            self._held[0, filled], self._held[1, filled] = old[part], new[part]
            self._filled = filled.stop
            if self._filled == tile:
                self._tile(self._held[0, :tile], self._held[1, :tile])
                self._filled = 0

    def finish(self, target: Path, fd: int) -> None:
        """Leave the steps as the file at `target`, which is open as `fd`, once all elements are there."""
        table = np.array(self._lengths, "<u4").view(np.uint8)
        if self._fd < 0:  # in memory: a file of its own would cost more than writing them
            with writing():
                os.ftruncate(fd, 0)
            write_at(fd, 0, flat(np.concatenate([table, *self._parts])))
            return
        self._spill()
        write_at(self._fd, 0, flat(table))
        with writing():
            self.path.replace(target)

    def close(self) -> None:
        """Close and remove the file, unless it was left as another."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            self.path.unlink(missing_ok=True)

    def _spill(self) -> None:
        if self._fd < 0:
            with writing():
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        if self._parts:
            parts = np.concatenate(self._parts)
            write_at(self._fd, self._written, flat(parts))
            self._written += parts.size
            self._parts.clear()

    def _tile(self, old: Array, new: Array) -> None:
        self._done += new.size
        if self.nbytes >= most_step_bytes(self._size):
            return
        positions = np.flatnonzero(old != new)
        stored = encode_tile(np.ascontiguousarray(old), positions, new[positions], self._dtype)
        self._lengths.append(stored.size)
        if stored.size:
            self._parts.append(stored)
            self.nbytes += stored.size
            if self.nbytes - self._written > IN_MEMORY:
                self._spill()


@dataclass(frozen=True, slots=True)
class BaseTensor:
    """The base's tensor that a tensor of the result comes from; `read` returns its flat elements [start, stop)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    read: Read


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """An array in the spool: from byte `offset` of the file at `path`."""

    name: str
    dtype: str
    length: int
    path: Path
    offset: int


@dataclass(frozen=True, slots=True)
class Storing:
    """How the tensors of an artifact are stored: coding of `values` to add, allowed `codings` of positions (and steps),
    and the `spool`."""

    values: Values
    codings: frozenset[Encoding]
    spool: Spool


class TensorWriter:
    """One tensor of the result, written with `write`, or in an artifact that adds with `add` and `finish`."""

    def __init__(
        self, storing: Storing, name: str, dtype: str, shape: tuple[int, ...], base: BaseTensor | None, path: Path
    ) -> None:
        self.path = path
        self.stored: list[StoredTensor] = []
        self.squares = (0.0, 0.0)
        self.nonfinite = NonFinite(0, 0)
        self._storing, self._name, self._dtype, self._shape = storing, name, dtype, shape
        is_change = base is not None and is_related(base.dtype, base.shape, dtype, shape)
        self._base = base if is_change else None
        self._size = math.prod(shape)
        self._record: Record | None = None
        self._lock = threading.Lock()
        self._early: dict[int, Array] = {}
        self._done = 0
        self._whole = True  # whether the spool has every value so far, not only changed ones
        self._fd = -1
        self._spooled = 0
        self._listed = Positions()
        self._values: list[Array] = []
        self._base_hash, self._result_hash = blake3(), blake3()
        has_steps = is_change and dtype in MANTISSA and "steps" in storing.codings
        self._steps = StepSpool(path.with_name(f"{path.name}.steps"), self._size, dtype) if has_steps else None
        if self._restore(storing.spool.kept(name)):
            return
        if not self._size:
            self._finish_write()

    @property
    def is_done(self) -> bool:
        """Whether it is finished, in this run or an earlier one."""
        return self._record is not None

    @property
    def record(self) -> Record:
        """The record for the manifest. RuntimeError: some elements are not written (a bug)."""
        if self._record is None:
            raise RuntimeError(f"{self._done} of {self._size} elements of {self._name} were written")
        return self._record

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._steps is not None:
            self._steps.close()

    def write(self, start: int, data: Any) -> None:
        """Final values (a buffer in the result's dtype) from flat element `start`; the last piece finishes it."""
        view = flat(data)
        if not view:
            return
        bits = np.frombuffer(view, bits_type(self._dtype))
        with self._lock, errors.context(self._name):
            if start != self._done:
                self._early[start] = bits.copy()
                return
            while bits.size:
                self._next(bits)
                bits = self._early.pop(self._done, bits[:0])
            if self._done == self._size:
                self._finish_write()

    def add(self, positions: Array, values: Array) -> None:
        """float32 `values` to add at the next ascending flat int64 `positions`; end with `finish`."""
        with self._lock, errors.context(self._name):
            if self._base is None or self._done or self._record is not None:
                raise ValueError("nothing can be added to it")
            if not positions.size:
                return
            self._listed.add(positions)
            values = np.ascontiguousarray(values, np.float32)
            if self._storing.values in SCALED:
                self._values.append(values)
            else:
                self._append_coded(encode_values(values, positions, 1, 1, self._storing.values))

    def add_parts(self, parts: Sequence[Part], stored: Array) -> None:
        """Finish a tensor with parts, of so many `stored` bytes (uint8); reads the base for the hashes."""
        with self._lock, errors.context(self._name):
            if self._base is None or self._done or self._listed.count or self._record is not None:
                raise ValueError("no parts can be added to it")
            if not self._size or not parts:
                self._finish_add()
                return
            self._append(stored)
            rounding = "stochastic" if self._dtype in LOW_BITS else None
            record = self._new_record("dense", values="parts", parts=list(parts), rounding=rounding)
            entry = Entry(self._name, record, stored)
            for bits in entry.tiles(self._read_base, check=False):
                self._saw(bits)
            self.stored.append(StoredTensor(PARTS, "U8", stored.size, self.path, 0))
            self._finished(self._new_record("dense", values="parts", parts=list(parts), rounding=rounding))

    def finish(self) -> None:
        """Finish a tensor written with `add`, or equal to the base's; reads the base for the hashes."""
        with self._lock, errors.context(self._name):
            if self._record is None:
                self._finish_add()

    def _next(self, bits: Array) -> None:
        start, stop = self._done, self._done + bits.size
        if stop > self._size:
            raise ValueError(f"element {stop} of {self._size} was written")
        self._done = stop
        self._saw(bits)
        if self._base is not None:
            base = self._read_base(start, stop)
            old = cast(extend(base, bits.size), self._base.dtype, self._dtype)
            positions = np.flatnonzero(old != bits)
            # from here on a bitmask is smaller than the unchanged values
            unchanged = stop - self._listed.count - positions.size
            if self._whole and unchanged * ITEMSIZE[self._dtype] > -(-self._size // 8):
                self._thin()
            self._listed.add(positions + start)
            if self._steps is not None:
                self._steps.add(old, bits)
            if not self._whole:
                bits = bits[positions]
        self._append(bits)

    def _saw(self, bits: Array) -> None:
        """Hash the next bits of the result, and count values that are not finite."""
        self._result_hash.update(flat(bits))
        nan, inf = count_nonfinite(bits.view(np.uint8), self._dtype)
        self.nonfinite = NonFinite(self.nonfinite.nan + nan, self.nonfinite.inf + inf)

    def _read_base(self, start: int, stop: int) -> Array:
        assert self._base is not None
        end = math.prod(self._base.shape)
        base = as_bits(self._base.read(min(start, end), min(stop, end)), self._base.dtype)
        self._base_hash.update(flat(base))
        return base

    def _thin(self) -> None:
        """Keep only the spooled values that differ from the base's."""
        dtype = np.dtype(bits_type(self._dtype))
        self._whole, self._spooled = False, 0
        for positions in self._listed.pieces():
            first, last = int(positions[0]), int(positions[-1])
            buffer = bytearray((last - first + 1) * dtype.itemsize)
            read_at(self._fd, first * dtype.itemsize, memoryview(buffer))
            self._append(np.frombuffer(buffer, dtype)[positions - first])

    def _append(self, array: Array) -> None:
        if self._fd < 0:
            with writing():
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        view = flat(array)
        write_at(self._fd, self._spooled, view)
        self._spooled += len(view)

    def _append_coded(self, coded: Coded) -> None:
        self.squares = (self.squares[0] + coded.squared_error, self.squares[1] + coded.squared)
        self._append(coded.values)

    def _finish_write(self) -> None:
        choice = ChosenCoding("dense", 0)
        if self._base is not None:
            if not self._size:
                self._read_base(0, 0)
            bits = 8 * ITEMSIZE[self._dtype]
            choice = choose(self._listed.gaps, self._size, bits, fill=self._whole, allowed=self._storing.codings)
            if self._are_steps_smaller(choice):
                self._store_steps()
                return
            if choice.coding != "dense" and self._whole:
                self._thin()
        self._store(self._new_record(choice.coding, choice.k), None, self._index(choice))

    def _are_steps_smaller(self, choice: ChosenCoding) -> bool:
        """Tell whether steps take fewer bytes than values and positions, whose array has a line in the header, too."""
        if self._steps is None or not self._listed.count:
            return False
        width, count = ITEMSIZE[self._dtype], self._listed.count
        others = self._size * width if choice.coding == "dense" else count * width + choice.nbytes + ARRAY_BYTES
        return self._steps.nbytes < min(others, self._size * width)

    def _store_steps(self) -> None:
        """Let the file of the steps take the place of that of the values."""
        assert self._steps is not None
        record = self._new_record("steps")
        self._steps.finish(self.path, self._fd)
        self._spooled = self._steps.nbytes
        self.stored.append(StoredTensor(f"{self._name}.steps", "U8", self._spooled, self.path, 0))
        self._finished(record)

    def _finish_add(self) -> None:
        if self._base is None or self._done:
            raise ValueError("not every element was written")
        count, group = self._listed.count, scale_group(self._shape)
        groups = -(-self._size // group)
        coding = cheapest(self._storing.values, count, groups)
        added: dict[str, Any] = {"values": coding} if count else {}
        scales: Array | None = None
        if self._values:
            positions = np.concatenate(list(self._listed.pieces()))
            coded = encode_values(np.concatenate(self._values), positions, groups, group, coding)
            self._append_coded(coded)
            self._values.clear()
            if coding in SCALED:
                scales = coded.scales
                added |= {"group": group, "unit": coded.unit} | ({"ranks": coded.ranks} if coded.ranks else {})
        if count and coding != "float32":
            added["error"] = relative_error(*self.squares)
        choice = choose(self._listed.gaps, self._size, VALUE_BITS[coding], fill=False, allowed=self._storing.codings)
        index, stored = self._index(choice), np.empty(0, np.uint8)
        if count:
            stored = np.memmap(self.path, np.uint8, "r", 0, self._spooled).view(f"<u{max(1, VALUE_BITS[coding] // 8)}")
        record = self._new_record(choice.coding, choice.k, **added)
        entry = Entry(self._name, record, stored, index, scales)
        for bits in entry.tiles(self._read_base, check=False):
            self._saw(bits)
        self._store(self._new_record(choice.coding, choice.k, **added), scales, index)

    def _index(self, choice: ChosenCoding) -> Array | None:
        if choice.coding == "dense" or not self._listed.count:
            return None
        return encode(choice, self._listed.pieces(), self._listed.count, self._size)

    def _new_record(self, encoding: Encoding, k: int = 0, **added: Any) -> Record:
        base = self._base
        fields: dict[str, Any] = {}
        if base is not None:
            fields["base"] = digest(self._base_hash)
            fields |= {"base_name": base.name} if base.name != self._name else {}
            fields |= {"base_shape": list(base.shape)} if base.shape != self._shape else {}
            fields |= {"base_dtype": base.dtype} if base.dtype != self._dtype else {}
        return Record(
            shape=list(self._shape),
            dtype=self._dtype,
            encoding=encoding,
            k=k,
            count=self._size if encoding == "dense" else self._listed.count,
            result=digest(self._result_hash),
            **fields,
            **added,
        )

    def _store(self, record: Record, scales: Array | None, index: Array | None) -> None:
        """Append scales and positions to the values in the spool, and list all three."""
        offset = 0
        behind = {".scales": scales, f".{record.encoding}": index}
        for array in behind.values():
            if array is not None and array.size:
                self._append(array)
        for suffix, (dtype, length) in stored_arrays(record).items():
            if (array := behind.get(suffix)) is not None:
                length = array.size
            assert length is not None
            self.stored.append(StoredTensor(self._name + suffix, dtype, length, self.path, offset))
            offset += length * ITEMSIZE[dtype]
        self._finished(record)

    def _finished(self, record: Record) -> None:
        self._listed.packed.clear()
        self._record = record
        self.close()
        self._steps = None
        state = {
            "record": record.model_dump(exclude_defaults=True),
            "stored": [[array.name, array.dtype, array.length, array.offset] for array in self.stored],
            "squares": self.squares,
            "nonfinite": self.nonfinite,
            "bytes": self._spooled,
        }
        self._storing.spool.finished(self._name, self.path, state)

    def _restore(self, state: Any) -> bool:
        """Take over the tensors that an earlier run finished, if their files still exist."""
        if state is None or (self.path.stat().st_size if self.path.exists() else 0) < state["bytes"]:
            return False
        self.stored = [StoredTensor(name, dtype, length, self.path, at) for name, dtype, length, at in state["stored"]]
        self.squares = tuple(state["squares"])
        self.nonfinite = NonFinite(*state["nonfinite"])
        self._record = Record.model_validate(state["record"])
        return True


def is_related(base_dtype: str, old: tuple[int, ...], dtype: str, shape: tuple[int, ...]) -> bool:
    """Tell whether a tensor can be stored as a change of the base's: after a cast, and with rows added."""
    casts = base_dtype == dtype or {base_dtype, dtype} <= FLOATING
    grows = len(old) == len(shape) > 0 and old[1:] == shape[1:] and old[0] <= shape[0]
    return casts and (old == shape or grows)
