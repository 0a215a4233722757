"""How the deltas of several fine-tunes meet: their signs, their angles, and the subspaces that their layers share.

Tensors are read tile by tile; of linear layers, in a second pass, one whole delta is in memory beside the leading
directions of the others. Counts are integers, and sums of products those of `span.gram`: none depends on tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deltamerge.apps.inspect.activations import Figures
from deltamerge.engine import backends
from deltamerge.engine.execute import Task, execute
from deltamerge.files import progress
from deltamerge.methods.low_rank import Wanted, factor
from deltamerge.methods.merge.matrices import Form
from deltamerge.methods.merge.spans import add_up, gram
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.tensors.dtypes import nbytes_of
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.tiles import Tile, Whole, densify
from deltamerge.tensors.traits import traits

Floats = NDArray[np.float64]
DIRECTIONS = 16  # of a layer that are compared; a quarter of its smaller side where that is less


class Conflict(Figures):
    """How the models' deltas meet. Matrices have a row and a column for each model, in their order."""

    relative_norm: list[float | None] = Field(description="‖Δ‖/‖W‖ of each model; null where the base is zero.")
    cosine: list[list[float]] = Field(description="Of two deltas, flat: 1 the same direction, 0 unrelated.")
    opposed: list[list[float]] = Field(
        description="Of the entries that both change, the share that they change in opposite ways; unrelated: 0.5."
    )
    overlap: list[list[float | None]] = Field(
        description="Mean over linear layers of ‖UᵢᵀUⱼ‖²/k and ‖VᵢᵀVⱼ‖²/k, U and V the k ≤ 16 leading directions of a "
        "delta's outputs and inputs: 1 the same subspace; null without a linear layer that both change."
    )
    chance: float | None = Field(description="The overlap of random subspaces of these layers.")
    cosine_mean: float = Field(description="Over pairs of models.")
    opposed_mean: float = Field(description="Over pairs.")
    overlap_mean: float | None = Field(description="Over pairs.")


def signs(*deltas: Any, tile: Tile) -> NDArray[np.int64]:
    """Return, for each pair i < j, how many entries of a tile both change, and how many in opposite ways."""
    ways = [torch.sign(densify(delta, tile.size)) for delta in deltas]
    found = []
    for i, j in _different(len(ways)):
        product = ways[i] * ways[j]
        found.append([int((product != 0).sum()), int((product < 0).sum())])
    return np.array(found, np.int64)


def overlaps_needs(*, form: Form, transposed: bool = False) -> tuple[int, float]:
    """Return the memory of `overlaps`: a delta, and twice its size while its directions are found."""
    _, rows, columns = form
    small = min(rows, columns)
    return 16 * rows * columns + 24 * small**2, 2.0 * form[0] * rows * columns * small


@traits(needs=overlaps_needs)
def overlaps(*deltas: Whole, form: Form, transposed: bool = False) -> Floats:
    """Return, for each pair i < j, sums over a tensor's matrices: float64 (pairs, 3).

    They are of both overlaps, of the overlaps of random subspaces, and of the number of overlaps.
    """
    count, rows, columns = form
    k = max(1, min(DIRECTIONS, min(rows, columns) // 4))
    found = np.zeros((len(_different(len(deltas))), 3))
    values = torch.empty(rows * columns, dtype=torch.float32, device=deltas[0].device)
    for one in range(count):
        sides = []
        for i, delta in enumerate(deltas):
            delta.fill(one * rows * columns, values)
            made = factor(values.view(rows, columns).cpu().numpy(), Wanted(rank=k), (i, one))
            sides.append([_unit(made.b), _unit(made.a.T)])
        for at, (i, j) in enumerate(_different(len(deltas))):
            for u, v in zip(sides[i], sides[j], strict=True):
                least = min(u.shape[1], v.shape[1])
                if least:
                    chance = max(u.shape[1], v.shape[1]) / len(u)
                    found[at] += [float(np.sum((u.T @ v) ** 2)) / least, chance, 1]
    return found


def _unit(vectors: Any) -> Floats:
    """Scale orthogonal columns to length 1. Columns of length 0 are left out."""
    wide = np.asarray(vectors, np.float64)
    lengths = np.linalg.norm(wide, axis=0)
    return np.asarray(wide[:, lengths > 0] / lengths[lengths > 0])


def _different(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def measured(*found: Any) -> tuple[Any, ...]:
    """Return the results of a tensor's reductions: signs, Gram matrices and, of matrices, overlaps."""
    return found


def measure(roots: Mapping[str, Node], *, device: str, workers: int) -> Conflict:
    """Return the conflict of the deltas in the nodes of a merge by `iso_c`, by tensor."""
    graph, wanted, count, size = Graph(), {}, 0, 0
    for name, root in roots.items():
        base, deltas, form = _parts(root)
        parts = [
            graph.node(signs, deltas, kind="sum", shape=root.shape),
            graph.node(gram, [base, *deltas], kind="concat", shape=root.shape),
        ]
        if form is not None:
            parts.append(graph.node(overlaps, deltas, kind="whole", shape=root.shape, form=form))
        wanted[name] = graph.node(measured, parts, kind="small", shape=root.shape, dtype=root.dtype)
        count, size = len(deltas), size + nbytes_of(root.dtype, root.shape)
    tasks = [Task(name, node, backends.choose(node, device)) for name, node in wanted.items()]
    with Reader() as reader, progress.phase("comparing", size) as comparing:
        values = execute(tasks, reader, None, device=device, workers=workers, progress=comparing.step)
    found = [values[node] for node in wanted.values()]
    return _conflict(count, [one[0] for one in found], [one[1] for one in found], [x for one in found for x in one[2:]])


def _parts(root: Node) -> tuple[Node, list[Node], Form | None]:
    """Return the base, the deltas, and the matrix form of a tensor that iso_c merges. None: it is no matrix."""
    mean = f"{task_arithmetic.__module__}:{task_arithmetic.__qualname__}"
    nodes = depth_first(root)
    whole = next((node for node in nodes if node.kind == "whole"), None)
    over = next(node for node in nodes if whole in node.inputs or node.function == mean)
    if whole is None:
        return over.inputs[0], list(over.inputs[1:]), None
    form: Form = whole.parameter("form")
    return over.inputs[0], list(whole.inputs), form


def _conflict(count: int, counts: list[Any], grams: list[Floats], shared: list[Floats]) -> Conflict:
    changed, opposite = np.sum(counts, axis=0).T
    products = [add_up(one, count=count + 1) for one in grams]
    total = np.array([[math.fsum(one[i, j] for one in products) for j in range(count + 1)] for i in range(count + 1)])
    norms = np.sqrt(np.diagonal(total))
    size = np.outer(norms, norms)
    cosine = np.divide(total, size, out=np.zeros_like(total), where=size > 0)[1:, 1:]
    both = np.sum(shared, axis=0) if shared else np.zeros((len(changed), 3))
    opposed = np.divide(opposite, changed, out=np.zeros(len(changed)), where=changed > 0)
    overlap = [float(a / n) if n else None for a, _, n in both]
    some = [one for one in overlap if one is not None]
    chance = both[:, 1].sum() / both[:, 2].sum() if some else None
    return Conflict(
        relative_norm=[float(norm / norms[0]) if norms[0] else None for norm in norms[1:]],
        cosine=cosine.tolist(),
        opposed=_square(count, opposed.tolist(), 0.0),
        overlap=_square(count, overlap, 1.0),
        chance=chance,
        cosine_mean=float(np.mean([cosine[i, j] for i, j in _different(count)])),
        opposed_mean=float(opposed.mean()),
        overlap_mean=float(np.mean(some)) if some else None,
    )


def _square(count: int, of_pairs: list[Any], own: float) -> list[list[Any]]:
    """Return a symmetric matrix from values of pairs, with `own` on its diagonal."""
    made = [[own] * count for _ in range(count)]
    for (i, j), value in zip(_different(count), of_pairs, strict=True):
        made[i][j] = made[j][i] = value
    return made
