"""One tensor of a delta artifact: decodes its entries, and applies them to the base's tensor.

An array of *bits* is flat and unsigned: the stored bytes of a dtype. Decoding checks every position. `Decoder` is the
one text of it: tensors in memory, files that are written and lazy tensors are made by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias
from typing import cast as typed

import numpy as np
from blake3 import blake3

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.manifest import Record, groups
from deltamerge.formats.delta.parts import PartSum, matrix_shape, sum_of
from deltamerge.formats.delta.positions import Array, Coding, Listing, Sliced
from deltamerge.formats.delta.steps import STEP_TILE, decode_tile, starts_of
from deltamerge.formats.delta.values import scale_values
from deltamerge.tensors.dtypes import bits_type, cast, narrow, narrow_randomly, widen
from deltamerge.tensors.reader import RecentParts

TILE = 1 << 20
OTHER_BASE = "the base's tensor is not the one this delta was made from"
DAMAGED = "the delta is damaged: copy, download or extract it again"
Read = Callable[[int, int], Any]
"""Flat elements [start, stop) of a tensor, as a numpy array of its dtype or of equally wide integers."""

NOTHING = np.empty(0, np.uint8)

Where: TypeAlias = "Array | slice"
"""Ascending positions, or a range of them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an artifact: its record, and its stored arrays (bits; None where nothing is stored).

    versions   of a tensor through several versions, from the base on: the entry of each, and its version's name. Of the
               entry itself only the record is used then
    every      check the hash of each version's result, not of the last alone
    """

    name: str
    record: Record
    values: Sliced
    index: Sliced | None = None
    scales: Sliced | None = None
    versions: tuple[tuple[str, Entry], ...] = ()
    every: bool = False

    @property
    def size(self) -> int:
        """Elements of the result's tensor."""
        return math.prod(self.record.shape)

    @property
    def base_dtype(self) -> str:
        """The dtype of the base's tensor."""
        return self.record.base_kind[0]

    @property
    def base_size(self) -> int:
        """Elements of the base's tensor."""
        return math.prod(self.record.base_kind[1])

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the result's tensor."""
        return self.record.dtype, tuple(self.record.shape)

    @property
    def base_kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the base's tensor."""
        return self.record.base_kind

    def key_in(self, state: Container[str]) -> str:
        """Return where the base's tensor stands in a state: under its name in the base, else in the result."""
        name = self.record.base_name
        return name if name is not None and name in state else self.name

    @property
    def has_steps(self) -> bool:
        """Whether its positions and values can only be told from the base's tensor."""
        return self.record.encoding == "steps"

    @property
    def needs_base(self) -> bool:
        """Whether its final values can only be told from the base's tensor."""
        return self.has_steps or self.record.values is not None

    def positions(self) -> Iterator[Array]:
        """Flat int64 positions in ascending pieces, without steps. InputError: they contradict the record."""
        assert self.index is not None
        with damage_told():
            yield from Decoder(self).listing.pieces()

    def tiles(self, read: Read | None, *, check: bool = True, tile: int = TILE) -> Iterator[Array]:
        """Yield the result as bits, tile by tile, computed from the base's tensor (None if the base has none).

        Memory holds a tile, of STEP_TILE elements at least where there are steps, and a piece of the positions of each
        entry. InputError: positions are damaged; or, with `check` and after the last tile, the base's or the result's
        hash differs from the record's. The error has no hint if the base is to blame.
        """
        if (read is None) != (self.record.base is None):
            raise InputError(f"the base {'lacks it' if read is None else 'must not have it'}")
        try:
            yield from self._tiles(read, check, tile)
        except InputError:  # the result over another base looks damaged
            if check and read is not None and self.digest_of(read) != self.record.base:
                raise InputError(OTHER_BASE) from None
            raise

    def _tiles(self, read: Read | None, check: bool, tile: int) -> Iterator[Array]:
        line = self.versions or (("", self),)
        changing = [(v, e) for v, e in line if e.record.count or e.kind != e.base_kind]
        levels = [_Level(version, Decoder(entry)) for version, entry in changing or line[-1:]]
        has_steps = any(level.decoder.entry.has_steps for level in levels)
        span = -(-tile // STEP_TILE) * STEP_TILE if has_steps else tile
        base_hash = blake3()
        for start in range(0, self.size, span):
            stop = min(start + span, self.size)
            bits: Array = np.empty(0, bits_type(self.base_dtype))
            if read is not None:
                bits = as_bits(read(min(start, self.base_size), min(stop, self.base_size)), self.base_dtype)
            if check:
                base_hash.update(flat(bits))
            for number, level in enumerate(levels):  # from the base upwards, without recursion: there may be thousands
                with errors.context(level.version) if level.version else nullcontext():
                    bits = level.decoder.over(bits, start, stop, fresh=number > 0)
                if check and (self.every or level is levels[-1]):
                    level.hash.update(flat(bits))
            for at in range(0, bits.size, tile):
                yield bits[at : at + tile]
        if check and self.record.base is not None and digest(base_hash) != self.record.base:
            raise InputError(OTHER_BASE)
        for level in levels:
            with errors.context(level.version) if level.version else nullcontext():
                level.decoder.finish()
                if check and (self.every or level is levels[-1]) and digest(level.hash) != level.decoder.record.result:
                    raise InputError("the result is not the tensor this delta was made for", hint=DAMAGED)

    def digest_of(self, read: Read) -> str:
        """Return the hash of the base's tensor as it is read."""
        return hash_of(lambda start, stop: as_bits(read(start, stop), self.base_dtype), self.base_size)

    def whole(self, read: Read | None, *, check: bool = True) -> Array:
        """Return the whole result as flat bits. InputError: as `tiles`."""
        out: Array = np.empty(self.size, bits_type(self.record.dtype))
        done = 0
        for bits in self.tiles(read, check=check):
            out[done : done + bits.size] = bits
            done += bits.size
        return out


@dataclass(frozen=True, slots=True)
class _Level:
    """An entry of a version, and the hash of its result."""

    version: str
    decoder: Decoder
    hash: Any = field(default_factory=blake3)


@dataclass(eq=False)
class Decoder:
    """Decodes an entry at any place, and applies it. Thread-safe.

    recent   keeps pieces of positions, and parts
    """

    entry: Entry
    recent: RecentParts = field(default_factory=lambda: RecentParts(1))
    seen: int = 0
    _key: object = field(default_factory=object)

    @property
    def record(self) -> Record:
        return self.entry.record

    @cached_property
    def listing(self) -> Listing:
        """The positions. InputError: too few bytes are stored."""
        entry, record = self.entry, self.record
        assert entry.index is not None
        coding = typed(Coding, record.encoding)
        return Listing(coding, entry.index, record.count, entry.size, record.k, self.recent)

    @cached_property
    def _starts(self) -> Array:
        assert self.entry.index is not None
        return starts_of(self.entry.index, self.entry.size)

    @cached_property
    def _scales(self) -> Array:
        """Float32 scales, one per group; empty if values have no scales."""
        entry, record = self.entry, self.record
        if entry.scales is None or record.values is None:
            return np.empty(0, np.float32)
        return scale_values(entry.scales[:], groups(record), record.unit, record.ranks)

    def _parts(self) -> PartSum:
        return sum_of(self.record.parts, self.entry.values, *matrix_shape(self.record.shape))

    def codes(self, start: int, stop: int) -> Array:
        """Return values [start, stop) before scaling: bits of final values, float32, int8, or int8 ±1 for signs."""
        coding, stored = self.record.values, self.entry.values
        if coding == "parts":
            return self.recent.get(self._key, self._parts).values(start, stop)
        if coding == "sign":
            bits = np.unpackbits(stored[start >> 3 : -(-stop // 8)], bitorder="little").view(np.int8)
            return 1 - (bits[start & 7 :][: stop - start] << 1)
        values = stored[start:stop]
        if coding == "bfloat16":
            return widen(values, "BF16")
        return values if coding is None else values.view(np.int8 if coding == "int8" else np.float32)

    def changes(self, start: int, stop: int, base: Array) -> Iterator[tuple[Where, Array]]:
        """Yield places relative to `start`, with bits of final values, or float32 values to add. InputError: damaged.

        Of steps, `start` begins a tile, and `base` has the base's bits in the result's dtype.
        """
        record = self.record
        if not record.count:
            return
        with damage_told():
            if self.entry.has_steps:
                for begin in range(0, stop - start, STEP_TILE):
                    tile = (start + begin) // STEP_TILE
                    assert self.entry.index is not None
                    stored = self.entry.index[int(self._starts[tile]) : int(self._starts[tile + 1])]
                    positions, values = decode_tile(stored, base[begin : begin + STEP_TILE], record.dtype)
                    self.seen += positions.size
                    yield positions + begin, values
            elif self.entry.index is None:
                yield slice(0, stop - start), self._scaled(start, stop, start)
            else:
                for positions, first in self.listing.between(start, stop):
                    yield positions - start, self._scaled(first, first + positions.size, positions)

    def _scaled(self, first: int, last: int, positions: Any) -> Array:
        values = self.codes(first, last)
        if not self._scales.size:
            return values
        where = np.arange(first, last) if self.entry.index is None else positions
        return self._scales[where // self.record.group] * values

    def over(self, bits: Array, start: int, stop: int, *, fresh: bool = False) -> Array:
        """Return the result's bits [start, stop), from the base's. Where these are `fresh` they may be changed.

        Of steps, `start` begins a tile, and `stop` ends one, or the tensor. InputError: damaged.
        """
        record, entry = self.record, self.entry
        if record.count and entry.index is None and record.values is None:
            with damage_told():
                return entry.values[start:stop]
        base = bits if bits.size == stop - start else extend(bits, stop - start)
        if record.dtype != entry.base_dtype:
            out = cast(base, entry.base_dtype, record.dtype)
        else:
            out = base if fresh or base is not bits or not record.count else base.copy()
        for where, values in self.changes(start, stop, out):
            self._put(out, base, where, values, start)
        return out

    def _put(self, out: Array, base: Array, where: Where, values: Array, start: int) -> None:
        """Apply entries to `out`, which holds `base` from `start` on in the result's dtype and may be `base` itself."""
        record, dtype = self.record, self.entry.base_dtype
        if record.values is None:
            out[where] = values
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if record.rounding:
                out[where] = narrow_randomly(widen(base[where], dtype) + values, record.dtype, start)
            elif not record.dtype == dtype == "F32":
                out[where] = narrow(widen(base[where], dtype) + values, record.dtype)
            elif isinstance(where, slice):
                out.view(np.float32)[where] += values
            else:
                np.add.at(out.view(np.float32), where, values)  # one pass; indexing would take two

    def finish(self) -> None:
        """Make the checks that need all ranges. InputError: there is more, or less."""
        record = self.record
        with damage_told():
            if self.entry.has_steps and self.seen != record.count:
                raise InputError(f"steps list {self.seen} entries, not {record.count}")
            if record.count and self.entry.index is not None and not self.entry.has_steps:
                self.listing.finish()


@contextmanager
def damage_told() -> Iterator[None]:
    """Give errors of decoding a hint."""
    try:
        yield
    except InputError as error:
        error.hint = error.hint or DAMAGED
        raise


def digest(hasher: Any) -> str:
    """Return the first 128 bits of a BLAKE3, in hex: enough against a chosen second preimage, and half the size in the
    manifest."""
    return str(hasher.hexdigest(length=16))


def hash_of(read: Read, size: int) -> str:
    """Return the hash of a tensor of `size` elements, as the manifest has it."""
    hasher = blake3()
    for start in range(0, size, TILE):
        hasher.update(flat(read(start, min(start + TILE, size))))
    return digest(hasher)


def as_bits(array: Any, dtype: str) -> Array:
    """Return a numpy array (or buffer) of a safetensors dtype's values as flat bits."""
    return np.asarray(array).reshape(-1).view(bits_type(dtype))


def extend(bits: Array, size: int) -> Array:
    """`bits` followed by zeros, `size` elements in all."""
    if bits.size == size:
        return bits
    out = np.zeros(size, bits.dtype)
    out[: bits.size] = bits
    return out
