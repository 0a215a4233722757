"""Runs a graph: tensors stream through it tile by tile, on any number of workers. It knows no method."""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from deltamerge import errors
from deltamerge.engine import backends
from deltamerge.engine.backends import TorchBackend
from deltamerge.engine.devices import fitting, torch_device, torch_devices
from deltamerge.engine.worker import Job, Running, Sink, Worker, on_gpu
from deltamerge.engine.worker import Task as Task
from deltamerge.tensors.dtypes import ITEMSIZE, nbytes_of
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.schedule import REDUCTIONS, depth_first, schedule
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.tiles import block_elements
from deltamerge.tensors.traits import function_of

TILE_ELEMENTS = 1 << 18
GPU_TILE_ELEMENTS = 1 << 22
JOB_ELEMENTS = 1 << 21
COPY_BYTES = 1 << 22
# Tiles of a job on a GPU: one is read while another is computed.
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
        device          "cpu" or GPUs;  workers   threads, of GPUs at least one each
        tile_elements   elements of a tile; None: the device's default
        progress        called with the number of bytes done
        known           values of small nodes that are not computed again
        done            done(name, offset, nbytes): whether the sink has these bytes already (from an interrupted run)

    A task whose root is a small node or a reduction makes no tensor; its value is returned, and its bytes count as
    progress.

    At most `workers` + 1 tensors are in progress, and each worker holds one tile of each live value. Several GPUs share
    the tasks, each whole. The result does not depend on `workers`, `tile_elements` or the devices.
    """
    shared = shared_values([task.root for task in tasks], known or {})
    devices: tuple[str, ...] = ("cpu",)  # a GPU that nothing is computed on is not begun
    if any(on_gpu(task, device) for task in tasks):
        devices = tuple(map(str, torch_devices(device)))
        if devices == ("cpu",):  # "auto", and torch sees none
            tasks = [replace(t, backend=backends.choose(t.root, "cpu")) if on_gpu(t, device) else t for t in tasks]
    workers, tile = max(workers, len(devices)), tile_elements or own_tile(devices[0])
    if devices != ("cpu",):
        tile = min(fitting(torch_device(one), -(-workers // len(devices)), tile) for one in devices)
    engine = _Engine(iter(tasks), reader, sink, devices, workers, tile, progress, done, shared)
    with (
        backends.quiet_allocator(),
        backends.single_threaded({task.backend for task in tasks if not task.root.is_source}),
    ):
        engine.run()
    return engine.shared


@dataclass(eq=False)
class _Engine:
    """A queue of jobs in planned order. A pass of a tensor starts when the previous pass is complete."""

    upcoming: Iterator[Task]
    reader: Reader
    sink: Sink | None
    devices: tuple[str, ...]
    workers: int
    tile_elements: int
    progress: Callable[[int], None]
    done: Callable[[str, int, int], bool]
    shared: dict[Node, Any]
    backends: dict[tuple[str, str], TorchBackend] = field(default_factory=dict)
    ready: deque[Job] = field(default_factory=deque)
    in_flight: int = 0
    working: int = 0
    failure: BaseException | None = None
    changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        mine = [self.devices[number % len(self.devices)] for number in range(self.workers)]
        threads = [threading.Thread(target=self._work, args=(device,), daemon=True) for device in mine]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException as interruption:  # the threads must end before the caller closes the sink
            self._fail(interruption)
            with self.changed:  # not by join: after an interrupted one Python 3.11 takes the thread for ended
                while self.working:
                    self.changed.wait()
        if self.failure is not None:
            raise self.failure

    def _work(self, device: str) -> None:
        """Do the jobs of a device's thread. It counts as working until it has freed all that they held.

        A thread that frees a tensor while the process exits would abort it. numpy does not warn of NaN: they are
        counted as the result is written.
        """
        with self.changed:
            self.working += 1
        try:
            with np.errstate(all="ignore"):
                self._do_jobs(device)
        finally:
            with self.changed:
                self.working -= 1
                self.changed.notify_all()

    def _do_jobs(self, device: str) -> None:
        worker = Worker(self.reader, self.sink, self.progress, self._backend, self._tile_step, self._has_failed)
        try:
            while (job := self._take(device)) is not None:
                with errors.context(f"tensor {job.running.task.name}"):
                    worker.do(job)
                    self._complete(job)
        except BaseException as failure:
            self._fail(failure)

    def _fail(self, failure: BaseException) -> None:
        with self.changed:
            self.failure = self.failure or failure
            self.changed.notify_all()

    def _has_failed(self) -> bool:
        return self.failure is not None

    def _take(self, device: str) -> Job | None:
        """Return the next job for a device's thread; None: there are no more."""
        with self.changed:
            while self.failure is None:
                for place, job in enumerate(self.ready):
                    if job.running.device in ("cpu", device):
                        del self.ready[place]
                        return job
                task = next(self.upcoming, None)
                if task is not None:
                    self._start(task, device)
                elif not self.in_flight:
                    return None
                else:
                    self.changed.wait()
            return None

    def _start(self, task: Task, device: str) -> None:
        if self._is_done(task, 0, nbytes_of(task.root.dtype, task.root.shape) // ITEMSIZE[task.root.dtype]):
            return
        plan = schedule(task.root)
        there = on_gpu(task, device)
        known = {id(node): self.shared[node] for small in plan.small for node in small if node in self.shared}
        running = Running(task, plan, known, device if there else "cpu")
        if there:
            running.uploads = self._backend(running).uploads(sum(map(bool, plan.passes)))
        jobs = self._next_pass(running)
        self.in_flight += bool(jobs)
        self.ready.extend(jobs)

    def _backend(self, running: Running) -> TorchBackend:
        """Return the backend of a running task, opened on first use: copies need none."""
        key = running.task.backend, running.device
        if (opened := self.backends.get(key)) is not None:
            return opened
        with self.changed:
            if key not in self.backends:
                self.backends[key] = backends.open_backend(*key)
            return self.backends[key]

    def _next_pass(self, running: Running) -> list[Job]:
        """Return the jobs of the next pass that must run; needless reductions are skipped."""
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
            backend = None if root.is_source else self._backend(running)
            wholes = [n for n in reductions if n.kind == "whole"]
            left_out = needless | set(map(id, wholes))
            running.steps = backends.steps(nodes, running.schedule.frees[index], root, left_out)
            running.whole = backend.whole(running.steps, root, running.values, self.reader) if backend else None
            running.partials = {id(n): {} for n in reductions}
            jobs = [Job(running, 0, 0, node) for node in wholes]
            in_tiles = len(wholes) < len(reductions) or (last and root.kind != "whole")
            tiled = self._jobs(running) if in_tiles else ()
            jobs += [job for job in tiled if not (last and self._is_done_job(job))]
            running.waiting = len(jobs)
            return jobs
        return []

    def _tile_step(self, task: Task) -> int:
        block = block_elements(task.root.shape)
        most = self.tile_elements if task.backend == "torch" else min(self.tile_elements, TILE_ELEMENTS)
        return max(1, most // block) * block

    def _jobs(self, running: Running) -> Iterator[Job]:
        root = running.task.root
        if root.is_source:
            total, step = root.nbytes, COPY_BYTES
        else:
            total = math.prod(root.shape)
            tile = self._tile_step(running.task)
            on_gpu = running.whole is None and self._backend(running).on_gpu
            step = GPU_TILES * tile if on_gpu else max(1, JOB_ELEMENTS // tile) * tile
        for start in range(0, max(total, 1), step):
            yield Job(running, start, min(total, start + step))

    def _is_done_job(self, job: Job) -> bool:
        root = job.running.task.root
        size = 1 if not root.is_source else ITEMSIZE[root.dtype]
        return self._is_done(job.running.task, job.start // size, job.stop // size)

    def _is_done(self, task: Task, start: int, stop: int) -> bool:
        """Tell whether the sink has the elements [start, stop) of a task; they then count as progress."""
        size = ITEMSIZE[task.root.dtype]
        done = self.done(task.name, task.offset + start * size, (stop - start) * size)
        if done:
            self.progress((stop - start) * size)
        return done

    def _complete(self, job: Job) -> None:
        running = job.running
        with self.changed:
            running.waiting -= 1
            if running.waiting:
                return
        running.reduced()
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
    """Return the values of small nodes that need no tile (numbers of the recipe) and of stages, each computed once."""
    values: dict[Node, Any] = dict(known)
    for root in roots:
        _share(root, values)
    return values


def _share(root: Node, values: dict[Node, Any]) -> None:
    """Add the values of one root to `values`."""
    tiled: set[Node] = set()
    for node in depth_first(root):
        if node.kind == "stage":
            if node not in values:
                values[node] = _staged(node, values)
        elif node.kind != "small" or not tiled.isdisjoint(node.inputs):
            tiled.add(node)
        elif node not in values:
            inputs = [values[source] for source in node.inputs]
            values[node] = function_of(node.function)(*inputs, **dict(node.parameters))


def _staged(stage: Node, values: dict[Node, Any]) -> Any:
    """Return the value of a stage. Adds the values of its inputs that need no tile to `values`."""
    small = [source for source in stage.inputs if source.kind in ("small", "stage")]
    for source in small:
        _share(source, values)
    known = {source: values[source] for source in small if source in values}
    return function_of(stage.function)(*stage.inputs, known=known, **dict(stage.parameters))


def own_tile(device: str) -> int:
    """Return the number of elements of a tile that suit a device."""
    return TILE_ELEMENTS if device == "cpu" else GPU_TILE_ELEMENTS


def default_workers() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# Whole tensors in memory.


def computed(
    roots: Mapping[str, Node],
    reader: Reader,
    *,
    device: str = "cpu",
    workers: int | None = None,
    known: Mapping[Node, Any] | None = None,
) -> dict[str, NDArray[np.uint8]]:
    """Return the bytes of tensors, by the names of their nodes; see `execute`. By default all cores work."""
    sink = _Buffers(roots)
    tasks = [Task(name, root, backends.choose(root, device)) for name, root in roots.items()]
    execute(tasks, reader, sink, device=device, workers=workers or default_workers(), known=known)
    return sink.buffers


class _Buffers:
    """A sink that lends the tensors themselves to be filled."""

    def __init__(self, roots: Mapping[str, Node]) -> None:
        self.buffers = {name: np.empty(nbytes_of(node.dtype, node.shape), np.uint8) for name, node in roots.items()}

    def write(self, name: str, offset: int, data: Any) -> None:
        self.buffers[name][offset : offset + data.nbytes] = data.view(np.uint8)

    def lend(self, name: str, offset: int, nbytes: int) -> NDArray[np.uint8]:
        return self.buffers[name][offset : offset + nbytes]

    def give(self, name: str, offset: int, buffer: NDArray[np.uint8]) -> None:
        """Do nothing, because the lent memory is the tensor itself."""
