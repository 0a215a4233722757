"""Assembles a pass of a tensor into the operations of the compiled loop, and says which tensors it can make whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from deltamerge.engine.fused import codes, merging, pruning, reductions
from deltamerge.engine.fused.assembly import Assembly, Form, StoredSource
from deltamerge.engine.fused.program import Program
from deltamerge.engine.graph import REDUCTIONS, Node, depth_first
from deltamerge.io.reader import Reader
from deltamerge.methods.prune.bits import SPARSE_BLOCK, is_sparse
from deltamerge.methods.prune.select import sampled_run
from deltamerge.methods.tiles import LONGEST_ROW, RUN, row_length

STORED = codes.DTYPES.keys()


def _read(assembly: Assembly, node: Node) -> None:
    info = node.parameter("tensor")
    assembly.source_of[id(node)] = len(assembly.sources)
    assembly.sources.append(StoredSource.of(info, assembly.reader))


def _cast(assembly: Assembly, node: Node, to: str) -> None:
    _store(assembly, node.inputs[0])


def _store(assembly: Assembly, node: Node) -> None:
    """A node's values are the output."""
    if assembly.gathers:
        kept = assembly.kept[id(node)]
        assembly.add(codes.PATCH, assembly.new(), assembly.source_of[id(node.inputs[0])], kept.register, kept.places)
    else:
        assembly.add(codes.STORE, -1, assembly.register(node))


CAST, ZEROS = "deltamerge.methods.ops:cast", "deltamerge.methods.ops:zeros"
COMBINE = "deltamerge.methods.merge.span:combine"
GRAM, NORM = "deltamerge.methods.merge.span:gram", "deltamerge.methods.prune.rescale:norm"
SUMS = {GRAM, NORM}
DIVIDE = "deltamerge.methods.prune.rescale:divide"
DIVIDE_ROWS = "deltamerge.methods.prune.rescale:divide_rows"
CLEAR, RESTORE = "deltamerge.methods.prune.protect:clear", "deltamerge.methods.prune.protect:restore"
BY_ROW = {
    "deltamerge.methods.prune.select:keep_largest_rows",
    "deltamerge.methods.prune.select:keep_largest_rows_scored",
}
DARE = "deltamerge.methods.prune.masks:dare"
DELLA = "deltamerge.methods.prune.della:della"
SORTING = {DELLA, *BY_ROW}
SAMPLE = "deltamerge.methods.prune.select:sample"
ASSEMBLERS: dict[str, Callable[..., None]] = {
    "deltamerge.methods.ops:subtract": pruning.subtract,
    ZEROS: pruning.zeros,
    CAST: _cast,
    DARE: pruning.dare,
    DELLA: pruning.della,
    DIVIDE: pruning.divide,
    DIVIDE_ROWS: pruning.divide_rows,
    CLEAR: pruning.clear,
    RESTORE: pruning.restore,
    **dict.fromkeys(BY_ROW, pruning.keep_largest_rows),
    NORM: reductions.norm,
    "deltamerge.methods.prune.select:high_histogram": reductions.high,
    "deltamerge.methods.prune.select:low_histogram": reductions.low,
    "deltamerge.methods.prune.select:count_nonzero": reductions.nonzero,
    "deltamerge.methods.prune.select:bracketed": reductions.bracketed,
    SAMPLE: reductions.sample,
    "deltamerge.methods.prune.select:equal_counts": reductions.equal,
    "deltamerge.methods.prune.select:keep_largest": pruning.keep_largest,
    "deltamerge.methods.prune.select:keep_between": pruning.keep_between,
    "deltamerge.methods.prune.select:keep_where": pruning.keep_where,
    "deltamerge.methods.merge.arithmetic:passthrough": merging.passthrough,
    "deltamerge.methods.merge.arithmetic:linear": partial(merging.weighted, based=False),
    "deltamerge.methods.merge.arithmetic:task_arithmetic": merging.weighted,
    "deltamerge.methods.merge.ties:ties": merging.ties,
    GRAM: reductions.gram,
    COMBINE: merging.combine,
    "deltamerge.methods.merge.sce:variance": merging.variance,
    "deltamerge.methods.merge.sce:sce": merging.sce,
}
# Merges whose result is the base but where a delta is kept, if all of them are sparse.
PATCHES = frozenset({"deltamerge.methods.merge.arithmetic:task_arithmetic", "deltamerge.methods.merge.ties:ties"})


def covers(root: Node) -> bool:
    """Whether the loop can run every pass of a tensor; whatever the values in between are."""
    return (root.kind in ("small", *REDUCTIONS) or root.dtype in STORED) and all(
        _is_known(node, root) for node in depth_first(root)
    )


def _is_known(node: Node, root: Node) -> bool:
    if node.kind == "small":
        return True
    if node.kind == "read":
        return node.dtype in STORED
    if node.function == CAST:
        return node is root and node.parameter("to") == root.dtype
    if node.function == COMBINE:
        return bool(node.parameter("along") == "tensor")
    if node.function in (CLEAR, RESTORE):  # of a sparse delta a sparse one
        return not _is_sparse(node.inputs[0])
    if node.function in BY_ROW:
        return row_length(node.shape) <= LONGEST_ROW
    return node.function in ASSEMBLERS


Steps = Sequence[tuple[Node, dict[str, Any], tuple[Node, ...]]]


def assemble(
    steps: Steps, values: Mapping[int, Any], reader: Reader, shape: tuple[int, ...], output: str
) -> Program | None:
    """The pass of `steps` (node, parameters, nodes used last there) on a tensor of `shape`; None: the loop has no
    operation for some step. `values` are the small ones so far, `output` is the dtype to write."""
    assembly = listed(steps, values, reader, shape, output)
    ends = any(node.kind in REDUCTIONS for node, _, _ in steps)
    return None if assembly is None else Program(assembly, reader, hashed=not ends)


def listed(
    steps: Steps, values: Mapping[int, Any], reader: Reader, shape: tuple[int, ...], output: str
) -> Assembly | None:
    """The operations of a pass."""
    ends = {node.function for node, _, _ in steps if node.kind in REDUCTIONS}
    functions, last = {node.function for node, _, _ in steps if node.kind != "read"}, steps[-1][0]
    gathers = not ends and _patches(last.inputs[0] if last.function == CAST else last)
    assembly = Assembly(values, reader, Form(shape), output, gathers)
    _cut(assembly, functions, any(_is_sparse(node) for node, _, _ in steps), ends)
    assembly.uses.update(id(source) for node, _, _ in steps for source in node.inputs)
    for node, parameters, frees in steps:
        if node.kind == "read":
            _read(assembly, node)
        elif node.function not in ASSEMBLERS:
            return None
        else:
            ASSEMBLERS[node.function](assembly, node, **parameters)
        assembly.release(frees)
    if not ends and last.function != CAST:
        _store(assembly, last)
    return assembly


def _patches(merge: Node) -> bool:
    """Whether a merge works on places alone: its cost follows what is kept."""
    return merge.function in PATCHES and merge.inputs[0].kind == "read" and all(map(_is_sparse, merge.inputs[1:]))


def _is_sparse(node: Node) -> bool:
    if node.function in (DIVIDE, DIVIDE_ROWS, CLEAR, RESTORE):
        return _is_sparse(node.inputs[0])
    return node.function == DARE and is_sparse(node.parameter("density"))


def _cut(assembly: Assembly, functions: set[str], drawn: bool, ends: set[str]) -> None:
    """Choose what a register holds: a run, whole rows, a block, or what a stream of gaps is for."""
    form, ranked = assembly.form, functions & {DELLA, *BY_ROW}
    whole = functions & SUMS or (DELLA in functions and not form.columns) or not form.pieces_are_rows
    if assembly.gathers:
        assembly.chunk, assembly.aligned = SPARSE_BLOCK, True
    elif drawn or (ranked and whole):
        assembly.chunk = form.block
    elif ranked:
        assembly.chunk = form.row * max(1, RUN // form.row)
    if ends == {SAMPLE} and not ranked and not drawn:
        assembly.sampled = sampled_run(form.shape)
