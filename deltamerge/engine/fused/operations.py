"""Operations of the compiled loop that several functions share: `loop`s of their traits call them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes

if TYPE_CHECKING:
    from deltamerge.engine.fused.assembly import Assembly, KeptRegisters
    from deltamerge.tensors.tensor import Node


def store(assembly: Assembly, node: Node) -> None:
    """Make a node's values the output."""
    if assembly.gathers:
        kept = assembly.kept[id(node)]
        assembly.add(codes.PATCH, assembly.new(), assembly.source_of[id(node.inputs[0])], kept.register, kept.places)
    else:
        assembly.add(codes.STORE, -1, assembly.register(node))


def subtract(assembly: Assembly, node: Node, dtypes: Any = None) -> None:
    """Subtract the second input from the first."""
    tune, base = map(assembly.operand, node.inputs)
    assembly.add(codes.SUBTRACT, assembly.made(node), tune, base)


def subtract_at(assembly: Assembly, node: Node, kept: KeptRegisters) -> None:
    """Subtract two stored tensors at the places of `kept`. Where one is zeros, take the other."""
    tune, base = node.inputs
    sources = [assembly.source_of[id(x)] for x in (tune, base) if id(x) not in assembly.zeros]
    code = codes.DIFFER_AT if len(sources) == 2 else codes.BASE_AT
    assembly.add(code, kept.register, *sources, kept.places)


def spread(assembly: Assembly, to: int, source: int, table: Any, how: int, lists: tuple[int, ...] = ()) -> None:
    """Apply a table of numbers to the register `source`: `how` as `codes.SPREAD` has it.

    table   (rows) or (row length), of numbers
    lists   the list of places of a sparse source
    """
    row = assembly.form.row
    rows = -(-assembly.form.elements // row)
    assert table.size == (row if how else rows) or not rows  # rows of no element may have numbers too
    at = assembly.table(table.astype("float32").reshape(-1))
    assembly.add(codes.SPREAD, to, source, row, at, how, lists=lists, count=len(lists))


def weighted(
    assembly: Assembly,
    node: Node,
    weights: Sequence[float],
    divisor: float = 1.0,
    factor: float = 1.0,
    *,
    models: Sequence[Node],
    base: Node | None = None,
) -> None:
    """Add up the models times their weights, ÷ divisor, × factor; add the base."""
    _merge(assembly, node, codes.ADD, models, base, 0, scalars=(divisor, factor), weights=tuple(weights))


def agreeing(
    assembly: Assembly,
    node: Node,
    weights: Sequence[float],
    factor: float,
    *,
    normalize: bool,
    models: Sequence[Node],
    base: Node,
) -> None:
    """Add up the weighted entries that have the elected sign, × factor; add the base.

    normalize   divide by the weights of these entries
    """
    scalars = (1.0, factor)
    _merge(assembly, node, codes.AGREE, models, base, int(normalize), scalars=scalars, weights=tuple(weights))


def _merge(
    assembly: Assembly, node: Node, code: int, models: Sequence[Node], base: Node | None, normalize: int, **numbers: Any
) -> None:
    if assembly.gathers:
        _merge_places(assembly, node, code, models, normalize, **numbers)
        return
    start = -1 if base is None else assembly.operand(base)
    registers = tuple(map(assembly.operand if code == codes.ADD else assembly.register, models))
    assembly.add(code, assembly.made(node), start, -1, normalize, models=registers, **numbers)


def _merge_places(
    assembly: Assembly, node: Node, code: int, models: Sequence[Node], normalize: int, **numbers: Any
) -> None:
    """Merge on the union of the models' places."""
    sparse = [assembly.kept[id(x)] for x in models]
    places, registers = sparse[0].places, [x.register for x in sparse]
    if len(models) > 1:
        places, rows = assembly.new_list(), assembly.new(len(models))
        assembly.add(codes.ALIGN, places, rows, models=tuple(registers), lists=tuple(x.places for x in sparse))
        registers = list(range(rows, rows + len(models)))
    start = assembly.new()
    assembly.add(codes.BASE_AT, start, assembly.source_of[id(node.inputs[0])], places)
    kept = assembly.keep(node, places)
    assembly.add(code, kept.register, start, places, normalize, models=tuple(registers), **numbers)
