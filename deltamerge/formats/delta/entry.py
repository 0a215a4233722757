"""One tensor of a delta artifact: decodes its entries, and applies them to the base's tensor.

An array of *bits* is flat and unsigned: the stored bytes of a dtype. Decoding checks every position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from typing import cast as typed

import numpy as np
from blake3 import blake3

from deltamerge.errors import InputError
from deltamerge.files.descriptors import flat
from deltamerge.formats.delta.manifest import Record, groups
from deltamerge.formats.delta.parts import PartSum, matrix_shape, sum_of
from deltamerge.formats.delta.positions import Array, Coding, Sliced, decode
from deltamerge.formats.delta.steps import STEP_TILE, decode_tile, starts_of, tiles_of
from deltamerge.formats.delta.values import scale_values
from deltamerge.tensors.dtypes import bits_type, cast, narrow, widen

TILE = 1 << 20
OTHER_BASE = "the base's tensor is not the one this delta was made from"
DAMAGED = "the delta is damaged: copy, download or extract it again"
Read = Callable[[int, int], Any]
"""Flat elements [start, stop) of a tensor, as a numpy array of its dtype or of equally wide integers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an artifact: its record, and its stored arrays (bits; None where nothing is stored).

    `made` are its parts, once they are in memory.
    """

    name: str
    record: Record
    values: Sliced
    index: Sliced | None = None
    scales: Sliced | None = None
    made: PartSum | None = None

    @property
    def size(self) -> int:
        """Elements of the result's tensor."""
        return math.prod(self.record.shape)

    @property
    def base_dtype(self) -> str:
        """The dtype of the base's tensor."""
        return self.record.base_dtype or self.record.dtype

    @property
    def base_size(self) -> int:
        """Elements of the base's tensor."""
        shape = self.record.base_shape
        return self.size if shape is None else math.prod(shape)

    @property
    def kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the result's tensor."""
        return self.record.dtype, tuple(self.record.shape)

    @property
    def base_kind(self) -> tuple[str, tuple[int, ...]]:
        """Dtype and shape of the base's tensor."""
        return self.record.base_kind

    def key_in(self, state: Container[str]) -> str:
        """Where the base's tensor stands in a state: under its name in the base, else in the result."""
        name = self.record.base_name
        return name if name is not None and name in state else self.name

    @property
    def has_steps(self) -> bool:
        """Whether its positions and values can only be told from the base's tensor."""
        return self.record.encoding == "steps"

    def positions(self) -> Iterator[Array]:
        """Flat int64 positions in ascending pieces, without steps. InputError: they contradict the record."""
        if self.index is not None:
            coding = typed(Coding, self.record.encoding)
            return decode(coding, self.index, self.record.count, self.size, self.record.k)
        stops = range(TILE, self.record.count + TILE, TILE)
        return (np.arange(stop - TILE, min(stop, self.record.count)) for stop in stops)

    def scale_values(self) -> Array:
        """Float32 scales, one per group; empty if values have no scales."""
        record = self.record
        if self.scales is None or record.values is None:
            return np.empty(0, np.float32)
        return scale_values(self.scales[:], groups(record), record.unit, record.ranks)

    def with_parts(self) -> Entry:
        """The same with its parts in memory, if it has parts. InputError: they are damaged."""
        if not self.record.parts or self.made is not None:
            return self
        with damage_told():
            return replace(self, made=sum_of(self.record.parts, self.values, *matrix_shape(self.record.shape)))

    def codes(self, start: int, stop: int) -> Array:
        """Values [start, stop) before scaling: bits of final values, float32, int8, or int8 ±1 for signs."""
        coding = self.record.values
        if coding == "parts":
            made = self.with_parts().made
            assert made is not None
            return made.values(start, stop)
        if coding == "sign":
            bits = np.unpackbits(self.values[start >> 3 : -(-stop // 8)], bitorder="little").view(np.int8)
            return 1 - (bits[start & 7 :][: stop - start] << 1)
        values = self.values[start:stop]
        if coding == "bfloat16":
            return widen(values, "BF16")
        return values if coding is None else values.view(np.int8 if coding == "int8" else np.float32)

    def values_at(self, positions: Array, first: int, scales: Array) -> Array:
        """Bits of final values, or float32 values to add, of the entries from number `first` on at `positions`."""
        values = self.codes(first, first + positions.size)
        return scales[positions // self.record.group] * values if scales.size else values

    def step_tile(self, number: int, base: Array, starts: Array | None = None) -> tuple[Array, Array]:
        """Positions in a tile of steps, and bits of their final values, from the base's `converted` bits of the tile.

        `starts` are those of `starts_of`. InputError: it is damaged, or the base is another.
        """
        assert self.index is not None
        with damage_told():
            starts = starts_of(self.index, self.size) if starts is None else starts
            stored = self.index[int(starts[number]) : int(starts[number + 1])]
            return decode_tile(stored, base, self.record.dtype)

    def converted(self, base: Array, size: int) -> Array:
        """The base's bits in the result's dtype, followed by zeros: `size` elements; a copy only where they differ."""
        base = extend(base, size)
        return base if self.record.dtype == self.base_dtype else cast(base, self.base_dtype, self.record.dtype)

    def pieces(self, read: Read | None = None) -> Iterator[tuple[Array, Array]]:
        """Positions, with bits of final values, or float32 values to add. InputError: damaged.

        `read` gives the base's elements, of which only steps have need.
        """
        if self.has_steps:
            assert read is not None
            for start, (_, _, positions, values) in zip(range(0, self.size, STEP_TILE), self._steps(read), strict=True):
                yield positions + start, values
            return
        with damage_told():
            own, scales, done = self.with_parts(), self.scale_values(), 0
            for positions in self.positions():
                yield positions, own.values_at(positions, done, scales)
                done += positions.size

    def tiles(self, read: Read | None, *, check: bool = True, tile: int = TILE) -> Iterator[Array]:
        """The result as bits, tile by tile, computed from the base's tensor (None if the base has none).

        InputError: positions are damaged; or, with `check` and after the last tile, the base's or the result's hash
        differs from the record's. The error has no hint if the base is to blame.
        """
        self._check_presence(read)
        record = self.record
        base_hash, result_hash = blake3(), blake3()
        for base, out in (
            self._results(read, tile) if read is None or not self.has_steps else self._stepped(read, check)
        ):
            if check:
                base_hash.update(flat(base))
                result_hash.update(flat(out))
            for at in range(0, out.size, tile):
                yield out[at : at + tile]
        if not check:
            return
        if record.base is not None and digest(base_hash) != record.base:
            raise InputError(OTHER_BASE)
        if digest(result_hash) != record.result:
            raise InputError("the result is not the tensor this delta was made for", hint=DAMAGED)

    def _check_presence(self, read: Read | None) -> None:
        """InputError: the base has the tensor, and was to lack it, or lacks it."""
        if (read is None) != (self.record.base is None):
            raise InputError(f"the base {'lacks it' if read is None else 'must not have it'}")

    def _results(self, read: Read | None, tile: int) -> Iterator[tuple[Array, Array]]:
        """The base's bits and the result's, tile by tile."""
        dense = self.index is None and self.record.count > 0 and self.record.values is None
        pieces = iter(()) if dense else self.pieces()
        held: tuple[Array, Array] | None = next(pieces, None)
        for start in range(0, self.size, tile):
            stop = min(start + tile, self.size)
            base = own = np.empty(0, bits_type(self.base_dtype))
            if read is not None:
                base = own = self._read(read, start, stop)
            if dense:
                yield own, self.values[start:stop]
                continue
            base = extend(base, stop - start)
            out = base.copy() if self.record.dtype == self.base_dtype else self.converted(base, base.size)
            while held is not None:
                positions, values = held
                cut = int(np.searchsorted(positions, stop))
                self.put(out, base, positions[:cut] - start, values[:cut])
                if cut < positions.size:
                    held = positions[cut:], values[cut:]
                    break
                held = next(pieces, None)
            yield own, out

    def _stepped(self, read: Read, check: bool) -> Iterator[tuple[Array, Array]]:
        """The same of steps, in their own tiles."""
        with self._base_blamed(read, check):
            for own, base, positions, values in self._steps(read):
                out = base.copy()
                out[positions] = values
                yield own, out

    @contextmanager
    def _base_blamed(self, read: Read | None, check: bool) -> Iterator[None]:
        """What cannot be decoded is, with `check`, the base's fault first: steps of another base look damaged."""
        try:
            yield
        except InputError:
            if check and read is not None and self.digest_of(read) != self.record.base:
                raise InputError(OTHER_BASE) from None
            raise

    def digest_of(self, read: Read) -> str:
        """The hash of the base's tensor as it is read."""
        return hash_of(lambda start, stop: self._read(read, start, stop), self.base_size)

    def _steps(self, read: Read) -> Iterator[tuple[Array, Array, Array, Array]]:
        """Of each tile of steps the base's bits, stored and converted, positions in it, and bits of final values."""
        assert self.index is not None
        with damage_told():
            starts, count = starts_of(self.index, self.size), 0
            for number, (start, stop) in enumerate(tiles_of(self.size)):
                own = self._read(read, start, stop)
                base = self.converted(own, stop - start)
                positions, values = self.step_tile(number, base, starts)
                count += positions.size
                yield own, base, positions, values
            if count != self.record.count:
                raise InputError(f"steps list {count} entries, not {self.record.count}")

    def _read(self, read: Read, start: int, stop: int) -> Array:
        return as_bits(read(min(start, self.base_size), min(stop, self.base_size)), self.base_dtype)

    def put(self, out: Array, base: Array, positions: Array, values: Array) -> None:
        """Apply entries to `out`, which holds `base` in the result's dtype and may be `base` itself."""
        if self.record.values is None:
            out[positions] = values
            return
        with np.errstate(over="ignore", invalid="ignore"):
            if self.record.dtype == self.base_dtype == "F32":
                np.add.at(out.view(np.float32), positions, values)  # one pass; indexing would take two
            else:
                out[positions] = narrow(widen(base[positions], self.base_dtype) + values, self.record.dtype)

    def whole(self, read: Read | None, *, check: bool = True) -> Array:
        """The whole result as flat bits. InputError: as `tiles`."""
        out: Array = np.empty(self.size, bits_type(self.record.dtype))
        done = 0
        for bits in self.tiles(read, check=check):
            out[done : done + bits.size] = bits
            done += bits.size
        return out


@contextmanager
def damage_told() -> Iterator[None]:
    """Give errors of decoding a hint."""
    try:
        yield
    except InputError as error:
        error.hint = error.hint or DAMAGED
        raise


def digest(hasher: Any) -> str:
    """The first 128 bits of a BLAKE3, in hex: enough against a chosen second preimage, and half the size in the
    manifest."""
    return str(hasher.hexdigest(length=16))


def hash_of(read: Read, size: int) -> str:
    """The hash of a tensor of `size` elements, as the manifest has it."""
    hasher = blake3()
    for start in range(0, size, TILE):
        hasher.update(flat(read(start, min(start + TILE, size))))
    return digest(hasher)


def as_bits(array: Any, dtype: str) -> Array:
    """A numpy array (or buffer) of a safetensors dtype's values as flat bits."""
    return np.asarray(array).reshape(-1).view(bits_type(dtype))


def extend(bits: Array, size: int) -> Array:
    """`bits` followed by zeros, `size` elements in all."""
    if bits.size == size:
        return bits
    out = np.zeros(size, bits.dtype)
    out[: bits.size] = bits
    return out
