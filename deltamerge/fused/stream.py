"""Assembles a pass of a tensor into the operations of `stream_loop`, and runs jobs of it from file to file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.fused import stream_loop as loop
from deltamerge.fused.arrays import guided
from deltamerge.graph import REDUCTIONS, Node
from deltamerge.io.checkpoint import Reader
from deltamerge.io.files import Descriptor
from deltamerge.merge.arithmetic import divisor_of
from deltamerge.merge.span import pairs
from deltamerge.pruners.bits import SPARSE_BLOCK, Key, is_sparse, threshold
from deltamerge.pruners.select import HIGH, LOW, sampled_run
from deltamerge.tensors import ITEMSIZE, block_elements

# Values of a chunk in float32: a few of them fill a core's first cache.
CHUNK = 1 << 11
LONGEST_DOT = 1 << 18
STORED = ("BF16", "F32")


@dataclass(frozen=True, slots=True)
class Place:
    """An open file, the byte in it of a tensor's first element, and the bytes of an element."""

    file: Descriptor
    begin: int
    itemsize: int


@dataclass(frozen=True, slots=True)
class Operation:
    """One of `stream_loop`, and what does not fit in its numbers."""

    code: int
    to: int
    fields: tuple[int, int, int, int] = (-1, -1, -1, -1)
    key: Key = (0, 0)
    scalars: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, ...] = ()
    models: tuple[int, ...] = ()
    lists: tuple[int, ...] = ()


class _Foreign(Exception):
    """The pass has a step that the loop cannot run."""


@dataclass(slots=True)
class _Assembly:
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
    sparse: bool = False
    whole_blocks: bool = False
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
            self.add(loop.LOAD, self.made(node), source)
        return self.registers[id(node)]

    def release(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            if id(node) in self.registers:
                self.free.append(self.registers.pop(id(node)))


def _read(assembly: _Assembly, node: Node) -> None:
    info = node.parameter("tensor")
    file = assembly.reader.stored(info)
    if file is None or node.dtype not in STORED:
        raise _Foreign
    assembly.source_of[id(node)] = len(assembly.sources)
    assembly.sources.append(Place(file, info.begin, ITEMSIZE[node.dtype]))


def _subtract(assembly: _Assembly, node: Node, dtypes: Any) -> None:
    tune, base = map(assembly.register, node.inputs)
    assembly.add(loop.SUBTRACT, assembly.made(node), tune, base)


def _dare(assembly: _Assembly, node: Node, key: Key, density: float) -> None:
    if is_sparse(density):
        tune, base = (assembly.source_of[id(x)] for x in node.inputs)
        places = assembly.lists[id(node)] = len(assembly.lists)
        assembly.add(loop.DRAW, places, len(assembly.tables), key=key)
        assembly.tables.append(guided(density))
        assembly.add(loop.DIFFER_AT, assembly.made(node), tune, base, places)
        return
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        _subtract(assembly, node, None)
        return
    tune, base = map(assembly.register, node.inputs)
    assembly.add(loop.DROP, assembly.made(node), tune, base, high, low, key=key)


def _divide(assembly: _Assembly, node: Node) -> None:
    delta, q = node.inputs
    source, places = assembly.register(delta), assembly.lists.get(id(delta), -1)
    if places >= 0:
        assembly.lists[id(node)] = places
    assembly.add(loop.DIVIDE, assembly.made(node), source, places, scalars=(assembly.values[id(q)], 1.0))


def _keep_largest(assembly: _Assembly, node: Node) -> None:
    delta, cut, ranks = node.inputs
    limits, before = assembly.values[id(cut)], assembly.values[id(ranks)]
    offset = sum(map(len, assembly.ranks)) if before.size else -1
    assembly.ranks += [before, np.array([limits.equal_total])] if before.size else []
    source = assembly.register(delta)
    assembly.add(loop.KEEP, assembly.made(node), source, limits.threshold, limits.equal_kept, offset)


def _weighted(
    assembly: _Assembly, node: Node, weights: Sequence[float], normalize: bool, lambda_: float = 1.0, based: bool = True
) -> None:
    divisor = divisor_of(tuple(weights)) if normalize else 1.0
    _merge(assembly, node, loop.ADD, tuple(weights), (divisor, lambda_), based=based)


def _ties(assembly: _Assembly, node: Node, weights: Sequence[float], normalize: bool, lambda_: float) -> None:
    _merge(assembly, node, loop.AGREE, tuple(weights), (1.0, lambda_), normalize=normalize)


def _merge(
    assembly: _Assembly,
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
        base = assembly.register(node.inputs[0]) if based else -1
        registers = tuple(map(assembly.register, models))
        to = assembly.made(node)
        assembly.add(code, to, base, -1, int(normalize), scalars=scalars, weights=weights, models=registers)
        return
    registers, lists = tuple(assembly.registers[id(x)] for x in models), tuple(assembly.lists[id(x)] for x in models)
    places = lists[0]
    if len(models) > 1:
        places, rows = len(assembly.lists), assembly.new(len(models))
        assembly.add(loop.ALIGN, places, rows, models=registers, lists=lists)
        registers = tuple(range(rows, rows + len(models)))
    base = assembly.new()
    assembly.add(loop.BASE_AT, base, assembly.source_of[id(node.inputs[0])], places)
    assembly.lists[id(node)] = places
    assembly.add(
        code, assembly.made(node), base, places, int(normalize), scalars=scalars, weights=weights, models=registers
    )


def _passthrough(assembly: _Assembly, node: Node, scales: Sequence[float]) -> None:
    _weighted(assembly, node, scales[:1], normalize=False, based=False)


def _combine(assembly: _Assembly, node: Node, along: str, based: bool) -> None:
    if along != "tensor":
        raise _Foreign
    coefficients = assembly.values[id(node.inputs[-1])]
    _merge_first(assembly, node, tuple(np.asarray(coefficients).tolist()), based)


def _merge_first(assembly: _Assembly, node: Node, weights: tuple[float, ...], based: bool) -> None:
    inputs = node.inputs[:-1]
    base = assembly.register(inputs[0]) if based else -1
    registers = tuple(map(assembly.register, inputs[1:] if based else inputs))
    assembly.add(loop.ADD, assembly.made(node), base, weights=weights, models=registers)


def _cast(assembly: _Assembly, node: Node, to: str) -> None:
    (value,) = node.inputs
    if to != assembly.output or to not in STORED:
        raise _Foreign
    if assembly.sparse:
        base = assembly.source_of[id(value.inputs[0])]
        assembly.add(loop.PATCH, -1, base, assembly.registers[id(value)], assembly.lists[id(value)])
    else:
        assembly.add(loop.STORE, -1, assembly.register(value))


def _counted(assembly: _Assembly, node: Node, code: int, size: int, wanted: int = 0) -> None:
    """`size` counters, or one for each block (0)."""
    assembly.counters[id(node)] = (len(assembly.operations), size)
    assembly.add(code, -1, assembly.register(node.inputs[0]), wanted)


def _high(assembly: _Assembly, node: Node) -> None:
    _counted(assembly, node, loop.HIGH, HIGH)


def _low(assembly: _Assembly, node: Node) -> None:
    _counted(assembly, node, loop.LOW, LOW, assembly.values[id(node.inputs[1])].high)


def _equal(assembly: _Assembly, node: Node) -> None:
    _counted(assembly, node, loop.EQUAL, 0, assembly.values[id(node.inputs[1])].threshold)


def _bracketed(assembly: _Assembly, node: Node) -> None:
    delta, bracket = node.inputs
    ends, row = assembly.values[id(bracket)], assembly.list_of(node)
    assembly.add(loop.LIST, -1, assembly.register(delta), ends.low, row, ends.high)


def _sample(assembly: _Assembly, node: Node) -> None:
    assembly.sampled = sampled_run(node.shape)
    assembly.add(loop.SAMPLE, -1, assembly.register(node.inputs[0]), -1, assembly.list_of(node))


def _gram(assembly: _Assembly, node: Node) -> None:
    registers = list(map(assembly.register, node.inputs))
    assembly.whole_blocks = True
    assembly.sums[id(node)] = (assembly.summed, len(pairs(len(registers))))
    for i, j in pairs(len(registers)):
        assembly.add(loop.DOTS, -1, registers[i], registers[j], assembly.summed)
        assembly.summed += 1


CAST = "deltamerge.ops:cast"
SAMPLE = "deltamerge.pruners.select:sample"
ASSEMBLERS: dict[str, Callable[..., None]] = {
    "deltamerge.ops:subtract": _subtract,
    CAST: _cast,
    "deltamerge.pruners.masks:dare": _dare,
    "deltamerge.pruners.rescale:divide": _divide,
    "deltamerge.pruners.select:high_histogram": _high,
    "deltamerge.pruners.select:high_counts": _high,
    "deltamerge.pruners.select:low_histogram": _low,
    "deltamerge.pruners.select:low_counts": _low,
    "deltamerge.pruners.select:bracketed": _bracketed,
    SAMPLE: _sample,
    "deltamerge.pruners.select:equal_counts": _equal,
    "deltamerge.pruners.select:keep_largest": _keep_largest,
    "deltamerge.merge.arithmetic:passthrough": _passthrough,
    "deltamerge.merge.arithmetic:linear": partial(_weighted, based=False),
    "deltamerge.merge.arithmetic:task_arithmetic": _weighted,
    "deltamerge.merge.ties:ties": _ties,
    "deltamerge.merge.span:gram": _gram,
    "deltamerge.merge.span:combine": _combine,
}
SPARSE = frozenset({
    CAST,
    "deltamerge.pruners.masks:dare",
    "deltamerge.pruners.rescale:divide",
    "deltamerge.merge.arithmetic:task_arithmetic",
    "deltamerge.merge.ties:ties",
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
    assembly = _Assembly(values, reader, output)
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
            assembly.add(loop.STORE, -1, assembly.register(last))
    except _Foreign:
        return None
    if assembly.sampled and reductions != {SAMPLE}:
        return None
    block = block_elements(shape)
    if assembly.whole_blocks and block > LONGEST_DOT:
        return None
    return Program(assembly, block)


class Program:
    """A pass, ready to run on any range of elements, from any number of threads."""

    def __init__(self, assembly: _Assembly, block: int) -> None:
        done = assembly.operations
        self.block, self.sources, self.sparse = block, assembly.sources, assembly.sparse
        self.counters, self.sums, self.itemsize = assembly.counters, assembly.sums, ITEMSIZE[assembly.output]
        self.chunk = SPARSE_BLOCK if self.sparse else block if assembly.whole_blocks else CHUNK
        self.listed, self.sampled = assembly.listed, assembly.sampled
        self.rows, self.lists, self.summed = assembly.count, len(assembly.lists), assembly.summed
        width = max([1, *(len(x.models) for x in done)])
        self.operations = np.array([(x.code, x.to, *x.fields) for x in done], np.int64)
        self.keys = np.array([x.key for x in done], np.uint64)
        self.scalars = np.array([x.scalars for x in done], np.float32)
        self.weights = np.array([_padded(x.weights, width) for x in done], np.float32)
        self.models = np.array([len(x.models) for x in done], np.int64)
        self.registers_of = np.array([_padded(x.models, width) for x in done], np.int64)
        self.lists_of = np.array([_padded(x.lists, width) for x in done], np.int64)
        self.tables, self.guides, self.bounds = _joined(assembly.tables)
        self.ranks = np.concatenate([np.empty(0, np.int64), *assembly.ranks])

    def run(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> dict[int, Any] | None:
        """`backends.Pass.run`; `start` lies on a block of the tensor."""
        operations, blocks = self.operations.copy(), -(-(stop - start) // self.block)
        counts = self._place_counters(operations, blocks)
        sums = np.empty((self.summed, blocks), np.float64)
        listed = np.empty((len(self.listed), stop - start + 2 * blocks + 1), np.uint32)
        used = np.zeros(len(self.listed), np.int64)
        files = [(place.file.fd, place.begin, place.itemsize) for place in self.sources]
        memory = np.empty(0, np.uint8) if out is None else out
        raw = np.empty((len(files), 4 * max(loop.PIECE, self.chunk, self.sampled)), np.uint8)
        registers = np.empty((max(1, self.rows), self.chunk), np.float32)
        places = np.empty((self.lists, SPARSE_BLOCK + 1), np.int64)
        went = loop.run(
            operations, self.keys, self.scalars, self.weights, self.models,
            _addresses(registers, self.registers_of), self.lists_of, self.tables, self.guides, self.bounds, self.ranks,
            np.array(files, np.int64), memory, self.itemsize, start, stop, self.block, self.sparse, self.sampled,
            raw, _addresses(raw, np.arange(len(raw))), registers,
            places, _addresses(places, self.lists_of), counts, sums, listed, used,
        )  # fmt: skip
        if not went:
            return None
        found: dict[int, Any] = {}
        for node, (row, size) in self.counters.items():
            first = operations[row, 5]
            found[node] = counts[first : first + (size or blocks)]
        for node, (row, count) in self.sums.items():
            found[node] = sums[row : row + count].T
        for node, row in self.listed.items():
            found[node] = listed[row, : used[row]].copy()
        return found

    def _place_counters(self, operations: NDArray[np.int64], blocks: int) -> NDArray[np.int64]:
        total = 0
        for row, size in self.counters.values():
            operations[row, 5] = total
            total += size or blocks
        return np.zeros(total, np.int64)


def _padded(values: Sequence[Any], width: int) -> tuple[Any, ...]:
    return (*values, *[0] * (width - len(values)))


def _addresses(array: NDArray[Any], rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where `rows` of an array begin in memory."""
    return np.asarray(array.ctypes.data + array.strides[0] * rows)


def _joined(
    parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.int64]]:
    """The gap tables end to end, their guides likewise, and where each begins and ends, with its shift."""
    tables, guides = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    bounds, at, of_guide = np.empty((len(parts), 5), np.int64), 0, 0
    for row, (table, guide, shift) in zip(bounds, parts, strict=True):
        row[:] = at, at + table.size, of_guide, of_guide + guide.size, shift
        at, of_guide = at + table.size, of_guide + guide.size
        tables.append(table)
        guides.append(guide)
    return np.concatenate(tables), np.concatenate(guides), bounds
