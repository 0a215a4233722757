"""Assembles a pass of a tensor into the operations of the compiled loop, and says which tensors it can make whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.assembly import Assembly, Form, StoredSource
from deltamerge.engine.fused.operations import store
from deltamerge.engine.fused.program import Program
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import REDUCTIONS, depth_first
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.tiles import RUN, SPARSE_BLOCK
from deltamerge.tensors.traits import Traits, is_sparse, traits_of

STORED = codes.DTYPES.keys()

Steps = Sequence[tuple[Node, dict[str, Any], tuple[Node, ...]]]


def covers(root: Node) -> bool:
    """Whether the loop can run every pass of a tensor; whatever the values in between are."""
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
    """The pass of `steps` (node, parameters, nodes used last there) on a tensor of `shape`; None: the loop has no
    operation for some step. `values` are the small ones so far, `output` is the dtype to write."""
    assembly = operations_of(steps, values, reader, shape, output)
    ends = any(node.kind in REDUCTIONS for node, _, _ in steps)
    return None if assembly is None else Program(assembly, reader, hashed=not ends)


def operations_of(
    steps: Steps, values: Mapping[int, Any], reader: Reader, shape: tuple[int, ...], output: str
) -> Assembly | None:
    """The operations of a pass."""
    declared = [traits_of(node.function) for node, _, _ in steps]
    ends, last = any(node.kind in REDUCTIONS for node, _, _ in steps), steps[-1][0]
    gathers = not ends and _patches(last.inputs[0] if declared[-1].stores else last)
    assembly = Assembly(values, reader, Form(shape), output, gathers)
    _cut(assembly, steps, declared)
    assembly.uses.update([id(source) for node, _, _ in steps for source in node.operands])
    for (node, parameters, frees), its in zip(steps, declared, strict=True):
        if node.is_source:
            _read(assembly, node)
        elif its.loop is None:
            return None
        else:
            its.loop(assembly, node, **parameters)
        assembly.release(frees)
    if not ends and not declared[-1].stores:
        store(assembly, last)
    return assembly


def _read(assembly: Assembly, node: Node) -> None:
    assembly.source_of[id(node)] = len(assembly.sources)
    assembly.sources.append(StoredSource.of(node, assembly.reader))


def _patches(merge: Node) -> bool:
    """Whether a merge works on places alone: its cost follows what is kept."""
    if not traits_of(merge.function).patches or not merge.inputs[0].is_source:
        return False
    return all(map(is_sparse, merge.inputs[1:]))


def _cut(assembly: Assembly, steps: Steps, declared: Sequence[Traits]) -> None:
    """Choose what a register holds: a run, whole rows, a block, or what a stream of gaps is for."""
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
