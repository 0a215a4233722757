"""Interning, order, lifetimes and passes of graphs, as tables of equalities."""

from __future__ import annotations

import pickle

import pytest

from deltamerge.tensors.schedule import depth_first, schedule
from deltamerge.tensors.tensor import Graph, Node


def chain(graph: Graph, models: int, shape: tuple[int, ...] = (8, 8)) -> Node:
    """combine(subtract(read_i, base) …): what a merge of `models` looks like."""
    base = graph.node("m:read", kind="stored", shape=shape, tensor="base")
    deltas = [
        graph.node("m:subtract", [graph.node("m:read", kind="stored", shape=shape, tensor=i), base], shape=shape)
        for i in range(models)
    ]
    return graph.node("m:combine", [base, *deltas], shape=shape)


def selected(graph: Graph) -> Node:
    """A mask that needs a threshold (two reductions) before it can run."""
    x = graph.node("m:read", kind="stored", tensor="x")
    first = graph.node("m:count", [x], kind="sum")
    bin_ = graph.node("m:bin", [first], kind="small")
    second = graph.node("m:fine", [x, bin_], kind="concat")
    cut = graph.node("m:cut", [second, bin_], kind="small")
    return graph.node("m:keep", [x, cut])


def test_equal_nodes_are_one_node():
    graph = Graph()
    assert chain(graph, 3) is chain(graph, 3)
    assert len(graph.nodes) == 1 + 3 + 3 + 1
    assert graph.node("m:f", a=1) is not graph.node("m:f", a=2)
    assert graph.node("m:f", a=1, b=2) is graph.node("m:f", b=2, a=1)


def test_inputs_come_first_and_once():
    root = chain(Graph(), 5)
    order = depth_first(root)
    assert order[-1] is root
    assert len(set(map(id, order))) == len(order)
    seen: set[int] = set()
    for node in order:
        assert all(id(source) in seen for source in node.inputs)
        seen.add(id(node))


@pytest.mark.parametrize("models", [1, 2, 4, 8])
def test_a_read_is_freed_at_its_last_use(models):
    assert schedule(chain(Graph(), models)).peak == models + 2


def test_passes_follow_the_reductions():
    root = selected(Graph())
    plan = schedule(root)
    assert [[n.function for n in nodes] for nodes in plan.passes] == [
        ["m:read", "m:count"],
        ["m:read", "m:fine"],
        ["m:read", "m:keep"],
    ]
    assert [[n.function for n in nodes] for nodes in plan.small] == [[], ["m:bin"], ["m:cut"]]


def test_a_deep_graph_does_not_recurse():
    graph = Graph()
    node = graph.node("m:read", kind="stored")
    for i in range(20_000):
        node = graph.node("m:next", [node], step=i)
    assert len(depth_first(node)) == 20_001
    assert schedule(node).peak == 2


def test_a_plan_is_plain_data():
    root = pickle.loads(pickle.dumps(selected(Graph())))
    assert [n.function for n in depth_first(root)][-1] == "m:keep"
