"""bitsandbytes weights: codes of a table (nf4, fp4) with the greatest magnitude of their block, and int8 rows.

nf4, fp4   W_k = table[code_k] · absmax_⌊k/blocksize⌋ over the flat weight, two codes a byte, the high nibble first. A
           nested absmax is table₂[code] · absmax₂ + offset, in blocks of its own. Blocks, shape and offset stand as
           JSON in the bytes of `quant_state.bitsandbytes__…` (Dettmers et al. 2023; bitsandbytes/functional.py)
int8       W_ij = code_ij · SCB_i · (1/127 in float32) (Dettmers et al. 2022)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.files.strict_json import parse_json
from deltamerge.formats.quantised.coder import (
    CHUNK,
    CodedParts,
    Coding,
    ScaleChoice,
    as_one,
    best,
    by_rows,
    flat_of,
    float32,
)
from deltamerge.formats.quantised.codes import Floats, Integers, Part, Shape, Table, scales_in
from deltamerge.formats.quantised.detect import MOST_STATE
from deltamerge.formats.quantised.scheme import AGAIN, Scaled, StoredWeight, Tabled, bits, expect, floats, grid, weight
from deltamerge.tensors.dtypes import Array
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Read, TensorInfo

STATE = "quant_state.bitsandbytes__"
PER_127 = np.float32(7.874015718698502e-3)  # bitsandbytes' constant


@dataclass(frozen=True, slots=True)
class FourBits(Tabled):
    """Codes that `table` (16) turns into values, times the greatest magnitude of their block.

    Nested magnitudes are codes of `outer_table` (256), times the magnitude of their block of `outer_group`, plus
    `offset`.
    """

    swapped: ClassVar[bool] = True
    codes: Part
    scales: Part
    table: Part
    outer: Part | None
    outer_table: Part | None
    columns: int
    group: int
    outer_group: int = 1
    offset: float = 0.0

    @property
    def refuses_zero(self) -> bool:
        return self.outer is None

    def table_of(self, read: Read) -> Floats:
        return floats(read, self.table, 0, 16)

    def scales_at(self, read: Read, start: int, count: int) -> Floats:
        if self.outer is None or self.outer_table is None:
            return floats(read, self.scales, start, count)
        blocks = (start + np.arange(count)) // self.outer_group
        outer = floats(read, self.outer, int(blocks[0]), int(blocks[-1] - blocks[0]) + 1)
        table = floats(read, self.outer_table, 0, 256)
        scales: Floats = table[bits(read, self.scales, start, count)] * outer[blocks - blocks[0]]
        scales += np.float32(self.offset)
        return scales

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        """Code the weight as a whole: blocks go on from row to row."""
        outer = () if self.outer is None else (self.outer,)
        return as_one(shape, TableCoder(self), self.codes, self.scales, *outer)


@dataclass(frozen=True, slots=True)
class TableCoder:
    """Writes the nearest numbers of the table of `like`, times the greatest magnitude of a block.

    Nested magnitudes keep the table and offset that they have there.
    """

    like: FourBits

    def encode(self, values: Floats, read: Read) -> CodedParts:
        like = self.like
        numbers = Table(tuple(like.table_of(read).tolist()))
        flat, block = values.reshape(-1), like.group
        count = -(-len(flat) // block)
        most = np.concatenate([np.abs(part).max(axis=1) for _, part in _parts(flat, block)])
        if like.outer_table is None:
            stored, scales = scales_in(most, like.scales.dtype)
            arrays: tuple[Array, ...] = (stored,)
        else:
            scales, arrays = _nested(most, floats(read, like.outer_table, 0, 256), like.outer_group, like.offset)
        codes = np.empty((count, block), np.uint8)
        lost = 0.0
        for top, part in _parts(flat, block):
            own = scales[top : top + len(part), None]
            found = numbers.codes(float32(part / np.where(own > 0, own, np.float32(1))))
            back = numbers.values(found) * own
            back -= part
            codes[top : top + len(part)] = found
            lost += float(np.einsum("ab,ab->", back, back, dtype=np.float64, casting="safe"))
        line = codes.reshape(-1)[: len(flat) + len(flat) % 2]
        return CodedParts((line[0::2] << np.uint8(4) | line[1::2], *arrays), lost)


def _parts(flat: Floats, block: int) -> Iterator[tuple[int, Floats]]:
    """Yield blocks (n, block) of a flat weight that together stay in cache, and the number of the first.

    The last is filled with zeros.
    """
    step = max(1, CHUNK // block) * block
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        yield start // block, np.pad(part, (0, -len(part) % block)).reshape(-1, block)


def _nested(most: Floats, numbers: Floats, group: int, plus: float) -> tuple[Floats, tuple[Array, Array]]:
    """Return the magnitudes of blocks as they are read back, and as codes of a table with magnitudes of their own."""
    table, offset = Table(tuple(numbers.tolist())), np.float32(plus)
    rest = np.pad(most - offset, (0, -len(most) % group)).reshape(-1, group)
    rest.reshape(-1)[len(most) :] = 0
    outer = np.abs(rest).max(axis=1)
    codes = table.codes(float32(rest / np.where(outer > 0, outer, np.float32(1))[:, None]))
    back = table.values(codes) * outer[:, None]
    back += offset
    return float32(back.reshape(-1)[: len(most)]), (codes.reshape(-1)[: len(most)], outer)


class Int8Rows(Scaled):
    """int8 codes times their row's greatest magnitude / 127."""

    __slots__ = ()

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        return by_rows(shape, Int8RowCoder(), self.codes, self.scales)


@dataclass(frozen=True, slots=True)
class Int8RowCoder:
    """Writes codes times the greatest magnitude of their row / 127."""

    def encode(self, values: Floats, read: Read) -> CodedParts:
        most = np.abs(values).max(axis=1)
        scales = np.where(most > 0, most, np.float32(1)) * PER_127
        found = best(values[:, None, None, :], Integers(), [ScaleChoice(scales[:, None], most[:, None])])
        return CodedParts((flat_of(found.codes), float32(most)), float(found.lost.sum()))


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight that bitsandbytes stores. InputError: a format or shape that is not bitsandbytes'."""
    scales = stored.part(".SCB")
    return _read_int8(stored, scales) if scales is not None else _read_four_bits(stored)


def _read_int8(stored: StoredWeight, scales: TensorInfo) -> TensorInfo:
    codes, layout = stored.codes, stored.part("weight_format")
    if len(codes.shape) != 2 or codes.dtype != "I8":
        raise InputError(f"its codes are {codes.dtype} {list(codes.shape)}, must be a matrix of I8")
    expect(scales, codes.shape[:1], {"F32"})
    if layout is not None and layout.path.exists():  # on the hub it is looked at when the file is there
        with Reader() as reader:
            code = int(bits(reader, expect(layout, (), {"U8"}), 0, 1)[0])
        if code:
            raise InputError(f"its weight_format is {code}, must be 0 (rows)")
    laid = grid(codes.shape, scales.shape)
    made = Int8Rows(codes, scales, None, None, codes.shape[1], laid, "I8", factor=float(PER_127))
    return weight(stored, codes.shape, made)


def _read_four_bits(stored: StoredWeight) -> TensorInfo:
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
    if stored.part(".nested_absmax") is None:
        expect(scales, (blocks,), {"F32", "BF16", "F16"})
        return weight(stored, tuple(shape), FourBits(codes, scales, table, None, None, shape[-1], block))
    group, offset = said.get("nested_blocksize"), said.get("nested_offset")
    if type(group) is not int or group < 1 or not isinstance(offset, float | int) or not math.isfinite(offset):
        raise InputError(f"its nested_blocksize is {str(group)[:40]}, its nested_offset {str(offset)[:40]}")
    outer = expect(stored.need(".nested_absmax"), (-(-blocks // group),), {"F32"})
    numbers = expect(stored.need(".nested_quant_map"), (256,), {"F32"})
    expect(scales, (blocks,), {"U8"})
    made = FourBits(codes, scales, table, outer, numbers, shape[-1], block, group, float(offset))
    return weight(stored, tuple(shape), made)


def _state(info: TensorInfo) -> dict[str, Any]:
    """Return the JSON that a quant_state holds; its file must be there."""
    if info.dtype != "U8" or info.nbytes > MOST_STATE:
        raise InputError(f"{info.name}: is {info.dtype} of {info.nbytes:,} bytes")
    with Reader() as reader:
        raw = bits(reader, info, 0, info.nbytes).tobytes()
    with errors.context(info.name):
        return parse_json(raw)
