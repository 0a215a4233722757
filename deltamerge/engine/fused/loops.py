"""The operations of a pass as the source of one Triton loop: what `kernels/src/operations.cpp` does with registers.

A loop has no number of its own: keys, thresholds and weights are arrays beside it, so that tensors that are made alike
share a compiled loop. A program holds `SIZE` entries. Where a pass looks at blocks (sums, equals by rank) a program's
entries are a run of one block, else they begin at any multiple of 16, where a generator's do.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.assembly import Assembly, Operation
from deltamerge.methods.merge.arithmetic import SMALLEST_DIVISOR
from deltamerge.methods.merge.sce import SMALLEST_WEIGHT
from deltamerge.methods.prune.select import HIGH, LOW

BY_BLOCK = {codes.EQUAL, codes.DOTS, codes.NORM}
STORES = {"BF16": "f.narrowed({})", "F16": "f.halved_bits({})", "F32": "f.known_nan({})"}
LOADS = {"BF16": "f.widened({})", "F16": "{}.to(tl.float32)", "F32": "{}"}


@dataclass(eq=False)
class Source:
    """The lines of a loop, and the arrays that it reads: `ints` (int64) and `floats` (float32).

    counted   per counting operation the first of its counters, and how many it has (0: one for each block)
    """

    assembly: Assembly
    lines: list[str] = field(default_factory=list)
    ints: list[int] = field(default_factory=list)
    floats: list[float] = field(default_factory=list)
    counted: dict[int, tuple[int, int]] = field(default_factory=dict)
    counters: int = 0
    carried: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, assembly: Assembly) -> Source | None:
        """The source of a pass; None: it has an operation that only torch does on a GPU."""
        if assembly.gathers or assembly.lists or assembly.listed or assembly.zeros:
            return None
        source = cls(assembly)
        for number, operation in enumerate(assembly.operations):
            write = WRITERS.get(operation.code)
            if write is None or (operation.code == codes.SPREAD and operation.lists):
                return None
            write(source, operation, number)
        return source

    @property
    def by_block(self) -> bool:
        """Whether a program's entries are of one block."""
        return bool(self.carried) or any(x.code in BY_BLOCK for x in self.assembly.operations)

    def number(self, value: int) -> str:
        self.ints.append(value - (1 << 64) if value >> 63 > 0 else value)
        return f"tl.load(ints_at + {len(self.ints) - 1})"

    def real(self, value: float) -> str:
        self.floats.append(value)
        return f"tl.load(floats_at + {len(self.floats) - 1})"

    def add(self, line: str) -> None:
        self.lines.append(line)

    def set(self, operation: Operation, value: str) -> None:
        self.add(f"r{operation.to} = {value}")

    def value(self, operand: int) -> str:
        """A register, or a source as it is stored."""
        return f"s{operand - codes.DIRECT}" if operand >= codes.DIRECT else f"r{operand}"

    def based(self, operand: int, value: str) -> str:
        return value if operand < 0 else f"{self.value(operand)} + {value}"

    def counters_of(self, number: int, size: int) -> int:
        first = self.counters
        self.counted[number] = first, size
        self.counters += size
        return first

    def text(self) -> str:
        """The loop."""
        stored = [LOADS[place.info.dtype] for place in self.assembly.sources]
        pointers = [f"s{i}_at" for i in range(len(stored))]
        arguments = ["out_at", "counts_at", "sums_at", *pointers, "ints_at", "floats_at", "table_at", "ranks_at"]
        loads = [form.format(f"tl.load(s{i}_at + i, there, other=0)") for i, form in enumerate(stored)]
        body = [*(f"s{i} = {load}" for i, load in enumerate(loads)), *self.lines]
        if not self.by_block:
            head = ["first = start // 16 * 16 + tl.program_id(0).to(tl.int64) * SIZE",
                    "at = first + tl.arange(0, SIZE)", "there = (at >= start) & (at < stop)",
                    "i = at - start"]  # fmt: skip
        else:
            head = ["block = tl.program_id(0).to(tl.int64)"]
            inner = ["first = start + block * BLOCK + run * SIZE", "at = first + tl.arange(0, SIZE)",
                     "there = (at < stop) & (at < start + (block + 1) * BLOCK)", "i = at - start"]  # fmt: skip
            if self.carried:
                head += [f"{name} = tl.zeros([], tl.int32)" for name in self.carried]
                head.append("for run in range(0, RUNS):")
                body = [f"    {line}" for line in [*inner, *body]]
            else:
                head += ["run = tl.program_id(1)", *inner]
        if self.by_block:
            signature = f"{', '.join(arguments)}, start, stop, blocks, BLOCK, RUNS, SIZE: tl.constexpr"
        else:
            signature = f"{', '.join(arguments)}, start, stop, SIZE: tl.constexpr"
        text = "\n".join(["@triton.jit", f"def loop({signature}):", *(f"    {x}" for x in [*head, *body])]) + "\n"
        halves = "f.half_of(at, 0, {})" if self.by_block else "f.halves(first, 0, {}, SIZE)"
        for number in range(len(self.assembly.operations)):
            text = text.replace(f"HALVES({number})", halves.format(f"k{number}, l{number}"))
        return text.replace("COUNTERS", str(self.counters))


@lru_cache(maxsize=256)
def compiled(text: str) -> Any:
    """The loop of a source. Triton reads it back where Python's tracebacks would."""
    import triton
    import triton.language as tl

    from deltamerge.io.gpu import functions

    name = f"<deltamerge loop {abs(hash(text)):x}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    space: dict[str, Any] = {"triton": triton, "tl": tl, "f": functions, "__name__": __name__}
    exec(compile(text, name, "exec"), space)
    return space["loop"]


def _load(source: Source, x: Operation, _: int) -> None:
    source.set(x, f"s{x.fields[0]}")


def _subtract(source: Source, x: Operation, _: int) -> None:
    source.set(x, f"{source.value(x.fields[0])} - {source.value(x.fields[1])}")


def _drop(source: Source, x: Operation, number: int) -> None:
    a, b, high, low = x.fields
    q = x.scalars[0]
    for name, word in zip("kl", x.key, strict=True):
        source.add(f"{name}{number} = {source.number(word)}.to(tl.uint64, bitcast=True)")
    source.add(f"h{number} = HALVES({number})")
    bounds = f"{source.number(high)}.to(tl.int32), {source.number(low)}.to(tl.int32)"
    source.add(f"m{number} = f.kept(at, h{number}, {bounds}, k{number}, l{number})")
    delta = f"{source.value(a)} - {source.value(b)}"
    delta = delta if q == 1.0 else f"f.divided({delta}, {source.real(q)})"
    source.set(x, f"tl.where(m{number}, {delta}, 0.0)")


def _divide(source: Source, x: Operation, _: int) -> None:
    source.set(x, f"f.divided({source.value(x.fields[0])}, {source.real(x.scalars[0])})")


def _keep(source: Source, x: Operation, number: int) -> None:
    score, threshold, kept, ranks = x.fields
    value = source.value(x.models[0] if x.models else score)
    source.add(f"b{number}, t{number} = f.magnitude({source.value(score)}), {source.number(threshold)}.to(tl.int32)")
    if ranks < 0:
        source.set(x, f"tl.where(b{number} >= t{number}, {value}, 0.0)")
        return
    source.carried.append(f"c{number}")
    before = f"tl.load(ranks_at + {source.number(ranks)} + start // BLOCK + block)"
    source.add(f"e{number} = (b{number} == t{number}) & there")
    source.add(f"n{number} = tl.cumsum(e{number}.to(tl.int32), 0) + c{number}")
    source.add(f"c{number} += tl.sum(e{number}.to(tl.int32), 0)")
    source.add(f"e{number} = e{number} & (n{number} <= {source.number(kept)} - {before})")
    source.set(x, f"tl.where((b{number} > t{number}) | e{number}, {value}, 0.0)")


def _sum(source: Source, x: Operation, number: int, weights: Sequence[float]) -> str:
    """Lines that add up the weighted models, one after the other; the name of the sum."""
    for i, (model, weight) in enumerate(zip(x.models, weights, strict=True)):
        term = f"{source.real(weight)} * {source.value(model)}"
        source.add(f"a{number} = {term}" if i == 0 else f"a{number} = a{number} + {term}")
    return f"a{number}"


def _add(source: Source, x: Operation, number: int) -> None:
    total, (divisor, scale) = _sum(source, x, number, x.weights), x.scalars
    if np.float32(divisor) != 1:
        source.add(f"{total} = f.divided({total}, {source.real(divisor)})")
    if np.float32(scale) != 1:
        source.add(f"{total} = {total} * {source.real(scale)}")
    source.set(x, source.based(x.fields[0], total))


def _vote(source: Source, x: Operation, number: int, *, weighted: bool, normalize: bool) -> None:
    """Lines that add up the entries with the total's sign (`v`), and their weights (`w`)."""
    source.add(f"v{number} = tl.zeros_like(a{number})")
    source.add(f"w{number} = tl.zeros_like(a{number})")
    for model, weight in zip(x.models, x.weights, strict=True):
        w, value = source.real(weight), source.value(model)
        source.add(f"y{number} = {w} * {value}")
        sign = f"y{number}" if weighted else value
        source.add(f"v{number} = v{number} + f.agreeing({sign}, a{number}, y{number})")
        if normalize:
            source.add(f"w{number} = w{number} + f.agreeing({sign}, a{number}, tl.zeros_like(a{number}) + {w})")


def _agree(source: Source, x: Operation, number: int) -> None:
    _sum(source, x, number, x.weights)
    normalize, scale = bool(x.fields[2]), x.scalars[1]
    _vote(source, x, number, weighted=True, normalize=normalize)
    if normalize:
        divisor = f"tl.where(tl.abs(w{number}) < {SMALLEST_DIVISOR}, 1.0, w{number})"
        source.add(f"v{number} = f.divided(v{number}, {divisor})")
    if np.float32(scale) != 1:
        source.add(f"v{number} = v{number} * {source.real(scale)}")
    source.set(x, source.based(x.fields[0], f"v{number}"))


def _elect(source: Source, x: Operation, number: int) -> None:
    _sum(source, x, number, [1.0] * len(x.models))
    _vote(source, x, number, weighted=False, normalize=True)
    divisor = f"tl.where(w{number} < {SMALLEST_WEIGHT}, {SMALLEST_WEIGHT}, w{number})"
    source.set(x, source.based(x.fields[0], f"f.divided(v{number}, {divisor})"))


def _variance(source: Source, x: Operation, number: int) -> None:
    first, *others = map(source.value, x.models)
    count = source.real(float(len(x.models)))
    source.add(f"a{number} = tl.zeros_like({first})")
    for other in others:
        source.add(f"a{number} = a{number} + ({other} - {first})")
    source.add(f"a{number} = f.divided(a{number}, {count})")
    source.add(f"y{number} = 0.0 - a{number}")
    source.add(f"v{number} = y{number} * y{number}")
    for other in others:
        source.add(f"y{number} = ({other} - {first}) - a{number}")
        source.add(f"v{number} = v{number} + y{number} * y{number}")
    source.set(x, f"f.divided(v{number}, {count})")


def _clear(source: Source, x: Operation, _: int) -> None:
    other = f"{source.value(x.fields[1])}.to(tl.int32, bitcast=True)"
    source.set(x, f"tl.where({other} != 0, 0.0, {source.value(x.fields[0])})")


def _spread(source: Source, x: Operation, _: int) -> None:
    a, row, table, how = x.fields
    place = f"at // {source.number(row)}" if how == 0 else f"at % {source.number(row)}"
    entry = f"tl.load(table_at + {source.number(table)} + {place}, there, other=1.0)"
    value = source.value(a)
    source.set(x, f"tl.abs({value}) * {entry}" if how == 2 else f"f.divided({value}, {entry})")


def _columns(source: Source, x: Operation, number: int) -> None:
    a, other, row, _ = x.fields
    source.add(f"c{number} = at % {source.number(row)}")
    source.add(f"m{number} = c{number} < 0")
    for column in x.lists:
        source.add(f"m{number} = m{number} | (c{number} == {source.number(column)})")
    source.set(x, f"tl.where(m{number}, {'0.0' if other < 0 else source.value(other)}, {source.value(a)})")


def _store(source: Source, x: Operation, _: int) -> None:
    source.add(f"tl.store(out_at + i, {STORES[source.assembly.output].format(source.value(x.fields[0]))}, there)")


def _count(source: Source, x: Operation, number: int, size: int, place: str, mask: str) -> None:
    first = source.counters_of(number, size)
    source.add(f"tl.atomic_add(counts_at + {first} + {place}, 1, {mask}, sem='relaxed')")


def _high(source: Source, x: Operation, number: int) -> None:
    source.add(f"b{number} = f.magnitude({source.value(x.fields[0])})")
    _count(source, x, number, HIGH, f"(b{number} >> 16)", "there")


def _low(source: Source, x: Operation, number: int) -> None:
    source.add(f"b{number} = f.magnitude({source.value(x.fields[0])})")
    mask = f"there & ((b{number} >> 16) == {source.number(x.fields[1])})"
    _count(source, x, number, LOW, f"(b{number} & 0xFFFF)", mask)


def _nonzero(source: Source, x: Operation, number: int) -> None:
    first = source.counters_of(number, 1)
    found = f"tl.sum(((({source.value(x.fields[0])}) != 0.0) & there).to(tl.int32), 0).to(tl.int64)"
    source.add(f"tl.atomic_add(counts_at + {first}, {found}, sem='relaxed')")


def _equal(source: Source, x: Operation, number: int) -> None:
    source.counted[number] = len([n for n, (_, size) in source.counted.items() if size == 0]), 0
    first = source.counted[number][0]
    equal = f"(f.magnitude({source.value(x.fields[0])}) == {source.number(x.fields[1])}) & there"
    place = f"counts_at + COUNTERS + {first} * blocks + block"
    source.add(f"tl.atomic_add({place}, tl.sum(({equal}).to(tl.int32), 0).to(tl.int64), sem='relaxed')")


def _summed(source: Source, row: int, total: str) -> None:
    source.add(f"tl.store(sums_at + ({row} * blocks + block) * RUNS + run, {total})")


def _dots(source: Source, x: Operation, _: int) -> None:
    a, b = (f"{source.value(y)}.to(tl.float64)" for y in x.fields[:2])
    _summed(source, x.fields[2], f"f.halved(tl.where(there, {a} * {b}, 0.0), SIZE)")


def _norm(source: Source, x: Operation, _: int) -> None:
    value = source.value(x.fields[0])
    if x.fields[1]:
        total = f"f.halved(tl.where(there, tl.abs({value}).to(tl.float64), 0.0), SIZE)"
    else:
        largest = f"tl.max(tl.where(there, f.magnitude({value}), 0), 0)"
        total = f"{largest}.to(tl.float32, bitcast=True).to(tl.float64)"
    _summed(source, x.fields[2], total)


WRITERS: dict[int, Callable[[Source, Operation, int], None]] = {
    codes.LOAD: _load, codes.SUBTRACT: _subtract, codes.DROP: _drop, codes.DIVIDE: _divide, codes.KEEP: _keep,
    codes.ADD: _add, codes.AGREE: _agree, codes.ELECT: _elect, codes.VARIANCE: _variance, codes.CLEAR: _clear,
    codes.SPREAD: _spread, codes.COLUMNS: _columns, codes.STORE: _store, codes.HIGH: _high, codes.LOW: _low,
    codes.NONZERO: _nonzero, codes.EQUAL: _equal, codes.DOTS: _dots, codes.NORM: _norm,
}  # fmt: skip


def array(values: Sequence[Any], dtype: Any) -> NDArray[Any]:
    """At least one entry, so that there is an address."""
    return np.array([*values, 0][: max(1, len(values))], dtype)
