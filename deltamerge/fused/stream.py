"""Assembles a pass of a tensor into the operations of the compiled loop, and says which tensors it can make whole."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.fused import codes
from deltamerge.fused.assembly import Assembly, Form, Kept
from deltamerge.fused.program import Place, Program
from deltamerge.graph import REDUCTIONS, Node, depth_first
from deltamerge.io.checkpoint import Reader
from deltamerge.merge.arithmetic import divisor_of
from deltamerge.merge.span import pairs
from deltamerge.pruners.bits import SPARSE_BLOCK, Key, guided, is_sparse, threshold
from deltamerge.pruners.della import probabilities
from deltamerge.pruners.select import HIGH, LOW, sampled_run
from deltamerge.tensors import LONGEST_ROW, RUN, row_length

STORED = codes.DTYPES.keys()


def _read(assembly: Assembly, node: Node) -> None:
    info = node.parameter("tensor")
    assembly.source_of[id(node)] = len(assembly.sources)
    assembly.sources.append(Place(info, assembly.reader.stored(info)))


def _subtract(assembly: Assembly, node: Node, dtypes: Any = None) -> None:
    tune, base = map(assembly.operand, node.inputs)
    assembly.add(codes.SUBTRACT, assembly.made(node), tune, base)


def _zeros(assembly: Assembly, node: Node) -> None:
    assembly.zeros.add(id(node))


def _dare(assembly: Assembly, node: Node, key: Key, density: float) -> None:
    if is_sparse(density):
        kept = assembly.kept[id(node)] = Kept(assembly.new(), assembly.new_list())
        assembly.add(codes.DRAW, kept.places, len(assembly.tables), key=key)
        assembly.tables.append(guided(density))
        _differ_at(assembly, node, kept)
        return
    high, low = divmod(threshold(density), 1 << 16)
    if high >> 16:
        _subtract(assembly, node)
        return
    tune, base = map(assembly.operand, node.inputs)
    assembly.add(codes.DROP, assembly.made(node), tune, base, high, low, key=key)


def _differ_at(assembly: Assembly, node: Node, kept: Kept) -> None:
    """The difference of two stored tensors at the places that are kept; of one and zeros, the one."""
    tune, base = node.inputs
    sources = [assembly.source_of[id(x)] for x in (tune, base) if id(x) not in assembly.zeros]
    if len(sources) == 2:
        assembly.add(codes.DIFFER_AT, kept.register, *sources, kept.places)
    else:
        assembly.add(codes.BASE_AT, kept.register, *sources, kept.places)


def _divide(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, sparse = assembly.values[id(divisor)], assembly.kept.get(id(delta))
    if sparse is not None:
        kept = assembly.kept[id(node)] = Kept(assembly.new(), sparse.places)
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


def _keep_largest(assembly: Assembly, node: Node) -> None:
    delta = assembly.register(node.inputs[0])
    _keep(assembly, assembly.made(node), delta, delta, *(assembly.values[id(x)] for x in node.inputs[1:]))


def _keep_between(assembly: Assembly, node: Node) -> None:
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


def _keep_where(assembly: Assembly, node: Node) -> None:
    delta, score = map(assembly.register, node.inputs[:2])
    _keep(assembly, assembly.made(node), score, delta, *(assembly.values[id(x)] for x in node.inputs[2:]))


@lru_cache(maxsize=16)
def _limits(columns: int, density: float, epsilon: float) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Of each rank: the bound of the words of the kept, π · 2**32, and π / density; uppers come before lower halves."""
    probability = probabilities(columns, density, epsilon)
    bounds = np.round(probability * 2.0**32).astype(np.int64)
    return np.concatenate([bounds >> 16, bounds & 0xFFFF]).astype(np.uint32), (probability / density).astype(np.float32)


def _della(assembly: Assembly, node: Node, key: Key, density: float, epsilon: float, weighted: bool = True) -> None:
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


def _divide_rows(assembly: Assembly, node: Node) -> None:
    delta, divisor = node.inputs
    q, sparse = assembly.values[id(divisor)], assembly.kept.get(id(delta))
    if isinstance(q, float):
        _divide(assembly, node)
    elif sparse is not None:
        kept = assembly.kept[id(node)] = Kept(assembly.new(), sparse.places)
        _spread(assembly, kept.register, sparse.register, q, int(q.shape[-1] != 1), (sparse.places,))
    else:
        source = assembly.register(delta)
        _spread(assembly, assembly.made(node), source, q, int(q.shape[-1] != 1), ())


def _keep_largest_rows(assembly: Assembly, node: Node, density: float) -> None:
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


def _clear(assembly: Assembly, node: Node) -> None:
    _replace_columns(assembly, node, node.inputs[1], -1)


def _restore(assembly: Assembly, node: Node) -> None:
    _, tune, base, columns = node.inputs
    whole = assembly.new()
    assembly.add(codes.SUBTRACT, whole, assembly.operand(tune), assembly.operand(base))
    _replace_columns(assembly, node, columns, whole)
    assembly.free.append(whole)


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
    if assembly.gathers:
        _merge_places(assembly, node, models, code, int(normalize), scalars=scalars, weights=weights)
        return
    base = assembly.operand(node.inputs[0]) if based else -1
    registers = tuple(map(assembly.operand if code == codes.ADD else assembly.register, models))
    fields = (base, -1, int(normalize))
    assembly.add(code, assembly.made(node), *fields, scalars=scalars, weights=weights, models=registers)


def _merge_places(
    assembly: Assembly, node: Node, models: Sequence[Node], code: int, normalize: int, **numbers: Any
) -> None:
    """A merge on the union of the models' places."""
    sparse = [assembly.kept[id(x)] for x in models]
    places, registers = sparse[0].places, [x.register for x in sparse]
    if len(models) > 1:
        places, rows = assembly.new_list(), assembly.new(len(models))
        assembly.add(codes.ALIGN, places, rows, models=tuple(registers), lists=tuple(x.places for x in sparse))
        registers = list(range(rows, rows + len(models)))
    base = assembly.new()
    assembly.add(codes.BASE_AT, base, assembly.source_of[id(node.inputs[0])], places)
    kept = assembly.kept[id(node)] = Kept(assembly.new(), places)
    assembly.add(code, kept.register, base, places, normalize, models=tuple(registers), **numbers)


def _passthrough(assembly: Assembly, node: Node, scales: Sequence[float]) -> None:
    _weighted(assembly, node, scales[:1], normalize=False, based=False)


def _combine(assembly: Assembly, node: Node, along: str, based: bool) -> None:
    inputs, weights = node.inputs[:-1], tuple(np.asarray(assembly.values[id(node.inputs[-1])]).tolist())
    base = assembly.operand(inputs[0]) if based else -1
    registers = tuple(map(assembly.operand, inputs[1:] if based else inputs))
    assembly.add(codes.ADD, assembly.made(node), base, weights=weights, models=registers)


def _variance(assembly: Assembly, node: Node) -> None:
    assembly.add(codes.VARIANCE, assembly.made(node), models=tuple(map(assembly.register, node.inputs)))


def _sce(assembly: Assembly, node: Node) -> None:
    base, *deltas, weights = node.inputs
    start, registers = assembly.operand(base), tuple(map(assembly.register, deltas))
    given = tuple(assembly.values[id(weights)])
    assembly.add(codes.ELECT, assembly.made(node), start, models=registers, weights=given)


def _cast(assembly: Assembly, node: Node, to: str) -> None:
    _store(assembly, node.inputs[0])


def _store(assembly: Assembly, node: Node) -> None:
    """A node's values are the output."""
    if assembly.gathers:
        kept = assembly.kept[id(node)]
        assembly.add(codes.PATCH, assembly.new(), assembly.source_of[id(node.inputs[0])], kept.register, kept.places)
    else:
        assembly.add(codes.STORE, -1, assembly.register(node))


def _counted(assembly: Assembly, node: Node, code: int, size: int, wanted: int = 0) -> None:
    """`size` counters, or one for each block (0)."""
    delta = assembly.register(node.inputs[0])
    assembly.counters[id(node)] = (len(assembly.operations), size)
    assembly.add(code, -1, delta, wanted)


def _high(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.HIGH, HIGH)


def _low(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.LOW, LOW, assembly.values[id(node.inputs[1])].high)


def _equal(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.EQUAL, 0, assembly.values[id(node.inputs[1])].threshold)


def _nonzero(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.NONZERO, 1)


def _bracketed(assembly: Assembly, node: Node) -> None:
    delta, bracket = node.inputs
    ends, row = assembly.values[id(bracket)], assembly.list_of(node)
    assembly.add(codes.LIST, -1, assembly.register(delta), ends.low, row, ends.high)


def _sample(assembly: Assembly, node: Node) -> None:
    run = sampled_run(assembly.form.shape)
    assembly.add(codes.SAMPLE, -1, assembly.register(node.inputs[0]), run, assembly.list_of(node))


def _gram(assembly: Assembly, node: Node) -> None:
    registers = list(map(assembly.register, node.inputs))
    of = pairs(len(registers))
    for row, (i, j) in enumerate(of, assembly.sums_of(node, len(of))):
        assembly.add(codes.DOTS, -1, registers[i], registers[j], row)


def _norm(assembly: Assembly, node: Node, norm: str) -> None:
    delta, row = assembly.register(node.inputs[0]), assembly.sums_of(node, 0)
    if norm == "l2":
        assembly.add(codes.DOTS, -1, delta, delta, row)
    else:
        assembly.add(codes.NORM, -1, delta, int(norm == "l1"), row)


CAST, ZEROS = "deltamerge.ops:cast", "deltamerge.ops:zeros"
COMBINE = "deltamerge.merge.span:combine"
GRAM, NORM = "deltamerge.merge.span:gram", "deltamerge.pruners.rescale:norm"
SUMS = {GRAM, NORM}
DIVIDE = "deltamerge.pruners.rescale:divide"
DIVIDE_ROWS = "deltamerge.pruners.rescale:divide_rows"
CLEAR, RESTORE = "deltamerge.pruners.protect:clear", "deltamerge.pruners.protect:restore"
BY_ROW = {"deltamerge.pruners.select:keep_largest_rows", "deltamerge.pruners.select:keep_largest_rows_scored"}
DARE = "deltamerge.pruners.masks:dare"
DELLA = "deltamerge.pruners.della:della"
SAMPLE = "deltamerge.pruners.select:sample"
ASSEMBLERS: dict[str, Callable[..., None]] = {
    "deltamerge.ops:subtract": _subtract,
    ZEROS: _zeros,
    CAST: _cast,
    DARE: _dare,
    DELLA: _della,
    DIVIDE: _divide,
    DIVIDE_ROWS: _divide_rows,
    CLEAR: _clear,
    RESTORE: _restore,
    **dict.fromkeys(BY_ROW, _keep_largest_rows),
    NORM: _norm,
    "deltamerge.pruners.select:high_histogram": _high,
    "deltamerge.pruners.select:high_counts": _high,
    "deltamerge.pruners.select:low_histogram": _low,
    "deltamerge.pruners.select:low_counts": _low,
    "deltamerge.pruners.select:count_nonzero": _nonzero,
    "deltamerge.pruners.select:bracketed": _bracketed,
    SAMPLE: _sample,
    "deltamerge.pruners.select:equal_counts": _equal,
    "deltamerge.pruners.select:keep_largest": _keep_largest,
    "deltamerge.pruners.select:keep_between": _keep_between,
    "deltamerge.pruners.select:keep_where": _keep_where,
    "deltamerge.merge.arithmetic:passthrough": _passthrough,
    "deltamerge.merge.arithmetic:linear": partial(_weighted, based=False),
    "deltamerge.merge.arithmetic:task_arithmetic": _weighted,
    "deltamerge.merge.ties:ties": _ties,
    GRAM: _gram,
    COMBINE: _combine,
    "deltamerge.merge.sce:variance": _variance,
    "deltamerge.merge.sce:sce": _sce,
}
# Merges whose result is the base but where a delta is kept, if all of them are sparse.
PATCHES = frozenset({"deltamerge.merge.arithmetic:task_arithmetic", "deltamerge.merge.ties:ties"})


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


def assemble(
    steps: Sequence[tuple[Node, dict[str, Any], tuple[Node, ...]]],
    values: Mapping[int, Any],
    reader: Reader,
    shape: tuple[int, ...],
    output: str,
) -> Program | None:
    """The pass of `steps` (node, parameters, nodes used last there) on a tensor of `shape`; None: the loop has no
    operation for some step. `values` are the small ones so far, `output` is the dtype to write."""
    reductions = {node.function for node, _, _ in steps if node.kind in REDUCTIONS}
    functions, last = {node.function for node, _, _ in steps if node.kind != "read"}, steps[-1][0]
    gathers = not reductions and _patches(last.inputs[0] if last.function == CAST else last)
    assembly = Assembly(values, reader, Form(shape), output, gathers)
    _cut(assembly, functions, any(_is_sparse(node) for node, _, _ in steps), reductions)
    assembly.uses.update(id(source) for node, _, _ in steps for source in node.inputs)
    for node, parameters, frees in steps:
        if node.kind == "read":
            _read(assembly, node)
        elif node.function not in ASSEMBLERS:
            return None
        else:
            ASSEMBLERS[node.function](assembly, node, **parameters)
        assembly.release(frees)
    if not reductions and last.function != CAST:
        _store(assembly, last)
    return Program(assembly, reader, hashed=not reductions)


def _patches(merge: Node) -> bool:
    """Whether a merge works on places alone: its cost follows what is kept."""
    return merge.function in PATCHES and all(map(_is_sparse, merge.inputs[1:]))


def _is_sparse(node: Node) -> bool:
    if node.function in (DIVIDE, DIVIDE_ROWS, CLEAR, RESTORE):
        return _is_sparse(node.inputs[0])
    return node.function == DARE and is_sparse(node.parameter("density"))


def _cut(assembly: Assembly, functions: set[str], drawn: bool, reductions: set[str]) -> None:
    """Choose what a register holds: a run, whole rows, a block, or what a stream of gaps is for."""
    form, ranked = assembly.form, functions & {DELLA, *BY_ROW}
    whole = functions & SUMS or (DELLA in functions and not form.columns) or not form.pieces_are_rows
    if assembly.gathers:
        assembly.chunk, assembly.aligned = SPARSE_BLOCK, True
    elif drawn or (ranked and whole):
        assembly.chunk = form.block
    elif ranked:
        assembly.chunk = form.row * max(1, RUN // form.row)
    if reductions == {SAMPLE} and not ranked and not drawn:
        assembly.sampled = sampled_run(form.shape)
