"""Deltas and what is kept of them, as operations of the compiled loop."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.assembly import Assembly, KeptRegisters
from deltamerge.engine.graph import Node
from deltamerge.methods.prune.bits import Key, guided, is_sparse
from deltamerge.methods.prune.bits import threshold as bound
from deltamerge.methods.prune.della import probabilities
from deltamerge.methods.prune.rescale import row_divisors


def subtract(assembly: Assembly, node: Node, dtypes: Any = None) -> None:
    tune, base = map(assembly.operand, node.inputs)
    assembly.add(codes.SUBTRACT, assembly.made(node), tune, base)


def zeros(assembly: Assembly, node: Node) -> None:
    assembly.zeros.add(id(node))


def dare(assembly: Assembly, node: Node, key: Key, density: float) -> None:
    if is_sparse(density):
        kept = assembly.kept[id(node)] = KeptRegisters(assembly.new(), assembly.new_list())
        assembly.add(codes.DRAW, kept.places, len(assembly.tables), key=key)
        assembly.tables.append(guided(density))
        _differ_at(assembly, node, kept)
        return
    high, low = divmod(bound(density), 1 << 16)
    if high >> 16:
        subtract(assembly, node)
        return
    tune, base = map(assembly.operand, node.inputs)
    assembly.add(codes.DROP, assembly.made(node), tune, base, high, low, key=key)


def _differ_at(assembly: Assembly, node: Node, kept: KeptRegisters) -> None:
    """The difference of two stored tensors at the places that are kept; of one and zeros, the one."""
    tune, base = node.inputs
    sources = [assembly.source_of[id(x)] for x in (tune, base) if id(x) not in assembly.zeros]
    if len(sources) == 2:
        assembly.add(codes.DIFFER_AT, kept.register, *sources, kept.places)
    else:
        assembly.add(codes.BASE_AT, kept.register, *sources, kept.places)


def divide(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, sparse = assembly.values[id(divisor)], assembly.kept.get(id(delta))
    if sparse is not None:
        kept = assembly.kept[id(node)] = KeptRegisters(assembly.new(), sparse.places)
        assembly.add(codes.DIVIDE, kept.register, sparse.register, sparse.places, scalars=(q, 1.0))
        return
    source, last = assembly.register(delta), assembly.operations[-1]
    undivided = (last.code, last.to, last.scalars[0]) == (codes.DROP, source, 1.0)
    if undivided and assembly.uses[id(delta)] == 1 and q > 0:  # a dropped entry stays +0
        assembly.operations[-1] = replace(last, scalars=(q, 1.0))
        assembly.registers[id(node)] = assembly.registers.pop(id(delta))
        return
    assembly.add(codes.DIVIDE, assembly.made(node), source, scalars=(q, 1.0))


def _keep(assembly: Assembly, to: int, score: int, values: int, cut: Any, before: NDArray[np.int64]) -> None:
    """To a register the values whose score is among the largest."""
    offset = sum(map(len, assembly.ranks)) if before.size else -1
    assembly.ranks += [before, np.array([cut.equal_total])] if before.size else []
    assembly.add(codes.KEEP, to, score, cut.threshold, cut.equal_kept, offset, models=(values,))


def keep_largest(assembly: Assembly, node: Node) -> None:
    delta = assembly.register(node.inputs[0])
    _keep(assembly, assembly.made(node), delta, delta, *(assembly.values[id(x)] for x in node.inputs[1:]))


def keep_between(assembly: Assembly, node: Node) -> None:
    delta, (outer, outer_ranks, inner, inner_ranks) = (
        assembly.register(node.inputs[0]),
        (assembly.values[id(x)] for x in node.inputs[1:]),
    )
    wide, narrow = assembly.new(), assembly.new()
    _keep(assembly, wide, delta, delta, outer, outer_ranks)
    _keep(assembly, narrow, delta, delta, inner, inner_ranks)
    # an entry that the inner cut keeps as +0.0 is +0.0 anyway
    assembly.add(codes.CLEAR, assembly.made(node), wide, narrow)
    assembly.free += [wide, narrow]


def keep_where(assembly: Assembly, node: Node) -> None:
    delta, score = map(assembly.register, node.inputs[:2])
    _keep(assembly, assembly.made(node), score, delta, *(assembly.values[id(x)] for x in node.inputs[2:]))


@lru_cache(maxsize=16)
def _limits(columns: int, density: float, epsilon: float) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Of each rank: the bound of the words of the kept, π · 2**32, and π / density; uppers come before lower halves."""
    probability = probabilities(columns, density, epsilon)
    bounds = np.round(probability * 2.0**32).astype(np.int64)
    return np.concatenate([bounds >> 16, bounds & 0xFFFF]).astype(np.uint32), (probability / density).astype(np.float32)


def della(assembly: Assembly, node: Node, key: Key, density: float, epsilon: float, weighted: bool = True) -> None:
    form, lengths = assembly.form, list[int]()
    for length in form.row_lengths:
        limits, ratios = _limits(length, density, epsilon)
        lengths += [length, sum(map(len, assembly.limits)), assembly.table(ratios)]
        assembly.limits.append(limits)
    delta, count = assembly.register(node.inputs[0]), len(lengths) // 3
    fields = (delta, form.columns, int(weighted))
    assembly.add(codes.RANK, assembly.made(node), *fields, key=key, lists=tuple(lengths), count=count)


def _spread(assembly: Assembly, to: int, source: int, table: NDArray[Any], how: int, lists: tuple[int, ...]) -> None:
    row = assembly.form.row
    assert table.size == (row if how else -(-assembly.form.elements // row))
    at = assembly.table(table.astype(np.float32).reshape(-1))
    assembly.add(codes.SPREAD, to, source, row, at, how, lists=lists, count=len(lists))


def divide_rows(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, sparse = assembly.values[id(divisor)], assembly.kept.get(id(delta))
    if isinstance(q, float):
        divide(assembly, node)
        return
    how = int(q.shape[-1] != 1)
    if not how:
        q = row_divisors(q, node.shape)
    if sparse is not None:
        kept = assembly.kept[id(node)] = KeptRegisters(assembly.new(), sparse.places)
        _spread(assembly, kept.register, sparse.register, q, how, (sparse.places,))
    else:
        source = assembly.register(delta)
        _spread(assembly, assembly.made(node), source, q, how, ())


def keep_largest_rows(assembly: Assembly, node: Node, density: float) -> None:
    delta, row = assembly.register(node.inputs[0]), assembly.form.row
    score, k = delta, round(density * row)
    if len(node.inputs) > 1:
        score = assembly.new()
        _spread(assembly, score, delta, assembly.values[id(node.inputs[1])], 2, ())
    assembly.add(codes.ROWS, assembly.made(node), delta, score, k, row)
    if score != delta:
        assembly.free.append(score)


def _replace_columns(assembly: Assembly, node: Node, columns: Node, others: int) -> None:
    delta, numbers = assembly.register(node.inputs[0]), tuple(assembly.values[id(columns)].tolist())
    fields = (delta, others, assembly.form.row)
    assembly.add(codes.COLUMNS, assembly.made(node), *fields, lists=numbers, count=len(numbers))


def clear(assembly: Assembly, node: Node) -> None:
    _replace_columns(assembly, node, node.inputs[1], -1)


def restore(assembly: Assembly, node: Node) -> None:
    _, tune, base, columns = node.inputs
    whole = assembly.new()
    assembly.add(codes.SUBTRACT, whole, assembly.operand(tune), assembly.operand(base))
    _replace_columns(assembly, node, columns, whole)
    assembly.free.append(whole)
