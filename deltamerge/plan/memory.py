"""The anonymous memory of a run, as a value that the parts of a plan add up, and the size of a tile that fits a cap.

`Memory` splits the bytes by use, `Cost` is the cost of one tensor, and `tiles` chooses the size of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from deltamerge.engine.execute import own_tile
from deltamerge.errors import InputError
from deltamerge.errors.shown import human
from deltamerge.plan.inputs import SOURCES, Inputs
from deltamerge.plan.outputs import OutputTensor
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.names import layer_index
from deltamerge.tensors.schedule import REDUCTIONS, depth_first, schedule
from deltamerge.tensors.tensor import Kind, Node
from deltamerge.tensors.tiles import block_elements
from deltamerge.tensors.traits import traits_of

# bytes of anonymous memory of the process before the first tile, measured (benchmarks/speed/merge_speed.py)
BASELINE_BYTES = {"fused": 90_000_000, "torch": 260_000_000}
CODING_BYTES = 32_000_000  # bytes of a thread's intermediate values between values and codes


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of anonymous memory, by use.

    `+` adds memory held at the same time, `largest` takes the maximum of stages.
    """

    parts: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Memory) -> Memory:
        """Return the memory of both at one time."""
        names = dict.fromkeys((*self.parts, *other.parts))
        return Memory({name: self.parts.get(name, 0) + other.parts.get(name, 0) for name in names})

    @property
    def total(self) -> int:
        """Return the sum of all parts."""
        return sum(self.parts.values())

    def describe(self) -> dict[str, int]:
        """Return the parts that are not 0, as `deltamerge plan --json` prints them."""
        return {name: size for name, size in self.parts.items() if size}


def largest(*stages: Memory) -> Memory:
    """Return the memory of the largest of several stages that run one after another."""
    return max(stages, key=lambda stage: stage.total)


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a tensor.

    passes       over its tiles, at most
    read_bytes   from the inputs, in the passes that are usual
    alive        bytes per element of a tile: stored reads and float32 values alive at once, and scratch inside a step
    whole, kept  bytes while values of the whole tensor are computed, and bytes of these values
    operations   estimated operations on whole matrices
    """

    passes: int
    read_bytes: int
    alive: int
    whole: int = 0
    kept: int = 0
    operations: float = 0.0


def cost(root: Node) -> Cost:
    """Return the cost of the tensor that `root` makes, from its schedule."""
    order = depth_first(root)
    place = {node: i for i, node in enumerate(order)}
    form = _form(tuple([(n.function, n.kind, n.dtype, tuple([place[s] for s in n.operands])) for n in order]))
    needs = [_needs(order[i]) for i in form.wholes]
    return Cost(
        form.passes,
        sum([order[i].read_nbytes for i in form.reads]),
        form.alive,
        sum(size for size, _ in needs),
        sum(4 * math.prod(order[i].shape) for i in form.wholes),
        sum(operations for _, operations in needs),
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """The part of a cost shared by tensors whose nodes differ only in shapes and parameters.

    passes, alive   as in `Cost`
    reads           places of the nodes that usual passes read, once for each pass
    wholes          places of the `whole` nodes
    """

    passes: int
    alive: int
    reads: tuple[int, ...]
    wholes: tuple[int, ...]


@lru_cache(maxsize=256)  # a model's tensors have few different graphs
def _form(nodes: tuple[tuple[str, Kind, str, tuple[int, ...]], ...]) -> _Form:
    """Return the shared part of the costs of tensors made by `nodes`: function, kind, dtype and places of inputs."""
    order: list[Node] = []
    for function, kind, dtype, inputs in nodes:
        order.append(Node(function, tuple(order[i] for i in inputs), (), (), dtype, kind))
    place, plan = {node: i for i, node in enumerate(order)}, schedule(order[-1])
    reads = [[node for node in steps if node.is_source] for steps in plan.passes]
    stored = max(sum(ITEMSIZE[node.dtype] for node in some) for some in reads)
    usual = [
        some for some, steps in zip(reads, plan.passes, strict=True) if steps is plan.passes[-1] or _is_usual(steps)
    ]
    return _Form(
        len(plan.passes),
        stored + 4 * (plan.peak + 3) + ITEMSIZE[order[-1].dtype],
        tuple(place[node] for some in usual for node in some),
        tuple(place[node] for steps in plan.passes for node in steps if node.kind == "whole"),
    )


def _needs(node: Node) -> tuple[int, float]:
    """Return the bytes of computing a `whole` node, including its value, and its operations."""
    needs = traits_of(node.function).needs
    if needs is None:
        raise TypeError(f"{node.function} does not declare what it needs")
    found, operations = needs(**dict(node.parameters))
    return int(found), float(operations)


def _is_usual(steps: Sequence[Node]) -> bool:
    """Tell whether a pass that ends in reductions is made for nearly every tensor, and reads it all."""
    return any(step.kind in REDUCTIONS and not traits_of(step.function).rare for step in steps)


def held_coded(outputs: tuple[OutputTensor, ...], workers: int) -> int:
    """Return the bytes of coded weights whose rows are collected, and of their codes."""
    units = [output.coding.unit_bytes for output in outputs if output.coding is not None]
    if not units:
        return 0
    from deltamerge.formats.quantised.writer import LARGE

    return 2 * (workers + 1) * min(max(units), LARGE) + workers * (max(units) // 2 + CODING_BYTES)


def held_rounding(outputs: tuple[OutputTensor, ...], workers: int) -> int:
    """Return the bytes by which workers choose or measure the codes of weights: torch, moments, factors, and rows."""
    codings = [output.coding for output in outputs if output.coding is not None and output.coding.rounding is not None]
    if not codings:
        return 0
    from deltamerge.formats.quantised.coder import BlockCoder
    from deltamerge.formats.quantised.feedback import ROOM

    moments = max(8 * coding.inputs**2 for coding in codings)
    blocks = [c.coder.block[0] * c.matrix[1] for c in codings if isinstance(c.coder, BlockCoder)]
    own = 3 * moments + 3 * max(coding.unit_bytes for coding in codings) + 12 * 8 * max(ROOM, *blocks, 0)
    return BASELINE_BYTES["torch"] - BASELINE_BYTES["fused"] + workers * own


def tiles(
    outputs: tuple[OutputTensor, ...],
    costs: Mapping[Node, Cost],
    device: str,
    workers: int,
    memory: int | None,
    held: Memory,
) -> tuple[int, Memory]:
    """Return the elements of a tile and the memory at the peak. The tile shrinks until the peak fits `memory`.

    outputs   the output's tensors
    costs     their costs
    device    the plan's device
    workers   threads
    memory    the cap in bytes; None: no cap
    held      memory held beside the tiles
    """
    roots = {(piece.built.root, piece.backend) for output in outputs for piece in output.pieces}
    computed = [(root, backend) for root, backend in roots if not root.is_source]
    process = BASELINE_BYTES["torch" if any(b == "torch" for _, b in computed) else "fused"]
    whole = _held_whole([costs[root] for root, _ in computed], workers) if device == "cpu" else 0
    held = Memory({"process": process}) + held + Memory({"whole_matrices": whole})
    alive = max((costs[root].alive for root, _ in computed), default=0)
    largest_block = max((min(block_elements(r.shape), math.prod(r.shape)) for r, _ in computed), default=1)
    on_gpu = device != "cpu" and any(backend == "torch" for _, backend in computed)
    tile = own_tile(device if on_gpu else "cpu")
    while True:
        peak = held + Memory({"tiles": workers * alive * max(tile, largest_block)})
        if memory is None or peak.total <= memory:
            return tile, peak
        if tile <= largest_block or tile <= 1024:
            raise InputError(
                f"--memory {human(memory)} is too little for {workers} worker{'s' * (workers > 1)}",
                hint=f"give at least {-(-peak.total // 10**6)}MB{', or fewer --workers' * (workers > 1)}",
            )
        tile //= 2


def _held_whole(costs: Sequence[Cost], workers: int) -> int:
    """Return the bytes of whole tensors: each worker computes one, and one more is written."""
    largest = sorted((cost.whole for cost in costs), reverse=True)[:workers]
    return sum(largest) + max((cost.kept for cost in costs), default=0)


def check_size(inputs: Inputs) -> None:
    """Raise InputError if the output has more tensors, each counted once per source, than a plan can hold."""
    tensors = len(inputs.template.tensors)
    stored = 1 + max((layer_index(name) or 0 for name in inputs.template.tensors), default=0)
    count = 0
    for group in inputs.groups:
        share = tensors if group.part.ranges is None else tensors * group.part.layers // max(1, min(stored, tensors))
        count += share * len(group.all)
    if count > SOURCES:
        message = f"the output would have about {count:,} tensors, counted for each model they come from"
        raise InputError(f"{message}: more than {SOURCES:,}", hint="merge fewer models, or fewer layers, at a time")
