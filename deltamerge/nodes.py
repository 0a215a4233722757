"""Masks that need several passes over a tensor, as graph nodes: the largest entries, WANDA's, importance sampling's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from deltamerge.graph import Graph, Node
from deltamerge.pruners.bits import Key

COLUMNS = "deltamerge.pruners.columns"
SAMPLING = "deltamerge.pruners.sampling"
SELECT = "deltamerge.pruners.select"


def largest(graph: Graph, delta: Node, k: int) -> Node:
    """Δ with only its k largest magnitudes: two passes over the tensor, rarely three, then the mask."""
    if k >= math.prod(delta.shape):
        return delta
    make = graph.node
    if k == 0:
        cut = make(f"{SELECT}:nothing", kind="small")
        ranks = make(f"{SELECT}:no_ranks", kind="small")
        return make(f"{SELECT}:keep_largest", [delta, cut, ranks], shape=delta.shape)
    high = make(f"{SELECT}:high_histogram", [delta], kind="sum", shape=delta.shape)
    found = make(f"{SELECT}:pick_bin", [high], kind="small", k=k)
    low = make(f"{SELECT}:low_counts", [delta, found], kind="sum", shape=delta.shape)
    listed = make(f"{SELECT}:lows", [delta, found], kind="concat", shape=delta.shape)
    cut = make(f"{SELECT}:pick_listed", [low, listed, found], kind="small")
    equal = make(f"{SELECT}:equal_counts", [delta, cut], kind="concat", shape=delta.shape)
    ranks = make(f"{SELECT}:ranks_listed", [equal, listed, cut], kind="small")
    return make(f"{SELECT}:keep_largest", [delta, cut, ranks], shape=delta.shape)


def above(graph: Graph, delta: Node, cut: Node) -> Node:
    """Δ above a cut, and of the entries equal to it the first ones in flat order."""
    equal = graph.node(f"{SELECT}:equal_counts", [delta, cut], kind="concat", shape=delta.shape)
    ranks = graph.node(f"{SELECT}:pick_ranks", [equal], kind="small")
    return graph.node(f"{SELECT}:keep_largest", [delta, cut, ranks], shape=delta.shape)


def best_scored(graph: Graph, delta: Node, activations: Node, name: str, transposed: bool, density: float) -> Node:
    """WANDA: the best of each output's inputs, which lie in a row, or in a column of a weight stored (in, out)."""
    shape = delta.shape
    norms = graph.node(
        "deltamerge.stages:norm",
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
