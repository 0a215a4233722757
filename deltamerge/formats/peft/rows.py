"""An embedding with the rows of `trainable_token_indices` replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.peft.config import CONFIG, tokens_of
from deltamerge.tensors.dtypes import PLAIN, bits_type
from deltamerge.tensors.dtypes import cast as cast_bits
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed


@view(entrywise=True)
def replaced_rows(read: Read, tensor: Tensor, start: int, out: memoryview, *, places: tuple[int, ...]) -> None:
    """Replace the rows `places` of the first input by those of the second, in the first's dtype."""
    base, values = tensor.inputs
    target = np.frombuffer(out, bits_type(tensor.dtype))
    read.read_into(base, start, out)
    width, stop = math.prod(tensor.shape[1:]), start + len(target)
    for row, place in enumerate(places):
        low, high = max(start, place * width), min(stop, (place + 1) * width)
        if low < high:
            raw = np.empty(high - low, bits_type(values.dtype))
            read.read_into(values, row * width + low - place * width, raw)
            target[low - start : high - start] = cast_bits(raw, values.dtype, tensor.dtype)


def with_rows(info: TensorInfo, module: str, values: TensorInfo, config: Mapping[str, Any]) -> TensorInfo:
    """Return an embedding with its rows replaced. InputError: no ids for it, or another shape."""
    ids = next((ids for end, ids in tokens_of(config).items() if not end or f".{module}".endswith(f".{end}")), None)
    if ids is None:
        raise InputError(f"{CONFIG} has no trainable_token_indices for it", hint="download the adapter again")
    if values.shape != (len(ids), *info.shape[1:]) or max(ids, default=0) >= info.shape[0]:
        message = f"{len(ids)} rows {list(values.shape)} do not fit the base's {list(info.shape)}"
        raise InputError(message, hint="give the base added tokens first: resize_token_embeddings()")
    if info.dtype not in PLAIN:
        raise InputError(f"the base's weight is {info.dtype}", hint="adapters are merged into unquantised weights")
    return replace(info, tensor=viewed(replaced_rows, [info, values], info.shape, info.dtype, places=tuple(ids)))
