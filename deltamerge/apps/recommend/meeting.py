"""How the deltas of several fine-tunes meet: their signs, their angles, the subspaces that their layers share.

Tensors are read tile by tile. Of linear layers, a second pass holds one whole delta and the leading directions of the
others. Counts are integers, and sums of products are those of `spans.gram`: none depends on tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from deltamerge.apps.inspect.statistics import Figures
from deltamerge.engine import backends
from deltamerge.engine.execute import Task, execute
from deltamerge.errors import InputError
from deltamerge.files import progress
from deltamerge.methods.low_rank import NOT_FINITE, REPAIR, SMALL, leading
from deltamerge.methods.merge.matrices import Form
from deltamerge.methods.merge.spans import add_up, gram
from deltamerge.methods.merge.task_arithmetic import task_arithmetic
from deltamerge.plan.finite import without_alike
from deltamerge.tensors.dtypes import nbytes_of
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import depth_first
from deltamerge.tensors.tensor import Graph, Node
from deltamerge.tensors.tiles import Tile, Whole, densify
from deltamerge.tensors.traits import traits

Floats = NDArray[np.float64]
ALIKE = 0.5  # cosine from which on deltas go the same way
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
    disturbance: list[list[float | None]] = Field(
        description="Row i, column j: ‖ΔⱼVᵢ‖²/‖ΔᵢVᵢ‖² over linear layers, the change by j of the inputs that i changes "
        "most, beside the change by i; null without a linear layer."
    )
    most_alike: list[int] = Field(description="The two models of the largest cosine, by their places.")
    most_opposed: list[int] = Field(description="Those of the smallest.")
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


def meet_needs(*, form: Form, models: int, transposed: bool = False) -> tuple[int, float]:
    """Return the memory and operations of `meet`: a matrix, its factors, and all leading directions."""
    _, rows, columns = form
    small = min(rows, columns)
    held = 8 * rows * columns + 8 * min(small, SMALL) * (rows + columns) + 24 * models * DIRECTIONS * (rows + columns)
    return held, 2.0 * models * form[0] * rows * columns * (small if small <= SMALL else 8 * DIRECTIONS)


@traits(needs=meet_needs)
def meet(*deltas: Whole, form: Form, models: int, transposed: bool = False) -> tuple[Floats, Floats]:
    """Return how the deltas of `models` meet, as sums over a tensor's matrices, float64.

        overlap   (pairs, 3): both overlaps, the overlaps of random subspaces, and the number of overlaps
        reach     (models, models): ‖Δ_j V_i‖² in row i and column j, V_i the leading input directions of delta i

    `transposed`: matrices are stored (in, out).
    """
    matrices, rows, columns = form
    most = max(1, min(DIRECTIONS, min(rows, columns) // 4))
    overlap, reach = np.zeros((len(_different(models)), 3)), np.zeros((models, models))
    values = torch.empty(rows * columns, dtype=torch.float32, device=deltas[0].device)
    for one in range(matrices):
        sides = []
        for i, delta in enumerate(deltas):
            delta.fill(one * rows * columns, values)
            sides.append(leading(values.view(rows, columns).cpu().numpy(), most, (i, one)))
        for at, (i, j) in enumerate(_different(models)):
            for u, v in zip(sides[i], sides[j], strict=True):
                least = min(u.shape[1], v.shape[1])
                if least:
                    chance = max(u.shape[1], v.shape[1]) / len(u)
                    overlap[at] += [float(np.sum((u.T @ v) ** 2)) / least, chance, 1]
        for j, delta in enumerate(deltas):
            delta.fill(one * rows * columns, values)
            matrix = values.view(rows, columns).cpu().numpy()
            for i, side in enumerate(sides):
                moved = matrix.T @ side[0].astype(np.float32) if transposed else matrix @ side[1].astype(np.float32)
                reach[i, j] += float(np.sum(np.square(moved, dtype=np.float64)))
    return overlap, reach


def _different(count: int) -> list[tuple[int, int]]:
    return list(combinations(range(count), 2))


def measured(*found: Any) -> tuple[Any, ...]:
    """Return the results of a tensor's reductions: signs, Gram matrices and, of matrices, how they meet."""
    return found


def measure(roots: Mapping[str, Node], *, device: str, workers: int) -> Conflict:
    """Return the conflict of the deltas in the nodes of a merge by `iso_cts`, by tensor.

    Infinities and NaNs that all models hold alike count as zero. InputError: others.
    """
    found = _reduced(roots, device, workers)
    if odd := {name: without_alike(roots[name]) for name, one in found.items() if not np.isfinite(one[1]).all()}:
        found |= _reduced(odd, device, workers)
    for name, one in found.items():
        if not np.isfinite(one[1]).all():
            raise InputError(f"tensor {name}: {NOT_FINITE}", hint=REPAIR)
    count = len(parts_of(next(iter(roots.values())))[1])
    reduced = found.values()
    return _conflict(count, [x[0] for x in reduced], [x[1] for x in reduced], [y for x in reduced for y in x[2:]])


def _reduced(roots: Mapping[str, Node], device: str, workers: int) -> dict[str, tuple[Any, ...]]:
    """Return what `measured` gives of every tensor."""
    graph, wanted, size = Graph(), {}, 0
    for name, root in roots.items():
        base, deltas, form, transposed = parts_of(root)
        size += nbytes_of(root.dtype, root.shape)
        parts = [
            graph.node(signs, deltas, kind="sum", shape=root.shape),
            graph.node(gram, [base, *deltas], kind="concat", shape=root.shape),
        ]
        if form is not None:
            more: dict[str, Any] = {"form": form, "models": len(deltas), **({"transposed": True} if transposed else {})}
            parts.append(graph.node(meet, deltas, kind="whole", shape=root.shape, **more))
        wanted[name] = graph.node(measured, parts, kind="small", shape=root.shape, dtype=root.dtype)
    tasks = [Task(name, node, backends.choose(node, device)) for name, node in wanted.items()]
    with Reader() as reader, progress.phase("comparing", size) as comparing:
        values = execute(tasks, reader, None, device=device, workers=workers, progress=comparing.step)
    return {name: values[node] for name, node in wanted.items()}


def parts_of(root: Node) -> tuple[Node, list[Node], Form | None, bool]:
    """Return the base, the deltas, the form of a tensor that iso_cts merges, and whether it is stored transposed.

    No form: it is no matrix.
    """
    mean = f"{task_arithmetic.__module__}:{task_arithmetic.__qualname__}"
    nodes = depth_first(root)
    whole = next((node for node in nodes if node.kind == "whole"), None)
    over = next(node for node in nodes if whole in node.inputs or node.function == mean)
    if whole is None:
        return over.inputs[0], list(over.inputs[1:]), None, False
    parameters = dict(whole.parameters)
    return over.inputs[0], list(whole.inputs), parameters["form"], bool(parameters.get("transposed"))


def _conflict(count: int, counts: list[Any], grams: list[Floats], met: list[tuple[Floats, Floats]]) -> Conflict:
    changed, opposite = np.sum(counts, axis=0).T
    products = [add_up(one, count=count + 1) for one in grams]
    total = np.array([[math.fsum(one[i, j] for one in products) for j in range(count + 1)] for i in range(count + 1)])
    norms = np.sqrt(np.diagonal(total))
    size = np.outer(norms, norms)
    cosine = np.divide(total, size, out=np.zeros_like(total), where=size > 0)[1:, 1:]
    both = np.sum([one for one, _ in met], axis=0) if met else np.zeros((len(changed), 3))
    opposed = np.divide(opposite, changed, out=np.zeros(len(changed)), where=changed > 0)
    overlap = [float(a / n) if n else None for a, _, n in both]
    some = [one for one in overlap if one is not None]
    chance = both[:, 1].sum() / both[:, 2].sum() if some else None
    reach = np.sum([one for _, one in met], axis=0) if met else np.zeros((count, count))
    own = np.broadcast_to(np.diagonal(reach)[:, None], reach.shape)
    disturbed = [
        [float(a / b) if b > 0 else None for a, b in zip(*rows, strict=True)] for rows in zip(reach, own, strict=True)
    ]
    pairs = sorted(_different(count), key=lambda pair: cosine[pair])
    return Conflict(
        relative_norm=[float(norm / norms[0]) if norms[0] else None for norm in norms[1:]],
        cosine=cosine.tolist(),
        opposed=_square(count, opposed.tolist(), 0.0),
        overlap=_square(count, overlap, 1.0),
        chance=chance,
        disturbance=disturbed,
        most_alike=list(pairs[-1]),
        most_opposed=list(pairs[0]),
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
