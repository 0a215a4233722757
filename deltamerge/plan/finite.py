"""Plans for models that share infinities or NaNs: these entries are copied, the rest of the tensor is merged."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from deltamerge.engine import backends
from deltamerge.errors.shown import some
from deltamerge.formats.audit import NonFinite
from deltamerge.methods.ops import put_back
from deltamerge.plan.memory import Cost
from deltamerge.plan.outputs import OutputTensor, Piece
from deltamerge.plan.planner import Plan
from deltamerge.plan.stack import is_buffer
from deltamerge.tensors.dtypes import FLOATING, bits_type
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import VIEWS, Read, Tensor, TensorInfo, name_of, view, viewed
from deltamerge.tensors.views import CHUNK, floats

SMALL = 1 << 16  # elements; tensors up to this size are searched before a run


def set_aside(planned: Plan, names: Collection[str] | None = None) -> Plan:
    """Return the plan with infinities and NaNs that all models hold alike kept out of the arithmetic.

    Such entries are limits of activations, or masks. Only small tensors are searched, and tensors in `names` of any
    size. In a copied tensor, the base of a delta must hold them too. Without a base, only buffers and single numbers
    may hold them.
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
    """Return the counts of values in the result that are not finite, without values that all models hold alike."""
    left = {}
    for name, found in nonfinite.items():
        known = planned.alike.get(name, NonFinite(0, 0))
        rest = NonFinite(max(0, found.nan - known.nan), max(0, found.inf - known.inf))
        if rest.nan or rest.inf:
            left[name] = rest
    return left


def without_alike(root: Tensor) -> Tensor:
    """Return the graph with zeros where all models that it reads hold the same infinity or NaN."""
    models = _models(root)
    return _rewritten(root, {one: finite(one, models) for one in models})


def _pieces(
    output: OutputTensor,
    reader: Reader,
    device: str,
    costs: dict[Tensor, Cost],
    bases: Mapping[str, TensorInfo],
) -> tuple[tuple[Piece, ...], NonFinite]:
    made, nan, inf = [], 0, 0
    for piece in output.pieces:
        root = piece.built.root
        models = _copied(root, bases.get(output.name)) if root.is_source else _models(root)
        found = count_alike(reader, models) if models else NonFinite(0, 0)
        if len(models) > 1 and (found.nan or found.inf):
            new = root if root.is_source else _put_back(root, models)
            delta = piece.built.delta
            if delta is not None:
                delta = _rewritten(delta, {one: finite(one, models) for one in models})
            for before, after in ((root, new), (piece.built.delta, delta)):
                if before in costs and after is not None:
                    costs[after] = costs[before]
            built = replace(piece.built, root=new, delta=delta)
            piece = replace(piece, built=built, backend=backends.choose(delta or new, device))
        nan, inf = nan + found.nan, inf + found.inf
        made.append(piece)
    return tuple(made), NonFinite(nan, inf)


def _put_back(root: Tensor, models: tuple[Tensor, ...]) -> Tensor:
    """Return a merged tensor of finite numbers, with the infinities and NaNs of all models put back."""
    inputs = (without_alike(root), models[0], places(models))
    return Tensor(name_of(put_back), inputs, (("to", root.dtype),), root.shape, root.dtype, "map")


def _copied(root: Tensor, base: TensorInfo | None) -> tuple[Tensor, ...]:
    """Return the tensors that must have the same infinities and NaNs as a copied tensor. Empty: they are a fault."""
    if root.dtype not in FLOATING:
        return ()
    if base is not None and base.shape == root.shape and base.dtype in FLOATING:
        return root, base.tensor
    return (root,) if is_buffer(root) or root.size == 1 else ()


def _models(root: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors of models that a merged tensor is computed from entry by entry; empty for other tensors."""
    if len(root.inputs) == 1 and root.inputs[0].is_source:
        return ()
    found = [tensor for tensor in depth_first(root) if tensor.is_source]
    plain = all(
        _is_entrywise(tensor) and tensor.shape == root.shape and tensor.dtype in FLOATING and tensor.size
        for tensor in found
    )
    return tuple(found) if plain else ()


def _is_entrywise(source: Tensor) -> bool:
    """Tell whether a tensor is computed entry by entry from one model's, not from several models' rows or a delta."""
    whole = source.whole
    return whole.kind == "stored" or VIEWS[whole.function].entrywise


def _rewritten(root: Tensor, tensors: Mapping[Tensor, Tensor]) -> Tensor:
    """Return the graph with `tensors` exchanged. Nodes that read none of them stay the same."""
    done: dict[int, Tensor] = {}
    for node in depth_first(root):
        if node.is_source:
            done[id(node)] = tensors.get(node, node)
        else:
            inputs = tuple(done[id(source)] for source in node.operands)
            same = all(a is b for a, b in zip(inputs, node.operands, strict=True))
            done[id(node)] = node if same else replace(node, inputs=inputs)
    return done[id(root)]


@view()
def finite_part(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Take the first input, with zeros where all others hold the same infinity or NaN."""
    source, *models = tensor.inputs
    bits = np.frombuffer(out, bits_type(tensor.dtype))
    read.read_into(source, start, bits)
    bits[alike(read, models, start, len(bits))] = 0


@view()
def alike_places(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Mark by 1 where all inputs hold the same infinity or NaN, in uint8."""
    np.frombuffer(out, np.uint8)[:] = alike(read, tensor.inputs, start, len(out))


def finite(source: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Return `source`, one of `models`, with zeros where all models hold the same infinity or NaN."""
    return viewed(finite_part, [source, *models], source.shape, source.dtype)


def places(models: Sequence[Tensor]) -> Tensor:
    """Return the tensor that marks where all models hold the same infinity or NaN."""
    return viewed(alike_places, models, models[0].shape, "U8")


def alike(read: Read, models: Sequence[Tensor], start: int, count: int) -> NDArray[np.bool_]:
    """Tell for `count` elements from `start` whether all models hold the same float32 bits that are not finite."""
    first = floats(read, models[0], start, count)
    mask: NDArray[np.bool_] = ~np.isfinite(first)
    for info in models[1:] if mask.any() else ():
        mask &= floats(read, info, start, count).view(np.uint32) == first.view(np.uint32)
    return mask


def count_alike(read: Read, models: Sequence[Tensor]) -> NonFinite:
    """Return the number of NaNs, and of infinities, that all models hold alike."""
    nan = inf = 0
    size = math.prod(models[0].shape)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        mask = alike(read, models, start, count)
        if mask.any():
            found = np.isnan(floats(read, models[0], start, count)[mask])
            nan, inf = nan + int(found.sum()), inf + int((~found).sum())
    return NonFinite(nan, inf)
