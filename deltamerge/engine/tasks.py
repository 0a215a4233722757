"""What the engine is given and what it keeps of it: tasks, the jobs that a running task is cut into, and the sink."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.backends import Step
from deltamerge.engine.devices import Uploads
from deltamerge.engine.fused.program import Program
from deltamerge.tensors.schedule import REDUCTIONS, Schedule
from deltamerge.tensors.tensor import Node


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

    device   of a task on a GPU the one that does all of it, where its tiles are kept; else "cpu", for any worker
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
        """Make the values of the pass's reductions of what its jobs have given."""
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
    """Whether a task is computed on a GPU, where `device` is one."""
    return device != "cpu" and task.backend == "torch" and not task.root.is_source
