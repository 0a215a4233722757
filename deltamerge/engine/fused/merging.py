"""Merges of models and deltas, as operations of the compiled loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltamerge.engine.fused import codes
from deltamerge.engine.fused.assembly import Assembly, KeptRegisters
from deltamerge.engine.graph import Node
from deltamerge.methods.merge.arithmetic import divisor_of


def weighted(
    assembly: Assembly,
    node: Node,
    weights: Sequence[float],
    normalize: bool,
    lambda_: float = 1.0,
    based: bool = True,
    counts: Sequence[float] | None = None,
) -> None:
    divisor = divisor_of(tuple(weights if counts is None else counts)) if normalize else 1.0
    _merge(assembly, node, codes.ADD, tuple(weights), (divisor, lambda_), based=based)


def ties(assembly: Assembly, node: Node, weights: Sequence[float], normalize: bool, lambda_: float) -> None:
    _merge(assembly, node, codes.AGREE, tuple(weights), (1.0, lambda_), normalize=normalize)


def _merge(
    assembly: Assembly,
    node: Node,
    code: int,
    weights: tuple[float, ...],
    scalars: tuple[float, float],
    *,
    normalize: bool = False,
    based: bool = True,
) -> None:
    models = node.inputs[1:] if based else node.inputs
    if assembly.gathers:
        _merge_places(assembly, node, models, code, int(normalize), scalars=scalars, weights=weights)
        return
    base = assembly.operand(node.inputs[0]) if based else -1
    registers = tuple(map(assembly.operand if code == codes.ADD else assembly.register, models))
    fields = (base, -1, int(normalize))
    assembly.add(code, assembly.made(node), *fields, scalars=scalars, weights=weights, models=registers)


def _merge_places(
    assembly: Assembly, node: Node, models: Sequence[Node], code: int, normalize: int, **numbers: Any
) -> None:
    """A merge on the union of the models' places."""
    sparse = [assembly.kept[id(x)] for x in models]
    places, registers = sparse[0].places, [x.register for x in sparse]
    if len(models) > 1:
        places, rows = assembly.new_list(), assembly.new(len(models))
        assembly.add(codes.ALIGN, places, rows, models=tuple(registers), lists=tuple(x.places for x in sparse))
        registers = list(range(rows, rows + len(models)))
    base = assembly.new()
    assembly.add(codes.BASE_AT, base, assembly.source_of[id(node.inputs[0])], places)
    kept = assembly.kept[id(node)] = KeptRegisters(assembly.new(), places)
    assembly.add(code, kept.register, base, places, normalize, models=tuple(registers), **numbers)


def passthrough(assembly: Assembly, node: Node, scales: Sequence[float]) -> None:
    weighted(assembly, node, scales[:1], normalize=False, based=False)


def combine(assembly: Assembly, node: Node, along: str, based: bool) -> None:
    inputs, weights = node.inputs[:-1], tuple(np.asarray(assembly.values[id(node.inputs[-1])]).tolist())
    base = assembly.operand(inputs[0]) if based else -1
    registers = tuple(map(assembly.operand, inputs[1:] if based else inputs))
    assembly.add(codes.ADD, assembly.made(node), base, weights=weights, models=registers)


def variance(assembly: Assembly, node: Node) -> None:
    assembly.add(codes.VARIANCE, assembly.made(node), models=tuple(map(assembly.register, node.inputs)))


def sce(assembly: Assembly, node: Node) -> None:
    base, *deltas, weights = node.inputs
    start, registers = assembly.operand(base), tuple(map(assembly.register, deltas))
    given = tuple(assembly.values[id(weights)])
    assembly.add(codes.ELECT, assembly.made(node), start, models=registers, weights=given)
