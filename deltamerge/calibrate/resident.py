"""Models under calibration on a GPU: weights stay there as they are stored, and masks are drawn as they are used.

A pruned weight base + mask ∘ (tune − base) / q is one Triton loop over two stored tensors, so that neither a mask nor a
delta is kept for a seed or a candidate. What does not fit in a third of the free memory streams by: the next block's
tensors are read and sent while a block is computed, and freed when the walk has left it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from deltamerge.calibrate.ahead import Ahead
from deltamerge.calibrate.arrivals import Arrivals
from deltamerge.engine.backends import listed, steps
from deltamerge.engine.devices import KEPT_SHARE, Room, free_bytes
from deltamerge.engine.fused.on_gpu import Loop
from deltamerge.engine.fused.stream import assemble_on_gpu
from deltamerge.engine.graph import Graph, Node, depth_first, schedule
from deltamerge.io import gpu
from deltamerge.io.reader import Reader
from deltamerge.io.tensor import TensorInfo
from deltamerge.methods.merge.arithmetic import task_arithmetic
from deltamerge.methods.prune.rescale import divide, divide_rows
from deltamerge.methods.tiles import Tile

if TYPE_CHECKING:
    from deltamerge.calibrate.candidates import Q

ADDED: Mapping[str, Any] = {"weights": (1.0,), "normalize": False, "lambda_": 1.0}


class Resident:
    """Stored tensors on a GPU, of which so many models `share` the room, and the masked deltas that loops draw from
    them."""

    def __init__(self, reader: Reader, device: torch.device, known: Mapping[Node, Any], share: int = 1) -> None:
        self.reader, self.device = reader, device
        self.known = {id(node): value for node, value in known.items()}
        self.room = Room(free_bytes(device) // (KEPT_SHARE * share))
        self.there: dict[TensorInfo, Tensor] = {}
        self.passing: dict[TensorInfo, Tensor] = {}
        self.ahead = Ahead(Arrivals(reader, device).send)
        self._next: set[TensorInfo] = set()
        self._entered: Any = None

    def begin(self, infos: Iterable[TensorInfo]) -> None:
        """Send what the next block needs, while the one that is entered is computed; free what was left before."""
        self.passing = {info: tensor for info, tensor in self.passing.items() if info in self._next}
        self._next = {info for info in infos if info not in self.there}
        if self._next and self._entered is not None:
            self._entered.synchronize()  # the host is one block ahead of the device at most, and so is its memory
        self._entered = torch.cuda.current_stream(self.device).record_event()
        self.ahead.begin(info for info in self._next if info not in self.passing)

    def stored(self, info: TensorInfo) -> Tensor:
        """A flat stored tensor on the GPU, which stays if there is room."""
        for kept in (self.there, self.passing):
            if info in kept:
                return kept[info]
        made = self.ahead(info).here()
        kept = self.there if self.room.take(info.nbytes) else self.passing
        kept[info] = made
        return made

    def shed(self) -> bool:
        """Free what stays there, from now on; whether there was any."""
        found = bool(self.there)
        self.clear()
        self.room = Room(0)
        return found

    def drawn(self, node: Node, base: TensorInfo, shape: tuple[int, ...]) -> Drawn | None:
        """The masked delta of a tensor of `shape`; None where no loop makes it in one pass: it is sparse, it has to be
        sorted or cut first, or it is only some of the tensor's rows."""
        plan = schedule(node)
        if not gpu.available(self.device) or len(plan.passes) > 1 or {n.shape for n in plan.passes[0]} != {shape}:
            return None
        found = Drawn(self, node, base)
        return found if found.loop(node, {}) is not None else None

    def clear(self) -> None:
        """Free them."""
        self.ahead.close()
        for info in self.there:
            self.room.give(info.nbytes)
        self.there.clear()
        self.passing.clear()


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """A tensor's masked delta, drawn anew whenever it is used: the value of `node`, over the stored `base`."""

    resident: Resident
    node: Node
    base: TensorInfo

    def delta(self) -> Tensor:
        """mask ∘ Δ in float32, in the tensor's shape."""
        return self._run(self.node, {})

    def pruned(self, q: Q) -> Tensor:
        """base + mask ∘ Δ / q in float32; q has no gradient."""
        graph = Graph()
        if isinstance(q, Tensor) and q.dim():
            function: Any = divide_rows
            value: Any = q.detach().to("cpu", torch.float32).numpy()
        else:
            function, value = divide, float(np.float32(float(q)))
        number = graph.node("q", kind="small")
        divided = graph.node(function, [self.node, number], shape=self.node.shape)
        root = graph.node(task_arithmetic, [graph.read(self.base), divided], shape=self.node.shape, **ADDED)
        return self._run(root, {id(number): value})

    def loop(self, root: Node, values: Mapping[int, Any]) -> Loop | None:
        """The loop that makes `root` of stored tensors."""
        plan = schedule(root)
        given = listed(steps(plan.passes[-1], plan.frees[-1], root, ()))
        known = {**self.resident.known, **values}
        small = [node for node in depth_first(root) if node.kind == "small" and id(node) not in known]
        if small:
            return None
        return assemble_on_gpu(given, known, self.resident.reader, root.shape, "F32")

    def _run(self, root: Node, values: Mapping[int, Any]) -> Tensor:
        loop = self.loop(root, values)
        assert loop is not None
        stored = [self.resident.stored(node.parameter("tensor")) for node in loop.reads]
        size = stored[0].numel()
        made: Tensor = loop.run(Tile(0, size, root.shape), stored, self.resident.device)[0]
        return made.view(root.shape)
