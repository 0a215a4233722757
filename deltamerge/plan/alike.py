"""Infinities and NaNs that all models hold alike: zero during the merge, put back afterwards.

∞ − ∞ is NaN, as are 0 · ∞ and a norm over ∞. Where a base and its fine-tunes agree, such values are no fault of the
merge, so they are kept out of its arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from deltamerge.formats.audit import NonFinite
from deltamerge.tensors.dtypes import bits_type
from deltamerge.tensors.tensor import Read, Tensor, view, viewed
from deltamerge.tensors.views import CHUNK, floats

Mask = NDArray[np.bool_]


@view()
def finite_part(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Take the first input, with zeros where all others hold the same infinity or NaN."""
    source, *models = tensor.inputs
    bits = np.frombuffer(out, bits_type(tensor.dtype))
    read.read_into(source, start, bits)
    bits[alike(read, models, start, len(bits))] = 0


@view()
def alike_places(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Mark by 1 where all inputs hold the same infinity or NaN, in uint8."""
    np.frombuffer(out, np.uint8)[:] = alike(read, tensor.inputs, start, len(out))


def finite(source: Tensor, models: Sequence[Tensor]) -> Tensor:
    """Return `source`, one of `models`, with zeros where all models hold the same infinity or NaN."""
    return viewed(finite_part, [source, *models], source.shape, source.dtype)


def places(models: Sequence[Tensor]) -> Tensor:
    """Return the tensor that marks where all models hold the same infinity or NaN."""
    return viewed(alike_places, models, models[0].shape, "U8")


def alike(read: Read, models: Sequence[Tensor], start: int, count: int) -> Mask:
    """Tell of `count` elements from `start` where all models hold the same float32 bits, and these are not finite."""
    first = floats(read, models[0], start, count)
    mask: Mask = ~np.isfinite(first)
    for info in models[1:] if mask.any() else ():
        mask &= floats(read, info, start, count).view(np.uint32) == first.view(np.uint32)
    return mask


def count_alike(read: Read, models: Sequence[Tensor]) -> NonFinite:
    """Return the number of NaNs, and of infinities, that all models hold alike."""
    nan = inf = 0
    size = math.prod(models[0].shape)
    for start in range(0, size, CHUNK):
        count = min(CHUNK, size - start)
        mask = alike(read, models, start, count)
        if mask.any():
            found = np.isnan(floats(read, models[0], start, count)[mask])
            nan, inf = nan + int(found.sum()), inf + int((~found).sum())
    return NonFinite(nan, inf)
