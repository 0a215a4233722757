"""A tensor that is computed tile by tile, as a `whole` function reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltamerge.engine.backends import Step, TorchBackend, steps
from deltamerge.engine.devices import Lane
from deltamerge.tensors.schedule import TILED, last_uses
from deltamerge.tensors.tensor import Node
from deltamerge.tensors.tiles import Tile, block_elements, densify
from deltamerge.tensors.traits import function_of


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
        """The value of a `whole` node; `nodes` are those of its pass, `values` those of earlier ones."""
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
    node      whose values these are
    steps     what computes them
    values    of small nodes and of reductions
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
