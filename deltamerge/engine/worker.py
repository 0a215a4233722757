"""Tasks, the jobs that they are cut into, and the work of a thread on a job.

A thread copies bytes, or computes tiles on its device and passes them to the sink. A `whole` function reads each input
through a `Source`, which computes the requested tiles.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from deltamerge.engine.backends import Step, TorchBackend, steps
from deltamerge.engine.devices import Lane, Uploads, is_out_of_memory, too_little
from deltamerge.engine.fused.program import Program
from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import REDUCTIONS, TILED, Schedule, last_uses
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.tiles import Tile, block_elements, densify
from deltamerge.tensors.traits import function_of


class Sink(Protocol):
    """Receives finished tiles; called from any worker, once for each byte of a tensor."""

    def write(self, name: str, offset: int, data: Any) -> None:
        """Take `data`, the bytes of tensor `name` from byte `offset`."""


@runtime_checkable
class Lender(Sink, Protocol):
    """A sink that lends the memory into which it wants the bytes written."""

    def lend(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Memory for bytes of tensor `name` from byte `offset`; may wait for earlier ones to be written."""

    def give(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Take back lent memory, now filled."""


@dataclass(frozen=True, slots=True)
class Task:
    """One output tensor, or some of its rows.

    name      of the tensor
    root      the node that computes it
    backend   "fused" or "torch", as planned
    offset    byte of the tensor at which the node's first element goes
    """

    name: str
    root: Node
    backend: str
    offset: int = 0


@dataclass(eq=False)
class Running:
    """A task in progress: small values so far, the running pass (`whole` runs it in one call), jobs it waits for.

    device   for a task on a GPU, the device that does all of it and keeps its tiles; otherwise "cpu", for any worker
    """

    task: Task
    schedule: Schedule
    values: dict[int, Any]
    device: str
    index: int = -1
    steps: list[Step] = field(default_factory=list)
    whole: Program | None = None
    partials: dict[int, dict[int, Any]] = field(default_factory=dict)
    waiting: int = 0
    uploads: Uploads | None = None
    _changed: threading.Lock = field(default_factory=threading.Lock)

    def reduce(self, node: Node, start: int, value: Any) -> None:
        """Add a sum at once (integers, so in any order); keep a concatenated partial under its tile's start."""
        with self._changed:
            parts = self.partials[id(node)]
            if node.kind == "sum":
                parts[0] = parts[0] + value if parts else value
            else:
                parts[start] = value

    def reduced(self) -> None:
        """Compute the values of the pass's reductions from the results of its jobs."""
        for node in (item.node for item in self.steps if item.node.kind in REDUCTIONS):
            parts = [part for _, part in sorted(self.partials[id(node)].items())]
            self.values[id(node)] = parts[0] if node.kind == "sum" else np.concatenate(parts)


@dataclass(frozen=True, slots=True)
class Job:
    """A range of tiles of one pass, or of bytes to copy; or all of a tensor, for a `whole` node."""

    running: Running
    start: int
    stop: int
    whole: Node | None = None


def on_gpu(task: Task, device: str) -> bool:
    """Tell whether a task is computed on a GPU, where `device` is one."""
    return device != "cpu" and task.backend == "torch" and not task.root.is_source


class Stopped(Exception):
    """The run has failed elsewhere."""


@dataclass(frozen=True, slots=True)
class Making:
    """How tiles are computed: the backend and its lane, the elements of a tile at most (whole blocks), and whether the
    run has failed meanwhile."""

    backend: TorchBackend
    lane: Lane
    step: int
    stopped: Callable[[], bool]

    def value(self, node: Node, nodes: Sequence[Node], values: Mapping[int, Any]) -> Any:
        """Return the value of a `whole` node.

        `nodes` are the nodes of its pass, `values` the values of earlier nodes.
        """
        tiled = [n for n in nodes if n.kind in TILED]

        def given(source: Node) -> Any:
            if source.kind not in TILED:
                return values[id(source)]
            return Source(self, source, tuple(steps(tiled, last_uses(tiled, source), source, ())), values)

        inputs = [given(source) for source in node.inputs]
        with self.lane.tile():
            made = function_of(node.function)(*inputs, **dict(node.parameters))
            self.lane.wait()
        return made


@dataclass(frozen=True, slots=True)
class Source:
    """The values of a node that has tiles, over any range; nothing is kept between two reads.

    making    how tiles are computed
    node      the node with these values
    steps     the steps that compute them
    values    values of small nodes and of reductions
    """

    making: Making
    node: Node
    steps: tuple[Step, ...]
    values: Mapping[int, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the tensor."""
        return self.node.shape

    @property
    def device(self) -> Any:
        """Where its values are."""
        return self.making.lane.device

    def fill(self, start: int, out: Any) -> None:
        """Write the elements from `start` on into `out`, a flat float32 tensor on the device."""
        stop, block, size = start + out.numel(), block_elements(self.shape), math.prod(self.shape)
        first = start // block * block
        while first < stop:
            if self.making.stopped():
                raise Stopped
            last = min(first + self.making.step, -(-stop // block) * block, size)
            tile = Tile(first, last, self.shape)
            low, high = max(start, first), min(stop, last)
            with self.making.lane.tile():
                out[low - start : high - start] = densify(self._computed(tile), tile.size)[low - first : high - first]
            first = last

    def _computed(self, tile: Tile) -> Any:
        making, values = self.making, dict[int, Any]()
        for item in self.steps:
            node = item.node
            if node.is_source:
                values[id(node)] = making.lane.read(node, tile)
            else:
                inputs = [values[id(s)] if id(s) in values else self.values[id(s)] for s in node.inputs]
                values[id(node)] = making.backend.function(node)(*inputs, tile=tile, **item.parameters)
            for freed in item.frees:
                del values[id(freed)]
        return values[id(self.node)]


@dataclass(eq=False)
class Worker:
    """One thread's way from jobs to the sink.

    backend   opens the backend of a running task
    step      elements of a tile of a task: whole blocks
    stopped   whether the run has failed meanwhile
    lanes     of the backends that it has come by
    """

    reader: Reader
    sink: Sink | None
    progress: Callable[[int], None]
    backend: Callable[[Running], TorchBackend]
    step: Callable[[Task], int]
    stopped: Callable[[], bool]
    lanes: dict[str, Lane] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.lender = self.sink if isinstance(self.sink, Lender) else None

    def do(self, job: Job) -> None:
        """All of a job."""
        if job.whole is not None:
            self._compute_at_once(job.whole, job.running)
        elif job.running.task.root.is_source:
            self._copy(job)
        else:
            self._compute(job)

    def _copy(self, job: Job) -> None:
        source = job.running.task.root
        memory = self._lend(job.running.task, job.start, job.stop - job.start)
        self.reader.read_into(source, job.start // ITEMSIZE[source.dtype], memory)
        self._give(job.running.task, job.start, memory)

    def _lend(self, task: Task, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Lent memory for a task's bytes from byte `start` of its node."""
        if self.lender is None:
            return np.empty(nbytes, np.uint8)
        return self.lender.lend(task.name, task.offset + start, nbytes)

    def _give(self, task: Task, start: int, memory: NDArray[np.uint8]) -> None:
        assert self.sink is not None
        give = self.sink.write if self.lender is None else self.lender.give
        give(task.name, task.offset + start, memory)
        self.progress(len(memory))

    def _compute(self, job: Job) -> None:
        running = job.running
        root = running.task.root
        step = self.step(running.task)
        if running.whole is not None and self._compute_whole(running.whole, job):
            return
        backend, lane = self._lane(running)
        calls = [None if item.node.is_source else backend.function(item.node) for item in running.steps]
        for node in (item.node for item in running.steps if item.node.is_source):
            size = ITEMSIZE[node.dtype]
            self.reader.advise(node, job.start * size, (job.stop - job.start) * size)
        start = job.start
        while start < job.stop or start == job.start:
            if self.stopped():
                return
            tile = Tile(start, min(job.stop, start + step), root.shape)
            try:
                self._tile(running, lane, calls, tile)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                step = self._smaller(running, lane, tile)
                continue
            start = max(tile.stop, start + 1)
        lane.flush()

    def _smaller(self, running: Running, lane: Lane, tile: Tile) -> int:
        """Half the elements of a tile that did not fit in a GPU's memory. InputError: it was one block."""
        block = block_elements(tile.shape)
        if tile.size <= block:
            raise too_little(lane.device, f"a tile of {tile.size:,} elements of {running.task.name}")
        lane.flush()
        return max(1, tile.size // 2 // block) * block

    def _tile(self, running: Running, lane: Lane, calls: Sequence[Callable[..., Any] | None], tile: Tile) -> None:
        """A pass on one tile; its reductions count when all of it has been computed."""
        task, root = running.task, running.task.root
        values: dict[int, Any] = {}
        reduced: list[tuple[Node, Any]] = []
        with lane.tile():
            for item, call in zip(running.steps, calls, strict=True):
                node = item.node
                if call is None:
                    values[id(node)] = lane.read(node, tile, running.uploads)
                else:
                    inputs = [values[id(s)] if id(s) in values else running.values[id(s)] for s in node.inputs]
                    value = call(*inputs, tile=tile, **item.parameters)
                    if node.kind in REDUCTIONS:
                        reduced.append((node, value))
                    else:
                        values[id(node)] = value
                for freed in item.frees:
                    del values[id(freed)]
            if id(root) in values:
                start = tile.start * ITEMSIZE[root.dtype]
                lane.emit(values[id(root)], partial(self._lend, task, start), partial(self._give, task, start))
        for node, value in reduced:
            running.reduce(node, tile.start, value)
        if root.kind == "small":
            self.progress(tile.size * ITEMSIZE[root.dtype])

    def _lane(self, running: Running) -> tuple[TorchBackend, Lane]:
        """Return the backend of a running task, and this thread's lane of it."""
        backend, name = self.backend(running), running.task.backend
        return backend, self.lanes.get(name) or self.lanes.setdefault(name, backend.lane(self.reader))

    def _compute_at_once(self, node: Node, running: Running) -> None:
        """The value of a `whole` node."""
        made = Making(*self._lane(running), self.step(running.task), self.stopped)
        running.values[id(node)] = made.value(node, running.schedule.passes[running.index], running.values)

    def _compute_whole(self, whole: Program, job: Job) -> bool:
        running = job.running
        task, root = running.task, running.task.root
        size = ITEMSIZE[root.dtype]
        written = running.index == len(running.schedule.passes) - 1 and root.kind not in REDUCTIONS
        nbytes = (job.stop - job.start) * size
        memory = self._lend(task, job.start * size, nbytes) if written else None
        found = whole.run(job.start, job.stop, memory)
        if found is None:
            return False
        for item in running.steps:
            if item.node.kind in REDUCTIONS:
                running.reduce(item.node, job.start, found[id(item.node)])
        if memory is not None:
            self._give(task, job.start * size, memory)
        elif root.kind == "small":
            self.progress(nbytes)
        return True
