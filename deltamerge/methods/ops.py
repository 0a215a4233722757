"""Elementwise steps on torch tiles, shared by all methods: subtract, cast, put deltas onto the base."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import operations
from deltamerge.tensors.dtypes import torch_dtype
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import Kept, Patched
from deltamerge.tensors.tiles import alike as alike
from deltamerge.tensors.tiles import block_rows as block_rows
from deltamerge.tensors.tiles import densify as densify
from deltamerge.tensors.tiles import halved as halved
from deltamerge.tensors.tiles import row_length_of as row_length_of
from deltamerge.tensors.traits import name_of, traits

if TYPE_CHECKING:
    from deltamerge.engine.fused.operations import Assembly
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Tile

    Tensor = torch.Tensor


def _cast_loop(assembly: Assembly, node: Node, to: str) -> None:
    operations.store(assembly, node.inputs[0])


def _ends(node: Node, root: Node) -> bool:
    """Tell whether a cast makes the output, in its dtype."""
    return node is root and node.parameter("to") == root.dtype


def _zeros_loop(assembly: Assembly, node: Node) -> None:
    assembly.zeros.add(id(node))


@traits(loop=operations.subtract)
def subtract(tune: Tensor, base: Tensor, *, tile: Tile, dtypes: tuple[str, str]) -> Tensor:
    """Return Δ = fine-tune − base in float32. `dtypes` are the stored dtypes of both."""
    return tune.to(torch.float32) - base.to(torch.float32)


def is_difference(node: Node) -> bool:
    """Tell whether a node is the difference of two stored tensors, which takes no more work than reading them."""
    stored = all(one.kind == "stored" for one in node.inputs)
    return stored and node.function == name_of(subtract)


@traits(loop=_cast_loop, fits=_ends, stores=True)
def cast(value: Tensor | Patched, *, tile: Tile, to: str) -> Tensor:
    """Return the value in the output dtype, rounded once to nearest, ties to even."""
    target = torch_dtype(to)
    if not isinstance(value, Patched):
        return _rounded(value, target)
    result = value.base.clone() if value.base.dtype == target else _rounded(value.base, target)
    _indexed(result)[value.positions] = _indexed(_rounded(value.values, target))
    return result


def at(stored: Tensor, positions: Tensor) -> Tensor:
    """Return a stored tile's entries at positions, in float32."""
    return _indexed(stored)[positions].view(stored.dtype).to(torch.float32)


def _indexed(stored: Tensor) -> Tensor:
    """Return the tile, or its bytes if it is float8, because only some devices can index float8."""
    return stored.view(torch.uint8) if stored.element_size() == 1 else stored


def put_back(value: Tensor, stored: Tensor, where: Tensor, *, tile: Tile, to: str) -> Tensor:
    """Return the value, in the output dtype, with stored entries where `where` is not 0.

    value    the merged tile
    stored   the tile with the stored entries, taken bit for bit if it has the output dtype
    where    the mask
    to       the output dtype
    """
    return stored.to(torch_dtype(to)).where(where.bool(), value)


def _rounded(value: Tensor, target: torch.dtype) -> Tensor:
    """Round once. A NaN has the same bits on every device: 0x7FC0 in bfloat16, 0x7E00 in float16, else torch's bits."""
    result = value.to(target)
    if result.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        return result
    if result is value:
        return result.masked_fill(value.isnan(), torch.nan)
    return result.masked_fill_(value.isnan(), torch.nan)


@traits(loop=_zeros_loop)
def zeros(like: Tensor | Kept, *, tile: Tile) -> Tensor:
    """Return a tile of float32 zeros, on the device of `like`."""
    values = like.values if isinstance(like, Kept) else like
    return torch.zeros(tile.size, dtype=torch.float32, device=values.device)


def dense(delta: Any, *, tile: Tile) -> Tensor:
    """Return a delta as a dense float32 tile."""
    return densify(delta, tile.size)


def over(x: Tensor, divisor: float) -> Tensor:
    """Return x / divisor in float32.

    The divisor becomes a tensor on the device, because torch multiplies by the reciprocal of a plain number.
    """
    return x / torch.full((), divisor, dtype=x.dtype, device=x.device)


def union(base: Any, deltas: tuple[Any, ...]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Put deltas (`Kept`) on the union of their positions: (positions, base there in float32, each delta there)."""
    positions = torch.unique(torch.cat([d.positions for d in deltas]))
    there = []
    for delta in deltas:
        dense = torch.zeros(positions.numel(), dtype=torch.float32, device=positions.device)
        dense[torch.searchsorted(positions, delta.positions)] = delta.values
        there.append(dense)
    return positions, at(base, positions), there


def onto(base: Tensor, deltas: tuple[Any, ...], tile: Tile, mix: Callable[[list[Tensor]], Tensor]) -> Tensor | Patched:
    """Return base + mix(deltas) in float32; `Patched` on the union of their positions where all deltas are `Kept`."""
    if all(isinstance(delta, Kept) for delta in deltas):
        positions, base_there, there = union(base, deltas)
        return Patched(base, positions, base_there + mix(there))
    return base.to(torch.float32) + mix([densify(delta, tile.size) for delta in deltas])
