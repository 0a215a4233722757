"""Runs a graph: tensors stream through it tile by tile, on any number of workers. It knows no method."""

from __future__ import annotations

import os
import threading
from collections import ChainMap, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge import errors
from deltamerge.engine import backends
from deltamerge.engine.backends import TorchBackend
from deltamerge.engine.devices import AUTO, Lane, fitting, is_out_of_memory, too_little, torch_device
from deltamerge.engine.fused.program import Program
from deltamerge.engine.graph import REDUCTIONS, Node, depth_first, function_of, schedule
from deltamerge.engine.sink import Lender, Sink
from deltamerge.engine.source import Making
from deltamerge.engine.tasks import Job, Running, on_gpu
from deltamerge.engine.tasks import Task as Task
from deltamerge.io.dtypes import ITEMSIZE, nbytes_of
from deltamerge.io.reader import Reader
from deltamerge.io.tensor import TensorInfo
from deltamerge.methods.tiles import Tile, block_elements

TILE_ELEMENTS = 1 << 18
GPU_TILE_ELEMENTS = 1 << 22
JOB_ELEMENTS = 1 << 21
COPY_BYTES = 1 << 22
# On a GPU a job is so many tiles: one is read while another is computed.
GPU_TILES = 4


def execute(
    tasks: Sequence[Task],
    reader: Reader,
    sink: Sink | None,
    *,
    device: str = "cpu",
    workers: int = 1,
    tile_elements: int | None = None,
    progress: Callable[[int], None] = lambda _: None,
    known: Mapping[Node, Any] | None = None,
    done: Callable[[str, int, int], bool] = lambda *_: False,
) -> dict[Node, Any]:
    """Compute every task's tensor and pass its tiles to `sink`; returns the values of shared small nodes.

        tasks           what to compute
        reader          reads the inputs
        sink            None: all roots are small or reductions
        device          "cpu" or a GPU;  workers   threads
        tile_elements   of a tile; None: the device's own
        progress        called with the number of bytes done
        known           values of small nodes that are not computed again
        done            done(name, offset, nbytes): whether the sink has these bytes already (from an interrupted run)

    A task whose root is a small node or a reduction makes no tensor; its value is returned, and its bytes count as
    progress.

    At most `workers` + 1 tensors are in progress, and each worker holds one tile of each live value. The result does
    not depend on `workers`, `tile_elements` or the device.
    """
    shared = shared_values([task.root for task in tasks], known or {})
    if device == AUTO and any(on_gpu(task, device) for task in tasks) and torch_device(device).type == "cpu":
        tasks = [replace(t, backend=backends.choose(t.root, "cpu")) if on_gpu(t, device) else t for t in tasks]
        device = "cpu"
    if not any(on_gpu(task, device) for task in tasks):
        device = "cpu"  # a GPU that nothing is computed on is not begun
    tile = tile_elements or own_tile(device)
    engine = _Engine(iter(tasks), reader, sink, device, workers, tile, progress, done, shared)
    with (
        backends.quiet_allocator(),
        backends.single_threaded({task.backend for task in tasks if task.root.kind != "read"}),
    ):
        engine.run()
    return engine.shared


@dataclass(eq=False)
class _Engine:
    """A queue of jobs in planned order; a pass of a tensor starts when the one before is complete."""

    upcoming: Iterator[Task]
    reader: Reader
    sink: Sink | None
    device: str
    workers: int
    tile_elements: int
    progress: Callable[[int], None]
    done: Callable[[str, int, int], bool]
    shared: dict[Node, Any]
    backends: dict[str, TorchBackend] = field(default_factory=dict)
    ready: deque[Job] = field(default_factory=deque)
    in_flight: int = 0
    working: int = 0
    failure: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def __post_init__(self) -> None:
        self.lender = self.sink if isinstance(self.sink, Lender) else None
        if self.device != "cpu":
            self.tile_elements = fitting(torch_device(self.device), self.workers, self.tile_elements)
        self.shared_by_id = {id(node): value for node, value in self.shared.items()}

    def run(self) -> None:
        threads = [threading.Thread(target=self._work, daemon=True) for _ in range(self.workers)]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as interruption:  # whoever called closes what the threads write to: first they end
            self._fail(interruption)
            with self.changed:  # not by join: after an interrupted one Python 3.11 takes the thread for ended
                while self.working:
                    self.changed.wait()
        if self.failure is not None:
            raise self.failure

    @np.errstate(all="ignore")
    def _work(self) -> None:
        """The loop of one thread. numpy's warnings about NaN are off: they are counted when the result is written."""
        lanes: dict[str, Lane] = {}
        with self.changed:
            self.working += 1
        try:
            while (job := self._take()) is not None:
                task = job.running.task
                with errors.context(f"tensor {task.name}"):
                    if job.whole is not None:
                        self._compute_at_once(job.whole, job.running, lanes)
                    elif task.root.kind == "read":
                        self._copy(job)
                    else:
                        self._compute(job, lanes)
                    self._complete(job)
        except BaseException as failure:
            self._fail(failure)
        finally:
            with self.changed:
                self.working -= 1
                self.changed.notify_all()

    def _fail(self, failure: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.changed.notify_all()

    def _take(self) -> Job | None:
        with self.changed:
            while self.failure is None:
                if self.ready:
                    return self.ready.popleft()
                task = next(self.upcoming, None)
                if task is not None:
                    self._start(task)
                elif not self.in_flight:
                    return None
                else:
                    self.changed.wait()
            return None

    def _start(self, task: Task) -> None:
        if self._is_done(task, 0, nbytes_of(task.root.dtype, task.root.shape) // ITEMSIZE[task.root.dtype]):
            return
        plan = schedule(task.root)
        running = Running(task, plan, ChainMap({}, self.shared_by_id))
        if task.root.kind != "read" and self.device != "cpu":
            running.uploads = self._backend(task).uploads(sum(map(bool, plan.passes)))
        jobs = self._next_pass(running)
        self.in_flight += bool(jobs)
        self.ready.extend(jobs)

    def _backend(self, task: Task) -> TorchBackend:
        """The backend of a task, opened on first use: copies need none."""
        with self.changed:
            if task.backend not in self.backends:
                self.backends[task.backend] = backends.open_backend(task.backend, self.device)
            return self.backends[task.backend]

    def _next_pass(self, running: Running) -> list[Job]:
        """The jobs of the next pass that must run; needless reductions are skipped."""
        for index in range(running.index + 1, len(running.schedule.passes)):
            running.index = index
            for node in running.schedule.small[index]:
                if id(node) not in running.values:
                    inputs = [running.values[id(s)] for s in node.inputs]
                    running.values[id(node)] = function_of(node.function)(*inputs, **dict(node.parameters))
            nodes = running.schedule.passes[index]
            if not nodes:
                self.shared[running.task.root] = running.values[id(running.task.root)]
                return []
            reductions = [n for n in nodes if n.kind in REDUCTIONS]
            last = index == len(running.schedule.passes) - 1
            needless = {id(n) for n in reductions if not last and backends.is_needless(n, running.values)}
            running.values.update(dict.fromkeys(needless))
            reductions = [n for n in reductions if id(n) not in needless]
            if not (last or reductions):
                continue
            root = running.task.root
            backend = None if root.kind == "read" else self._backend(running.task)
            wholes = [n for n in reductions if n.kind == "whole"]
            left_out = needless | set(map(id, wholes))
            running.steps = backends.steps(nodes, running.schedule.frees[index], root, left_out)
            running.whole = backend.whole(running.steps, root, running.values, self.reader) if backend else None
            running.loop = backend.loop(running.steps, root, running.values, self.reader) if backend else None
            running.partials = {id(n): {} for n in reductions}
            jobs = [Job(running, 0, 0, node) for node in wholes]
            in_tiles = len(wholes) < len(reductions) or (last and root.kind != "whole")
            tiled = self._jobs(running) if in_tiles else ()
            jobs += [job for job in tiled if not (last and self._is_done_job(job))]
            running.waiting = len(jobs)
            return jobs
        return []

    def _jobs(self, running: Running) -> Iterator[Job]:
        root = running.task.root
        if root.kind == "read":
            total, step = root.parameter("tensor").nbytes, COPY_BYTES
        else:
            total = int(np.prod(root.shape, dtype=np.int64))
            tile = self._tile_step(running.task)
            on_gpu = running.whole is None and self._backend(running.task).on_gpu
            step = GPU_TILES * tile if on_gpu else max(1, JOB_ELEMENTS // tile) * tile
        for start in range(0, max(total, 1), step):
            yield Job(running, start, min(total, start + step))

    def _is_done_job(self, job: Job) -> bool:
        root = job.running.task.root
        size = 1 if root.kind != "read" else ITEMSIZE[root.dtype]
        return self._is_done(job.running.task, job.start // size, job.stop // size)

    def _is_done(self, task: Task, start: int, stop: int) -> bool:
        """Whether the sink has the elements [start, stop) of a task; they then count as progress."""
        size = ITEMSIZE[task.root.dtype]
        done = self.done(task.name, task.offset + start * size, (stop - start) * size)
        if done:
            self.progress((stop - start) * size)
        return done

    def _tile_step(self, task: Task) -> int:
        block = block_elements(task.root.shape)
        most = self.tile_elements if task.backend == "torch" else min(self.tile_elements, TILE_ELEMENTS)
        return max(1, most // block) * block

    def _copy(self, job: Job) -> None:
        source: TensorInfo = job.running.task.root.parameter("tensor")
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

    def _compute(self, job: Job, lanes: dict[str, Lane]) -> None:
        running = job.running
        root = running.task.root
        step = self._tile_step(running.task)
        if running.whole is not None and self._compute_whole(running.whole, job):
            return
        backend, lane = self._lane(running.task, lanes)
        calls = [None if item.node.kind == "read" else backend.function(item.node) for item in running.steps]
        for node in (item.node for item in running.steps if item.node.kind == "read"):
            size = ITEMSIZE[node.dtype]
            self.reader.advise(node.parameter("tensor"), job.start * size, (job.stop - job.start) * size)
        start = job.start
        while start < job.stop or start == job.start:
            if self.failure is not None:
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
        """Elements of a tile after one that a GPU had too little memory for: half. InputError: it was one block."""
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
            if running.loop is not None and tile.size:
                stored = [lane.read(node, tile, running.uploads) for node in running.loop.reads]
                made, partials = running.loop.run(tile, stored, lane.device)
                reduced = [(s.node, partials[id(s.node)]) for s in running.steps if s.node.kind in REDUCTIONS]
                values |= {id(root): made} if made is not None else {}
                calls = ()
            for item, call in zip(running.steps, calls, strict=False):
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
            self._reduce(running, node, tile.start, value)
        if root.kind == "small":
            self.progress(tile.size * ITEMSIZE[root.dtype])

    def _lane(self, task: Task, lanes: dict[str, Lane]) -> tuple[TorchBackend, Lane]:
        """A thread's lane of the backend of a task."""
        backend = self._backend(task)
        return backend, lanes.get(task.backend) or lanes.setdefault(task.backend, backend.lane(self.reader))

    def _compute_at_once(self, node: Node, running: Running, lanes: dict[str, Lane]) -> None:
        """The value of a `whole` node."""
        made = Making(*self._lane(running.task, lanes), self._tile_step(running.task), lambda: bool(self.failure))
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
                self._reduce(running, item.node, job.start, found[id(item.node)])
        if memory is not None:
            self._give(task, job.start * size, memory)
        elif root.kind == "small":
            self.progress(nbytes)
        return True

    def _reduce(self, running: Running, node: Node, start: int, value: Any) -> None:
        """Add a sum at once (integers, so in any order); keep a concatenated partial under its tile's start."""
        with self.changed:
            parts = running.partials[id(node)]
            if node.kind == "sum":
                parts[0] = parts[0] + value if parts else value
            else:
                parts[start] = value

    def _complete(self, job: Job) -> None:
        running = job.running
        with self.changed:
            running.waiting -= 1
            if running.waiting:
                return
        for node in (item.node for item in running.steps if item.node.kind in REDUCTIONS):
            parts = [part for _, part in sorted(running.partials[id(node)].items())]
            running.values[id(node)] = parts[0] if node.kind == "sum" else np.concatenate(parts)
        jobs = self._next_pass(running)
        if not jobs and running.uploads is not None:
            running.uploads.clear()
        with self.changed:
            if jobs:
                self.ready.extendleft(reversed(jobs))
            else:
                self.in_flight -= 1
                root = running.task.root
                if root.kind in REDUCTIONS:
                    self.shared[root] = running.values[id(root)]
            self.changed.notify_all()


def shared_values(roots: Sequence[Node], known: Mapping[Node, Any]) -> dict[Node, Any]:
    """Values of the small nodes that need no tile (numbers of the recipe, calibration), each computed once."""
    values: dict[Node, Any] = dict(known)
    tiled: set[Node] = set()
    for root in roots:
        for node in depth_first(root):
            if node.kind != "small" or any(source in tiled for source in node.inputs):
                tiled.add(node)
            elif node not in values:
                inputs = [values[source] for source in node.inputs]
                values[node] = function_of(node.function)(*inputs, **dict(node.parameters))
    return values


def own_tile(device: str) -> int:
    """Elements of a tile that suit a device."""
    return TILE_ELEMENTS if device == "cpu" else GPU_TILE_ELEMENTS


def default_workers() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
