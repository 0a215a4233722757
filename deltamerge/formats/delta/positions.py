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
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from deltamerge.errors import InputError

Array = npt.NDArray[Any]
Coding = Literal["dense", "indices", "bitmask", "gaps", "rice"]

CODINGS: tuple[Coding, ...] = ("dense", "indices", "bitmask", "gaps", "rice")
LARGEST_K = 40  # so that the positions of a piece stay below 2**62
SPAN = 1 << 17  # entries or bytes decoded at once, so that temporaries stay in cache
ESCAPE = 255
_QUOTIENTS = np.arange(ESCAPE) >> np.arange(LARGEST_K + 1)[:, None]


@dataclass(slots=True)
class Gaps:
    """What the sizes of the codings depend on, counted tile by tile over ascending positions."""

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
        """Bits of rice's unary part, count + Σ(gap >> k), for every k."""
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
        """The positions, tile by tile."""
        return map(self.piece, range(len(self.packed)))

    def piece(self, number: int) -> Array:
        """The positions of one tile."""
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
    """Bits per element of a tensor of which `density` is stored at random positions: p v + H(p), or v if dense."""
    p = density
    entropy = -p * math.log2(p) - (1 - p) * math.log2(1 - p) if 0 < p < 1 else 0.0
    return min(p * value_bits + entropy, value_bits)


def uniform_density(bits: float, value_bits: int) -> float:
    """The density that takes `bits` per element."""
    if expected_bits(1.0, value_bits) <= bits:
        return 1.0
    low, high = 1e-9, 1.0
    for _ in range(50):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if expected_bits(middle, value_bits) <= bits else (low, middle)
    return low


def index_itemsize(size: int) -> int:
    """Bytes of one flat index into `size` elements."""
    return 4 if size < 1 << 31 else 8


def _rice_bytes(count: int, k: int, unary_bits: int) -> int:
    return k // 8 * count + k % 8 * -(-count // 8) + -(-unary_bits // 8)


def most_bytes(coding: Coding, count: int, size: int, k: int) -> int:
    """The bytes that the positions of `count` of `size` elements can take at most."""
    if coding == "rice":
        return _rice_bytes(count, k, count + (size >> k))
    if coding == "gaps":
        return count + size // ESCAPE
    return -(-size // 8) if coding == "bitmask" else index_itemsize(size) * count


def choose(gaps: Gaps, size: int, value_bits: int, *, fill: bool, allowed: Collection[str] = CODINGS) -> ChosenCoding:
    """The coding that takes the fewest bytes, values included; of equals the simplest.

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
    if coding == "rice" and count:
        pieces = _decode_rice(stored, count, k)
    elif coding == "bitmask":
        pieces = _decode_bits(stored)
    elif coding == "gaps":
        pieces = _decode_gaps(stored)
    else:
        pieces = (stored[i : i + SPAN].astype(np.int64) for i in range(0, stored.size, SPAN))
    seen, last = 0, -1
    for positions in pieces:
        if not positions.size:
            continue
        if coding == "indices" and (positions[0] <= last or (positions[1:] <= positions[:-1]).any()):
            raise InputError("indices are not ascending and unique")
        seen += positions.size
        last = int(positions[-1])
        if last >= size or positions[0] < 0:
            raise InputError(f"position {last if last >= size else positions[0]} is outside of {size} elements")
        if seen > count:
            break
        yield positions
    if seen != count:
        raise InputError(f"{coding} list{'s more than' if seen > count else f's {seen} entries, not'} {count}")


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


def _decode_bits(stored: Sliced) -> Iterator[Array]:
    for i in range(0, stored.size, SPAN):
        bits = np.unpackbits(stored[i : i + SPAN], bitorder="little")
        positions = np.flatnonzero(bits.view(bool))
        positions += i << 3
        yield positions


def _decode_gaps(stored: Sliced) -> Iterator[Array]:
    last, codes = -1, np.empty(0, np.uint8)
    for i in range(0, stored.size, SPAN):
        codes = stored[i : i + SPAN]
        entries = codes != ESCAPE
        positions = np.cumsum(codes, dtype=np.int64)
        skipped = int(positions[-1])
        positions = positions[entries]
        positions += np.arange(last + 1, last + 1 + positions.size)
        last += skipped + positions.size
        yield positions
    if codes.size and codes[-1] == ESCAPE:
        raise InputError("gaps end in an escape")


def rice_parts(stored: Array, count: int, k: int) -> tuple[list[Array], Array, Array]:
    """The planes, the packed bits and the unary bits of rice codes. InputError: they are too short for `count`."""
    start, stop = rice_offsets(stored.size, count, k)
    planes = [stored[i * count : (i + 1) * count] for i in range(k // 8)]
    return planes, stored[start:stop], stored[stop:]


def rice_offsets(nbytes: int, count: int, k: int) -> tuple[int, int]:
    """Where the packed bits and the unary bits begin in `nbytes` of rice codes."""
    if not 0 <= k <= LARGEST_K or nbytes < _rice_bytes(count, k, count):
        raise InputError(f"{nbytes} bytes of rice codes, too few for {count} entries")
    start = k // 8 * count
    return start, start + k % 8 * -(-count // 8)


def _decode_rice(stored: Sliced, count: int, k: int) -> Iterator[Array]:
    packed_at, unary_at = rice_offsets(stored.size, count, k)
    b, planes = k % 8, k // 8
    done, unary = 0, np.empty(0, np.uint8)
    # (bit << k) - Σ(2**k - 1 - r) + 2**k - 1 is the position, and 2**k - 1 - r is r with its bits inverted
    total = 0
    for i in range(unary_at, stored.size, SPAN >> 2):
        unary = stored[i : i + (SPAN >> 2)]
        bits = np.unpackbits(unary, bitorder="little")
        positions = np.flatnonzero(bits.view(bool))
        stop = done + positions.size
        if stop > count:
            raise InputError(f"rice lists more than {count} entries")
        positions += (i - unary_at) << 3
        positions <<= k
        packed = stored[packed_at + (done >> 3) * b : packed_at + -(-stop // 8) * b]
        inverted = _fields(packed, done, stop, b) if b else np.zeros(positions.size, np.uint8)
        if planes:
            inverted = inverted.astype(np.int64)
            inverted <<= 8 * planes
            for j in range(planes):
                inverted |= (~stored[j * count + done : j * count + stop]).astype(np.int64) << 8 * j
        sums = np.cumsum(inverted, dtype=np.int64)
        if sums.size:
            sums += total - (1 << k) + 1
            positions -= sums
            total = int(sums[-1]) + (1 << k) - 1
        done = stop
        yield positions
    if not unary[-1]:
        raise InputError("rice codes end in padding")


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
    """The inverted b-bit fields [start, stop) as uint8, from the packed groups of eight that contain them."""
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
