"""The steps of a pass without its needless reductions."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from deltamerge.engine.backends import Step
from deltamerge.engine.graph import REDUCTIONS, Node, companion


def steps(
    nodes: Sequence[Node],
    frees: Mapping[int, tuple[Node, ...]],
    root: Node,
    needless: Collection[int],
) -> list[Step]:
    """The nodes of a pass with what to free after each, without needless reductions (by id) and what only these need.

    What a left-out node would free is freed by the step before it.
    """
    ends = [n for n in nodes if n.kind in REDUCTIONS and id(n) not in needless]
    wanted = {id(root), *map(id, ends)}
    for node in reversed(nodes):
        if id(node) in wanted:
            wanted |= {id(source) for source in node.inputs}
    made: list[Step] = []
    for i, node in enumerate(nodes):
        freed = tuple(n for n in frees.get(i, ()) if id(n) in wanted)
        if id(node) in wanted:
            made.append(Step(node, dict(node.parameters), freed))
        elif freed:
            made[-1] = replace(made[-1], frees=made[-1].frees + freed)
    return made


def is_needless(node: Node, values: Mapping[int, Any]) -> bool:
    """Whether a reduction's companion declares it needless, given the small values known."""
    needless = companion(node.function, "needless")
    return needless is not None and bool(needless(*(values[id(s)] for s in node.inputs if id(s) in values)))
