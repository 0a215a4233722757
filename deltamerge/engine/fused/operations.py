"""The assembly of a pass of the compiled loop, and the operations that several functions share.

The `loop` of a function's traits gets the `Assembly` of the pass: its sources, registers, lists of places, results.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltamerge.engine.fused import codes
from deltamerge.files.descriptors import Descriptor
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node, Tensor
from deltamerge.tensors.tiles import RUN, block_elements, row_length

if TYPE_CHECKING:
    from deltamerge.formats.quantised.codes import CodedRows
    from deltamerge.formats.quantised.scheme import CodedWeight


@dataclass(frozen=True, slots=True)
class StoredSource:
    """A source: its open file, or None where a view computes its values.

    `coded`: the file holds its codes, which the loop itself makes numbers of.
    """

    info: Tensor
    file: Descriptor | None
    coded: CodedWeight | None = None

    @classmethod
    def of(cls, source: Tensor, reader: Reader) -> StoredSource:
        coded: CodedWeight | None = source.coded
        return cls(source, reader.stored(source if coded is None else coded.codes), coded)

    def rows(self, reader: Reader, start: int, stop: int) -> CodedRows | None:
        """Return the codes of elements [start, stop); None: the loop is given their values."""
        coded = self.coded
        return None if coded is None or not coded.is_one(start, stop) else coded.rows(reader, start, stop)

    @property
    def path(self) -> Path:
        return self.info.path

    @property
    def itemsize(self) -> int:
        return ITEMSIZE[self.info.dtype]

    @property
    def begin(self) -> int:
        """Return the byte of its file where its elements, or its codes, begin."""
        return self.info.begin if self.coded is None else self.coded.codes.begin

    @property
    def bits(self) -> int:
        """Return the bits of an element in the file; 0: its elements do not follow each other there."""
        return 8 * self.itemsize if self.coded is None else self.coded.bits


@dataclass(frozen=True, slots=True)
class Operation:
    """An operation of `codes`, with arguments that do not fit in its numbers."""

    code: int
    to: int
    fields: tuple[int, int, int, int] = (-1, -1, -1, -1)
    key: tuple[int, int] = (0, 0)
    scalars: tuple[float, float] = (1.0, 1.0)
    weights: tuple[float, ...] = ()
    models: tuple[int, ...] = ()
    lists: tuple[int, ...] = ()
    count: int = 0

    @property
    def width(self) -> int:
        return max(len(self.weights), len(self.models), len(self.lists))


@dataclass(frozen=True, slots=True)
class Form:
    """A tensor's shape, elements, and elements of a block."""

    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def block(self) -> int:
        return block_elements(self.shape)

    @property
    def columns(self) -> int:
        """Return the length of a row as `tiles.row_length_of` has it; 0 where a block is one row."""
        return self.shape[-1] if len(self.shape) > 1 else 0

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Return the lengths that rows can have."""
        if self.columns and row_length(self.shape) <= self.block:
            return (self.columns,)
        last = self.elements % self.block or self.block
        return tuple(sorted({self.columns, min(self.block, self.elements), last} - {0}))

    @property
    def row(self) -> int:
        """Return the length of an output row."""
        return max(1, row_length(self.shape))

    @property
    def pieces_are_rows(self) -> bool:
        """Tell whether the pieces that are read consist of whole rows."""
        return self.row <= self.block and (self.block <= codes.PIECE or self.row == self.block)


@dataclass(frozen=True, slots=True)
class KeptRegisters:
    """A sparse delta: the register of its values, and the list of their places."""

    register: int
    places: int


@dataclass(slots=True)
class Assembly:
    """The operations so far; registers and sparse deltas by node. `gathers`: the pass works on places alone."""

    values: Mapping[int, Any]
    reader: Reader
    form: Form
    output: str
    gathers: bool
    chunk: int = RUN
    aligned: bool = False
    sampled: int = 0
    operations: list[Operation] = field(default_factory=list)
    sources: list[StoredSource] = field(default_factory=list)
    source_of: dict[int, int] = field(default_factory=dict)
    registers: dict[int, int] = field(default_factory=dict)
    zeros: set[int] = field(default_factory=set)
    kept: dict[int, KeptRegisters] = field(default_factory=dict)
    lists: int = 0
    free: list[int] = field(default_factory=list)
    count: int = 0
    tables: list[tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]] = field(default_factory=list)
    ranks: list[NDArray[np.int64]] = field(default_factory=list)
    limits: list[NDArray[np.uint32]] = field(default_factory=list)
    ratios: list[NDArray[np.float32]] = field(default_factory=list)
    counters: dict[int, tuple[int, int]] = field(default_factory=dict)
    summed: int = 0
    sums: dict[int, tuple[int, int]] = field(default_factory=dict)
    listed: dict[int, int] = field(default_factory=dict)
    uses: Counter[int] = field(default_factory=Counter)

    def add(self, code: int, to: int, *fields: int, **more: Any) -> None:
        a, b, c, d = (*fields, -1, -1, -1, -1)[:4]
        self.operations.append(Operation(code, to, (a, b, c, d), **more))

    def new(self, count: int = 1) -> int:
        """Return a register, or several in a row."""
        if count == 1 and self.free:
            return self.free.pop()
        self.count += count
        return self.count - count

    def made(self, node: Node) -> int:
        self.registers[id(node)] = self.new()
        return self.registers[id(node)]

    def keep(self, node: Node, places: int) -> KeptRegisters:
        """Return a register for a node's kept values, at the places of a list."""
        self.kept[id(node)] = KeptRegisters(self.new(), places)
        return self.kept[id(node)]

    def new_list(self) -> int:
        """Return a list of places."""
        self.lists += 1
        return self.lists - 1

    def table(self, numbers: NDArray[np.float32]) -> int:
        """Return where a table of numbers begins among all."""
        self.ratios.append(numbers)
        return sum(map(len, self.ratios[:-1]))

    def list_of(self, node: Node) -> int:
        """Return a list for a reduction's results."""
        return self.listed.setdefault(id(node), len(self.listed))

    def sums_of(self, node: Node, count: int) -> int:
        """Return the first of `count` rows of sums for a reduction's results; 0: one row of its own."""
        first = self.summed
        self.sums[id(node)] = (first, count)
        self.summed += count or 1
        return first

    def register(self, node: Node) -> int:
        """Return the register of a node's values, filled when it is first asked for where they are stored or sparse."""
        if id(node) not in self.registers:
            if id(node) in self.zeros:
                self.add(codes.SCATTER, self.made(node), 0, -1)
            elif id(node) in self.kept:
                sparse = self.kept[id(node)]
                self.add(codes.SCATTER, self.made(node), sparse.register, sparse.places)
            else:
                self.add(codes.LOAD, self.made(node), self.source_of[id(node)])
        return self.registers[id(node)]

    def operand(self, node: Node) -> int:
        """Return the holder of a node's values: its register, or a source that needs no register."""
        source = self.source_of.get(id(node), -1)
        if id(node) in self.registers or source < 0 or self.sources[source].info.dtype == "F16":
            return self.register(node)
        return codes.DIRECT + source

    def release(self, nodes: Sequence[Node]) -> None:
        """Let nodes that are not used any more leave their registers."""
        for node in nodes:
            if id(node) in self.registers:
                self.free.append(self.registers.pop(id(node)))
            sparse = self.kept.pop(id(node), None)
            if sparse is not None:
                self.free.append(sparse.register)


# Operations that several functions share.


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
    """Subtract two stored tensors at the places of `kept`. If one is zeros, take the other."""
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
