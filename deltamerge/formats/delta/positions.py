"""Codings of the positions of a sparse tensor's entries; numpy only, no loop over entries.

Positions (flat, ascending, unique, in [0, size)) have four codings, and the smallest is chosen. With gap =
distance to the position before, less 1 (the first is measured from -1):

    indices   int32 positions; int64 from 2**31 elements
    bitmask   ceil(size / 8) bytes; bit i % 8 of byte i // 8 is set where position i is listed
    gaps      one byte a gap: 0..254 is the gap; 255 skips 255 positions and lists none
    rice      gap = q * 2**k + r. First the count r's: k // 8 planes of count bytes, the lowest byte first; then
              their upper b = k % 8 bits in groups of eight (the last one padded with zeros), b bytes a group,
              little-endian, the first in the lowest bits. Then the q's as unary bits, each byte filled from its
              lowest bit: q zeros and a one; zeros to the end of the last byte.

Random positions of density d cost about H(d)/d bits each, and rice is within 3 % of it: 4.8 bits at 0.1, 8.1 at
0.01, 11.4 at 0.001. Decoding needs no loop either: the i-th one of the unary bits lies at bit i + Σq.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from deltamerge.errors import InputError
from deltamerge.tensors.reader import RecentParts

Array = npt.NDArray[Any]
Coding = Literal["dense", "indices", "bitmask", "gaps", "rice"]

CODINGS: tuple[Coding, ...] = ("dense", "indices", "bitmask", "gaps", "rice")
LARGEST_K = 40  # so that the positions of a piece stay below 2**62
SPAN = 1 << 17  # entries or bytes decoded at once, so that temporaries stay in cache
ESCAPE = 255
_QUOTIENTS = np.arange(ESCAPE) >> np.arange(LARGEST_K + 1)[:, None]


@dataclass(slots=True)
class Gaps:
    """The counts that give the sizes of the codings, taken tile by tile over ascending positions."""

    count: int = 0
    last: int = -1
    escapes: int = 0
    small: Array = field(default_factory=lambda: np.zeros(ESCAPE, np.int64))
    large: list[int] = field(default_factory=lambda: [0] * (LARGEST_K + 1))

    def add(self, positions: Array) -> None:
        """Count the next int64 `positions`."""
        if not positions.size:
            return
        gaps = _gaps(positions, self.last)
        counts = np.bincount(np.minimum(gaps, ESCAPE), minlength=ESCAPE + 1)
        self.small += counts[:ESCAPE]
        if counts[ESCAPE]:
            large = gaps[gaps >= ESCAPE]
            self.escapes += int((large // ESCAPE).sum())
            for k in range(LARGEST_K + 1):
                if not (total := int(large.sum())):
                    break
                self.large[k] += total
                large >>= 1
        self.count += positions.size
        self.last = int(positions[-1])

    def unary_bits(self) -> list[int]:
        """Return the bits of rice's unary part, count + Σ(gap >> k), for every k."""
        return [self.count + a + b for a, b in zip(self.large, (_QUOTIENTS @ self.small).tolist(), strict=True)]


@dataclass(slots=True)
class Positions:
    """Ascending positions and their `gaps`, kept tile by tile in at most size / 8 bytes.

    A tile is its first position and, relative to it, a bitmask (uint8) or distances, whichever is smaller.
    """

    gaps: Gaps = field(default_factory=Gaps)
    packed: list[tuple[int, Array]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return self.gaps.count

    def add(self, positions: Array) -> None:
        """Keep the next int64 `positions`."""
        if not positions.size:
            return
        self.gaps.add(positions)
        first, span = int(positions[0]), int(positions[-1] - positions[0])
        distances = positions - first
        if span < 32 * positions.size:
            bits = np.zeros(span + 1, bool)
            bits[distances] = True
            self.packed.append((first, np.packbits(bits, bitorder="little")))
        else:
            self.packed.append((first, distances.astype(np.uint32) if span < 1 << 32 else distances))

    def pieces(self) -> Iterator[Array]:
        """Return the positions, tile by tile."""
        return map(self.piece, range(len(self.packed)))

    def piece(self, number: int) -> Array:
        """Return the positions of one tile."""
        first, packed = self.packed[number]
        is_bits = packed.dtype == np.uint8
        distances = np.flatnonzero(np.unpackbits(packed, bitorder="little").view(bool)) if is_bits else packed
        positions = distances.astype(np.int64)
        positions += first
        return positions


@dataclass(frozen=True, slots=True)
class ChosenCoding:
    """A coding, the bytes of its positions, and rice's k."""

    coding: Coding
    nbytes: int
    k: int = 0


def expected_bits(density: float, value_bits: int) -> float:
    """Return the bits per element of a tensor with `density` of its values at random positions: p v + H(p), or v if
    dense."""
    p = density
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0
    return min(p * value_bits + entropy, value_bits)


def uniform_density(bits: float, value_bits: int) -> float:
    """Return the density that takes `bits` per element."""
    if expected_bits(1.0, value_bits) <= bits:
        return 1.0
    low, high = 1e-9, 1.0
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected_bits(middle, value_bits) <= bits else (low, middle)
    return low


def index_itemsize(size: int) -> int:
    """Return the bytes of one flat index into `size` elements."""
    return 4 if size < 1 << 31 else 8


def _rice_bytes(count: int, k: int, unary_bits: int) -> int:
    return k // 8 * count + k % 8 * -(-count // 8) + -(-unary_bits // 8)


def most_bytes(coding: Coding, count: int, size: int, k: int) -> int:
    """Return the bytes that the positions of `count` of `size` elements can take at most."""
    if coding == "rice":
        return _rice_bytes(count, k, count + (size >> k))
    if coding == "gaps":
        return count + size // ESCAPE
    return -(-size // 8) if coding == "bitmask" else index_itemsize(size) * count


def choose(gaps: Gaps, size: int, value_bits: int, *, fill: bool, allowed: Collection[str] = CODINGS) -> ChosenCoding:
    """Return the coding that takes the fewest bytes, values included; of equals the simplest.

    gaps         of the positions
    size         elements of the tensor
    value_bits   bits of one stored value
    fill         whether dense may be chosen though entries are missing (their values are the base's)
    allowed      codings to choose from
    """
    count = gaps.count
    choices = [
        ChosenCoding("indices", index_itemsize(size) * count),
        ChosenCoding("bitmask", -(-size // 8)),
        ChosenCoding("gaps", count + gaps.escapes),
    ]
    if "rice" in allowed:
        ks = [ChosenCoding("rice", _rice_bytes(count, k, bits), k) for k, bits in enumerate(gaps.unary_bits())]
        choices.append(min(ks, key=lambda choice: choice.nbytes))
    if fill or count == size:
        missing = -(-size * value_bits // 8) - -(-count * value_bits // 8)
        choices.insert(0, ChosenCoding("dense", missing))
    best = min((c for c in choices if c.coding in allowed), key=lambda choice: choice.nbytes)
    return ChosenCoding("dense", 0) if best.coding == "dense" else best


def encode(choice: ChosenCoding, positions: Iterable[Array], count: int, size: int) -> Array:
    """Store ascending int64 `positions`, given in pieces; int32 or int64 for indices, else uint8."""
    done, last = 0, -1
    k = choice.k
    if choice.coding == "indices":
        out = np.empty(count, f"<i{index_itemsize(size)}")
        for piece in positions:
            out[done : done + piece.size] = piece
            done += piece.size
        return out
    out = np.full(choice.nbytes, ESCAPE if choice.coding == "gaps" else 0, np.uint8)
    planes, packed, unary = rice_parts(out, count, k) if choice.coding == "rice" else ([], out, out)
    ones = -1  # the last bit set in the unary part
    place = -1  # the last gap's byte
    for piece in positions:
        if not piece.size:
            continue
        if choice.coding == "bitmask":
            _set_bits(out, piece)
            continue
        gaps = _gaps(piece, last)
        last = int(piece[-1])
        if choice.coding == "gaps":
            places = np.cumsum(gaps // ESCAPE + 1) + place
            out[places] = gaps % ESCAPE
            place = int(places[-1])
            continue
        bits = np.cumsum((gaps >> k) + 1) + ones
        _set_bits(unary, bits)
        ones = int(bits[-1])
        for i, plane in enumerate(planes):
            plane[done : done + piece.size] = gaps >> 8 * i & 0xFF
        _set_fields(packed, done, (gaps & (1 << k) - 1) >> 8 * len(planes), k % 8)
        done += piece.size
    return out


class Sliced(Protocol):
    """Elements that can be sliced: a numpy array, or an object that reads one."""

    @property
    def size(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Array: ...


def decode(coding: Coding, stored: Sliced, count: int, size: int, k: int = 0) -> Iterator[Array]:
    """Ascending int64 positions in pieces of about 2**17. InputError: any fault of `stored`.

    coding   name of the coding
    stored   the array
    count    number of positions
    size     elements of the tensor
    k        rice's
    """
    return Listing(coding, stored, count, size, k).pieces()


class Listing:
    """The positions of a tensor's entries, decoded piece by piece, from any piece that was reached once.

    `recent` keeps decoded pieces. Thread-safe. InputError: any fault of `stored`, when it is reached.
    """

    def __init__(
        self, coding: Coding, stored: Sliced, count: int, size: int, k: int = 0, recent: RecentParts | None = None
    ) -> None:
        self._coding, self._stored, self._count, self._size, self._k = coding, stored, count, size, k
        self._recent, self._key = recent or RecentParts(1), object()  # a key that is no cycle
        self._adding = threading.Lock()
        packed_at, begin, self._step = 0, 0, SPAN
        if coding == "rice":
            packed_at, begin = rice_offsets(stored.size, count, k)
            self._step = SPAN >> 2
        self._packed_at, self._unary_at = packed_at, begin
        self._places = [_Place(0, begin, 0, -1 if coding == "indices" else 0)]
        if begin >= stored.size:
            self._check_count(0)

    def pieces(self) -> Iterator[Array]:
        """Yield the positions of one piece after another."""
        number = 0
        while (piece := self._piece(number)) is not None:
            if piece.size:
                yield piece
            number += 1

    def between(self, start: int, stop: int) -> Iterator[tuple[Array, int]]:
        """Yield positions in [start, stop), and the number of the first of them."""
        number = bisect_right(self._places, start, key=attrgetter("least")) - 1
        while number >= len(self._places) or self._places[number].least < stop:
            piece = self._piece(number)
            if piece is None:
                return
            low, high = np.searchsorted(piece, (start, stop))
            if low < high:
                yield piece[low:high], self._places[number].before + int(low)
            if high < piece.size:
                return
            number += 1

    def finish(self) -> None:
        """Decode the rest."""
        while self._piece(len(self._places) - 1) is not None:
            pass

    def _piece(self, number: int) -> Array | None:
        for earlier in range(len(self._places) - 1, number):
            if self._piece(earlier) is None:
                return None
        if self._places[number].at >= self._stored.size:
            return None
        return self._recent.get((self._key, number), partial(self._decode, number))

    def _decode(self, number: int) -> Array:
        place = self._places[number]
        stored = self._stored[place.at : place.at + self._step]
        positions, carry = {
            "rice": self._rice,
            "bitmask": self._bitmask,
            "gaps": self._gaps,
        }.get(self._coding, self._indices)(stored, place)
        seen, least, end = place.before + positions.size, place.least, place.at + stored.size
        if positions.size:
            first, last = int(positions[0]), int(positions[-1])
            if last >= self._size or first < 0:
                raise InputError(
                    f"position {last if last >= self._size else first} is outside of {self._size} elements"
                )
            least = last + 1
        if seen > self._count or end >= self._stored.size:
            self._check_count(seen)
        with self._adding:
            if len(self._places) == number + 1:
                self._places.append(_Place(least, end, seen, carry))
        return positions

    def _check_count(self, seen: int) -> None:
        if seen != self._count:
            said = "list more than" if seen > self._count else f"lists {seen} entries, not"
            raise InputError(f"{self._coding} {said} {self._count}")

    def _indices(self, stored: Array, place: _Place) -> tuple[Array, int]:
        positions = stored.astype(np.int64)
        if positions[0] <= place.carry or (positions[1:] <= positions[:-1]).any():
            raise InputError("indices are not ascending and unique")
        return positions, int(positions[-1])

    def _bitmask(self, stored: Array, place: _Place) -> tuple[Array, int]:
        positions = np.flatnonzero(np.unpackbits(stored, bitorder="little").view(bool))
        positions += place.at << 3
        return positions, 0

    def _gaps(self, stored: Array, place: _Place) -> tuple[Array, int]:
        positions = np.cumsum(stored, dtype=np.int64)
        end = place.carry + int(positions[-1])
        positions = positions[stored != ESCAPE]
        positions += np.arange(place.carry, place.carry + positions.size)
        if stored[-1] == ESCAPE and place.at + stored.size >= self._stored.size:
            raise InputError("gaps end in an escape")
        return positions, end + positions.size

    def _rice(self, stored: Array, place: _Place) -> tuple[Array, int]:
        # (bit << k) - Σ(2**k - 1 - r) + 2**k - 1 is the position, and 2**k - 1 - r is r with its bits inverted
        done, k, count = place.before, self._k, self._count
        b, planes = k % 8, k // 8
        positions = np.flatnonzero(np.unpackbits(stored, bitorder="little").view(bool))
        stop = done + positions.size
        if stop > count:
            self._check_count(stop)
        positions += (place.at - self._unary_at) << 3
        positions <<= k
        packed = self._stored[self._packed_at + (done >> 3) * b : self._packed_at + -(-stop // 8) * b]
        inverted = _fields(packed, done, stop, b) if b else np.zeros(positions.size, np.uint8)
        if planes:
            inverted = inverted.astype(np.int64)
            inverted <<= 8 * planes
            for j in range(planes):
                inverted |= (~self._stored[j * count + done : j * count + stop]).astype(np.int64) << 8 * j
        sums, total = np.cumsum(inverted, dtype=np.int64), place.carry
        if sums.size:
            sums += total - (1 << k) + 1
            positions -= sums
            total = int(sums[-1]) + (1 << k) - 1
        if not stored[-1] and place.at + stored.size >= self._stored.size:
            raise InputError("rice codes end in padding")
        return positions, total


class _Place(NamedTuple):
    """Where a piece begins.

    least    its positions are at least that
    at       element of the stored array (of rice: of its unary part)
    before   entries before it
    carry    of indices the last position, of gaps the next, of rice the sum of inverted remainders
    """

    least: int
    at: int
    before: int
    carry: int


def _gaps(positions: Array, last: int) -> Array:
    gaps = np.empty(positions.size, np.int64)
    gaps[0] = positions[0] - last
    np.subtract(positions[1:], positions[:-1], out=gaps[1:])
    gaps -= 1
    return gaps


def _set_bits(out: Array, positions: Array) -> None:
    first = int(positions[0]) >> 3
    bits = np.zeros(int(positions[-1]) + 1 - (first << 3), bool)
    bits[positions - (first << 3)] = True
    packed = np.packbits(bits, bitorder="little")
    out[first : first + packed.size] |= packed


def rice_parts(stored: Array, count: int, k: int) -> tuple[list[Array], Array, Array]:
    """Return the planes, the packed bits and the unary bits of rice codes.

    InputError: they are too short for `count`.
    """
    start, stop = rice_offsets(stored.size, count, k)
    planes = [stored[i * count : (i + 1) * count] for i in range(k // 8)]
    return planes, stored[start:stop], stored[stop:]


def rice_offsets(nbytes: int, count: int, k: int) -> tuple[int, int]:
    """Return where the packed bits and the unary bits begin in `nbytes` of rice codes."""
    if not 0 <= k <= LARGEST_K or nbytes < _rice_bytes(count, k, count):
        raise InputError(f"{nbytes} bytes of rice codes, too few for {count} entries")
    start = k // 8 * count
    return start, start + k % 8 * -(-count // 8)


# Eight b-bit fields in b bytes, to eight bytes and back: halves move apart by 32 - 4b bits, then pairs, fields.
def _steps(b: int) -> list[tuple[np.uint64, np.uint64, np.uint64]]:
    steps = []
    for fields in (4, 2, 1):
        width = fields * b
        low = sum(((1 << width) - 1) << 16 * fields * i for i in range(4 // fields))
        shift = 8 * fields - width
        steps.append((np.uint64(low), np.uint64(low << width), np.uint64(shift)))
    return steps


_STEPS = [_steps(b) for b in range(8)]


def _fields(packed: Array, start: int, stop: int, b: int) -> Array:
    """Return the inverted b-bit fields [start, stop) as uint8, from the packed groups of eight that contain them."""
    first, last = start >> 3, -(-stop // 8)
    groups = np.zeros((last - first, 8), np.uint8)
    groups[:, :b] = packed.reshape(-1, b)
    words = groups.view("<u8")[:, 0]
    for low, high, shift in _STEPS[b]:
        upper = words & high
        upper <<= shift
        words &= low
        words |= upper
    words ^= np.uint64(((1 << b) - 1) * 0x0101010101010101)
    return groups.reshape(-1)[start - (first << 3) : stop - (first << 3)]


def _set_fields(packed: Array, start: int, fields: Array, b: int) -> None:
    """Store b-bit `fields` from field number `start` on, where the packed groups are zero."""
    if not b:
        return
    first, last = start >> 3, -(-(start + fields.size) // 8)
    groups = np.zeros((last - first, 8), np.uint8)
    groups.reshape(-1)[start - (first << 3) :][: fields.size] = fields
    words = groups.view("<u8")[:, 0]
    for low, high, shift in reversed(_STEPS[b]):
        words[:] = words & low | words >> shift & high
    packed[first * b : last * b].reshape(-1, b)[...] |= groups[:, :b]
