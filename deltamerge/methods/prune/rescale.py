"""The divisor of kept entries (q, or mergekit's ratio of norms), and the factors that give deltas one length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.operations import Assembly, spread
from deltamerge.methods.ops import over
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.tiles import Kept, block_rows, densify, halved
from deltamerge.tensors.traits import first_is_sparse, traits

if TYPE_CHECKING:
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Make, Tile


def _divide_loop(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, sparse = assembly.values[id(divisor)], assembly.kept.get(id(delta))
    if sparse is not None:
        kept = assembly.keep(node, sparse.places)
        assembly.add(codes.DIVIDE, kept.register, sparse.register, sparse.places, scalars=(q, 1.0))
        return
    source, last = assembly.register(delta), assembly.operations[-1]
    undivided = (last.code, last.to, last.scalars[0]) == (codes.DROP, source, 1.0)
    if undivided and assembly.uses[id(delta)] == 1 and q > 0:  # a dropped entry stays +0
        assembly.operations[-1] = replace(last, scalars=(q, 1.0))
        assembly.registers[id(node)] = assembly.registers.pop(id(delta))
        return
    assembly.add(codes.DIVIDE, assembly.made(node), source, scalars=(q, 1.0))


@traits(loop=_divide_loop, sparse=first_is_sparse)
def divide(delta: torch.Tensor | Kept, q: float, *, tile: Tile) -> torch.Tensor | Kept:
    """Return kept / q in float32 (DAREx, section 3).

    Vanilla DARE is q = density, "random drop" and importance masks q = 1.
    """
    if isinstance(delta, Kept):
        return Kept(delta.positions, over(delta.values, q))
    return over(delta, q)


def _divide_rows_loop(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, sparse = assembly.values[id(divisor)], assembly.kept.get(id(delta))
    if isinstance(q, float):
        _divide_loop(assembly, node)
        return
    how = int(q.shape[-1] != 1)
    if not how:
        q = row_divisors(q, node.shape)
    if sparse is not None:
        kept = assembly.keep(node, sparse.places)
        spread(assembly, kept.register, sparse.register, q, how, (sparse.places,))
    else:
        source = assembly.register(delta)
        spread(assembly, assembly.made(node), source, q, how)


@traits(loop=_divide_rows_loop, sparse=first_is_sparse)
def divide_rows(delta: torch.Tensor | Kept, q: float | np.ndarray[Any, Any], *, tile: Tile) -> torch.Tensor | Kept:
    """Return kept_ij / q_i in float32.

    q (m, 1) for a matrix stored (out, in), (1, n) for (in, out), or one number; for stacked matrices (E, m, 1), or (E,
    1, 1) with a number for each
    """
    if isinstance(q, float):
        return divide(delta, q, tile=tile)
    values = delta.values if isinstance(delta, Kept) else delta
    quotient = values / _of_entries(delta, q, tile)
    return Kept(delta.positions, quotient) if isinstance(delta, Kept) else quotient


def multiply(delta: torch.Tensor | Kept, factor: float | np.ndarray[Any, Any], *, tile: Tile) -> torch.Tensor | Kept:
    """Return factor · Δ in float32. Factors of rows have the shapes of q in `divide_rows`."""
    values = delta.values if isinstance(delta, Kept) else delta
    of_entry = float(np.float32(factor)) if isinstance(factor, float) else _of_entries(delta, factor, tile)
    return Kept(delta.positions, values * of_entry) if isinstance(delta, Kept) else values * of_entry


def _of_entries(delta: torch.Tensor | Kept, q: np.ndarray[Any, Any], tile: Tile) -> torch.Tensor:
    """Return the row number of each entry of a tile."""
    values = delta.values if isinstance(delta, Kept) else delta
    places = delta.positions if isinstance(delta, Kept) else torch.arange(tile.size, device=values.device)
    flat = places + tile.start
    if q.shape[-1] == 1:
        q, of_entry = row_divisors(q, tile.shape), flat // tile.columns
    else:
        of_entry = flat % tile.columns
    return torch.from_numpy(q.astype(np.float32).reshape(-1)).to(values.device)[of_entry]


def row_divisors(q: np.ndarray[Any, Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Return q (…, 1) for every row of a tensor. Rows of stacked matrices have the q of their matrix."""
    stacked = len(shape) == 3 and q.size != shape[0] * shape[1]
    return np.broadcast_to(q[..., 0], shape[:-1]) if stacked else q


def constant(*, value: float) -> float:
    """Return a q that the recipe gives as a number."""
    return value


def _norm_loop(assembly: Assembly, node: Node, norm: str) -> None:
    delta, row = assembly.register(node.inputs[0]), assembly.sums_of(node, 0)
    if norm == "l2":
        assembly.add(codes.DOTS, -1, delta, delta, row)
    else:
        assembly.add(codes.NORM, -1, delta, int(norm == "l1"), row)


@traits(loop=_norm_loop, sums=True)
def norm(delta: torch.Tensor | Kept, *, tile: Tile, norm: str) -> np.ndarray[Any, Any]:
    """Return per block the float64 part of ‖Δ‖₁ (Σ abs), ‖Δ‖₂ (Σ squares) or ‖Δ‖∞ (max).

    A block is summed by halving, so every device adds in the same order.
    """
    rows = block_rows(densify(delta, tile.size).abs().to(torch.float64), tile)
    if norm == "linf":
        return rows.amax(1).cpu().numpy()
    return halved(rows * rows if norm == "l2" else rows).cpu().numpy()


def ratio(kept: np.ndarray[Any, Any], whole: np.ndarray[Any, Any], *, norm: str) -> float:
    """Return ‖kept‖ / ‖Δ‖, the q that gives the kept entries the delta's norm; 1 if either norm is 0 or not finite."""
    a, b = (float(x.max(initial=0.0)) if norm == "linf" else math.fsum(x) for x in (kept, whole))
    if norm == "l2":
        a, b = math.sqrt(a), math.sqrt(b)
    return a / b if 0 < a < math.inf and 0 < b < math.inf else 1.0


def matched(make: Make, whole: Any, kept: Any, kind: str) -> Any:
    """Make the node of mergekit's rescaling: kept · ‖Δ‖ / ‖kept‖, as a division by ‖kept‖ / ‖Δ‖."""
    norms = [make(norm, [node], kind="concat", shape=node.shape, norm=kind) for node in (kept, whole)]
    return make(divide, [kept, make(ratio, norms, kind="small", norm=kind)], shape=whole.shape)


def share(*squares: np.ndarray[Any, Any], number: int) -> float:
    """Return mean ‖Δ‖ / ‖Δ_number‖, from the squares of every delta by block.

    The mean is over deltas that are not 0. The result is 1 if the delta is 0, or a length is not finite.
    """
    lengths = [math.sqrt(math.fsum(some)) if np.isfinite(some).all() else math.inf for some in squares]
    some = [length for length in lengths if length > 0]
    own = lengths[number]
    return math.fsum(some) / len(some) / own if own > 0 and math.isfinite(sum(some)) else 1.0


def balanced(make: Make, deltas: Sequence[Any], number: int) -> Any:
    """Make the node of one of a tensor's deltas with the mean length of all."""
    squares = [make(norm, [delta], kind="concat", shape=delta.shape, norm="l2") for delta in deltas]
    factor = make(share, squares, kind="small", number=number)
    return make(multiply, [deltas[number], factor], shape=deltas[number].shape)
