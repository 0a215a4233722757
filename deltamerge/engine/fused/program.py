"""A pass for the compiled loop: the graphs that it can run, their operations as arrays, and the run on a range."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from deltamerge.engine import kernels
from deltamerge.engine.fused import codes
from deltamerge.engine.fused.operations import Assembly, Form, StoredSource, store
from deltamerge.files.hashes import PIECE_BYTES, Pieces
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import REDUCTIONS, depth_first
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.tiles import RUN, SPARSE_BLOCK
from deltamerge.tensors.traits import Traits, is_sparse, traits_of

if TYPE_CHECKING:
    from deltamerge.formats.quantised.codes import CodedRows

# The structures of kernels/src/program.h.
OPERATION = [("fields", "i8", 6), ("key", "u8", 2), ("scalars", "f4", 2), ("models", "i8"), ("first", "i8")]
IN_MEMORY = -1  # in place of a file: the elements are in memory
NOT_CODED = NO_ARRAY = -1


class Program:
    """A pass, ready to run on any range of elements, from any number of threads."""

    def __init__(self, assembly: Assembly, reader: Reader, *, hashed: bool) -> None:
        """`hashed`: the hashes of read bytes are added to the reader's pieces."""
        done, shape = assembly.operations, assembly.form
        self.assembly, self.reader = assembly, reader
        self.pieces: Pieces | None = reader.pieces if hashed else None
        self.block, self.sources = shape.block, assembly.sources
        self.counters, self.sums, self.listed = assembly.counters, assembly.sums, assembly.listed
        self.summed = assembly.summed
        self.spare: list[NDArray[np.uint8]] = []
        rows, weights, models, lists = list[Any](), list[float](), list[int](), list[int]()
        for x in done:
            count = x.count or len(x.models)
            rows.append(((x.code, x.to, *x.fields), x.key, x.scalars, count, len(weights)))
            if width := x.width:
                for given, into in ((x.weights, weights), (x.models, models), (x.lists, lists)):
                    into += [*given, *[0] * (width - len(given))]
        self.operations = np.array(rows, np.dtype(OPERATION))
        self.weights = np.array(weights, np.float32)
        self.models, self.lists = np.array(models, np.int64), np.array(lists, np.int64)
        self.tables, self.guides, self.bounds = _joined(assembly.tables)
        self.ranks = np.concatenate([np.empty(0, np.int64), *assembly.ranks])
        self.limits = np.concatenate([np.empty(0, np.uint32), *assembly.limits])
        self.ratios = np.concatenate([np.empty(0, np.float32), *assembly.ratios])

    def run(self, start: int, stop: int, out: NDArray[np.uint8] | None) -> dict[int, Any] | None:
        """Compute elements [start, stop) of the tensor, from the start of a block, and write them to `out` if given.

        Return the partials of the pass's reductions by the id of their node. None: it failed, and torch must find the
        error.
        """
        operations, blocks = self.operations.copy(), -(-(stop - start) // self.block)
        counts = self._place_counters(operations, blocks)
        sums = np.empty((self.summed, blocks), np.float64)
        listed = np.empty((len(self.listed), stop - start + 2 * blocks + codes.SLACK), np.uint32)
        used = np.zeros(len(self.listed), np.int64)
        coded = [place.rows(self.reader, start, stop) for place in self.sources]
        memory = [
            self._made(place, start, stop) if place.file is None or (place.coded and part is None) else None
            for place, part in zip(self.sources, coded, strict=True)
        ]
        held = [buffer for buffer in memory if buffer is not None]
        first_pieces, room = self._room(start, stop)
        digests, hashed = np.empty((len(self.sources), room, 2), np.uint64), first_pieces * PIECE_BYTES
        rows, described, arrays = self._files(memory, coded)
        native = kernels.native()
        assert native is not None
        went = native.run(
            self._job(start, stop), operations, self.weights, self.models, self.lists, self.tables, self.guides,
            self.bounds, self.ranks, self.limits, self.ratios, rows, described, first_pieces,
            np.empty(0, np.uint8) if out is None else out, counts, sums, listed, used, digests, hashed, tuple(arrays),
        )  # fmt: skip
        self.spare += held
        if not went:
            return None
        if self.pieces and room:
            for source, place in enumerate(self.sources):
                if self._hashed_bits(place) and memory[source] is None:
                    count = hashed[source] // PIECE_BYTES - first_pieces[source]
                    self.pieces.give(place.path, int(first_pieces[source]), digests[source, :count])
        found: dict[int, Any] = {}
        for node, (row, size) in self.counters.items():
            first = operations["fields"][row, 5]
            found[node] = counts[first : first + (size or blocks)]
        for node, (row, count) in self.sums.items():
            found[node] = sums[row : row + count].T if count else sums[row]
        for node, row in self.listed.items():
            found[node] = listed[row, : used[row]].copy()
        return found

    def _job(self, start: int, stop: int) -> NDArray[np.int64]:
        made, form = self.assembly, self.assembly.form
        numbers = (
            start, stop, form.block, form.elements, made.aligned, made.sampled, codes.DTYPES.get(made.output, 0),
            made.chunk, made.count, made.lists, made.summed,
        )  # fmt: skip
        return np.array(numbers, np.int64)

    def _made(self, place: StoredSource, start: int, stop: int) -> NDArray[np.uint8]:
        """Return a buffer that begins with the elements of a computed tensor.

        It reuses an old buffer, because new memory would have to be cleared first.
        """
        size = (stop - start) * place.itemsize
        buffer = self.spare.pop() if self.spare else np.empty(0, np.uint8)
        if len(buffer) < size:
            buffer = np.empty(size, np.uint8)
        self.reader.read_into(place.info, start, buffer[:size])
        return buffer

    def _files(
        self, memory: Sequence[NDArray[np.uint8] | None], coded: Sequence[CodedRows | None]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], list[NDArray[Any]]]:
        """Return the place of each source, the form of coded sources, and the arrays that both refer to by number."""
        rows, described = np.empty((len(self.sources), 5), np.int64), list[tuple[int, ...]]()
        arrays: list[NDArray[Any]] = []
        for row, place, made, part in zip(rows, self.sources, memory, coded, strict=True):
            fd, at = (IN_MEMORY, len(arrays)) if made is not None else (_fd(place), NO_ARRAY)
            arrays += [] if made is None else [made]
            row[:] = fd, place.begin, codes.DTYPES[place.info.dtype], at, NOT_CODED if part is None else len(described)
            described += [] if part is None else [part.numbers(self._hashed_bits(place) > 0, arrays)]
        return rows, np.array(described, np.int64), arrays

    def _room(self, start: int, stop: int) -> tuple[NDArray[np.int64], int]:
        """Return the number of the first piece of each source's file, and how many pieces any of them may have."""
        bits = [self._hashed_bits(place) for place in self.sources]
        begins = (place.begin + start * width // 8 for place, width in zip(self.sources, bits, strict=True))
        longest = (stop - start) * max(bits, default=0) // 8
        return np.array([-(-x // PIECE_BYTES) for x in begins], np.int64), longest // PIECE_BYTES if self.pieces else 0

    def _hashed_bits(self, place: StoredSource) -> int:
        """Return the bits of an element in a source's file; 0 where pieces may begin within a byte: they are not
        hashed."""
        begins = (self.block, max(codes.PIECE, self.assembly.chunk))
        return 0 if any(begin * place.bits % 8 for begin in begins) else place.bits

    def _place_counters(self, operations: NDArray[Any], blocks: int) -> NDArray[np.int64]:
        total = 0
        for row, size in self.counters.values():
            operations["fields"][row, 5] = total
            total += size or blocks
        return np.zeros(total, np.int64)


def _fd(place: StoredSource) -> int:
    assert place.file is not None
    return place.file.fd


def _joined(
    parts: Sequence[tuple[NDArray[np.uint64], NDArray[np.uint32], np.uint64]],
) -> tuple[NDArray[np.uint64], NDArray[np.uint32], NDArray[np.int64]]:
    """Return the gap tables end to end, the guides end to end, and each table's begin, end and shift."""
    tables, guides = [np.empty(0, np.uint64)], [np.empty(0, np.uint32)]
    bounds, at, of_guide = np.empty((len(parts), 5), np.int64), 0, 0
    for row, (table, guide, shift) in zip(bounds, parts, strict=True):
        row[:] = at, at + table.size, of_guide, of_guide + guide.size, shift
        at, of_guide = at + table.size, of_guide + guide.size
        tables.append(table)
        guides.append(guide)
    return np.concatenate(tables), np.concatenate(guides), bounds


STORED = codes.DTYPES.keys()

Steps = Sequence[tuple[Node, dict[str, Any], tuple[Node, ...]]]


def covers(root: Node) -> bool:
    """Tell whether the loop can run every pass of a tensor; whatever the values in between are."""
    return (root.kind in ("small", *REDUCTIONS) or root.dtype in STORED) and all(
        _is_known(node, root) for node in depth_first(root)
    )


def _is_known(node: Node, root: Node) -> bool:
    if node.kind in ("small", "stage"):
        return True
    if node.is_source:
        return node.dtype in STORED
    declared = traits_of(node.function)
    return declared.loop is not None and (declared.fits is None or declared.fits(node, root))


def assemble(
    steps: Steps, values: Mapping[int, Any], reader: Reader, shape: tuple[int, ...], output: str
) -> Program | None:
    """Return the pass of `steps` (node, parameters, nodes used last there) on a tensor of `shape`.

    None: the loop has no operation for some step. `values` are the small values so far, `output` is the dtype to write.
    """
    assembly = operations_of(steps, values, reader, shape, output)
    ends = any(node.kind in REDUCTIONS for node, _, _ in steps)
    return None if assembly is None else Program(assembly, reader, hashed=not ends)


def operations_of(
    steps: Steps, values: Mapping[int, Any], reader: Reader, shape: tuple[int, ...], output: str
) -> Assembly | None:
    """Return the operations of a pass."""
    declared = [traits_of(node.function) for node, _, _ in steps]
    ends, last = any(node.kind in REDUCTIONS for node, _, _ in steps), steps[-1][0]
    gathers = not ends and _patches(last.inputs[0] if declared[-1].stores else last)
    assembly = Assembly(values, reader, Form(shape), output, gathers)
    _cut(assembly, steps, declared)
    assembly.uses.update([id(source) for node, _, _ in steps for source in node.operands])
    for (node, parameters, frees), its in zip(steps, declared, strict=True):
        if node.is_source:
            assembly.source_of[id(node)] = len(assembly.sources)
            assembly.sources.append(StoredSource.of(node, reader))
        elif its.loop is None:
            return None
        else:
            its.loop(assembly, node, **parameters)
        assembly.release(frees)
    if not ends and not declared[-1].stores:
        store(assembly, last)
    return assembly


def _patches(merge: Node) -> bool:
    """Tell whether a merge works only on places, so that its cost grows with the number of kept entries."""
    if not traits_of(merge.function).patches or not merge.inputs[0].is_source:
        return False
    return all(map(is_sparse, merge.inputs[1:]))


def _cut(assembly: Assembly, steps: Steps, declared: Sequence[Traits]) -> None:
    """Choose the content of a register: a run, whole rows, a block, or the entries of a stream of gaps."""
    form, drawn = assembly.form, any(is_sparse(node) for node, _, _ in steps)
    ranked, sums = any(its.sorts for its in declared), any(its.sums for its in declared)
    whole = sums or not form.pieces_are_rows or (not form.columns and any(its.vectors for its in declared))
    if assembly.gathers:
        assembly.chunk, assembly.aligned = SPARSE_BLOCK, True
    elif drawn or (ranked and whole):
        assembly.chunk = form.block
    elif ranked:
        assembly.chunk = form.row * max(1, RUN // form.row)
    ends = {traits_of(node.function).samples for node, _, _ in steps if node.kind in REDUCTIONS}
    if len(ends) == 1 and not ranked and not drawn and (samples := ends.pop()) is not None:
        assembly.sampled = samples(form.shape)
