"""MLX weights: codes of 2 to 8 bits packed into uint32 rows, lowest first, in groups of columns; float32 values.

affine          W = code · scale + bias of its group, the product rounded (`metal` of transformers is the same, with
                `qbiases`)
mxfp4, mxfp8    W = e2m1 or e4m3 code · 2^(scale − 127)
nvfp4           W = e2m1 code · scale, a float8_e4m3fn

`group_size`, `bits` and `mode` stand in config.json, for a layer of other settings under its name
(https://ml-explore.github.io/mlx, mlx.core.quantize).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.fp4 import exponents, values_of
from deltamerge.formats.quantised.packing import expect, finite, floats, unpack, whole
from deltamerge.formats.quantised.scaled import values_of as table_of
from deltamerge.formats.quantised.weight import Array, Floats, Stored, bits, fill_rows, weight
from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.tensor import Read, TensorInfo

WORD = 32
MODES = {"affine": (1, 2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}  # and their bits
FLOAT_GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


@dataclass(frozen=True, slots=True)
class Packed:
    """Codes of `width` bits with a scale, and an affine one's bias, for `group` columns."""

    codes: TensorInfo
    scales: TensorInfo
    biases: TensorInfo | None
    columns: int
    group: int
    width: int
    mode: str

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        fill_rows(self.columns, start, out, lambda top, bottom: self._rows(read, top, bottom))

    def _rows(self, read: Read, top: int, bottom: int) -> Floats:
        count, words, groups = bottom - top, self.codes.shape[-1], self.columns // self.group
        stored = bits(read, self.codes, top * words, count * words).view(np.uint8).reshape(count, -1)
        values = self._values(stored).reshape(count, groups, self.group)
        values *= self._scales(read, top * groups, count * groups).reshape(count, groups, 1)
        if self.biases is not None:
            values += floats(read, self.biases, top * groups, count * groups).reshape(count, groups, 1)
        return values.reshape(count, self.columns)

    def _values(self, stored: Array) -> Floats:
        if self.mode == "affine":
            return unpack(stored, self.width).astype(np.float32)
        return table_of("F8_E4M3")[stored] if self.mode == "mxfp8" else values_of(stored)

    def _scales(self, read: Read, start: int, count: int) -> Floats:
        if self.mode == "affine":
            return floats(read, self.scales, start, count)
        stored = bits(read, self.scales, start, count)
        return finite(table_of("F8_E4M3")[stored] if self.mode == "nvfp4" else exponents(stored), self.scales)


def decoded(stored: Stored) -> TensorInfo:
    """The weight that MLX stores. InputError: settings that MLX does not have, or shapes that they do not give."""
    codes, settings = stored.codes, layer_settings(stored.settings, stored.name)
    mode = settings.get("mode", "affine")
    width: Any = settings.get("bits")
    group: Any = settings.get("group_size")
    if mode not in MODES:
        raise InputError(f"its mode is {str(mode)[:40]!r}, must be {', '.join(MODES)}")
    if type(width) is not int or width not in MODES[mode] or not _fits(mode, group):
        raise InputError(f"config.json says {str(width)[:40]} bits and groups of {str(group)[:40]} for mode {mode}")
    if codes.dtype != "U32" or len(codes.shape) < 2:
        raise InputError(f"its codes are {codes.dtype} {list(codes.shape)}, must be a matrix of U32")
    columns = whole(codes.shape[-1] * WORD, width, f"words of {width} bits")
    shape = (*codes.shape[:-1], whole(columns, group, "groups"))
    biases = None
    if mode == "affine":
        scales = expect(stored.need(".scales"), shape, PLAIN)
        biases = expect(stored.need(".biases", ".qbiases"), shape, PLAIN)
    else:
        scales = expect(stored.need(".scales"), shape, {"U8"})
    made = Packed(codes, scales, biases, columns, group, width, mode)
    return weight(stored, (*codes.shape[:-1], columns), made)


def _fits(mode: str, group: Any) -> bool:
    return type(group) is int and group > 0 and FLOAT_GROUPS.get(mode, group) == group


def layer_settings(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The settings of the layer whose weight is `name`: its own, over those of the whole model."""
    own = settings.get(name.removesuffix(".weight"))
    return {**settings, **own} if isinstance(own, Mapping) else settings
