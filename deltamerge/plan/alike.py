"""Infinities and NaNs that all models hold alike: zero during the merge, put back afterwards.

∞ − ∞ is NaN, as are 0 · ∞ and a norm over ∞. Where a base and its fine-tunes agree, such values are no fault of the
merge, so they are kept out of its arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from deltamerge.formats.audit import NonFinite
from deltamerge.tensors.computed import CHUNK, floats
from deltamerge.tensors.dtypes import bits_type
from deltamerge.tensors.tensor import Read, TensorInfo

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Finite:
    """`source`, one of `models`, with zeros where all models hold the same infinity or NaN."""

    source: TensorInfo
    models: tuple[TensorInfo, ...]

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        bits = np.frombuffer(out, bits_type(self.source.dtype))
        read.read_into(self.source, start, bits)
        bits[alike(read, self.models, start, len(bits))] = 0


@dataclass(frozen=True, slots=True)
class Places:
    """A uint8 tensor: 1 where all of `models` hold the same infinity or NaN, else 0."""

    models: tuple[TensorInfo, ...]

    def fill(self, read: Read, start: int, out: memoryview) -> None:
        np.frombuffer(out, np.uint8)[:] = alike(read, self.models, start, len(out))


def finite(source: TensorInfo, models: tuple[TensorInfo, ...]) -> TensorInfo:
    """`source` as a tensor with zeros where all models hold the same infinity or NaN."""
    return replace(source, begin=0, made=Finite(source, models))


def places(models: tuple[TensorInfo, ...]) -> TensorInfo:
    """The tensor that marks where all models hold the same infinity or NaN."""
    first = models[0]
    return replace(first, dtype="U8", begin=0, nbytes=math.prod(first.shape), made=Places(models))


def alike(read: Read, models: tuple[TensorInfo, ...], start: int, count: int) -> Mask:
    """A bool array of `count` elements from element `start`: all models hold the same float32 bits, and these are not
    finite."""
    first = floats(read, models[0], start, count)
    mask: Mask = ~np.isfinite(first)
    for info in models[1:] if mask.any() else ():
        mask &= floats(read, info, start, count).view(np.uint32) == first.view(np.uint32)
    return mask


def count_alike(read: Read, models: tuple[TensorInfo, ...]) -> NonFinite:
    """The number of NaNs, and of infinities, that all models hold alike."""
    nan = inf = 0
    size = math.prod(models[0].shape)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        mask = alike(read, models, start, count)
        if mask.any():
            found = np.isnan(floats(read, models[0], start, count)[mask])
            nan, inf = nan + int(found.sum()), inf + int((~found).sum())
    return NonFinite(nan, inf)
