"""Values of GGUF tensors, row by row: blocks as float32 by the gguf package, llama.cpp's conversions undone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.gguf.header import GgufBlock, block_of, package
from deltamerge.formats.quantised.scheme import Array, Floats, fill_rows, kept
from deltamerge.tensors.tensor import Made, Read, TensorInfo, decoded, viewed
from deltamerge.tensors.tensor import stored as leaf


@dataclass(frozen=True, slots=True)
class BlockValues:
    """The values of a tensor's blocks, which lie along rows of `columns`. `stored` has the bytes."""

    stored: TensorInfo
    kind: int
    columns: int

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        fill_rows(self.columns, start, out, lambda top, bottom: self._rows(read, top, bottom))

    def _rows(self, read: Read, top: int, bottom: int) -> Floats:
        gguf = package()
        elements, nbytes = block_of(self.kind)
        width = self.columns // elements * nbytes
        raw = np.empty((bottom - top, width), np.uint8)
        read.read_into(self.stored, top * width, raw)
        with np.errstate(all="ignore"):
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType(self.kind))
        return np.asarray(values, np.float32)


@dataclass(frozen=True, slots=True)
class HeadOrder:
    """The rows of `source` (…, columns) in transformers' order, a head of `rows` at a time.

    Of a head of q and k llama.cpp has the rows that its rotary embedding pairs side by side, transformers half a head
    apart. With `fused` = h the heads of q, of k and of v lie interleaved instead (q₀ k₀ v₀ q₁ …), in the file one after
    the other, h of each (Bloom).
    """

    source: TensorInfo
    rows: int
    columns: int
    fused: int = 0

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        fill_rows(self.columns, start, out, lambda top, bottom: self._band(read, top, bottom))

    def _band(self, read: Read, top: int, bottom: int) -> Floats:
        first, last = top // self.rows, -(-bottom // self.rows)
        values = np.empty((last - first, self.rows, self.columns), np.float32)
        for unit in range(first, last):
            begin = unit
            if self.fused:
                head, part = divmod(unit, 3)
                begin = part * self.fused + head
            read.read_into(self.source, begin * self.rows * self.columns, values[unit - first])
        if not self.fused:
            pairs = values.reshape(last - first, self.rows // 2, 2, self.columns)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2))
        return values.reshape(-1, self.columns)[top - first * self.rows : bottom - first * self.rows]


@dataclass(frozen=True, slots=True)
class MappedValues:
    """A function of the values of `source`: `less_one` of norms stored as w + 1, `log_of_negative` of Mamba's A."""

    source: TensorInfo
    function: str

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        values = np.frombuffer(out, np.float32)
        read.read_into(self.source, start, values)
        if self.function == "less_one":
            values -= np.float32(1)
            return
        if not (values < 0).all():
            raise InputError(f"{self.source.name}: is not below 0 everywhere", hint="download it again")
        np.log(-values, out=values)


@dataclass(frozen=True, slots=True)
class TransposedBlocks:
    """`source` (rows, columns) transposed, as GPT-2's Conv1D has its weights."""

    keeps: ClassVar[bool] = True
    source: TensorInfo

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        rows, columns = self.source.shape

        def decoded() -> Array:
            values = np.empty((rows, columns), np.float32)
            read.read_into(self.source, 0, values)
            return values

        values = kept(read, self.source, decoded)
        fill_rows(rows, start, out, lambda top, bottom: np.ascontiguousarray(values[:, top:bottom].T))


@dataclass(frozen=True, slots=True)
class JoinedExperts:
    """Experts (E, ra + rb, columns) whose rows are those of `sources` (E, ra, columns) and (E, rb, columns)."""

    sources: tuple[TensorInfo, TensorInfo]

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        values, done = np.frombuffer(out, np.float32), 0
        sizes = [math.prod(source.shape[1:]) for source in self.sources]
        while done < len(values):
            expert, inner = divmod(start + done, sum(sizes))
            part = int(inner >= sizes[0])
            inner -= sizes[0] * part
            count = min(sizes[part] - inner, len(values) - done)
            read.read_into(self.sources[part], expert * sizes[part] + inner, values[done : done + count])
            done += count


def tensor_of(block: GgufBlock, name: str) -> TensorInfo:
    """Return the float32 tensor of a block's values under `name`."""
    stored = TensorInfo(block.name, leaf(block.path, block.begin, (block.nbytes,), "U8", block.name))
    return made(name, block.shape, block, BlockValues(stored, block.kind, block.shape[-1]))


def made(name: str, shape: Sequence[int], like: GgufBlock | TensorInfo, how: Made) -> TensorInfo:
    """Return the float32 tensor of `shape` that `how` computes."""
    return TensorInfo(name, viewed(decoded, (), tuple(shape), "F32", made=how, name=name, path=like.path))
