"""What a delta makes of one tensor in memory: computed and checked first, written after, and undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.delta.entry import Entry
from deltamerge.formats.delta.positions import Array
from deltamerge.models.delta_file import bits_of, to_torch
from deltamerge.tensors.lazy import torch

DENSE = 8  # above one entry in so many the whole tensor is held, not positions and values
INT32 = 1 << 31


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the tensor under a `key` of a state.

    It is `values` (bits) at positions, or everywhere (None), or the tensor `whole`.
    """

    key: str
    where: Array | None
    values: Array
    whole: Any = None


def change_of(entry: Entry, key: str, tensor: Any) -> Change | None:
    """Return the change that an entry of the same dtype and shape makes of a `tensor`, which stands under `key`.

    It is computed and checked tile by tile. None: there is no change. InputError: the delta is damaged, or of another
    base.
    """
    old = bits_of(tensor)
    made: Array | None = None
    where: list[Array] = []
    values: list[Array] = []
    done = count = 0
    for bits in entry.tiles(lambda start, stop: old[start:stop]):
        end = done + bits.size
        if made is not None:
            made[done:end] = bits
        else:
            positions = np.flatnonzero(bits != old[done:end])
            count += positions.size
            where.append(positions + done)
            values.append(bits[positions])
            if count * DENSE > entry.size:
                made = old.copy()
                made[np.concatenate(where)] = np.concatenate(values)
        done = end
    if made is not None:
        return Change(key, None, made)
    return Change(key, np.concatenate(where), np.concatenate(values)) if count else None


def whole_of(entry: Entry, tensor: Any) -> Change:
    """Return the tensor that an entry makes of a `tensor`, on its device. None for `tensor`: the base has none.

    InputError: as `change_of`.
    """
    old = None if tensor is None else bits_of(tensor)
    made = entry.whole(None if old is None else lambda start, stop: old[start:stop])
    whole = to_torch(made, entry.record.dtype).reshape(tuple(entry.record.shape))
    return Change(entry.name, None, made, whole if tensor is None else whole.to(tensor.device))


@dataclass(frozen=True, slots=True)
class Write:
    """Integers `values`, of a tensor's bits, at positions `where` of its memory `line`; None: at all of the tensor."""

    line: Any
    where: Any
    values: Any

    def put(self) -> None:
        if self.where is None:
            self.line.copy_(self.values)
        else:
            self.line[self.where] = self.values

    def kept(self) -> Write:
        """Return the write that undoes this one."""
        return Write(self.line, self.where, self.line.clone() if self.where is None else self.line[self.where])


def write_of(change: Change, tensor: Any) -> Write:
    """Return the write of a change into its tensor. InputError: it cannot be written at single positions."""
    dtype = f"I{8 * tensor.element_size()}"
    values = to_torch(change.values, dtype).to(tensor.device)
    if change.where is None:
        return Write(tensor.detach().view(values.dtype), None, values.reshape(tensor.shape))
    with errors.context(change.key):
        memory, where = _line_of(tensor, to_torch(change.where, "I64"))
    kind = torch.int32 if memory.numel() < INT32 else torch.int64
    return Write(memory.view(values.dtype), where.to(tensor.device, kind), values)


def _line_of(tensor: Any, where: Any) -> tuple[Any, Any]:
    """Return the memory that a tensor spans, as one dimension, and where its flat positions lie in it."""
    data = tensor.detach()
    if data.is_contiguous():
        return data.view(-1), where
    sizes, strides = data.shape, data.stride()
    if any(stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)):
        raise InputError("shares memory between its elements", hint="clone() it first")
    span = 1 + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    at, rest = torch.zeros_like(where), where
    for axis in reversed(range(len(sizes))):
        at += rest % sizes[axis] * strides[axis]
        rest = rest // sizes[axis]
    return data.as_strided((span,), (1,)), at
