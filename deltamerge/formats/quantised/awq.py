"""AWQ weights: W_oi = scale_go · (code_io − zero_go), g = ⌊i / group⌋, in float32.

Codes of four bits lie transposed, as (inputs, outputs), in int32 words of eight outputs: output
(0, 2, 4, 6, 1, 3, 5, 7)_k of a word is in bits [4 k, 4 k + 4). So are zeros. (`version: gemm`; Lin et al. 2023;
AutoAWQ, utils/packing_utils.py)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import Coding, as_one
from deltamerge.formats.quantised.codes import AWQ_PLACES, WORD, Array, Floats, Part, Shape, pack_words, unpack_awq
from deltamerge.formats.quantised.gptq import INTEGERS, TurnedCoder, TurnedWords, matrix
from deltamerge.formats.quantised.scheme import StoredWeight, columns_of, expect, weight, whole
from deltamerge.tensors.dtypes import PLAIN
from deltamerge.tensors.tensor import Read, TensorInfo

BITS = 4


@dataclass(frozen=True, slots=True)
class Awq(TurnedWords):
    """Codes of four bits packed along outputs, `group` inputs a group."""

    align: ClassVar[int] = 8
    across: ClassVar[int] = 8
    codes: Part
    zeros: Part
    scales: Part
    inputs: int
    group: int
    width: int = BITS
    plus: int = 0

    def groups(self, read: Read) -> None:
        return None

    def zeros_at(self, read: Read, top: int, bottom: int) -> Floats:
        rows, words = self.zeros.shape
        first = top // 8
        zeros = unpack_awq(columns_of(read, self.zeros, rows, words, first, -(-bottom // 8)))
        return np.ascontiguousarray(zeros[:, top - first * 8 : bottom - first * 8].T, np.float32)

    def coding(self, shape: Shape, settings: Mapping[str, Any]) -> Coding:
        return as_one(shape, TurnedCoder(self, sym=False), self.codes, self.scales, self.zeros)

    def pack(self, codes: Array) -> Array:
        return self.pack_zeros(codes.T)

    def pack_zeros(self, zeros: Array) -> Array:
        groups = zeros.reshape(len(zeros), -1, 8)
        placed = np.empty_like(groups)
        placed[:, :, AWQ_PLACES] = groups
        return pack_words(placed.reshape(zeros.shape), BITS)


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight (outputs, inputs) of an AWQ layer. InputError: a version, width or shape that is not AWQ's."""
    settings = stored.settings
    version = str(settings.get("version") or settings.get("format") or "gemm").lower()
    if version != "gemm":
        raise InputError(f"its version is {version[:40]!r}, must be gemm")
    said = settings.get("bits", settings.get("w_bit", BITS))
    if said != BITS:
        raise InputError(f"its codes are of {str(said)[:40]} bits, must be {BITS}")
    codes, scales = matrix(stored.codes, INTEGERS), matrix(stored.need("scales"), PLAIN)
    groups, outputs = scales.shape
    words = whole(outputs * BITS, WORD, "words")
    group = whole(codes.shape[0], groups, "groups")
    expect(codes, (codes.shape[0], words), INTEGERS)
    zeros = expect(stored.need("qzeros"), (groups, words), INTEGERS)
    return weight(stored, (outputs, codes.shape[0]), Awq(codes, zeros, scales, codes.shape[0], group))
