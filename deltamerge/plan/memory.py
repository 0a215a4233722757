"""The anonymous memory that a run takes, and the tile size that keeps it under a cap."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deltamerge.engine.execute import own_tile
from deltamerge.errors import InputError
from deltamerge.errors.shown import human
from deltamerge.files.outbox import ROOM, SLAB, room_for
from deltamerge.formats.quantised.writer import LARGE
from deltamerge.plan.inputs import SOURCES, Inputs
from deltamerge.plan.outputs import OutputTensor
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.graph import REDUCTIONS, Node, peak_tiles, schedule
from deltamerge.tensors.names import layer_index
from deltamerge.tensors.tiles import block_elements
from deltamerge.tensors.traits import traits_of

# bytes of anonymous memory of the process before the first tile, measured (benchmarks/speed/merge_speed.py)
BASELINE_BYTES = {"fused": 90_000_000, "torch": 260_000_000}
CODING_BYTES = 32_000_000  # of what one thread makes on the way from values to codes


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a tensor.

    passes       over its tiles, at most
    read_bytes   from the inputs, in the passes that are usual
    alive        bytes per element of a tile: stored reads and float32 values alive at once, and scratch inside a step
    whole, kept  bytes that values of the whole tensor take while they are computed, and those of the values
    operations   on whole matrices, about
    """

    passes: int
    read_bytes: int
    alive: int
    whole: int = 0
    kept: int = 0
    operations: float = 0.0


def cost(root: Node) -> Cost:
    """The cost of the tensor that `root` makes, from its schedule."""
    plan = schedule(root)
    reads = [[node for node in nodes if node.kind == "read"] for nodes in plan.passes]
    stored = max(sum(ITEMSIZE[node.dtype] for node in nodes) for nodes in reads)
    usual = [
        nodes for nodes, steps in zip(reads, plan.passes, strict=True) if steps is plan.passes[-1] or _is_usual(steps)
    ]
    wholes = [node for nodes in plan.passes for node in nodes if node.kind == "whole"]
    return Cost(
        len(plan.passes),
        sum(node.parameter("tensor").read_nbytes for nodes in usual for node in nodes),
        stored + 4 * (peak_tiles(plan) + 3) + ITEMSIZE[root.dtype],
        sum(_needs(node)[0] for node in wholes),
        sum(4 * math.prod(node.shape) for node in wholes),
        sum(_needs(node)[1] for node in wholes),
    )


def _needs(node: Node) -> tuple[int, float]:
    """The bytes that a `whole` node takes while it is computed, its value's among them, and its operations."""
    needs = traits_of(node.function).needs
    if needs is None:
        raise TypeError(f"{node.function} does not declare what it needs")
    found, operations = needs(**dict(node.parameters))
    return int(found), float(operations)


def _is_usual(steps: Sequence[Node]) -> bool:
    """Whether a pass that ends in reductions is made for nearly every tensor, and reads it all."""
    return any(step.kind in REDUCTIONS and not traits_of(step.function).rare for step in steps)


def held_by_delta(outputs: tuple[OutputTensor, ...], workers: int) -> int:
    """Bytes of positions, and of values to be coded, of the tensors that are open in a delta's sink."""
    largest = sorted((o.elements * (0.125 + 4 * o.pieces[0].built.changed) for o in outputs), reverse=True)
    return math.ceil(sum(largest[: workers + 1]))


def room(workers: int, memory: int | None) -> int:
    """Bytes on their way to the files of a checkpoint at most: where memory is capped, the least."""
    return room_for(workers) if memory is None else ROOM


def held_by_files(outputs: tuple[OutputTensor, ...], workers: int, memory: int | None) -> int:
    """Bytes on their way to the files of a checkpoint, and those being computed."""
    return min(sum(o.nbytes for o in outputs), room(workers, memory) + (workers + 1) * 2 * SLAB)


def held_coded(outputs: tuple[OutputTensor, ...], workers: int) -> int:
    """Bytes of the coded weights whose rows are being collected, and of what is made of them."""
    units = [output.coding.unit_bytes for output in outputs if output.coding is not None]
    if not units:
        return 0
    return 2 * (workers + 1) * min(max(units), LARGE) + workers * (max(units) // 2 + CODING_BYTES)


def tile_and_peak(
    outputs: tuple[OutputTensor, ...],
    costs: Mapping[Node, Cost],
    device: str,
    workers: int,
    memory: int | None,
    held: int = 0,
) -> tuple[int, int]:
    """(elements of a tile, bytes of anonymous memory at the peak); the tile shrinks until the peak fits `memory`.

    outputs   the output's tensors
    costs     of them
    device    of the plan
    workers   threads
    memory    the cap in bytes; None: no cap
    held      bytes that the sink holds
    """
    roots = {(piece.built.root, piece.backend) for output in outputs for piece in output.pieces}
    computed = [(root, backend) for root, backend in roots if root.kind != "read"]
    baseline = BASELINE_BYTES["torch" if any(b == "torch" for _, b in computed) else "fused"] + held
    alive = max((costs[root].alive for root, _ in computed), default=0)
    if device == "cpu":
        baseline += _held_whole([costs[root] for root, _ in computed], workers)
    largest_block = max((min(block_elements(r.shape), math.prod(r.shape)) for r, _ in computed), default=1)
    on_gpu = device != "cpu" and any(backend == "torch" for _, backend in computed)
    tile = own_tile(device if on_gpu else "cpu")
    while True:
        peak = baseline + workers * alive * max(tile, largest_block)
        if memory is None or peak <= memory:
            return tile, peak
        if tile <= largest_block or tile <= 1024:
            raise InputError(
                f"--memory {human(memory)} is too little for {workers} workers",
                hint=f"give at least {-(-peak // 10**6)}MB, or fewer --workers",
            )
        tile //= 2


def _held_whole(costs: Sequence[Cost], workers: int) -> int:
    """Bytes of whole tensors: each worker computes one, and one more is being written."""
    largest = sorted((cost.whole for cost in costs), reverse=True)[:workers]
    return sum(largest) + max((cost.kept for cost in costs), default=0)


def check_size(inputs: Inputs) -> None:
    """InputError: the output's tensors, each counted once per source, are more than a plan can hold."""
    tensors = len(inputs.template.tensors)
    stored = 1 + max((layer_index(name) or 0 for name in inputs.template.tensors), default=0)
    count = 0
    for group in inputs.groups:
        share = tensors if group.part.ranges is None else tensors * group.part.layers // max(1, min(stored, tensors))
        count += share * len(group.all)
    if count > SOURCES:
        message = f"the output would have about {count:,} tensors, counted for each model they come from"
        raise InputError(f"{message}: more than {SOURCES:,}", hint="merge fewer models, or fewer layers, at a time")
