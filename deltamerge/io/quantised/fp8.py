"""FP8 weights with a scale a block, as DeepSeek-V3 and Qwen3-FP8 store them.

W_ij = code_ij · scale_⌊i/m⌋⌊j/n⌋ in float32: codes (…, rows, columns) are float8_e4m3fn or e5m2, scales (…, ⌈rows/m⌉,
⌈columns/n⌉) are floats or E8M0, `weight_block_size` is [m, n] (transformers, integrations/finegrained_fp8.py). Without
blocks: one scale for the tensor, or one a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.io.dtypes import PLAIN, widen
from deltamerge.io.quantised.weight import Array, Floats, Stored, bits, fill_rows, row_bits, weight
from deltamerge.io.tensor import Read, TensorInfo


@dataclass(frozen=True, slots=True)
class BlockScaled:
    """Float8 codes times the scale of their block of `block` = (m, n) rows and columns."""

    codes: TensorInfo
    scales: TensorInfo
    block: tuple[int, int]

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        fill_rows(self.codes.shape[-1], start, out, lambda top, bottom: self._rows(read, top, bottom))

    def _rows(self, read: Read, top: int, bottom: int) -> Floats:
        codes = row_bits(read, self.codes, top, bottom)
        values = values_of(self.codes.dtype)[codes]
        height, width = self.codes.shape[-2], self.codes.shape[-1]
        m, n = self.block
        down, across = -(-height // m), -(-width // n)
        numbers = np.arange(top, bottom)
        blocks = numbers // height * down + numbers % height // m  # the row of scales of each row
        first, last = int(blocks[0]), int(blocks[-1]) + 1
        stored = bits(read, self.scales, first * across, (last - first) * across)
        scales = scales_of(stored, self.scales.dtype).reshape(-1, across)
        values *= np.repeat(scales, n, axis=1)[:, :width][blocks - first]
        return values


def decoded(stored: Stored) -> TensorInfo:
    """The weight that float8 codes and their `_scale_inv` (or `_scale`) store."""
    codes, scales = stored.codes, stored.need("_scale_inv", "_scale")
    block = _block(stored.settings, codes.shape, scales.shape)
    if scales.dtype not in PLAIN | {"F8_E8M0"}:
        raise InputError(f"{scales.name}: {scales.dtype} is no dtype of scales")
    return weight(stored, codes.shape, BlockScaled(codes, scales, block))


def _block(settings: Any, shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
    """The rows and columns that share a scale. InputError: they do not give `scales`, the scales' shape."""
    said = settings.get("weight_block_size")
    height, width = shape[-2], shape[-1]
    if math.prod(scales) == 1:
        return height, width
    blocks = (said[0], said[1]) if said else (1, width)
    expected = (*shape[:-2], -(-height // blocks[0]), -(-width // blocks[1]))
    if scales != expected:
        raise InputError(f"its scales have the shape {list(scales)}, must be {list(expected)}")
    return blocks


@cache
def values_of(dtype: str) -> Floats:
    """The float32 value of each of the 256 codes of a float8 dtype."""
    exponent, mantissa, bias = {"F8_E4M3": (4, 3, 7), "F8_E5M2": (5, 2, 15)}[dtype]
    codes = np.arange(256)
    power, fraction = codes >> mantissa & (1 << exponent) - 1, (codes & (1 << mantissa) - 1) / (1 << mantissa)
    values = np.where(power == 0, np.ldexp(fraction, 1 - bias), np.ldexp(1 + fraction, power - bias))
    if dtype == "F8_E4M3":
        values[codes & 0x7F == 0x7F] = np.nan
    else:
        values[codes & 0x7F == 0x7C] = np.inf
        values[codes & 0x7F > 0x7C] = np.nan
    values = np.where(codes & 0x80, -values, values).astype(np.float32)
    values.flags.writeable = False
    return values


def scales_of(stored: Array, dtype: str) -> Floats:
    """Scales in float32: floats, or exponents (2^(code − 127); 255 is NaN)."""
    if dtype != "F8_E8M0":
        return widen(stored, dtype)
    exponents = np.ldexp(np.float32(1), stored.astype(np.int32) - 127)
    return np.where(stored == 255, np.float32(np.nan), exponents).astype(np.float32)
