"""MLX weights: codes of 2 to 8 bits packed into uint32 rows, lowest first, in groups of columns; float32 values.

affine          W = code · scale + bias of its group, the product rounded (`metal` of transformers is the same, with
                `qbiases`)
mxfp4, mxfp8    W = e2m1 or e4m3 code · 2^(scale − 127)
nvfp4           W = e2m1 code · scale, a float8_e4m3fn

`group_size`, `bits` and `mode` stand in config.json, for a layer of other settings under its name
(https://ml-explore.github.io/mlx, mlx.core.quantize).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import (
    CodedParts,
    Coding,
    ScaleChoice,
    by_rows,
    code_grid,
    extremes,
    float32,
    shares_of,
)
from deltamerge.formats.quantised.codes import WORD, Floats, Integers, Shape, packed, scales_in
from deltamerge.formats.quantised.mxfp4 import Mxfp4
from deltamerge.formats.quantised.nvfp4 import Nvfp4
from deltamerge.formats.quantised.scheme import Scaled, StoredWeight, expect, grid, weight, whole
from deltamerge.tensors.dtypes import PLAIN, narrow, widen
from deltamerge.tensors.tensor import Read, TensorInfo

MODES = {"affine": (1, 2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}  # and their bits
FLOAT_GROUPS = {"mxfp4": 32, "mxfp8": 32, "nvfp4": 16}


class Affine(Scaled):
    """Codes with a scale and a bias for some columns."""

    __slots__ = ()

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        assert self.biases is not None
        if self.biases.dtype != self.scales.dtype:
            raise InputError(f"has biases of {self.biases.dtype} beside scales of {self.scales.dtype}")
        coder = AffineCoder(self.width, self.grid.n, self.scales.dtype)
        return by_rows(shape, coder, self.codes, self.scales, self.biases)


@dataclass(frozen=True, slots=True)
class AffineCoder:
    """Writes codes of `width` bits in words, with a scale and a bias for `group` columns."""

    width: int
    group: int
    scale: str

    def encode(self, values: Floats, read: Read) -> CodedParts:
        numbers = Integers(self.width, signed=False)
        made = code_grid(values, numbers, (1, self.group), self._choices)
        assert made.biases is not None
        return CodedParts((packed(made.codes, numbers, "words"), made.scales, made.biases), made.lost)

    def _choices(self, blocks: Floats) -> Iterator[ScaleChoice]:
        low, high = extremes(blocks)
        steps = np.float32(2**self.width - 1)
        for share in shares_of(Integers(self.width)) if self.width < 8 else (1.0,):
            cut = np.float32((1 - share) / 2)
            span = high - low
            stored, scales = scales_in(float32(span * np.float32(share) / steps), self.scale)
            bias = narrow(np.ascontiguousarray(float32(low + span * cut)), self.scale)
            yield ScaleChoice(scales, stored, None, (float32(widen(bias, self.scale)), bias))


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight that MLX stores. InputError: settings that MLX does not have, or shapes they do not give."""
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
    blocks = (*codes.shape[:-1], whole(columns, group, "groups"))
    shape = (*codes.shape[:-1], columns)
    scales = expect(stored.need(".scales"), blocks, PLAIN if mode == "affine" else {"U8"})
    laid = grid(shape, blocks, (1, group))
    if mode == "affine":
        biases = expect(stored.need(".biases", ".qbiases"), blocks, PLAIN)
        made = Affine(codes, scales, None, None, columns, laid, "unsigned", width, biases=biases)
        return weight(stored, shape, made)
    if mode == "mxfp8":
        return weight(stored, shape, Scaled(codes, scales, None, None, columns, laid, "F8_E4M3"))
    return weight(stored, shape, (Mxfp4 if mode == "mxfp4" else Nvfp4)(codes, scales, columns))


def _fits(mode: str, group: Any) -> bool:
    return type(group) is int and group > 0 and FLOAT_GROUPS.get(mode, group) == group


def layer_settings(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the settings of the layer with the weight `name`: its own settings override the whole model's."""
    own = settings.get(name.removesuffix(".weight"))
    return {**settings, **own} if isinstance(own, Mapping) else settings
