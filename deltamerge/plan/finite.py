"""Plans for models that share infinities or NaNs: those entries are copied, the rest of the tensor is merged."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from deltamerge.engine import backends
from deltamerge.errors.shown import some
from deltamerge.formats.audit import NonFinite
from deltamerge.formats.peft.updates import Experts, Hadamard, Kronecker, Residual, Rows, Shifted
from deltamerge.methods.ops import put_back
from deltamerge.plan.alike import count_alike, finite, places
from deltamerge.plan.memory import Cost
from deltamerge.plan.outputs import OutputTensor, Piece
from deltamerge.plan.planner import Plan
from deltamerge.plan.stack import is_buffer
from deltamerge.tensors.computed import Cast, LowRank, Zeros
from deltamerge.tensors.dtypes import FLOATING
from deltamerge.tensors.experts import Joined, Turned
from deltamerge.tensors.graph import READ, Node, depth_first, name_of
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

# Tensors that are computed entry by entry from a model's own; not rows of several models nor a delta artifact's.
ENTRYWISE = Cast | LowRank | Zeros | Joined | Turned | Experts | Hadamard | Kronecker | Residual | Rows | Shifted
SMALL = 1 << 16  # elements; tensors up to this size are searched before a run


def set_aside(planned: Plan, names: Collection[str] | None = None) -> Plan:
    """The plan with infinities and NaNs that all models hold alike kept out of the arithmetic.

    It searches the small tensors, or those of `names` whatever their size. Such entries are limits of activations or
    masks. Of a copied tensor they are those that the base of a delta has too, or without one a buffer's or a single
    number's.
    """
    outputs, counts, costs = [], dict(planned.alike), dict(planned.costs)
    origin = planned.inputs.origin
    bases = {} if origin is None else {origin.stored[name]: tensor for name, tensor in origin.tensors.items()}
    with Reader() as reader:
        for output in planned.outputs:
            wanted = output.elements <= SMALL if names is None else output.name in names
            if wanted and output.name not in counts:
                pieces, found = _pieces(output, reader, planned.device, costs, bases)
                if found.nan or found.inf:
                    counts[output.name] = found
                    output = replace(output, pieces=pieces)
            outputs.append(output)
    if len(counts) == len(planned.alike):
        return planned
    note = f"not finite in every model alike, copied: {some(sorted(counts))}"
    notes = (*(n for n in planned.notes if not n.startswith("not finite in every model")), note)
    return replace(planned, outputs=tuple(outputs), costs=costs, alike=counts, notes=notes)


def unexpected(planned: Plan, nonfinite: Mapping[str, NonFinite]) -> dict[str, NonFinite]:
    """The counts of what is not finite in the result beyond what all models hold alike."""
    left = {}
    for name, found in nonfinite.items():
        known = planned.alike.get(name, NonFinite(0, 0))
        rest = NonFinite(max(0, found.nan - known.nan), max(0, found.inf - known.inf))
        if rest.nan or rest.inf:
            left[name] = rest
    return left


def _pieces(
    output: OutputTensor,
    reader: Reader,
    device: str,
    costs: dict[Node, Cost],
    bases: Mapping[str, TensorInfo],
) -> tuple[tuple[Piece, ...], NonFinite]:
    made, nan, inf = [], 0, 0
    for piece in output.pieces:
        root = piece.built.root
        models = _copied(root, bases.get(output.name)) if root.kind == "read" else _models(root)
        found = count_alike(reader, models) if models else NonFinite(0, 0)
        if len(models) > 1 and (found.nan or found.inf):
            new = root if root.kind == "read" else _put_back(root, models)
            delta = piece.built.delta
            if delta is not None:
                delta = _rewritten(delta, {info: finite(info, models) for info in models})
            for before, after in ((root, new), (piece.built.delta, delta)):
                if before in costs and after is not None:
                    costs[after] = costs[before]
            built = replace(piece.built, root=new, delta=delta)
            piece = replace(piece, built=built, backend=backends.choose(delta or new, device))
        nan, inf = nan + found.nan, inf + found.inf
        made.append(piece)
    return tuple(made), NonFinite(nan, inf)


def _put_back(root: Node, models: tuple[TensorInfo, ...]) -> Node:
    """A merged tensor of finite numbers, in which what is not finite is put back where all models have it."""
    merged = _rewritten(root, {info: finite(info, models) for info in models})
    read = Node(READ, (), (("tensor", models[0]),), root.shape, models[0].dtype, "read")
    where = places(models)
    mask = Node(READ, (), (("tensor", where),), root.shape, "U8", "read")
    return Node(name_of(put_back), (merged, read, mask), (("to", root.dtype),), root.shape, root.dtype, "map")


def _copied(root: Node, base: TensorInfo | None) -> tuple[TensorInfo, ...]:
    """The tensors that have to agree in what is not finite in a copied one; empty: it is a fault."""
    info: TensorInfo = root.parameter("tensor")
    if info.dtype not in FLOATING:
        return ()
    if base is not None and base.shape == info.shape and base.dtype in FLOATING:
        return info, base
    return (info,) if is_buffer(info) or math.prod(info.shape) == 1 else ()


def _models(root: Node) -> tuple[TensorInfo, ...]:
    """The stored tensors that a merged tensor is computed from entry by entry; empty for other tensors."""
    if len(root.inputs) == 1 and root.inputs[0].kind == "read":
        return ()
    found = [node.parameter("tensor") for node in depth_first(root) if node.kind == "read"]
    plain = all(
        isinstance(info.made, ENTRYWISE | None)
        and info.shape == root.shape
        and info.dtype in FLOATING
        and math.prod(info.shape)
        for info in found
    )
    return tuple(dict.fromkeys(found)) if plain else ()


def _rewritten(root: Node, tensors: Mapping[TensorInfo, TensorInfo]) -> Node:
    """The graph with `tensors` exchanged; nodes that read none of them stay the same."""
    done: dict[int, Node] = {}
    for node in depth_first(root):
        if node.kind == "read" and node.parameter("tensor") in tensors:
            done[id(node)] = replace(node, parameters=(("tensor", tensors[node.parameter("tensor")]),))
        else:
            inputs = tuple(done[id(source)] for source in node.inputs)
            same = all(a is b for a, b in zip(inputs, node.inputs, strict=True))
            done[id(node)] = node if same else replace(node, inputs=inputs)
    return done[id(root)]
