"""Coders of schemes with forms of their own: NVFP4, MLX, GPTQ, AWQ, bitsandbytes; the mirrors of their decoders."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.blockwise import PER_127, Nested, Tabled
from deltamerge.formats.quantised.coder import (
    SHARES,
    BlockCoder,
    Choice,
    Coded,
    best,
    blocks_of,
    chunks,
    extremes,
    flat_of,
    float32,
    pack_words,
    packed,
    shares_of,
)
from deltamerge.formats.quantised.columnwise import AWQ_PLACES, Awq, Gptq
from deltamerge.formats.quantised.numbers import E2M1, E4M3, Integers, Table, scales_in
from deltamerge.formats.quantised.packing import floats
from deltamerge.formats.quantised.weight import CHUNK, Array, Floats
from deltamerge.tensors.dtypes import bits_type, narrow, widen
from deltamerge.tensors.tensor import Read

WHOLE_RANGE = np.float32(E2M1.largest * E4M3.largest)


@dataclass(frozen=True, slots=True)
class TwoLevel:
    """NVFP4: E2M1 codes, an E4M3 scale for `group` columns, and one float32 for the whole weight, by which scales are
    multiplied, or divided (`over`); `single`: without it.

    The global scale is max |x| / (6 · 448), with which no scale is out of range.
    """

    group: int
    apply: Literal["times", "over", "single"]

    def encode(self, values: Floats, read: Read) -> Coded:
        rows, columns = values.shape
        most = np.float32(max(float(values.max()), -float(values.min())))
        factor = np.float32(1)
        if self.apply != "single" and most > 0:
            factor = most / WHOLE_RANGE if self.apply == "times" else WHOLE_RANGE / most
            factor = factor if np.isfinite(factor) and factor > 0 else np.float32(1)
        codes = np.empty((rows, columns), np.uint8)
        scales = np.empty((rows, columns // self.group), np.uint8)
        lost = 0.0
        for top, bottom, left, right in chunks(rows, columns, 1, self.group):
            blocks = blocks_of(values[top:bottom, left:right], 1, self.group)
            found = best(blocks, E2M1, self._choices(blocks, factor))
            codes[top:bottom, left:right] = flat_of(found.codes)
            scales[top:bottom, left // self.group : right // self.group] = found.scales
            lost += float(found.lost.sum())
        whole = () if self.apply == "single" else (np.full(1, factor, np.float32),)
        return Coded((packed(codes, E2M1, "nibbles"), scales, *whole), lost)

    def _choices(self, blocks: Floats, factor: np.float32) -> Iterator[Choice]:
        most = np.abs(blocks).max(axis=(1, 3)) / np.float32(E2M1.largest)
        exact = most * factor if self.apply == "over" else most / factor
        for share in SHARES:
            stored = np.maximum(E4M3.codes(float32(exact * np.float32(share))), np.uint8(1))
            scales = E4M3.values(stored)
            yield Choice(scales / factor if self.apply == "over" else scales * factor, stored)


@dataclass(frozen=True, slots=True)
class Affine:
    """MLX: codes of `width` bits in words, with a scale and a bias for `group` columns, W = code · scale + bias."""

    width: int
    group: int
    scale: str

    def encode(self, values: Floats, read: Read) -> Coded:
        rows, columns = values.shape
        numbers = Integers(self.width, signed=False)
        codes = np.empty((rows, columns), np.uint8)
        made: list[list[Array]] = []
        lost = 0.0
        for top, bottom, left, right in chunks(rows, columns, 1, self.group):
            if left == 0:
                made.append([np.empty((bottom - top, columns // self.group), bits_type(self.scale)) for _ in "sb"])
            blocks = blocks_of(values[top:bottom, left:right], 1, self.group)
            found = best(blocks, numbers, self._choices(blocks))
            codes[top:bottom, left:right] = flat_of(found.codes)
            for into, stored in zip(made[-1], (found.scales, found.biases), strict=True):
                into[:, left // self.group : right // self.group] = stored
            lost += float(found.lost.sum())
        scales, biases = (np.concatenate(parts) for parts in zip(*made, strict=True))
        return Coded((packed(codes, numbers, "words"), scales, biases), lost)

    def _choices(self, blocks: Floats) -> Iterator[Choice]:
        low, high = extremes(blocks)
        steps = np.float32(2**self.width - 1)
        for share in shares_of(Integers(self.width)) if self.width < 8 else (1.0,):
            cut = np.float32((1 - share) / 2)
            span = high - low
            stored, scales = scales_in(float32(span * np.float32(share) / steps), self.scale)
            bias = narrow(np.ascontiguousarray(float32(low + span * cut)), self.scale)
            yield Choice(scales, stored, None, (float32(widen(bias, self.scale)), bias))


@dataclass(frozen=True, slots=True)
class GptqCoder:
    """GPTQ: codes, zeros and scales of a whole weight, its inputs in the groups that `like` has them in.

    With `sym` all zeros are the middle of the range. No zero is 0 where zero − 1 is stored.
    """

    like: Gptq
    sym: bool

    def encode(self, values: Floats, read: Read) -> Coded:
        like = self.like
        groups = like.groups(read)
        order = np.arange(like.inputs) // like.group if groups is None else groups
        sizes = np.bincount(order, minlength=like.scales.shape[0])
        if len(set(sizes.tolist())) != 1:
            raise InputError(f"{like.codes.name}: its groups differ in size, and cannot be written")
        sorted_by = np.argsort(order, kind="stable")
        coder = _integers(like.width, int(sizes[0]), like.scales.dtype, sym=self.sym, least_zero=like.plus)
        outputs, inputs = values.shape
        step = max(32, CHUNK // inputs // 32 * 32)
        codes = np.empty((inputs * like.width // 32, outputs), np.int32)
        scales = np.empty((len(sizes), outputs), bits_type(like.scales.dtype))
        zeros = np.full((len(sizes), outputs), 1 << like.width - 1, np.int16)
        lost = 0.0
        for top in range(0, outputs, step):
            rows = np.ascontiguousarray(values[top : top + step])
            found, stored, shifts, less = coder.whole(np.ascontiguousarray(rows[:, sorted_by]))
            if self.sym:
                found = found + np.uint8(1 << like.width - 1) & np.uint8((1 << like.width) - 1)
            unsorted = np.empty_like(found)
            unsorted[:, sorted_by] = found
            at = slice(top, top + len(rows))
            codes[:, at] = pack_words(unsorted, like.width).T
            scales[:, at] = stored.T
            if shifts is not None:
                zeros[:, at] = shifts.T.view(np.uint8)
            lost += less
        return Coded((codes, scales, pack_words(zeros - like.plus, like.width)), lost)


@dataclass(frozen=True, slots=True)
class AwqCoder:
    """AWQ: codes, zeros and scales of a whole weight."""

    like: Awq

    def encode(self, values: Floats, read: Read) -> Coded:
        like = self.like
        outputs, inputs = values.shape
        coder = _integers(4, like.group, like.scales.dtype, sym=False)
        codes = np.empty((inputs, outputs // 8), np.int32)
        scales = np.empty((inputs // like.group, outputs), bits_type(like.scales.dtype))
        zeros = np.empty((inputs // like.group, outputs // 8), np.int32)
        lost = 0.0
        step = max(8, CHUNK // inputs // 8 * 8)
        for top in range(0, outputs, step):
            rows = np.ascontiguousarray(values[top : top + step])
            found, stored, shifts, less = coder.whole(rows)
            assert shifts is not None
            at, words = slice(top, top + len(rows)), slice(top // 8, (top + len(rows)) // 8)
            codes[:, words] = _interleaved(found.T)
            scales[:, at] = stored.T
            zeros[:, words] = _interleaved(shifts.view(np.uint8).T)
            lost += less
        return Coded((codes, scales, zeros), lost)


@dataclass(frozen=True, slots=True)
class TableCoder:
    """bitsandbytes nf4 and fp4: the nearest numbers of the table of `like`, times the greatest magnitude of a block;
    nested magnitudes keep the table and offset that they have there."""

    like: Tabled

    def encode(self, values: Floats, read: Read) -> Coded:
        like = self.like
        numbers = Table(tuple(floats(read, like.table, 0, 16).tolist()))
        flat, block = values.reshape(-1), like.block
        count = -(-len(flat) // block)
        most = np.concatenate([np.abs(part).max(axis=1) for _, part in _parts(flat, block)])
        if like.nested is None:
            stored, scales = scales_in(most, like.scales.dtype)
            arrays: tuple[Array, ...] = (stored,)
        else:
            scales, arrays = _nested(most, like.nested, read)
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
        return Coded((line[0::2] << np.uint8(4) | line[1::2], *arrays), lost)


def _parts(flat: Floats, block: int) -> Iterator[tuple[int, Floats]]:
    """Blocks (n, block) of a flat weight that together stay in cache, and the number of the first; zeros at the end."""
    step = max(1, CHUNK // block) * block
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        yield start // block, np.pad(part, (0, -len(part) % block)).reshape(-1, block)


@dataclass(frozen=True, slots=True)
class RowCoder:
    """bitsandbytes int8: codes times the greatest magnitude of their row / 127."""

    def encode(self, values: Floats, read: Read) -> Coded:
        most = np.abs(values).max(axis=1)
        scales = np.where(most > 0, most, np.float32(1)) * PER_127
        found = best(values[:, None, None, :], Integers(8), [Choice(scales[:, None], most[:, None])])
        return Coded((flat_of(found.codes), float32(most)), float(found.lost.sum()))


def _nested(most: Floats, nested: Nested, read: Read) -> tuple[Floats, tuple[Array, Array]]:
    """The magnitudes of blocks as they are read back, and as codes of a table with magnitudes of their own."""
    table = Table(tuple(floats(read, nested.table, 0, 256).tolist()))
    offset = np.float32(nested.offset)
    rest = np.pad(most - offset, (0, -len(most) % nested.block)).reshape(-1, nested.block)
    rest.reshape(-1)[len(most) :] = 0
    outer = np.abs(rest).max(axis=1)
    codes = table.codes(float32(rest / np.where(outer > 0, outer, np.float32(1))[:, None]))
    back = table.values(codes) * outer[:, None]
    back += offset
    return float32(back.reshape(-1)[: len(most)]), (codes.reshape(-1)[: len(most)], outer)


def _integers(width: int, group: int, scale: str, *, sym: bool, least_zero: int = 0) -> BlockCoder:
    numbers = Integers(width, signed=sym)
    zeros: Literal["words"] | None = None if sym else "words"
    return BlockCoder(numbers, (1, group), scale, zeros, search=width < 8, least_zero=least_zero)


def _interleaved(codes: Array) -> Array:
    """Codes (rows, 8 n) of four bits in words of eight, in AWQ's order."""
    groups = codes.reshape(len(codes), -1, 8)
    placed = np.empty_like(groups)
    placed[:, :, AWQ_PLACES] = groups
    return pack_words(placed.reshape(codes.shape), 4)
