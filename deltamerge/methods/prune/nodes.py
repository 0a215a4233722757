"""Masks and norms that need several passes over a tensor, as graph nodes: the largest entries, WANDA's, sampling's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deltamerge.engine.graph import Graph, Node
from deltamerge.methods.prune.bits import Key

COLUMNS = "deltamerge.methods.prune.columns"
RESCALE = "deltamerge.methods.prune.rescale"
SAMPLING = "deltamerge.methods.prune.sampling"
SELECT = "deltamerge.methods.prune.select"


def largest(graph: Graph, delta: Node, k: int) -> Node:
    """Δ with only its k largest magnitudes: a sample, a pass over the tensor, rarely three more, then the mask."""
    if k >= math.prod(delta.shape):
        return delta
    return graph.node(f"{SELECT}:keep_largest", [delta, *_end(graph, delta, k)], shape=delta.shape)


def above(graph: Graph, delta: Node, cut: Node) -> Node:
    """Δ above a cut, and of the entries equal to it the first ones in flat order."""
    return graph.node(f"{SELECT}:keep_largest", [delta, cut, _ranks(graph, delta, cut)], shape=delta.shape)


def between(graph: Graph, delta: Node, density: float, gamma: float) -> Node:
    """The int(density · n) magnitudes of Δ that follow its int(γ · n) largest; γ yields where both exceed n."""
    size = math.prod(delta.shape)
    kept = int(density * size)
    top = min(int(gamma * size), size - kept)
    if not top:
        return largest(graph, delta, kept)
    cuts = [*_end(graph, delta, top + kept), *_end(graph, delta, top)]
    return graph.node(f"{SELECT}:keep_between", [delta, *cuts], shape=delta.shape)


def _end(graph: Graph, delta: Node, k: int) -> tuple[Node, Node]:
    """Where the k largest magnitudes end: the cut, and the ranks of those equal to it."""
    make = graph.node
    if k == 0:
        return make(f"{SELECT}:nothing", kind="small"), make(f"{SELECT}:no_ranks", kind="small")
    shape = delta.shape
    sample = make(f"{SELECT}:sample", [delta], kind="concat", shape=shape)
    bracket = make(f"{SELECT}:pick_bracket", [sample], kind="small", k=k, size=math.prod(shape))
    inside = make(f"{SELECT}:bracketed", [delta, bracket], kind="concat", shape=shape)
    listed = make(f"{SELECT}:gathered", [inside, bracket], kind="small")
    near = make(f"{SELECT}:pick_listed", [listed], kind="small", k=k)
    high = make(f"{SELECT}:high_counts", [delta, near], kind="sum", shape=shape)
    found = make(f"{SELECT}:find_bin", [high], kind="small", k=k)
    low = make(f"{SELECT}:low_counts", [delta, found], kind="sum", shape=shape)
    cut = make(f"{SELECT}:pick_either", [near, low, found], kind="small")
    equal = make(f"{SELECT}:equal_counts", [delta, cut], kind="concat", shape=shape)
    return cut, make(f"{SELECT}:ranks_listed", [equal, listed, cut], kind="small")


def _ranks(graph: Graph, delta: Node, cut: Node) -> Node:
    equal = graph.node(f"{SELECT}:equal_counts", [delta, cut], kind="concat", shape=delta.shape)
    return graph.node(f"{SELECT}:pick_ranks", [equal], kind="small")


def matched(graph: Graph, whole: Node, kept: Node, norm: str) -> Node:
    """mergekit's rescaling: kept · ‖Δ‖ / ‖kept‖, as a division by ‖kept‖ / ‖Δ‖."""
    norms = [
        graph.node(f"{RESCALE}:norm", [node], kind="concat", shape=node.shape, norm=norm) for node in (kept, whole)
    ]
    ratio = graph.node(f"{RESCALE}:ratio", norms, kind="small", norm=norm)
    return graph.node(f"{RESCALE}:divide", [kept, ratio], shape=whole.shape)


def best_scored(graph: Graph, delta: Node, activations: Node, name: str, transposed: bool, density: float) -> Node:
    """WANDA: the best of each output's inputs, which lie in a row, or in a column of a weight stored (in, out)."""
    shape = delta.shape
    norms = graph.node(
        "deltamerge.calibrate.spec:norm",
        [activations],
        kind="small",
        name=name,
        count=shape[0] if transposed else shape[-1],
        transposed=transposed,
    )
    if not transposed:
        return graph.node(f"{SELECT}:keep_largest_rows_scored", [delta, norms], shape=shape, density=density)
    best = graph.node(f"{COLUMNS}:best_of_columns", [delta, norms], kind="concat", shape=shape, density=density)
    cut = graph.node(f"{COLUMNS}:pick_columns", [best], kind="small", density=density, rows=shape[0])
    equal = graph.node(f"{COLUMNS}:equal_columns", [delta, norms, cut], kind="concat", shape=shape)
    ranks = graph.node(f"{COLUMNS}:column_ranks", [equal], kind="small")
    return graph.node(f"{COLUMNS}:keep_best_of_columns", [delta, norms, cut, ranks], shape=shape)


def sampled(graph: Graph, delta: Node, pair: Sequence[Node], key: Key, density: float) -> Node:
    """Importance sampling: two passes find c, a third draws."""
    make, shape = graph.node, delta.shape
    expected = density * math.prod(shape)
    sums = make(f"{SAMPLING}:sums", [delta], kind="sum", shape=shape)
    clip = make(f"{SAMPLING}:pick_clip", [sums], kind="small", expected=expected)
    inside = make(f"{SAMPLING}:clip_bin", [clip], kind="small")
    low = make(f"{SELECT}:low_histogram", [delta, inside], kind="sum", shape=shape)
    c = make(f"{SAMPLING}:factor", [low, clip], kind="small", expected=expected)
    return make(f"{SAMPLING}:sampled", [*pair, c], shape=shape, key=key, density=density)
