"""A pass on one tile by one Triton loop: stored tiles in, a tile of the output and partials of reductions out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltamerge.engine.devices import current
from deltamerge.engine.fused.assembly import Assembly
from deltamerge.engine.fused.loops import Source, array, compiled
from deltamerge.engine.graph import Node
from deltamerge.io import gpu
from deltamerge.io.dtypes import torch_dtype
from deltamerge.io.lazy import torch
from deltamerge.methods.ops import halved
from deltamerge.methods.tiles import RUN, Tile

# Entries of one program; where a program looks at blocks a run of one, RUN.
SIZE = 1 << 11


class Loop:
    """The loop of a pass, for tiles of one tensor on one device.

    reads    the nodes whose stored tiles it is given, in order
    writes   whether it makes a tile of the output
    """

    def __init__(self, assembly: Assembly, source: Source, reads: tuple[Node, ...], *, writes: bool) -> None:
        self.assembly, self.source, self.reads, self.writes = assembly, source, reads, writes
        self.loop = compiled(source.text())
        longs = np.concatenate([array(source.ints, np.int64), *assembly.ranks, np.zeros(1, np.int64)])
        shorts = np.concatenate([array(source.floats, np.float32), *assembly.ratios, np.zeros(1, np.float32)])
        shorts = np.concatenate([shorts, np.zeros(len(shorts) % 2, np.float32)])
        self.numbers = np.concatenate([longs, shorts.view(np.int64)])
        self.longs, self.ints, self.floats = len(longs), max(1, len(source.ints)), max(1, len(source.floats))
        self.placed: dict[Any, tuple[torch.Tensor, ...]] = {}

    def _placed(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The arrays beside the loop, sent once: the first thread waits until they are there, so that others find
        them."""
        if device not in self.placed:
            there = torch.from_numpy(self.numbers).to(device)
            longs, shorts = there[: self.longs], there[self.longs :].view(torch.float32)
            self.placed[device] = longs, shorts, shorts[self.floats :], longs[self.ints :]
        return self.placed[device]

    @classmethod
    def of(cls, assembly: Assembly, reads: tuple[Node, ...], *, writes: bool) -> Loop | None:
        """The loop of a pass; None: some of it only torch does on a GPU."""
        source = Source.of(assembly)
        return None if source is None else cls(assembly, source, reads, writes=writes)

    def run(self, tile: Tile, stored: list[torch.Tensor], device: torch.device) -> tuple[Any, dict[int, Any]]:
        """The tile of the output, if there is one, and the partials of reductions by the id of their node."""
        with current(device):
            return self._run(tile, stored, device)

    def _run(self, tile: Tile, stored: list[torch.Tensor], device: torch.device) -> tuple[Any, dict[int, Any]]:
        inputs = [x.view(torch.int16) if x.dtype == torch.bfloat16 else x for x in stored]
        dtype = torch_dtype(self.assembly.output)
        out = torch.empty(tile.size if self.writes else 1, dtype=dtype, device=device)
        raw = out.view(torch.int16) if out.element_size() == 2 else out
        found: dict[int, list[Any]] = {}
        for part in self._parts(tile):
            for node, value in self._launch(part, tile, raw, inputs, device).items():
                found.setdefault(node, []).append(value)
        joined = {node: self._joined(node, values) for node, values in found.items()}
        return (out if self.writes else None), joined

    def _parts(self, tile: Tile) -> Iterator[Tile]:
        """The tile, or where a program looks at blocks its whole blocks, and one that is shorter."""
        block = self.assembly.form.block
        whole = tile.start + tile.size // block * block if self.source.by_block else tile.stop
        if whole > tile.start:
            yield Tile(tile.start, whole, tile.shape)
        if whole < tile.stop:
            yield Tile(whole, tile.stop, tile.shape)

    def _launch(
        self, part: Tile, tile: Tile, out: torch.Tensor, inputs: list[torch.Tensor], device: torch.device
    ) -> dict[int, Any]:
        source, assembly = self.source, self.assembly
        block = min(assembly.form.block, part.size)
        blocks, size = -(-part.size // block), SIZE
        at = part.start - tile.start
        if source.by_block:
            size = min(RUN, 1 << max(0, (block - 1).bit_length()))
        runs = -(-block // size)
        counters = source.counters + blocks * sum(size == 0 for _, size in source.counted.values())
        make = torch.zeros if counters else torch.empty
        counts = make(max(1, counters), dtype=torch.int64, device=device)
        sums = torch.empty(max(1, assembly.summed * blocks * runs), dtype=torch.float64, device=device)
        numbers: tuple[int, ...] = (part.start, part.stop)
        grid: tuple[int, ...] = (-(-(part.stop - part.start // 16 * 16) // size),)
        if source.by_block:
            numbers += (blocks, assembly.form.block, runs)
            grid = (blocks,) if source.carried else (blocks, runs)
        placed = self._placed(device)
        of_part = [x[at : at + part.size] for x in inputs]
        written = (out[at : at + part.size] if self.writes else out, counts, sums)
        gpu.launch(self.loop, grid, written, (*of_part, *placed), *numbers, SIZE=size)
        return self._found(counts, sums.view(assembly.summed, blocks, runs) if assembly.summed else sums, blocks)

    def _found(self, counts: torch.Tensor, sums: torch.Tensor, blocks: int) -> dict[int, Any]:
        source, assembly = self.source, self.assembly
        found: dict[int, Any] = {}
        numbers = counts.cpu().numpy() if source.counted else np.empty(0, np.int64)
        for node, (operation, _) in assembly.counters.items():
            first, size = source.counted[operation]
            begin = first if size else source.counters + first * blocks
            found[node] = numbers[begin : begin + (size or blocks)]
        if assembly.sums:
            runs = sums.cpu()
            for node, (row, count) in assembly.sums.items():
                of_node = runs[row : row + max(1, count)]
                total = of_node.amax(-1) if node in self._largest else halved(of_node)
                found[node] = total.T.numpy() if count else total[0].numpy()
        return found

    @property
    def _largest(self) -> set[int]:
        """The reductions that look for the largest, of which NaN is one."""
        return {n for n in self.assembly.sums if self._named(n).endswith(":norm") and self._kind(n) == "linf"}

    def _named(self, node: int) -> str:
        return self.assembly.named[node].function

    def _kind(self, node: int) -> str:
        return str(self.assembly.named[node].parameter("norm"))

    def _joined(self, node: int, values: list[NDArray[Any]]) -> NDArray[Any]:
        """Counters of all parts added, or what there is of each block one after the other."""
        counted = self.assembly.counters.get(node)
        if counted is not None and counted[1]:
            return np.asarray(np.sum(values, axis=0))
        return np.concatenate(values)


def loop_of(assembly: Assembly | None, reads: tuple[Node, ...], ends: Mapping[int, Node]) -> Loop | None:
    """The loop of an assembled pass whose reductions are `ends`; None: torch has to do it."""
    if assembly is None:
        return None
    assembly.named |= ends
    return Loop.of(assembly, reads, writes=not ends)
