"""Elementwise steps on torch tiles, shared by all methods: subtract, cast, densify, sums in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from deltamerge.io.dtypes import torch_dtype
from deltamerge.io.lazy import torch
from deltamerge.methods.tiles import RUN, Kept, Patched, Tile, block_elements

if TYPE_CHECKING:
    Tensor = torch.Tensor


def subtract(tune: Tensor, base: Tensor, *, tile: Tile, dtypes: tuple[str, str]) -> Tensor:
    """Δ = fine-tune − base in float32; `dtypes` are the stored ones of the two."""
    return tune.to(torch.float32) - base.to(torch.float32)


def cast(value: Tensor | Patched, *, tile: Tile, to: str) -> Tensor:
    """The value in the output dtype, rounded once to nearest, ties to even."""
    target = torch_dtype(to)
    if not isinstance(value, Patched):
        return _rounded(value, target)
    result = value.base.clone() if value.base.dtype == target else _rounded(value.base, target)
    _indexed(result)[value.positions] = _indexed(_rounded(value.values, target))
    return result


def at(stored: Tensor, positions: Tensor) -> Tensor:
    """A stored tile's entries at positions, in float32."""
    return _indexed(stored)[positions].view(stored.dtype).to(torch.float32)


def _indexed(stored: Tensor) -> Tensor:
    """The tile itself, or the bytes of one of float8, which has kernels for indices only on some devices."""
    return stored.view(torch.uint8) if stored.element_size() == 1 else stored


def put_back(value: Tensor, stored: Tensor, where: Tensor, *, tile: Tile, to: str) -> Tensor:
    """The value, in the output dtype, with stored entries where `where` is not 0.

    value    the merged tile
    stored   the tile that entries are taken from, bit for bit if it has the output dtype
    where    the mask
    to       the output dtype
    """
    return stored.to(torch_dtype(to)).where(where.bool(), value)


def _rounded(value: Tensor, target: torch.dtype) -> Tensor:
    """Round once; a NaN has the same bits on every device: 0x7FC0 in bfloat16, 0x7E00 in float16, in others torch's."""
    result = value.to(target)
    if result.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return result
    if result is value:
        return result.masked_fill(value.isnan(), torch.nan)
    return result.masked_fill_(value.isnan(), torch.nan)


def zeros(like: Tensor | Kept, *, tile: Tile) -> Tensor:
    """A tile of float32 zeros, on the device of `like`."""
    values = like.values if isinstance(like, Kept) else like
    return torch.zeros(tile.size, dtype=torch.float32, device=values.device)


def dense(delta: Any, *, tile: Tile) -> Tensor:
    """A delta as a dense float32 tile."""
    return densify(delta, tile.size)


def over(x: Tensor, divisor: float) -> Tensor:
    """x / divisor in float32; the divisor becomes a tensor, since torch multiplies by the reciprocal of a
    plain number. It is made on the device: nothing waits for it."""
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def union(base: Any, deltas: tuple[Any, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Sparse deltas (`Kept`) on the union of their positions: (positions, base there in float32, each delta there)."""
    positions = torch.unique(torch.cat([d.positions for d in deltas]))
    there = []
    for delta in deltas:
        dense = torch.zeros(positions.numel(), dtype=torch.float32, device=positions.device)
        dense[torch.searchsorted(positions, delta.positions)] = delta.values
        there.append(dense)
    return positions, at(base, positions), there


def onto(base: Tensor, deltas: tuple[Any, ...], tile: Tile, mix: Callable[[list[Tensor]], Tensor]) -> Tensor | Patched:
    """base + mix(deltas) in float32; `Patched` on the union of their positions where all deltas are `Kept`."""
    if all(isinstance(delta, Kept) for delta in deltas):
        positions, base_there, there = union(base, deltas)
        return Patched(base, positions, base_there + mix(there))
    return base.to(torch.float32) + mix([densify(delta, tile.size) for delta in deltas])


def densify(delta: Any, size: int) -> Tensor:
    """A delta as a flat float32 tensor, zero where `Kept` has no entry."""
    if not isinstance(delta, Kept):
        return delta  # type: ignore[no-any-return]  # a dense tile already
    dense = torch.zeros(size, dtype=torch.float32, device=delta.values.device)
    dense[delta.positions] = delta.values
    return dense


def block_rows(values: Tensor, tile: Tile) -> Tensor:
    """(blocks, width) the blocks of a flat tile, each padded with zeros to a power of two."""
    step = block_elements(tile.shape)
    blocks = -(-tile.size // step)
    rows = torch.nn.functional.pad(values, (0, blocks * step - tile.size)).view(blocks, step)
    return torch.nn.functional.pad(rows, (0, (1 << max(0, (step - 1).bit_length())) - step))


def halved(rows: Tensor) -> Tensor:
    """The sum of each row by halving, padded with zeros to a power of two, so that every device adds in the same order.

    Rows of more than `RUN` entries are cut into runs; the sums of the runs, each padded to full length, are added
    likewise.
    """
    size = rows.shape[-1]
    if size > RUN:
        runs = -(-size // RUN)
        padded = torch.nn.functional.pad(rows, (0, runs * RUN - size))
        return halved(halved(padded.view(*rows.shape[:-1], runs, RUN)))
    width = 1 << max(0, (size - 1).bit_length())
    rows = torch.nn.functional.pad(rows, (0, width - size))
    while width > 1:
        width //= 2
        rows = rows[..., :width] + rows[..., width:]
    return rows[..., 0]


def alike(values: Tensor, tile: Tile) -> Iterator[Tensor]:
    """The blocks of a flat tile as rows (blocks, size): all whole ones at once, then one that is shorter, if any."""
    step = block_elements(tile.shape)
    whole = tile.size // step * step
    if whole:
        yield values[:whole].view(-1, step)
    if whole < tile.size:
        yield values[whole:].view(1, -1)


def row_length_of(tile: Tile, size: int) -> int:
    """The length of the rows inside a block of `size` entries: that of the last dimension.

    A vector, or a part of one with more than 2**16 elements, is one row, as is a part of a row of more than 2**20.
    """
    columns = tile.shape[-1] if len(tile.shape) > 1 else 0
    return columns if 0 < columns <= size and size % columns == 0 else size
