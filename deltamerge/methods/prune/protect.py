"""Protected input columns of a delta: removed before a mask is drawn, and restored whole and unscaled after q.

Source: arXiv 2410.09344, App. D.2 (massive activations).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltamerge.engine.fused import codes
from deltamerge.methods.ops import at
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import Kept
from deltamerge.tensors.traits import first_is_dense, first_is_sparse, traits

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from deltamerge.engine.fused.operations import Assembly
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Tile

    Columns = NDArray[np.int64]


def _replace_columns(assembly: Assembly, node: Node, columns: Node, others: int) -> None:
    """Take the given columns from register `others`, or set them to 0 (-1)."""
    delta, numbers = assembly.register(node.inputs[0]), tuple(assembly.values[id(columns)].tolist())
    fields = (delta, others, assembly.form.row)
    assembly.add(codes.COLUMNS, assembly.made(node), *fields, lists=numbers, count=len(numbers))


def _clear_loop(assembly: Assembly, node: Node) -> None:
    _replace_columns(assembly, node, node.inputs[1], -1)


def _restore_loop(assembly: Assembly, node: Node) -> None:
    _, tune, base, columns = node.inputs
    whole = assembly.new()
    assembly.add(codes.SUBTRACT, whole, assembly.operand(tune), assembly.operand(base))
    _replace_columns(assembly, node, columns, whole)
    assembly.free.append(whole)


@traits(loop=_clear_loop, fits=first_is_dense, sparse=first_is_sparse)
def clear(delta: torch.Tensor | Kept, columns: Columns, *, tile: Tile) -> torch.Tensor | Kept:
    """Return Δ of a matrix (out, in) with 0 in the given, ascending columns."""
    if isinstance(delta, Kept):
        inside = torch.from_numpy(is_among(columns, tile)).to(delta.positions.device)
        stays = ~inside[(delta.positions + tile.start) % tile.columns]
        return Kept(delta.positions[stays], delta.values[stays])
    cleared = delta.clone()
    cleared[torch.from_numpy(places(columns, tile)).to(delta.device)] = 0.0
    return cleared


@traits(loop=_restore_loop, fits=first_is_dense, sparse=first_is_sparse)
def restore(
    delta: torch.Tensor | Kept, tune: torch.Tensor, base: torch.Tensor, columns: Columns, *, tile: Tile
) -> torch.Tensor | Kept:
    """Return the kept entries of a delta, with fine-tune − base in the columns that `clear` took out.

    delta     the kept entries
    tune      tile in its stored dtype
    base      tile in its stored dtype
    columns   ascending
    """
    there = torch.from_numpy(places(columns, tile)).to(tune.device)
    values = at(tune, there) - at(base, there)
    if isinstance(delta, Kept):
        positions, order = torch.cat([delta.positions, there]).sort()
        return Kept(positions, torch.cat([delta.values, values])[order])
    restored = delta.clone()
    restored[there] = values
    return restored


def is_among(columns: Columns, tile: Tile) -> NDArray[np.bool_]:
    """Tell for each of n columns whether it is in `columns`."""
    among = np.zeros(tile.columns, np.bool_)
    among[columns] = True
    return among


def places(columns: Columns, tile: Tile) -> Columns:
    """Return the positions of the columns' entries from the tile's start. A tile may begin and end inside a row."""
    rows = np.arange(tile.start // tile.columns, -(-tile.stop // tile.columns), dtype=np.int64)
    flat = (rows[:, None] * tile.columns + columns).reshape(-1)
    return flat[(flat >= tile.start) & (flat < tile.stop)] - tile.start
