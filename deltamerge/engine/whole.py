"""Whole tensors in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine import backends
from deltamerge.engine.execute import Task, default_workers, execute
from deltamerge.tensors.dtypes import nbytes_of
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Node


def computed(
    roots: Mapping[str, Node],
    reader: Reader,
    *,
    device: str = "cpu",
    workers: int | None = None,
    known: Mapping[Node, Any] | None = None,
) -> dict[str, NDArray[np.uint8]]:
    """The bytes of tensors, by the names of their nodes; see `execute`. By default all cores work."""
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
        """Nothing: what was lent is the tensor itself."""
