"""The encoding `steps`: the changes of a tensor of bfloat16 or float16, given the base's.

Elements are taken in tiles of 2**20, each by itself. The changing elements are coded apart for each group of
neighbouring exponents of the base: an element of a small exponent changes more often, as its unit in the last place is
smaller. A change is a step in the order of all bit patterns, from the negative NaNs over -inf, -0 and +0 to the
positive NaNs, modulo 2**16. docs/reference/delta-format.md has the bytes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.formats.delta.positions import Array, Sliced

LARGEST_RICE = 20
LARGEST_WIDE = 15
LARGEST_VALUE = (1 << 20) - 1  # of a list
PADDING = 8  # bytes behind bits that the kernels may touch
DAMAGED = "its bits are damaged"
_LENGTHS = np.frexp(np.arange(1 << 16))[1].astype(np.uint8)  # in bits, of the numbers below 2**16


def best_rice(values: Array) -> tuple[int, int]:
    """Return the k of the fewest bits for uint32 `values`, and these bits; the smallest of equals."""
    total = int(values.sum(dtype=np.int64))
    middle = (total // values.size).bit_length() - 1
    ks = range(max(0, min(middle - 1, LARGEST_RICE - 2)), max(0, min(middle + 2, LARGEST_RICE)) + 1)
    sums = (
        (total if k == 0 else int((values >> np.uint32(k)).sum(dtype=np.int64))) + (k + 1) * values.size for k in ks
    )
    nbits, k = min(zip(sums, ks, strict=True))
    return k, nbits


def best_wide(values: Array) -> tuple[int, int]:
    """Return the same of wide rice, for values below 2**15."""
    top = min(LARGEST_WIDE, int(values.max()).bit_length())
    shifted = ((k, _LENGTHS[values + np.uint32(1 << k)].astype(np.int64)) for k in range(top + 1))
    nbits, k = min((int((2 * lengths - k - 1).sum()), k) for k, lengths in shifted)
    return k, nbits


class BitWriter:
    """Bits written list by list; at most `capacity` of them."""

    def __init__(self, capacity: int) -> None:
        self._native = kernels.native()
        self._at = 0
        self._parts: list[Array] = []
        self._bytes = np.zeros(-(-capacity // 8) + 2 * PADDING if self._native else 0, np.uint8)

    def put(self, values: Array, k: int, *, wide: bool = False) -> None:
        """A list of uint32 `values`."""
        if self._native is not None:
            self._at = self._native.steps_pack(values, self._bytes, k, int(wide), self._at)
            assert self._at >= 0
            return
        values = values.astype(np.int64)
        whole = values + (1 << k) if wide else values
        zeros = _LENGTHS[whole].astype(np.int64) - 1 - k if wide else values >> k
        widths = zeros + k if wide else np.full_like(zeros, k)
        unary = np.zeros(int(zeros.sum()) + zeros.size, bool)
        unary[np.cumsum(zeros + 1) - 1] = True
        starts = np.cumsum(widths) - widths
        places = np.arange(int(widths.sum())) - np.repeat(starts, widths)
        self._parts += [unary, (np.repeat(whole, widths) >> places & 1).astype(bool)]

    def put_bits(self, bits: Array) -> None:
        """Bits (bool), one for each."""
        if self._native is None:
            self._parts.append(bits)
            return
        packed = np.packbits(np.concatenate([np.zeros(self._at & 7, bool), bits]), bitorder="little")
        self._bytes[self._at >> 3 :][: packed.size] |= packed
        self._at += bits.size

    def bytes(self) -> Array:
        """Return all of it, with zeros to the end of the last byte."""
        if self._native is None:
            return np.packbits(np.concatenate([np.zeros(0, bool), *self._parts]), bitorder="little")
        return self._bytes[: -(-self._at // 8)]


class BitReader:
    """Reads the bits of a BitWriter from `stored` (uint8). InputError: there are too few bits, or numbers too large."""

    def __init__(self, stored: Array) -> None:
        self._native = kernels.native()
        self._at = 0
        self._size = 8 * stored.size
        self._stored = np.concatenate([stored, np.zeros(PADDING, np.uint8)])
        self._bits = np.empty(0, bool)
        if self._native is None:
            self._bits = np.unpackbits(stored, bitorder="little").view(bool)

    def take(self, count: int, k: int, *, wide: bool = False) -> Array:
        """Return the next list, of `count` uint32 numbers."""
        if count > self._size - self._at:  # a number has a bit at least: a stranger's claim is not allocated
            raise InputError(DAMAGED)
        if self._native is not None:
            out = np.empty(count, np.uint32)
            self._at = self._native.steps_unpack(self._stored, out, k, int(wide), self._at, LARGEST_VALUE)
            if self._at < 0:
                raise InputError(DAMAGED)
            return out
        ones = np.flatnonzero(self._bits[self._at :])[:count]
        if ones.size < count:
            raise InputError(DAMAGED)
        zeros = np.diff(ones, prepend=-1) - 1
        widths = zeros + k if wide else np.full_like(zeros, k)
        at = self._at + (int(ones[-1]) + 1 if count else 0)
        starts = at + np.cumsum(widths) - widths
        self._at = at + int(widths.sum())
        if self._at > self._size or widths.max(initial=0) > LARGEST_RICE or zeros.max(initial=0) > LARGEST_VALUE:
            raise InputError(DAMAGED)
        first = starts >> 3
        words = sum(self._stored[first + i].astype(np.int64) << 8 * i for i in range(4))
        fields = words >> (starts & 7) & (1 << widths) - 1
        values: Array = (1 << widths) + fields - (1 << k) if wide else (zeros << k) + fields
        if values.max(initial=0) > LARGEST_VALUE:
            raise InputError(DAMAGED)
        return values.astype(np.uint32)

    def take_bits(self, count: int) -> Array:
        """Return the next `count` bits (bool)."""
        if count > self._size - self._at:
            raise InputError(DAMAGED)
        start, self._at = self._at, self._at + count
        if self._native is None:
            bits: Array = self._bits[start : self._at]
            return bits
        part = np.unpackbits(self._stored[start >> 3 : -(-self._at // 8)], bitorder="little").view(bool)
        return part[start & 7 :][:count]

    def end(self) -> None:
        """InputError: something is left but zeros to the end of a byte."""
        rest = self._stored[-(-self._at // 8) : -PADDING]
        last = self._stored[self._at >> 3] >> (self._at & 7) if self._at & 7 else 0
        if rest.size or last:
            raise InputError(DAMAGED)


STEP_TILE = 1 << 20
MANTISSA = {"BF16": 7, "F16": 10}  # the dtypes that have steps, and the bits below their exponent
EXPONENTS = 256
NO_GROUP = 255
MOST_GROUPS = 254
LARGEST_EXCESS = (1 << 15) - 2
_INVERTED = 64
_SIGN = np.uint16(0x8000)


@dataclass(frozen=True, slots=True)
class _List:
    """A list of gaps in a header: the number of entries, rice's k, and whether it lists the elements not chosen."""

    listed: int = 0
    k: int = 0
    inverted: bool = False

    def chosen(self, size: int) -> int:
        """Return how many of `size` it chooses. InputError: more than there are."""
        if self.listed > size:
            raise InputError("it lists more elements than there are")
        return size - self.listed if self.inverted else self.listed


@dataclass(frozen=True, slots=True)
class _Group:
    """A group in the header of a tile.

    last      its largest exponent
    changed   its elements that change
    large     the changed elements that move by more than one step; and wide rice's k for their steps, less 2
    """

    last: int
    changed: _List
    large: _List = _List()
    excess_k: int = 0


def ordered(bits: Array) -> Array:
    """Return the places of bit patterns in their order, both uint16."""
    places: Array = bits ^ ((bits.view(np.int16) >> 15).view(np.uint16) | _SIGN)
    return places


def unordered(places: Array) -> Array:
    """Return the bit patterns of places, both uint16."""
    bits: Array = places ^ ((~places.view(np.int16) >> 15).view(np.uint16) | _SIGN)
    return bits


def encode_tile(base: Array, positions: Array, values: Array, dtype: str) -> Array:
    """Return the bytes of a tile (uint8); none if nothing changes.

    base        its bits (uint16)
    positions   int64, ascending, of the elements that change
    values      their new bits, all of them different from the base's
    """
    if not positions.size:
        return np.empty(0, np.uint8)
    before = base[positions]
    steps = (ordered(values) - ordered(before)).view(np.int16)
    sizes = np.abs(steps.astype(np.int32))
    exponents = _exponents(before, dtype)
    counts = _count(base, dtype)
    lasts = _choose_groups(counts, exponents, sizes > 1)
    group_of = _group_of(lasts)
    ids = group_of[exponents]
    ranks, totals = _rank(base, group_of, positions, dtype), _totals(counts, group_of, len(lasts))
    order = np.argsort(ids, kind="stable")
    ends = np.cumsum(np.bincount(ids, minlength=len(lasts)))
    header, bits = bytearray([len(lasts)]), BitWriter(64 * positions.size + 64 * len(lasts) + base.size)
    for number, (last, stop, total) in enumerate(zip(lasts, ends.tolist(), totals.tolist(), strict=True)):
        own = order[(0 if not number else int(ends[number - 1])) : stop]
        header += bytes([last])
        header += _put_chosen(bits, ranks[own], total)
        if not own.size:
            continue
        bits.put_bits(steps[own] < 0)
        large = np.flatnonzero(sizes[own] > 1)
        header += _put_chosen(bits, large, own.size)
        if large.size:
            excess = (sizes[own][large] - 2).astype(np.uint32)
            k, _ = best_wide(excess)
            header += bytes([k])
            bits.put(excess, k, wide=True)
    return np.concatenate([np.frombuffer(bytes(header), np.uint8), bits.bytes()])


def _put_chosen(bits: BitWriter, chosen: Array, size: int) -> bytes:
    """Write which of `size` are chosen (ascending), or which are not if these are fewer; the header's bytes."""
    inverted = 2 * chosen.size > size
    if inverted:
        mask = np.ones(size, bool)
        mask[chosen] = False
        chosen = np.flatnonzero(mask)
    head = _varint(chosen.size)
    if not chosen.size:
        return head + bytes([_INVERTED * inverted])
    gaps = np.diff(chosen.astype(np.int64), prepend=-1)
    gaps -= 1
    values = gaps.astype(np.uint32)
    k, _ = best_rice(values)
    bits.put(values, k)
    return head + bytes([k + _INVERTED * inverted])


def decode_tile(stored: Array, base: Array, dtype: str) -> tuple[Array, Array]:
    """Return positions (int64, ascending) in a tile and the bits (uint16) that they get, from the base's bits.

    InputError: `stored` is damaged, or made from another base.
    """
    if not stored.size:
        return np.empty(0, np.int64), np.empty(0, np.uint16)
    groups, begin = _read_header(stored)
    bits = BitReader(stored[begin:])
    group_of = _group_of([group.last for group in groups])
    totals = [base.size] * len(groups)
    if any(group.changed.inverted for group in groups):
        totals = _totals(_count(base, dtype), group_of, len(groups)).tolist()
    listed, steps = [np.empty(0, np.uint32)], [np.empty(0, np.uint16)]
    for group, total in zip(groups, totals, strict=True):
        count = group.changed.chosen(total)
        listed.append(_take_ranks(bits, group.changed.listed, group.changed.k, total))
        negative = bits.take_bits(count)
        sizes = np.ones(count, np.uint16)
        large = _take_ranks(bits, group.large.listed, group.large.k, count)
        which: Any = large
        if group.large.inverted:
            which = np.ones(count, bool)
            which[large] = False
        many = group.large.chosen(count)
        if many:
            excess = bits.take(many, group.excess_k, wide=True)
            if excess.max() > LARGEST_EXCESS:
                raise InputError("it has a step beyond 2**15")
            sizes[which] = excess.astype(np.uint16) + np.uint16(2)
        steps.append(np.where(negative, -sizes, sizes))
    bits.end()
    inverted = np.array([group.changed.inverted for group in groups], np.uint8)
    positions, sources = _place(base, group_of, listed[1:], inverted, [part.size for part in steps[1:]], dtype)
    return positions, unordered(ordered(base[positions]) + np.concatenate(steps)[sources])


def _take_ranks(bits: BitReader, count: int, k: int, size: int) -> Array:
    """Ascending numbers below `size`, of their gaps."""
    gaps = bits.take(count, k)
    ranks = np.cumsum(gaps, dtype=np.int64)
    ranks += np.arange(count)
    if count and ranks[-1] >= size:
        raise InputError("it lists an element that is not there")
    return ranks.astype(np.uint32)


def _read_header(stored: Array) -> tuple[list[_Group], int]:
    """Return the groups of a tile, and where its bits begin."""
    numbers = _Numbers(stored[: 1 + MOST_GROUPS * 12].tobytes())
    groups: list[_Group] = []
    for _ in range(numbers.byte()):
        last = numbers.byte()
        if groups and last <= groups[-1].last:
            raise InputError("its groups are not ascending")
        changed = numbers.list()
        large, excess_k = _List(), 0
        if changed.listed or changed.inverted:
            large = numbers.list()
            if large.listed or large.inverted:
                excess_k = numbers.byte()
        if excess_k > LARGEST_WIDE:
            raise InputError("its k is too large")
        groups.append(_Group(last, changed, large, excess_k))
    if not groups or len(groups) > MOST_GROUPS:
        raise InputError(f"it has {len(groups)} groups")
    return groups, numbers.at


class _Numbers:
    """Reads the header of a tile. InputError: it is cut off, or a number is too large."""

    def __init__(self, stored: bytes) -> None:
        self._stored = stored
        self.at = 0

    def byte(self) -> int:
        if self.at == len(self._stored):
            raise InputError("its header is cut off")
        self.at += 1
        return self._stored[self.at - 1]

    def list(self) -> _List:
        listed = shift = 0
        while (byte := self.byte()) > 127:
            listed |= (byte & 127) << shift
            shift += 7
            if shift > 14:
                break
        listed |= (byte & 127) << shift
        how = self.byte()
        k = how & ~_INVERTED
        if byte > 127 or listed > STEP_TILE or k > LARGEST_RICE or (not listed and k):
            raise InputError("its header is damaged")
        return _List(listed, k, how >= _INVERTED)


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the highest bit is set where another byte follows."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _choose_groups(counts: Array, exponents: Array, large: Array) -> list[int]:
    """Return the last exponents of the groups: neighbours are one group where that is expected to take fewer bits.

    counts      (256) elements of each exponent
    exponents   of the elements that change
    large       which of these change by more than one step
    """
    changed = np.bincount(exponents, minlength=EXPONENTS)
    many = np.bincount(exponents[large], minlength=EXPONENTS)
    present = np.flatnonzero(counts)
    present = present[: int(np.flatnonzero(changed[present])[-1]) + 1]
    triples = np.stack([counts, changed, many], 1)[present].tolist()
    groups = [(last, *triple, _cost(*triple)) for last, triple in zip(present.tolist(), triples, strict=True)]
    while True:
        out: list[tuple[int, int, int, int, float]] = []
        for group in groups:
            if out:
                _, n, k, b, cost = out[-1]
                joined = n + group[1], k + group[2], b + group[3]
                together = _cost(*joined)
                if together <= cost + group[4]:
                    out[-1] = (group[0], *joined, together)
                    continue
            out.append(group)
        if len(out) == len(groups):
            lasts = [group[0] for group in out]
            return lasts if len(lasts) <= MOST_GROUPS else [*lasts[: MOST_GROUPS - 1], lasts[-1]]
        groups = out


def _cost(size: int, changed: int, large: int) -> float:
    """Expected bits of a group: its header, which elements change, which change by more than one step."""
    if not changed:
        return 24.0
    return (48.0 if large else 40.0) + _entropy(size, changed) + _entropy(changed, large)


def _entropy(size: int, chosen: int) -> float:
    """Return bits to say which are chosen, to whole 1/64 of a bit, so that no rounding of a logarithm decides."""
    nats = [n * math.log2(n) if n else 0.0 for n in (size, chosen, size - chosen)]
    return round(64 * (nats[0] - nats[1] - nats[2])) / 64


def _exponents(bits: Array, dtype: str) -> Array:
    mantissa = MANTISSA[dtype]
    return (bits >> mantissa & ((1 << 15 - mantissa) - 1)).astype(np.uint8)


def _group_of(lasts: list[int]) -> Array:
    """(256) the group of each exponent."""
    lower = np.searchsorted(np.array(lasts), np.arange(EXPONENTS))
    return np.where(lower < len(lasts), lower, NO_GROUP).astype(np.uint8)


def _numbers(dtype: str) -> tuple[int, int]:
    mantissa = MANTISSA[dtype]
    return mantissa, (1 << 15 - mantissa) - 1


def _count(base: Array, dtype: str) -> Array:
    """(256) how many elements have each exponent."""
    native = kernels.native()
    if native is None:
        return np.bincount(_exponents(base, dtype), minlength=EXPONENTS)
    counts = np.empty(EXPONENTS, np.int64)
    native.steps_count(base, counts, *_numbers(dtype))
    return counts


def _totals(counts: Array, group_of: Array, groups: int) -> Array:
    """Return how many elements each group has."""
    return np.bincount(group_of, counts, EXPONENTS)[:groups].astype(np.int64)


def _rank(base: Array, group_of: Array, positions: Array, dtype: str) -> Array:
    """Of each of `positions` how many elements of its group stand before it (uint32)."""
    native = kernels.native()
    ranks = np.empty(positions.size, np.uint32)
    if native is not None:
        if not native.steps_rank(base, group_of, positions, ranks, *_numbers(dtype)):
            raise ValueError("positions are not ascending")
        return ranks
    ids = group_of[_exponents(base, dtype)]
    own = ids[positions]
    for group in np.unique(own):
        ranks[own == group] = np.searchsorted(np.flatnonzero(ids == group), positions[own == group])
    return ranks


def _place(
    base: Array, group_of: Array, listed: list[Array], inverted: Array, counts: list[int], dtype: str
) -> tuple[Array, Array]:
    """Return the positions of the elements that change, and the number of each change in the order of the groups.

    listed     ranks (uint32) of each group
    inverted   (uint8) whether these are the elements that do not change
    counts     changes of each group
    """
    firsts = np.cumsum(counts) - counts
    native = kernels.native()
    if native is not None:
        starts = np.concatenate([[0], np.cumsum([part.size for part in listed])]).astype(np.int64)
        positions, sources = np.empty((2, sum(counts)), np.int64)
        found = native.steps_place(
            base, group_of, np.concatenate(listed), starts, inverted, firsts, positions, sources, *_numbers(dtype)
        )
        if found != positions.size:
            raise InputError("it belongs to another base")
        return positions, sources
    ids = group_of[_exponents(base, dtype)]
    parts = []
    for number, ranks in enumerate(listed):
        own = np.flatnonzero(ids == number)
        if ranks.size and ranks[-1] >= own.size:
            raise InputError("it belongs to another base")
        if inverted[number]:
            mask = np.ones(own.size, bool)
            mask[ranks] = False
            parts.append(own[mask])
        else:
            parts.append(own[ranks])
        if parts[-1].size != counts[number]:
            raise InputError("it belongs to another base")
    positions = np.concatenate(parts)
    sources = np.argsort(positions, kind="stable")
    return positions[sources], sources


def table_bytes(size: int) -> int:
    """Return the bytes of the lengths (a uint32 a tile) before the tiles of a tensor of `size` elements."""
    return -(-size // STEP_TILE) * 4


def most_step_bytes(size: int) -> int:
    """Return the bytes that steps of a tensor can take at most: more than its values they never do."""
    return 2 * size


def starts_of(stored: Sliced, size: int) -> Array:
    """Return where each tile's bytes begin, and the last ends. InputError: they do not fill `stored`."""
    begin = table_bytes(size)
    lengths = stored[: min(begin, stored.size)].view(np.uint8)
    if lengths.size == begin:
        starts: Array = np.concatenate([[0], np.cumsum(lengths.view("<u4"), dtype=np.int64)]) + begin
        if starts[-1] == stored.size:
            return starts
    raise InputError(f"steps of {stored.size} bytes do not have {begin // 4} tiles")
