"""The compiled loop checks what it is asked for: a call that does not fit raises ValueError and touches no memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltamerge.engine import kernels
from deltamerge.engine.fused import codes
from deltamerge.engine.fused.program import OPERATION

pytestmark = pytest.mark.skipif(not kernels.available(), reason="no compiled kernels")
SIZE = 10_000
FIELDS = ("code", "to", "a", "b", "c", "d")
JOB = ("start", "stop", "block", "elements", "aligned", "sampled", "dtype", "chunk", "registers", "lists", "sums")
SOURCE = ("fd", "begin", "dtype", "memory", "coded")
CODED = (
    "form", "width", "columns", "stride", "scales", "zeros", "height", "m", "n", "down", "across", "line", "hashed",
    "table", "stored", "groups", "biases", "factor",
)  # fmt: skip


def operation(code: int, to: int = -1, *fields: int, models: int = 0, first: int = 0) -> dict[str, Any]:
    a, b, c, d = (*fields, -1, -1, -1, -1)[:4]
    return {"code": code, "to": to, "a": a, "b": b, "c": c, "d": d, "models": models, "first": first}


@dataclass
class Call:
    """A call that adds two tensors in memory, of which each test changes one thing."""

    job: dict[str, int] = field(default_factory=lambda: dict(zip(JOB, (
        0, SIZE, SIZE, SIZE, 0, 0, codes.DTYPES["F32"], 2048, 4, 2, 1,
    ), strict=True)))  # fmt: skip
    operations: list[dict[str, Any]] = field(default_factory=lambda: [
        operation(codes.LOAD, 0, 0), operation(codes.LOAD, 1, 1),
        operation(codes.ADD, 2, 0, -1, models=1), operation(codes.STORE, -1, 2),
    ])  # fmt: skip
    sources: list[dict[str, int]] = field(default_factory=lambda: [
        dict(zip(SOURCE, (-1, 0, codes.DTYPES["F32"], number, -1), strict=True)) for number in (0, 1)
    ])  # fmt: skip
    coded: list[dict[str, int]] = field(default_factory=list)
    weights: Any = field(default_factory=lambda: np.ones(1, np.float32))
    operands: Any = field(default_factory=lambda: np.array([1]))
    lists: Any = field(default_factory=lambda: np.zeros(0, np.int64))
    tables: Any = field(default_factory=lambda: np.array([1 << 62, 2**64 - 1], np.uint64))
    guides: Any = field(default_factory=lambda: np.zeros(4, np.uint32))
    bounds: Any = field(default_factory=lambda: np.array([[0, 2, 0, 4, 61]]))
    ranks: Any = field(default_factory=lambda: np.zeros(0, np.int64))
    limits: Any = field(default_factory=lambda: np.zeros(0, np.uint32))
    ratios: Any = field(default_factory=lambda: np.zeros(0, np.float32))
    first_pieces: Any = field(default_factory=lambda: np.zeros(2, np.int64))
    out: Any = field(default_factory=lambda: np.zeros(SIZE, np.float32))
    counts: Any = field(default_factory=lambda: np.zeros(8, np.int64))
    sums: Any = field(default_factory=lambda: np.zeros((1, 1)))
    listed: Any = field(default_factory=lambda: np.zeros((1, SIZE + 2 + codes.SLACK), np.uint32))
    used: Any = field(default_factory=lambda: np.zeros(1, np.int64))
    digests: Any = field(default_factory=lambda: np.zeros(0, np.uint64))
    hashed: Any = field(default_factory=lambda: np.zeros(2, np.int64))
    arrays: tuple[Any, ...] = field(
        default_factory=lambda: (np.arange(SIZE, dtype=np.float32), np.ones(SIZE, np.float32))
    )

    def run(self) -> Any:
        rows = np.zeros(len(self.operations), OPERATION)
        for row, given in zip(rows, self.operations, strict=True):
            row["fields"] = [given[name] for name in FIELDS]
            row["scalars"], row["models"], row["first"] = (1.0, 1.0), given["models"], given["first"]
        table = [np.array([list(one.values()) for one in given], np.int64) for given in (self.sources, self.coded)]
        module: Any = kernels.native()
        return module.run(
            np.array(list(self.job.values()), np.int64), rows, self.weights, self.operands, self.lists, self.tables,
            self.guides, self.bounds, self.ranks, self.limits, self.ratios, *table, self.first_pieces, self.out,
            self.counts, self.sums, self.listed, self.used, self.digests, self.hashed, self.arrays,
        )  # fmt: skip


def test_the_call_that_is_changed_runs() -> None:
    call = Call()
    assert call.run()
    assert np.array_equal(call.out, np.arange(SIZE) + 1)


def test_of_no_element_nothing_is_asked() -> None:
    """A tensor without elements has no blocks, sums or output, and its file is not read."""
    call = Call()
    call.job.update(stop=0, elements=0)
    call.out, call.sums, call.arrays = call.out[:0], call.sums[:, :0], (np.zeros(0, np.float32),) * 2
    call.operations.append(operation(codes.DOTS, -1, 0, 1, 0))
    assert call.run()


Change = Callable[[Call], object]


def then(*operations: dict[str, Any]) -> Change:
    """With other operations after the two that fill registers 0 and 1."""
    return lambda call: call.operations.__setitem__(slice(2, None), list(operations))


def job(**numbers: int) -> Change:
    return lambda call: call.job.update(numbers)


def source(**numbers: int) -> Change:
    return lambda call: call.sources[1].update(numbers)


def arrays(second: Any) -> Change:
    return lambda call: setattr(call, "arrays", (call.arrays[0], second))


def given(**values: Any) -> Change:
    return lambda call: [setattr(call, name, value) for name, value in values.items()]


def both(*changes: Change) -> Change:
    return lambda call: [change(call) for change in changes]


def misaligned(dtype: Any, count: int) -> Any:
    size = np.dtype(dtype).itemsize
    return np.zeros(count * size + 8, np.uint8)[1 : 1 + count * size]


def codes_of(**numbers: int) -> Change:
    """The second source as int8 codes in a file, 100 columns with a scale each row."""

    def change(call: Call) -> None:
        row = dict(zip(CODED, (2, 8, 100, 100, 2, -1, 100, 1, 100, 100, 1, 0, 0, -1, -1, -1, -1, -1), strict=True))
        call.coded.append(row | numbers)
        call.sources[1].update(fd=0, coded=0)
        call.arrays = (*call.arrays, np.ones(100, np.float32))

    return change


def words_of(**numbers: int) -> Change:
    """The second source as words of four bits, stored transposed, 80 columns of 125 rows."""

    def change(call: Call) -> None:
        row = dict(zip(CODED, (7, 4, 80, 125, 2, 3, 0, 0, 0, 0, 1, 0, 0, -1, 4, 5, -1, -1), strict=True))
        call.coded.append(row | numbers)
        call.sources[1].update(coded=0)
        more = np.ones((125, 1), np.float32), np.zeros((125, 1), np.float32), np.zeros((10, 125), np.uint32)
        call.arrays = (*call.arrays, *more, np.zeros(80, np.int32))

    return change


def _more(call: Call, array: Any) -> None:
    call.arrays = (*call.arrays, array)


DRAWN = operation(codes.DRAW, 0, 0)
BAD: dict[str, Change] = {
    # registers
    "a register that is not there": then(operation(codes.STORE, -1, 4)),
    "a register below the first": then(operation(codes.STORE, -1, -2)),
    "a register that is far away": then(operation(codes.STORE, -1, (1 << 32) - 1)),
    "a register into which nothing was put": then(operation(codes.STORE, -1, 3)),
    "a result to no register": then(operation(codes.CLEAR, 4, 0, 1)),
    "a result to a negative register": then(operation(codes.DIVIDE, -1, 0)),
    "rows of registers beyond the last": both(
        given(operands=np.array([0, 1]), weights=np.ones(2, np.float32), lists=np.zeros(2, np.int64)),
        then(DRAWN, operation(codes.ALIGN, 1, 3, models=2)),
    ),
    "too many registers": job(registers=1 << 20),
    # sources
    "a source that is not there": then(operation(codes.LOAD, 2, 2)),
    "a source below the first": then(operation(codes.LOAD, 2, -1)),
    "a source in place of a register that is not there": then(operation(codes.SUBTRACT, 2, codes.DIRECT + 2, 0)),
    "a source of float16 in place of a register": both(
        source(dtype=codes.DTYPES["F16"]), then(operation(codes.SUBTRACT, 2, codes.DIRECT + 1, 0))
    ),
    "a source of no dtype": source(dtype=3),
    "an array that is not there": source(memory=2),
    "an array below the first": source(memory=-2),
    "no file and no array": source(memory=-1),
    "an array that is too short": arrays(np.ones(SIZE - 1, np.float32)),
    "an array without elements": arrays(np.zeros(0, np.float32)),
    "an array that is not aligned": arrays(misaligned(np.float32, SIZE)),
    "a file before all": source(fd=-2),
    "a file number beyond all": source(fd=1 << 40),
    "a place before a file": both(source(fd=0), source(begin=-8)),
    "a place beyond all files": both(source(fd=0), source(begin=(1 << 63) - 8)),
    "codes that are not there": source(coded=0),
    # sizes
    "a range that ends before it begins": job(start=0, stop=-1),
    "a range beyond the tensor": job(stop=SIZE + 1),
    "a range that begins inside a block": job(start=1),
    "a block without elements": job(block=0),
    "a size that leaves 64 bits": job(stop=1 << 62, elements=1 << 62, block=1 << 62),
    "a size whose bytes leave 64 bits": job(stop=(1 << 63) - 1, elements=(1 << 63) - 1, block=1 << 45),
    "a register without elements": job(chunk=0),
    "a register of all memory": job(chunk=1 << 61),
    "a negative sample": job(sampled=-1),
    "a sample of all memory": job(sampled=1 << 60),
    "blocks of the generator that no register holds": job(aligned=1),
    "an output of no dtype": job(dtype=7),
    "sums beyond their array": job(sums=2),
    "negative lists": job(lists=-1),
    # results
    "no output": given(out=np.zeros(0, np.float32)),
    "an output that is too short": given(out=np.zeros(SIZE - 1, np.float32)),
    "counts that are too short": then(operation(codes.HIGH, -1, 0, 0, 0, 0)),
    "counts at a negative place": then(operation(codes.NONZERO, -1, 0, 0, 0, -1)),
    "counts at a place that overflows": then(operation(codes.LOW, -1, 0, 0, 0, (1 << 63) - 2)),
    "sums in no row": then(operation(codes.DOTS, -1, 0, 1, 1)),
    "a list in no row": then(operation(codes.SAMPLE, -1, 0, 10, 1)),
    "a list that is too short": both(given(listed=np.zeros((1, SIZE), np.uint32)), then(operation(
        codes.LIST, -1, 0, 0, 0, 9))),
    "a list that is not empty": both(given(used=np.array([5])), then(operation(codes.SAMPLE, -1, 0, 10, 0))),
    "two lists in one row": then(operation(codes.SAMPLE, -1, 0, 10, 0), operation(codes.SAMPLE, -1, 1, 10, 0)),
    "hashes that begin before the range": both(
        source(fd=0, begin=1 << 17), given(digests=np.zeros((2, 4, 2), np.uint64))
    ),
    "hashes that begin inside a piece": both(
        source(fd=0), given(digests=np.zeros((2, 4, 2), np.uint64), hashed=np.array([0, 1024]))
    ),
    "digests that are too few": both(
        source(fd=0), given(digests=np.zeros((2, 1, 2), np.uint64)), job(stop=SIZE, elements=SIZE),
        lambda call: [call.job.update(stop=40_000, elements=40_000, block=40_000), given(
            out=np.zeros(40_000, np.float32), arrays=(np.zeros(40_000, np.float32),))(call)],
    ),
    # lists of places, tables
    "places that were not drawn": then(operation(codes.DIVIDE, 2, 0, 0)),
    "places in no list": then(operation(codes.DRAW, 2, 0)),
    "places by no table": then(operation(codes.DRAW, 0, 1)),
    "a table beyond its array": both(given(bounds=np.array([[0, 3, 0, 4, 61]])), then(DRAWN)),
    "a table without an end": both(given(tables=np.array([1, 2], np.uint64)), then(DRAWN)),
    "a table of its end alone": both(given(bounds=np.array([[1, 2, 0, 4, 61]])), then(DRAWN)),
    "a guide that is too short": both(given(bounds=np.array([[0, 2, 0, 4, 60]])), then(DRAWN)),
    "a guide out of its table": both(given(guides=np.full(4, 2, np.uint32)), then(DRAWN)),
    "a shift of all bits": both(given(bounds=np.array([[0, 2, 0, 4, 64]])), then(DRAWN)),
    "a negative shift": both(given(bounds=np.array([[0, 2, 0, 4, -1]])), then(DRAWN)),
    # operations
    "no such operation": then(operation(99, 0, 0)),
    "a negative operation": then(operation(-1, 0, 0)),
    "models beyond their array": then(operation(codes.ADD, 2, 0, -1, models=2)),
    "models that begin before their array": then(operation(codes.ADD, 2, 0, -1, models=1, first=-1)),
    "no models": then(operation(codes.VARIANCE, 2)),
    "as many models as leave 64 bits": then(operation(codes.ADD, 2, 0, -1, models=(1 << 63) - 1, first=1)),
    "ranks beyond their array": then(operation(codes.KEEP, 2, 0, 1, 1, 0)),
    "rows without columns": then(operation(codes.ROWS, 2, 0, 0, 1, 0)),
    "rows that do not fill a register": then(operation(codes.ROWS, 2, 0, 0, 1, 7)),
    "a division by a table beyond its array": then(operation(codes.SPREAD, 2, 0, 10, 0, 0)),
    "a division by rows of nothing": then(operation(codes.SPREAD, 2, 0, 0, 0, 0)),
    "columns of nothing": then(operation(codes.COLUMNS, 2, 0, -1, 0)),
    "a column beyond the row": both(
        given(lists=np.array([10])), then(operation(codes.COLUMNS, 2, 0, -1, 10, models=1))
    ),
    "limits beyond their array": both(
        given(lists=np.array([100, 0, 0])), then(operation(codes.RANK, 2, 0, 100, 0, models=1))
    ),
    # codes
    "codes of no form": codes_of(form=9),
    "codes of no width": codes_of(form=3, width=0),
    "codes of too many bits": codes_of(form=3, width=64),
    "codes without columns": codes_of(columns=0),
    "rows of codes that overlap": codes_of(stride=99),
    "rows of codes that leave 64 bits": codes_of(stride=1 << 62),
    "a division by a block of nothing": codes_of(n=0),
    "a division by a matrix of nothing": codes_of(height=0),
    "a division by rows of nothing in a block": codes_of(m=0),
    "scales of too few rows": codes_of(line=-1),
    "scales of rows that come later": codes_of(line=1),
    "scales in no array": codes_of(scales=3),
    "scales for a part of the columns": codes_of(n=50),
    "a table that is not there": codes_of(form=4, width=4, stride=50),
    "biases in no array": codes_of(biases=3),
    "biases that are too few": both(codes_of(biases=3), lambda call: _more(call, np.zeros(99, np.float32))),
    "a factor in no array": codes_of(factor=3),
    "codes in no array": codes_of(stored=3),
    "codes in memory that are too few": both(
        codes_of(stored=3), lambda call: _more(call, np.zeros(SIZE - 1, np.uint8))
    ),
    "codes in memory that are hashed": both(
        codes_of(stored=3, hashed=1), lambda call: _more(call, np.zeros(SIZE, np.uint8))
    ),
    "words of no width": words_of(width=5),
    "words of too few rows": words_of(stride=124),
    "words beyond their array": words_of(stride=126),
    "words that begin late": words_of(line=1),
    "words in no array": words_of(stored=9),
    "a group of columns that is not there": both(words_of(), lambda call: call.arrays[5].__setitem__(3, 1)),
    # arrays as they come
    "a job that is too short": lambda call: call.job.pop("sums"),
    "a bound that is not aligned": given(bounds=misaligned(np.int64, 5)),
    "operands that are not aligned": given(operands=misaligned(np.int64, 1)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_call_that_does_not_fit_touches_nothing(case: str) -> None:
    call = Call()
    BAD[case](call)
    before = [np.array(x) for x in (call.out, call.counts, call.listed, call.digests)]
    with pytest.raises(ValueError, match=r"^[a-z][a-z0-9 ,.]+$"):
        call.run()
    after = (call.out, call.counts, call.listed, call.digests)
    assert case == "rows that do not fill a register" or all(map(np.array_equal, before, after))


def in_memory(call: Call) -> None:
    """The second source as int8 codes in memory, with a bias a row and a factor."""
    codes_of(stored=3, biases=4, factor=5)(call)
    for array in (np.full(SIZE, 3, np.uint8), np.ones(100, np.float32), np.full(1, 2, np.float32)):
        _more(call, array)


CODES = {"codes": (codes_of(), 3), "words": (words_of(), 0), "codes in memory": (in_memory, 8)}


def decoded(call: Call, data: Any, start: int = 0) -> Any:
    out = np.empty(SIZE - start, np.float32)
    module: Any = kernels.native()
    module.decode(np.array(list(call.coded[0].values()), np.int64), data, out, start, call.arrays)
    return out


@pytest.mark.parametrize("case", CODES)
def test_codes_alone_are_read_as_in_the_loop(case: str) -> None:
    call, data = Call(), np.full(SIZE, 3, np.uint8)
    change, value = CODES[case]
    change(call)
    assert np.array_equal(decoded(call, data), np.full(SIZE, value))
    if case == "codes":
        assert np.array_equal(decoded(call, data[9700:], 9730), np.full(270, value))
        for few in (data[:-1], data[:0]):
            with pytest.raises(ValueError, match="codes are too short"):
                decoded(call, few)
    for start in (-1, 1 << 62):
        with pytest.raises(ValueError, match="outside"):
            kernels.native().decode(np.array(list(call.coded[0].values())), data, np.empty(4, np.float32), start, ())


def test_codes_that_do_not_fit_are_refused_alone_too() -> None:
    refused = 0
    for change in BAD.values():
        call = Call()
        change(call)
        if call.coded:
            refused += 1
            with pytest.raises(ValueError, match=r"^[a-z][a-z0-9 ,.]+$"):
                decoded(call, np.zeros(SIZE, np.uint8))
    assert refused > 20


@pytest.mark.parametrize("case", CODES)
def test_codes_that_fit_are_read(case: str, tmp_path: Path) -> None:
    """So that what is refused above is refused for what was changed."""
    call = Call()
    with (tmp_path / "codes").open("w+b") as file:
        file.write(bytes([3]) * SIZE)
        file.flush()
        change, value = CODES[case]
        change(call)
        call.sources[1]["fd"] = file.fileno()
        assert call.run()
    assert np.array_equal(call.out, np.arange(SIZE) + value)


def test_no_random_call_leaves_its_arrays() -> None:
    """Numbers of a good call exchanged for others, thousands of times; `make sanitize` watches the memory."""
    rng = np.random.default_rng(7)
    numbers = [-(1 << 63), -(1 << 32), -2, -1, 0, 1, 2, 3, 7, 15, 16, 2047, 2048, SIZE, 1 << 16, codes.DIRECT,
               codes.DIRECT + 1, 1 << 33, 1 << 62, (1 << 63) - 1]  # fmt: skip
    refused = 0
    for _ in range(4000):
        call = Call()
        if rng.random() < 0.3:
            (codes_of(), words_of(), in_memory)[rng.integers(3)](call)
        if rng.random() < 0.5:
            then(operation(int(rng.integers(0, 29)), 2, 0, 0, 0, 0, models=int(rng.integers(0, 2))))(call)
            if rng.random() < 0.3:
                call.operations.insert(2, DRAWN)
        for _ in range(int(rng.integers(1, 3))):
            places: list[Any] = [call.job, *call.operations, *call.sources, *call.coded]
            row = places[rng.integers(len(places))]
            row[list(row)[rng.integers(len(row))]] = numbers[rng.integers(len(numbers))]
        try:
            if call.coded and rng.random() < 0.5:
                decoded(call, np.zeros(SIZE, np.uint8))
            else:
                call.run()
        except (ValueError, MemoryError):
            refused += 1
    assert 1000 < refused < 4000


def test_both_languages_have_one_table() -> None:
    """The header is made by setup.py of the Python table, and is in no repository."""
    header = Path(kernels.__file__).parent / "src" / "codes.h"
    if not header.exists():
        pytest.skip("nothing was compiled here")
    found = {name.lower(): int(number) for name, number in re.findall(r"k(\w+) = (\d+)", header.read_text())}
    plain = {name: value for name, value in vars(codes).items() if isinstance(value, int) and name.isupper()}
    assert found == {name.title().replace("_", "").lower(): value for name, value in plain.items()}
    assert len(set(plain.values()) - {codes.PIECE, codes.DIRECT}) == 29


@pytest.mark.parametrize("name", ["trellis", "steps_unpack", "steps_count", "steps_place", "ordered_product"])
def test_the_other_entry_points_bound_what_they_shift_and_divide_by(name: str) -> None:
    module: Any = kernels.native()
    u8, floats = np.zeros(64, np.uint8), np.zeros(64, np.float32)
    table, far = np.zeros(256, np.float32), 1 << 62
    calls: dict[str, list[tuple[Any, ...]]] = {
        "trellis": [
            (floats, floats, u8, 8, 1),  # a table of other than 256
            (floats, table, u8, 0, 1),
            (floats, table, u8, far, 1),
            (floats, table, u8, 7, 1),
            (floats, table, np.zeros(128, np.uint8), 8, 1),
            (floats, table, u8, 8, 3),
        ],
        "steps_unpack": [(u8, u8, 3, 0, 0, -1), (u8, u8, 3, 0, 0, far), (u8, u8, 40, 0, 0, 9)],
        "steps_count": [
            (u8, np.zeros(256, np.int64), 64, 255),
            (u8, np.zeros(256, np.int64), -1, 255),
            (u8, np.zeros(256, np.int64), 7, 256),
        ],
        "steps_place": [
            (u8, np.zeros(256, np.uint8), np.zeros(2, np.uint32), np.array(starts), np.zeros(2, np.uint8),
             np.zeros(2, np.int64), np.zeros(9, np.int64), np.zeros(9, np.int64), shift, 255)
            for starts, shift in (([0, 9, 2], 7), ([-4, 1, 2], 7), ([0, 1, 2], 40))
        ],
        "ordered_product": [(floats, floats, floats, far, 4, far), (floats, floats, floats, -2, 4, -2)],
    }  # fmt: skip
    for arguments in calls[name]:
        with pytest.raises(ValueError, match=r"array is shorter|no such|1 or 2 bits"):
            getattr(module, name)(*arguments)
