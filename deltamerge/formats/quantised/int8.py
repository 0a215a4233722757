"""int8 weights of compressed-tensors (int-quantized): W = (code − zero) · scale, scales and zeros on a grid.

`weight` has one code a byte, `weight_scale` the scales and `weight_zero_point` perhaps the zeros. bitsandbytes' int8
is another form (`bitsandbytes.py`).
"""

from __future__ import annotations

from deltamerge.errors import InputError
from deltamerge.formats.quantised.grid import channels
from deltamerge.formats.quantised.packed import GroupSettings, of_groups, one_by_one
from deltamerge.formats.quantised.scheme import OR_QUANTISE, Coding, Shape, StoredWeight
from deltamerge.tensors.tensor import TensorInfo


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight that codes of a byte store. InputError: another dtype, or companions that do not fit."""

    def one(group: GroupSettings) -> TensorInfo:
        if stored.codes.dtype != "I8":
            what = f"is stored as {stored.codes.dtype} beside scales, which is no form of it"
            raise InputError(what, hint=OR_QUANTISE)
        return one_by_one(stored, group)

    return of_groups(stored, one)


def write_rows(name: str, shape: Shape, scale: str) -> Coding:
    """Return the coding of a matrix with a scale a row."""
    return channels(name, shape, "I8", scale)
