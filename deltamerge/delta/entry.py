"""One tensor of a delta artifact: decodes its entries, and applies them to the base's tensor.

An array of *bits* is flat and unsigned: the stored bytes of a dtype. Decoding checks every position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from blake3 import blake3

from deltamerge.delta.manifest import Record, groups
from deltamerge.delta.positions import Array, Sliced, decode
from deltamerge.delta.values import scale_values
from deltamerge.errors import InputError
from deltamerge.io.dtypes import bits_type, cast, narrow, widen
from deltamerge.io.files import flat

TILE = 1 << 20
DAMAGED = "the delta is damaged: copy, download or extract it again"
Read = Callable[[int, int], Any]
"""Flat elements [start, stop) of a tensor, as a numpy array of its dtype or of equally wide integers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of an artifact: its record, and its stored arrays (bits; None where nothing is stored)."""

    name: str
    record: Record
    values: Sliced
    index: Sliced | None = None
    scales: Sliced | None = None

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

    def positions(self) -> Iterator[Array]:
        """Flat int64 positions in ascending pieces. InputError: they contradict the record."""
        if self.index is not None:
            return decode(self.record.encoding, self.index, self.record.count, self.size, self.record.k)
        stops = range(TILE, self.record.count + TILE, TILE)
        return (np.arange(stop - TILE, min(stop, self.record.count)) for stop in stops)

    def scale_values(self) -> Array:
        """Float32 scales, one per group; empty if values have no scales."""
        record = self.record
        if self.scales is None or record.values is None:
            return np.empty(0, np.float32)
        return scale_values(self.scales[:], groups(record), record.unit, record.ranks)

    def codes(self, start: int, stop: int) -> Array:
        """Values [start, stop) before scaling: bits of final values, float32, int8, or int8 ±1 for signs."""
        coding = self.record.values
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

    def pieces(self) -> Iterator[tuple[Array, Array]]:
        """Positions, with bits of final values, or float32 values to add. InputError: damaged."""
        with damage_told():
            scales, done = self.scale_values(), 0
            for positions in self.positions():
                yield positions, self.values_at(positions, done, scales)
                done += positions.size

    def tiles(self, read: Read | None, *, check: bool = True, tile: int = TILE) -> Iterator[Array]:
        """The result as bits, tile by tile, computed from the base's tensor (None if the base has none).

        InputError: positions are damaged; or, with `check` and after the last tile, the base's or the result's hash
        differs from the record's. The error has no hint if the base is to blame.
        """
        record, dtype = self.record, self.record.dtype
        if (read is None) != (record.base is None):
            raise InputError(f"the base {'lacks it' if read is None else 'must not have it'}")
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
                    self.put(out, base, positions[:cut] - start, values[:cut])
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
            raise InputError("the base's tensor is not the one this delta was made from")
        if digest(result_hash) != record.result:
            raise InputError("the result is not the tensor this delta was made for", hint=DAMAGED)

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

    def apply(self, base: Array | None) -> Array:
        """The whole result as flat bits, from the base tensor's flat bits; hashes are not checked."""
        read = None if base is None else lambda start, stop: base[start:stop]
        parts = list(self.tiles(read, check=False, tile=max(1, self.size)))
        return parts[0] if parts else np.empty(0, bits_type(self.record.dtype))


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
