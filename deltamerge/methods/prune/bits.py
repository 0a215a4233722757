"""Random bits as a pure function of (seed, model, tensor name, flat position).

Philox4x64-10 (Salmon et al., SC 2011; as in `numpy.random.Philox` and Random123) turns a 128-bit key and a
256-bit counter into four 64-bit words. The key is `mask_key`; the counter is (index, block, lane, 0), low word
first, so streams of different lanes and blocks never meet:

    lane 0, 1   high and low 16 bits of every position's 32-bit word: half-word number `position` of the
                little-endian stream of block 0 (16 half-words an index)
    lane 2      gaps between kept positions, one stream for each block of 2**16 positions
    lane 3      one 64-bit draw for each column, block 0
    lane 4      one 64-bit draw for each position of normal or uniform numbers, block 0

Only the density d decides how a mask is drawn. From `SPARSE_BELOW` up, position p is kept iff its word is below
round(d * 2**32); the low half is only read when the high half ties. Below, the number g of dropped positions before
the next kept position has P(g >= k) = (1-d)**k and is drawn by table from 63 bits. A gap beyond the table's end skips
the table's length and draws again (the law has no memory, so this is exact). Everything is integer arithmetic: any
device, tile, thread or order of models gives the same mask.
"""

from __future__ import annotations

import hashlib
import json
import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import SPARSE_BLOCK

if TYPE_CHECKING:
    from numpy.typing import NDArray

Key = tuple[int, int]

SPARSE_BELOW = 1 / 16
LONGEST_GAP = 1 << 16
HIGH, LOW, GAPS, COLUMNS, NUMBERS = range(5)

MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)
WEYL = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
ROUNDS = 10

_MASK32 = (1 << 32) - 1


def mask_key(seed: int, model: str, tensor: str) -> Key:
    """Return the Philox key of a model's tensor: blake2b-128 of the JSON list ["deltamerge mask 1", seed, model,
    tensor]."""
    text = json.dumps(["deltamerge mask 1", seed, model, tensor], separators=(",", ":"))
    digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def is_sparse(density: float) -> bool:
    """Tell whether a mask of this density is drawn by gaps. Its delta is then a `Kept`."""
    return density < SPARSE_BELOW


def threshold(density: float) -> int:
    """Return round(density * 2**32): a position is kept iff its 32-bit word is below (dense regime)."""
    return round(density * 2**32)


@lru_cache(maxsize=64)
def gap_table(density: float) -> NDArray[np.uint64]:
    """Return T[k-1] = floor(2**63 * (1 - (1-density)**k)), k = 1 ... K = min(ceil(4/density), 2**16), by 192-bit
    integers.

    A draw u of 63 bits gives the gap `searchsorted(T, u, "right")`.
    """
    size = LONGEST_GAP if density * LONGEST_GAP <= 4 else math.ceil(4 / density)
    numerator, denominator = density.as_integer_ratio()
    one = 1 << 192
    miss = one - (numerator << 192) // denominator
    power, table = one, np.empty(size, np.uint64)
    for k in range(size):
        power = power * miss >> 192
        table[k] = (one - power) >> 129
    table.setflags(write=False)
    return table


@lru_cache(maxsize=64)
def guided(density: float) -> tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]:
    """Return the gap table with a sentinel, and the least gap for each value of a draw's leading bits."""
    table = gap_table(density)
    leading = min(len(table).bit_length() + 2, 14)
    starts = np.arange(1 << leading, dtype=np.uint64) << np.uint64(63 - leading)
    guide = np.searchsorted(table, starts, side="right").astype(np.uint32)
    return np.append(table, np.uint64(2**64 - 1)), guide, np.uint64(63 - leading)


def _generator(key: Key, index: int, block: int, lane: int) -> np.random.Philox:
    counter = index + (block << 64) + (lane << 128)
    # numpy increments the counter before it is used
    return np.random.Philox(key=key[0] + (key[1] << 64), counter=(counter - 1) % (1 << 256))


def uniforms(key: Key, start: int, stop: int) -> NDArray[np.float64]:
    """Return (2, stop − start) two numbers in (0, 1) for each position: (w + ½) / 2³², w a half of its draw."""
    first = start // 4
    raw = _generator(key, first, 0, NUMBERS).random_raw(4 * (-(-stop // 4) - first))
    raw = raw[start - 4 * first :][: stop - start]
    halves = np.stack([raw >> np.uint64(32), raw & np.uint64(_MASK32)])
    return (halves.astype(np.float64) + 0.5) / 2.0**32


def normals(key: Key, start: int, stop: int) -> NDArray[np.float32]:
    """Return standard normal numbers of positions [start, stop): √(−2 ln u) cos 2πv of their `uniforms` (Box and
    Muller)."""
    u, v = uniforms(key, start, stop)
    found: NDArray[np.float32] = (np.sqrt(-2.0 * np.log(u)) * np.cos(2.0 * np.pi * v)).astype(np.float32)
    return found


def _halves(key: Key, lane: int, start: int, stop: int) -> NDArray[np.uint16]:
    first = start // 16
    raw = _generator(key, first, 0, lane).random_raw(4 * (-(-stop // 16) - first))
    return raw.astype("<u8", copy=False).view("<u2")[start - 16 * first : stop - 16 * first]


def words(key: Key, start: int, stop: int) -> NDArray[np.uint32]:
    """Return the 32-bit words of positions [start, stop)."""
    high = _halves(key, HIGH, start, stop).astype(np.uint32)
    return high << np.uint32(16) | _halves(key, LOW, start, stop)


def keep(key: Key, start: int, stop: int, density: float) -> NDArray[np.bool_]:
    """Return words(key, start, stop) < round(density * 2**32), as bool, at about half the price."""
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        return np.ones(stop - start, np.bool_)
    halves = _halves(key, HIGH, start, stop)
    kept = halves < high
    if low:
        for tie in np.flatnonzero(halves == high).tolist():
            position = start + tie
            kept[tie] = _halves(key, LOW, position, position + 1)[0] < low
    return kept


def positions(key: Key, start: int, stop: int, density: float) -> NDArray[np.int64]:
    """Return the kept positions among [start, stop), ascending, relative to start."""
    if not is_sparse(density):
        return np.flatnonzero(keep(key, start, stop, density)).astype(np.int64, copy=False)
    table, parts = gap_table(density), [np.empty(0, np.int64)]
    for block in range(start // SPARSE_BLOCK, -(-stop // SPARSE_BLOCK)):
        generator, place = _generator(key, 0, block, GAPS), 0
        while place < SPARSE_BLOCK:
            draws = generator.random_raw(_draws(density)) >> np.uint64(1)
            gaps = np.searchsorted(table, draws, side="right")
            kept = gaps < len(table)
            ends = place + np.cumsum(gaps + kept)
            parts.append(_inside(ends[kept] - 1, block * SPARSE_BLOCK, start, stop))
            place = int(ends[-1])
    return np.concatenate(parts)


def _inside(found: NDArray[np.int64], origin: int, start: int, stop: int) -> NDArray[np.int64]:
    first, last = np.searchsorted(found, [start - origin, min(stop - origin, SPARSE_BLOCK)])
    return found[first:last] + (origin - start)


def _draws(density: float) -> int:
    """Return the number of draws at once: a multiple of 4, enough for nearly every block. Masks do not depend on it."""
    mean = density * SPARSE_BLOCK * 1.02
    return 4 * math.ceil((mean + 5 * math.sqrt(mean) + 4) / 4)


@lru_cache(maxsize=64)
def choose_columns(key: Key, n: int, count: int) -> NDArray[np.int64]:
    """Return `count` of n columns, ascending: the columns with the smallest 64-bit draws, the first of equal draws."""
    draws = _generator(key, 0, 0, COLUMNS).random_raw(n)
    columns = np.sort(np.argsort(draws, kind="stable")[:count]).astype(np.int64, copy=False)
    columns.setflags(write=False)
    return columns


def words_torch(key: Key, start: int, stop: int, device: Any = "cpu") -> torch.Tensor:
    """Return `words` as int64 on any device."""
    if torch.device(device).type == "cpu":
        return torch.from_numpy(words(key, start, stop).astype(np.int64))
    return _words_device(key, start, stop, device)


def keep_torch(key: Key, start: int, stop: int, density: float, device: Any = "cpu") -> torch.Tensor:
    """Return `keep` on any device.

    key           the mask's key
    start, stop   positions
    density       share of positions that are kept
    device        device of the result, a bool tensor (stop − start)
    """
    if torch.device(device).type == "cpu":
        return torch.from_numpy(keep(key, start, stop, density))
    return _keep_device(key, start, stop, density, device)


def positions_torch(key: Key, start: int, stop: int, density: float, device: Any = "cpu") -> torch.Tensor:
    """Return `positions` on any device.

    key           the mask's key
    start, stop   positions
    density       share of positions that are kept
    device        device of the result, an ascending int64 tensor
    """
    if torch.device(device).type == "cpu":
        return torch.from_numpy(positions(key, start, stop, density))
    if is_sparse(density):
        return _positions_device(key, start, stop, density, device)
    return _keep_device(key, start, stop, density, device).nonzero().flatten()


def _words_device(key: Key, start: int, stop: int, device: Any) -> torch.Tensor:
    lanes = torch.stack([torch.full((1,), lane, device=device) for lane in (HIGH, LOW)])
    halves = _halves_device(key, lanes, start, stop, device).long() & 0xFFFF
    return halves[0] << 16 | halves[1]


def _keep_device(key: Key, start: int, stop: int, density: float, device: Any) -> torch.Tensor:
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        return torch.ones(stop - start, dtype=torch.bool, device=device)
    # unsigned order of int16: flip the sign bit
    halves, high = _halves_device(key, HIGH, start, stop, device) ^ -0x8000, high - 0x8000
    kept = halves < high
    if low:
        ties = (halves == high).nonzero().flatten()
        position = ties + start
        block = _philox_device(key, position // 16, torch.zeros_like(position), LOW)
        word = block.gather(1, (position // 4 % 4)[:, None]).flatten()
        kept[ties] = (word >> 16 * (position % 4) & 0xFFFF) < low
    return kept


def _positions_device(key: Key, start: int, stop: int, density: float, device: Any) -> torch.Tensor:
    """Return `positions_torch` for all blocks of [start, stop) at once: draws (B, D), gaps by table, places by a
    cumulative sum along D."""
    table = torch.from_numpy(gap_table(density).astype(np.int64)).to(device)
    block_B1 = torch.arange(start // SPARSE_BLOCK, -(-stop // SPARSE_BLOCK), device=device)[:, None]
    place_B1 = torch.zeros_like(block_B1)
    count, index, parts = _draws(density) // 4, 0, [block_B1.new_empty(0)]
    while len(block_B1) and int(place_B1.min()) < SPARSE_BLOCK:
        index_1C = torch.arange(index, index + count, device=device)[None, :]
        draws_BD = _philox_device(key, index_1C, block_B1, GAPS).flatten(1) >> 1 & ((1 << 63) - 1)
        gaps_BD = torch.searchsorted(table, draws_BD, right=True)
        kept_BD = gaps_BD < len(table)
        ends_BD = place_B1 + torch.cumsum(gaps_BD + kept_BD, 1)
        found_BD = block_B1 * SPARSE_BLOCK + ends_BD - 1
        kept_BD &= (ends_BD <= SPARSE_BLOCK) & (found_BD >= start) & (found_BD < stop)
        parts.append(found_BD[kept_BD] - start)
        place_B1, index = ends_BD[:, -1:], index + count
    found = torch.cat(parts)
    return found if len(parts) <= 2 else found.sort().values


def _halves_device(key: Key, lane: int | torch.Tensor, start: int, stop: int, device: Any) -> torch.Tensor:
    """Return the half-words of positions [start, stop), with a row for each of the lanes (n, 1)."""
    first = start // 16
    index = torch.arange(first, -(-stop // 16), device=device)
    halves = _philox_device(key, index, torch.zeros_like(index), lane).view(torch.int16).flatten(-2)
    return halves[..., start - 16 * first : stop - 16 * first]


def _philox_device(key: Key, index: torch.Tensor, block: torch.Tensor, lane: int | torch.Tensor) -> torch.Tensor:
    """Return Philox4x64-10 of counters (index, block, lane, 0): int64 in two's complement, a new last axis of 4 words.

    Both halves of a round are one tensor, so that a GPU launches few kernels.
    """
    lanes = lane if isinstance(lane, torch.Tensor) else torch.full_like(index, lane)
    shape = torch.broadcast_shapes(index.shape, block.shape, lanes.shape)  # type: ignore[no-untyped-call]  # torch
    index, block, lanes = index.expand(shape), block.expand(shape), lanes.expand(shape)

    def pair(numbers: tuple[int, int]) -> torch.Tensor:
        return torch.stack([torch.full((1,) * index.dim(), _signed(x), device=index.device) for x in numbers])

    factors, keys, weyl = pair(MULTIPLIERS), pair(key), pair(WEYL)
    limbs = factors & _MASK32, factors >> 32 & _MASK32
    even, odd = torch.stack([index, lanes]), torch.stack([block, torch.zeros_like(index)])
    for _ in range(ROUNDS):
        high, low = _multiply(even, factors, *limbs)
        even, odd = high.flip(0) ^ odd ^ keys, low.flip(0)
        keys = keys + weyl
    return torch.stack([even[0], odd[0], even[1], odd[1]], -1)


def _multiply(
    a: torch.Tensor, b: torch.Tensor, b_low: torch.Tensor, b_high: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return high and low 64 bits of the unsigned product, by the 32-bit limbs of b; sums wrap as two's complement."""
    a_low, a_high = a & _MASK32, a >> 32 & _MASK32
    middle = (a_low * b_low >> 32 & _MASK32) + a_high * b_low
    cross = (middle & _MASK32) + a_low * b_high
    return a_high * b_high + (middle >> 32 & _MASK32) + (cross >> 32 & _MASK32), a * b


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
