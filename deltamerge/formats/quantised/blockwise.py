"""bitsandbytes: codes of a table (nf4, fp4) with the greatest magnitude of their block, and int8 rows.

nf4, fp4   W_k = table[code_k] · absmax_⌊k/blocksize⌋ over the flat weight, two codes a byte, the high nibble first. A
           nested absmax is table₂[code] · absmax₂ + offset, in blocks of its own. Blocks, shape and offset stand as
           JSON in the bytes of `quant_state.bitsandbytes__…` (Dettmers et al. 2023; bitsandbytes/functional.py)
int8       W_ij = code_ij · SCB_i · (1/127 in float32) (Dettmers et al. 2022)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.files.strict_json import parse_json
from deltamerge.formats.quantised.detect import MOST_STATE
from deltamerge.formats.quantised.packing import AGAIN, damaged, expect, floats
from deltamerge.formats.quantised.scaled import Part, table_part
from deltamerge.formats.quantised.weight import Floats, Stored, bits, fill_rows, put_rows, weight
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Read, TensorInfo

STATE = "quant_state.bitsandbytes__"
PER_127 = np.float32(7.874015718698502e-3)  # bitsandbytes' constant


@dataclass(frozen=True, slots=True)
class Nested:
    """Blocks' greatest magnitudes stored as codes of `table`, with blocks of their own."""

    scales: TensorInfo
    table: TensorInfo
    block: int
    offset: float


@dataclass(frozen=True, slots=True)
class Tabled:
    """Codes of four bits that `table` (16) turns into values, times their block's `scales`."""

    codes: TensorInfo
    scales: TensorInfo
    table: TensorInfo
    columns: int
    block: int
    nested: Nested | None

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        put_rows(self.columns, start, out, lambda top, bottom, values: self._rows(read, top, bottom, values))

    @property
    def is_plain(self) -> bool:
        """Whether the kernels can make numbers of its codes: blocks divide rows."""
        return self.columns % self.block == 0

    @property
    def bits(self) -> int:
        """The bits of an element in the file."""
        return 4

    def part(self, read: Read, start: int, stop: int) -> Part | None:
        """What the compiled loop needs for elements [start, stop); None: a scale there is 0; `fill` looks into it."""
        top, bottom, blocks = start // self.columns, -(-stop // self.columns), self.columns // self.block
        scales, table = self._scales(read, top * blocks, (bottom - top) * blocks), floats(read, self.table, 0, 16)
        shape = math.prod(self.scales.shape) // blocks, self.columns
        return table_part(shape, self.block, scales, top, table, swapped=True) if scales.all() else None

    def _rows(self, read: Read, top: int, bottom: int, out: Floats) -> None:
        begin, end = top * self.columns, bottom * self.columns
        first, last = begin // self.block, -(-end // self.block)
        table = floats(read, self.table, 0, 16)
        low = first * self.block // 2
        high = min(last * self.block // 2, self.codes.nbytes)
        stored = bits_as_bytes(read, self.codes, low, high)
        scales, skip, native = self._scales(read, first, last - first), begin - first * self.block, kernels.native()
        if native is not None and scales.all():
            flat = out.reshape(-1) if not skip else np.empty(skip + end - begin, np.float32)
            native.tabled(stored, scales, table, flat, self.block, True)
            if skip:
                out[:] = flat[skip:].reshape(out.shape)
            return
        pairs = np.stack([table[np.arange(256) >> 4], table[np.arange(256) & 15]], 1)
        values = np.zeros(((last - first) * self.block // 2, 2), np.float32)
        np.take(pairs, stored, axis=0, out=values[: len(stored)])
        values = values.reshape(last - first, self.block)
        if self.nested is None:
            greatest(scales, values, self.scales)
        values *= scales[:, None]
        out[:] = values.reshape(-1)[skip : skip + end - begin].reshape(out.shape)

    def _scales(self, read: Read, start: int, count: int) -> Floats:
        if self.nested is None:
            return floats(read, self.scales, start, count)
        nested = self.nested
        blocks = (start + np.arange(count)) // nested.block
        outer = floats(read, nested.scales, int(blocks[0]), int(blocks[-1] - blocks[0]) + 1)
        table = floats(read, nested.table, 0, 256)
        scales: Floats = table[bits(read, self.scales, start, count)] * outer[blocks - blocks[0]]
        scales += np.float32(nested.offset)
        return scales


@dataclass(frozen=True, slots=True)
class RowScaled:
    """int8 codes times their row's greatest magnitude / 127."""

    codes: TensorInfo
    scales: TensorInfo

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        fill_rows(self.codes.shape[1], start, out, lambda top, bottom: self._rows(read, top, bottom))

    def _rows(self, read: Read, top: int, bottom: int) -> Floats:
        columns = self.codes.shape[1]
        codes = bits(read, self.codes, top * columns, (bottom - top) * columns).view(np.int8)
        values = codes.reshape(-1, columns).astype(np.float32)
        scales = floats(read, self.scales, top, bottom - top)
        greatest(scales, values, self.scales)
        values *= scales[:, None]
        values *= PER_127
        return values


def greatest(scales: Floats, values: Floats, info: TensorInfo) -> None:
    """InputError: the greatest magnitude of a row of `values` is stored as 0, and the row is not."""
    if not scales.all() and values[scales == 0].any():
        raise damaged(info, "is 0 where the weight is not")


def bits_as_bytes(read: Read, info: TensorInfo, low: int, high: int) -> Any:
    """Bytes [low, high) of a tensor, whatever its dtype."""
    size = info.nbytes // max(1, math.prod(info.shape))
    first, last = low // size, -(-high // size)
    return bits(read, info, first, last - first).view(np.uint8)[low - first * size :][: high - low]


def decoded(stored: Stored) -> TensorInfo:
    """The weight that bitsandbytes stores. InputError: a format or shape that is not bitsandbytes'."""
    scales = stored.part(".SCB")
    return _int8(stored, scales) if scales is not None else _four_bits(stored)


def _int8(stored: Stored, scales: TensorInfo) -> TensorInfo:
    codes, layout = stored.codes, stored.part("weight_format")
    if len(codes.shape) != 2 or codes.dtype != "I8":
        raise InputError(f"its codes are {codes.dtype} {list(codes.shape)}, must be a matrix of I8")
    expect(scales, codes.shape[:1], {"F32"})
    if layout is not None and layout.path.exists():  # on the hub it is looked at when the file is there
        with Reader() as reader:
            code = int(bits(reader, expect(layout, (), {"U8"}), 0, 1)[0])
        if code:
            raise InputError(f"its weight_format is {code}, must be 0 (rows)")
    return weight(stored, codes.shape, RowScaled(codes, scales))


def _four_bits(stored: Stored) -> TensorInfo:
    state = stored.part(f"{STATE}nf4", f"{STATE}fp4")
    if state is None:
        raise InputError(f"its {STATE}… is missing", hint=AGAIN)
    said = _state(state)
    shape, block = said.get("shape"), said.get("blocksize")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"{state.name}: its shape is {str(shape)[:80]}")
    if type(block) is not int or block < 2 or block % 2:
        raise InputError(f"{state.name}: its blocksize is {str(block)[:40]}")
    size = math.prod(shape)
    blocks = -(-size // block)
    codes = stored.codes
    if codes.nbytes != -(-size // 2):
        raise InputError(f"its codes take {codes.nbytes:,} bytes, must be {-(-size // 2):,} for {shape}")
    table, scales = expect(stored.need(".quant_map"), (16,), {"F32"}), stored.need("weight.absmax", ".absmax")
    nested = None
    if stored.part(".nested_absmax") is not None:
        nested = _nested(stored, said, blocks)
        expect(scales, (blocks,), {"U8"})
    else:
        expect(scales, (blocks,), {"F32", "BF16", "F16"})
    return weight(stored, tuple(shape), Tabled(codes, scales, table, shape[-1], block, nested))


def _nested(stored: Stored, said: Mapping[str, Any], blocks: int) -> Nested:
    block, offset = said.get("nested_blocksize"), said.get("nested_offset")
    if type(block) is not int or block < 1 or not isinstance(offset, float | int) or not math.isfinite(offset):
        raise InputError(f"its nested_blocksize is {str(block)[:40]}, its nested_offset {str(offset)[:40]}")
    scales = expect(stored.need(".nested_absmax"), (-(-blocks // block),), {"F32"})
    table = expect(stored.need(".nested_quant_map"), (256,), {"F32"})
    return Nested(scales, table, block, float(offset))


def _state(info: TensorInfo) -> dict[str, Any]:
    """The JSON that a quant_state holds; its file must be there."""
    if info.dtype != "U8" or info.nbytes > MOST_STATE:
        raise InputError(f"{info.name}: is {info.dtype} of {info.nbytes:,} bytes")
    with Reader() as reader:
        raw = bits(reader, info, 0, info.nbytes).tobytes()
    with errors.context(info.name):
        return parse_json(raw)
