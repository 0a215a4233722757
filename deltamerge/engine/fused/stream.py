"""Assembles a pass of a tensor into the operations of `stream_loop`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.program import Operation, Place, Program
from deltamerge.engine.graph import REDUCTIONS, Node
from deltamerge.io.dtypes import ITEMSIZE
from deltamerge.io.reader import Reader
from deltamerge.methods.merge.arithmetic import divisor_of
from deltamerge.methods.merge.span import pairs
from deltamerge.methods.prune.bits import Key, guided, is_sparse, threshold
from deltamerge.methods.prune.select import HIGH, LOW, sampled_run
from deltamerge.methods.tiles import block_elements

STORED = ("BF16", "F32")


class _Foreign(Exception):
    """The pass has a step that the loop cannot run."""


@dataclass(slots=True)
class Assembly:
    """The operations so far; registers and lists of places by node."""

    values: Mapping[int, Any]
    reader: Reader
    output: str
    operations: list[Operation] = field(default_factory=list)
    sources: list[Place] = field(default_factory=list)
    source_of: dict[int, int] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=dict)
    lists: dict[int, int] = field(default_factory=dict)
    free: list[int] = field(default_factory=list)
    count: int = 0
    tables: list[tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]] = field(default_factory=list)
    ranks: list[NDArray[np.int64]] = field(default_factory=list)
    counted: int = 0
    counters: dict[int, tuple[int, int]] = field(default_factory=dict)
    summed: int = 0
    sums: dict[int, tuple[int, int]] = field(default_factory=dict)
    listed: dict[int, int] = field(default_factory=dict)
    uses: Counter[int] = field(default_factory=Counter)
    sparse: bool = False
    sampled: int = 0

    def add(self, code: int, to: int, *fields: int, **more: Any) -> None:
        a, b, c, d = (*fields, -1, -1, -1, -1)[:4]
        self.operations.append(Operation(code, to, (a, b, c, d), **more))

    def new(self, count: int = 1) -> int:
        if count == 1 and self.free:
            return self.free.pop()
        self.count += count
        return self.count - count

    def made(self, node: Node) -> int:
        self.registers[id(node)] = self.new()
        return self.registers[id(node)]

    def list_of(self, node: Node) -> int:
        """A list for what a reduction finds."""
        return self.listed.setdefault(id(node), len(self.listed))

    def register(self, node: Node) -> int:
        """The register of a node's values; a stored tensor's is filled when it is first asked for."""
        if id(node) not in self.registers:
            source = self.source_of[id(node)]
            self.add(codes.LOAD, self.made(node), source)
        return self.registers[id(node)]

    def operand(self, node: Node) -> int:
        """What holds a node's values: its register, or a source that need not be put into one."""
        source = self.source_of.get(id(node), -1)
        if id(node) in self.registers or source < 0 or self.sources[source].itemsize != 2:
            return self.register(node)
        return codes.DIRECT + source

    def pair(self, tune: Node, base: Node) -> tuple[int, int]:
        """Two operands that are both direct or both registers."""
        found = self.operand(tune), self.operand(base)
        alike = (found[0] >= codes.DIRECT) == (found[1] >= codes.DIRECT)
        return found if alike else (self.register(tune), self.register(base))

    def release(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if id(node) in self.registers:
                self.free.append(self.registers.pop(id(node)))


def _read(assembly: Assembly, node: Node) -> None:
    info = node.parameter("tensor")
    file = assembly.reader.stored(info)
    if file is None or node.dtype not in STORED:
        raise _Foreign
    assembly.source_of[id(node)] = len(assembly.sources)
    assembly.sources.append(Place(file, info.path, info.begin, ITEMSIZE[node.dtype]))


def _subtract(assembly: Assembly, node: Node, dtypes: Any) -> None:
    tune, base = assembly.pair(*node.inputs)
    assembly.add(codes.SUBTRACT, assembly.made(node), tune, base)


def _dare(assembly: Assembly, node: Node, key: Key, density: float) -> None:
    if is_sparse(density):
        tune, base = (assembly.source_of[id(x)] for x in node.inputs)
        places = assembly.lists[id(node)] = len(assembly.lists)
        assembly.add(codes.DRAW, places, len(assembly.tables), key=key)
        assembly.tables.append(guided(density))
        assembly.add(codes.DIFFER_AT, assembly.made(node), tune, base, places)
        return
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        _subtract(assembly, node, None)
        return
    tune, base = assembly.pair(*node.inputs)
    assembly.add(codes.DROP, assembly.made(node), tune, base, high, low, key=key)


def _divide(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, source, last = assembly.values[id(divisor)], assembly.register(delta), assembly.operations[-1]
    undivided = (last.code, last.to, last.scalars[0]) == (codes.DROP, source, 1.0)
    if undivided and assembly.uses[id(delta)] == 1 and q > 0:  # a dropped entry stays +0
        assembly.operations[-1] = replace(last, scalars=(q, 1.0))
        assembly.registers[id(node)] = assembly.registers.pop(id(delta))
        return
    places = assembly.lists.get(id(delta), -1)
    if places >= 0:
        assembly.lists[id(node)] = places
    assembly.add(codes.DIVIDE, assembly.made(node), source, places, scalars=(q, 1.0))


def _keep_largest(assembly: Assembly, node: Node) -> None:
    delta, cut, ranks = node.inputs
    limits, before = assembly.values[id(cut)], assembly.values[id(ranks)]
    offset = sum(map(len, assembly.ranks)) if before.size else -1
    assembly.ranks += [before, np.array([limits.equal_total])] if before.size else []
    source = assembly.register(delta)
    assembly.add(codes.KEEP, assembly.made(node), source, limits.threshold, limits.equal_kept, offset)


def _weighted(
    assembly: Assembly, node: Node, weights: Sequence[float], normalize: bool, lambda_: float = 1.0, based: bool = True
) -> None:
    divisor = divisor_of(tuple(weights)) if normalize else 1.0
    _merge(assembly, node, codes.ADD, tuple(weights), (divisor, lambda_), based=based)


def _ties(assembly: Assembly, node: Node, weights: Sequence[float], normalize: bool, lambda_: float) -> None:
    _merge(assembly, node, codes.AGREE, tuple(weights), (1.0, lambda_), normalize=normalize)


def _merge(
    assembly: Assembly,
    node: Node,
    code: int,
    weights: tuple[float, ...],
    scalars: tuple[float, float],
    *,
    normalize: bool = False,
    based: bool = True,
) -> None:
    models = node.inputs[1:] if based else node.inputs
    if not assembly.sparse:
        base = assembly.operand(node.inputs[0]) if based else -1
        registers = tuple(map(assembly.operand if code == codes.ADD else assembly.register, models))
        to = assembly.made(node)
        assembly.add(code, to, base, -1, int(normalize), scalars=scalars, weights=weights, models=registers)
        return
    registers, lists = tuple(assembly.registers[id(x)] for x in models), tuple(assembly.lists[id(x)] for x in models)
    places = lists[0]
    if len(models) > 1:
        places, rows = len(assembly.lists), assembly.new(len(models))
        assembly.add(codes.ALIGN, places, rows, models=registers, lists=lists)
        registers = tuple(range(rows, rows + len(models)))
    base = assembly.new()
    assembly.add(codes.BASE_AT, base, assembly.source_of[id(node.inputs[0])], places)
    assembly.lists[id(node)] = places
    assembly.add(
        code, assembly.made(node), base, places, int(normalize), scalars=scalars, weights=weights, models=registers
    )


def _passthrough(assembly: Assembly, node: Node, scales: Sequence[float]) -> None:
    _weighted(assembly, node, scales[:1], normalize=False, based=False)


def _combine(assembly: Assembly, node: Node, along: str, based: bool) -> None:
    if along != "tensor":
        raise _Foreign
    coefficients = assembly.values[id(node.inputs[-1])]
    _merge_first(assembly, node, tuple(np.asarray(coefficients).tolist()), based)


def _merge_first(assembly: Assembly, node: Node, weights: tuple[float, ...], based: bool) -> None:
    inputs = node.inputs[:-1]
    base = assembly.operand(inputs[0]) if based else -1
    registers = tuple(map(assembly.operand, inputs[1:] if based else inputs))
    assembly.add(codes.ADD, assembly.made(node), base, weights=weights, models=registers)


def _cast(assembly: Assembly, node: Node, to: str) -> None:
    (value,) = node.inputs
    if to != assembly.output or to not in STORED:
        raise _Foreign
    if assembly.sparse:
        base = assembly.source_of[id(value.inputs[0])]
        assembly.add(codes.PATCH, -1, base, assembly.registers[id(value)], assembly.lists[id(value)])
    else:
        assembly.add(codes.STORE, -1, assembly.register(value))


def _counted(assembly: Assembly, node: Node, code: int, size: int, wanted: int = 0) -> None:
    """`size` counters, or one for each block (0)."""
    assembly.counters[id(node)] = (len(assembly.operations), size)
    assembly.add(code, -1, assembly.register(node.inputs[0]), wanted)


def _high(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.HIGH, HIGH)


def _low(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.LOW, LOW, assembly.values[id(node.inputs[1])].high)


def _equal(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.EQUAL, 0, assembly.values[id(node.inputs[1])].threshold)


def _bracketed(assembly: Assembly, node: Node) -> None:
    delta, bracket = node.inputs
    ends, row = assembly.values[id(bracket)], assembly.list_of(node)
    assembly.add(codes.LIST, -1, assembly.register(delta), ends.low, row, ends.high)


def _sample(assembly: Assembly, node: Node) -> None:
    assembly.sampled = sampled_run(node.shape)
    assembly.add(codes.SAMPLE, -1, assembly.register(node.inputs[0]), -1, assembly.list_of(node))


def _gram(assembly: Assembly, node: Node) -> None:
    registers = list(map(assembly.register, node.inputs))
    assembly.sums[id(node)] = (assembly.summed, len(pairs(len(registers))))
    for i, j in pairs(len(registers)):
        assembly.add(codes.DOTS, -1, registers[i], registers[j], assembly.summed)
        assembly.summed += 1


CAST = "deltamerge.methods.ops:cast"
SAMPLE = "deltamerge.methods.prune.select:sample"
ASSEMBLERS: dict[str, Callable[..., None]] = {
    "deltamerge.methods.ops:subtract": _subtract,
    CAST: _cast,
    "deltamerge.methods.prune.masks:dare": _dare,
    "deltamerge.methods.prune.rescale:divide": _divide,
    "deltamerge.methods.prune.select:high_histogram": _high,
    "deltamerge.methods.prune.select:high_counts": _high,
    "deltamerge.methods.prune.select:low_histogram": _low,
    "deltamerge.methods.prune.select:low_counts": _low,
    "deltamerge.methods.prune.select:bracketed": _bracketed,
    SAMPLE: _sample,
    "deltamerge.methods.prune.select:equal_counts": _equal,
    "deltamerge.methods.prune.select:keep_largest": _keep_largest,
    "deltamerge.methods.merge.arithmetic:passthrough": _passthrough,
    "deltamerge.methods.merge.arithmetic:linear": partial(_weighted, based=False),
    "deltamerge.methods.merge.arithmetic:task_arithmetic": _weighted,
    "deltamerge.methods.merge.ties:ties": _ties,
    "deltamerge.methods.merge.span:gram": _gram,
    "deltamerge.methods.merge.span:combine": _combine,
}
SPARSE = frozenset({
    CAST,
    "deltamerge.methods.prune.masks:dare",
    "deltamerge.methods.prune.rescale:divide",
    "deltamerge.methods.merge.arithmetic:task_arithmetic",
    "deltamerge.methods.merge.ties:ties",
})  # fmt: skip


def assemble(
    steps: Sequence[tuple[Node, dict[str, Any], tuple[Node, ...]]],
    values: Mapping[int, Any],
    reader: Reader,
    shape: tuple[int, ...],
    output: str,
) -> Program | None:
    """The pass of `steps` (node, parameters, nodes used last there) on a tensor of `shape`; None: the loop has no
    operation for some step, or a source is not stored as it is. `values` are the small ones so far, `output` is the
    dtype to write."""
    assembly = Assembly(values, reader, output)
    assembly.uses.update(id(source) for node, _, _ in steps for source in node.inputs)
    drawn = [is_sparse(p["density"]) for node, p, _ in steps if node.function.endswith("masks:dare")]
    assembly.sparse = any(drawn)
    stored = {node.dtype for node, _, _ in steps if node.kind == "read"} | {output}
    if assembly.sparse and not (all(drawn) and stored == {"BF16"}):
        return None
    known, last = SPARSE if assembly.sparse else ASSEMBLERS.keys(), steps[-1][0]
    reductions = {node.function for node, _, _ in steps if node.kind in REDUCTIONS}
    try:
        for node, parameters, frees in steps:
            if node.kind == "read":
                _read(assembly, node)
            elif node.function not in known or (node.function == CAST and node is not last):
                return None
            else:
                ASSEMBLERS[node.function](assembly, node, **parameters)
            assembly.release(frees)
        if not reductions and last.function != CAST:
            if assembly.sparse:
                return None
            assembly.add(codes.STORE, -1, assembly.register(last))
    except _Foreign:
        return None
    if assembly.sampled and reductions != {SAMPLE}:
        return None
    return Program(assembly, block_elements(shape), None if reductions else reader.pieces)
