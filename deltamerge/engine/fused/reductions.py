"""Counts, lists and sums of a tensor, as operations of the compiled loop."""

from __future__ import annotations

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.assembly import Assembly
from deltamerge.engine.graph import Node
from deltamerge.methods.merge.span import pairs
from deltamerge.methods.prune.select import HIGH, LOW, sampled_run


def _counted(assembly: Assembly, node: Node, code: int, size: int, wanted: int = 0) -> None:
    """`size` counters, or one for each block (0)."""
    delta = assembly.register(node.inputs[0])
    assembly.counters[id(node)] = (len(assembly.operations), size)
    assembly.add(code, -1, delta, wanted)


def high(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.HIGH, HIGH)


def low(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.LOW, LOW, assembly.values[id(node.inputs[1])].high)


def equal(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.EQUAL, 0, assembly.values[id(node.inputs[1])].threshold)


def nonzero(assembly: Assembly, node: Node) -> None:
    _counted(assembly, node, codes.NONZERO, 1)


def bracketed(assembly: Assembly, node: Node) -> None:
    delta, bracket = node.inputs
    ends, row = assembly.values[id(bracket)], assembly.list_of(node)
    assembly.add(codes.LIST, -1, assembly.register(delta), ends.low, row, ends.high)


def sample(assembly: Assembly, node: Node) -> None:
    run = sampled_run(assembly.form.shape)
    assembly.add(codes.SAMPLE, -1, assembly.register(node.inputs[0]), run, assembly.list_of(node))


def gram(assembly: Assembly, node: Node) -> None:
    registers = list(map(assembly.register, node.inputs))
    of = pairs(len(registers))
    for row, (i, j) in enumerate(of, assembly.sums_of(node, len(of))):
        assembly.add(codes.DOTS, -1, registers[i], registers[j], row)


def norm(assembly: Assembly, node: Node, norm: str) -> None:
    delta, row = assembly.register(node.inputs[0]), assembly.sums_of(node, 0)
    if norm == "l2":
        assembly.add(codes.DOTS, -1, delta, delta, row)
    else:
        assembly.add(codes.NORM, -1, delta, int(norm == "l1"), row)
