"""Views that formats use: zeros, bytes in memory, casts, gathered rows; and rows of a tensor as float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from deltamerge.engine import kernels
from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import ITEMSIZE, NUMPY, PLAIN, Array, bits_type, narrow, widen
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.tensor import VIEWS, Read, Tensor, TensorInfo, unique, view, viewed

CHUNK = 1 << 18  # elements computed at once, in whole rows: they stay in cache


@view(entrywise=True)
def zeros(read: Read, tensor: Tensor, start: int, out: memoryview, *, path: Path) -> None:
    """Fill with zeros, the base of weights that only an adapter has."""
    out[:] = bytes(len(out))


def zeros_like(like: Tensor | TensorInfo, dtype: str | None = None) -> Tensor:
    """Return zeros in the shape of a tensor, and in its dtype or another."""
    return viewed(zeros, (), like.shape, dtype or like.dtype, path=like.path)


@dataclass(frozen=True, slots=True, eq=False)
class Buffer:
    """Bytes in memory. Two buffers are never the same."""

    data: memoryview


@view()
def memory(read: Read, tensor: Tensor, start: int, out: memoryview, *, buffer: Buffer, name: str, path: Path) -> None:
    """Take bytes that are in memory."""
    out[:] = buffer.data[start * ITEMSIZE[tensor.dtype] :][: len(out)]


def in_memory(name: str, dtype: str, shape: tuple[int, ...], data: memoryview, path: Path = Path()) -> TensorInfo:
    """Return the tensor of these bytes. `dtype` is a safetensors code."""
    return TensorInfo(name, unique(memory, (), shape, dtype, buffer=Buffer(data), name=name, path=path))


@view(entrywise=True)
def cast(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Round the input to the dtype, to nearest, ties to even."""
    (source,) = tensor.inputs
    target = np.frombuffer(out, bits_type(tensor.dtype))
    for low in range(0, len(target), CHUNK):
        high = min(low + CHUNK, len(target))
        target[low:high] = narrow(floats(read, source, start + low, high - low), tensor.dtype)


def fill_rows(tensor: Tensor, start: int, out: memoryview, rows: Callable[[int, int], Array]) -> None:
    """Fill `out` from element `start` with whole rows computed in float32; a row is all that follows dimension 0."""
    fill_lines(math.prod(tensor.shape[1:]), tensor.dtype, start, out, rows)


def fill_lines(columns: int, dtype: str, start: int, out: memoryview, rows: Callable[[int, int], Array]) -> None:
    """Fill `out` from element `start` with rows of `columns`. `rows(top, bottom)` computes some in float32."""
    target = np.frombuffer(out, bits_type(dtype))
    step = max(1, CHUNK // columns)
    stop = start + len(target)
    last = math.ceil(stop / columns)
    for top in range(start // columns, last, step):
        bottom = min(top + step, last)
        made = narrow(np.ascontiguousarray(rows(top, bottom)), dtype).reshape(-1)
        low, high = max(start, top * columns), min(stop, bottom * columns)
        target[low - start : high - start] = made[low - top * columns : high - top * columns]


def product(left: Array, right: Array) -> Array:
    """Return left · right in float32 by the compiled kernels, else by numpy; the bits are the same."""
    out = np.empty((len(left), right.shape[1]), np.float32)
    native = kernels.native()
    if native is None:
        ordered_product(left, right, out)
    else:
        shape = (len(left), len(right), right.shape[1])
        native.ordered_product(np.ascontiguousarray(left), np.ascontiguousarray(right), out, *shape)
    return out


def ordered_product(left: Array, right: Array, out: Array) -> None:
    """Compute out_ij = Σ_k left_ik right_kj in the order of k, float32; each product and sum is rounded."""
    np.multiply(left[:, :1], right[0], out=out)
    product = np.empty_like(out)
    for k in range(1, len(right)):
        np.multiply(left[:, k : k + 1], right[k], out=product)
        out += product


def flat_rows(read: Read, info: Tensor | TensorInfo) -> Array:
    """Return a whole tensor in float32, as (rows, all that follows)."""
    return floats(read, info, 0, math.prod(info.shape)).reshape(info.shape[0], -1)


def base_rows(read: Read, info: Tensor | TensorInfo, top: int, bottom: int) -> Array:
    """Return rows [top, bottom) in float32, as (rows, all that follows)."""
    columns = math.prod(info.shape[1:])
    return floats(read, info, top * columns, (bottom - top) * columns).reshape(-1, columns)


def floats(read: Read, info: Tensor | TensorInfo, start: int, count: int) -> Array:
    """Return elements [start, start + count) in float32."""
    bits = np.empty(count, bits_type(info.dtype))
    read.read_into(info, start, bits)
    return widen(bits, info.dtype)


# Rows that are gathered from other tensors: embeddings under another vocabulary.


CHUNK_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class PickTable:
    """An array that is a parameter of a view; its digest compares it."""

    digest: str
    values: NDArray[Any] = field(compare=False, repr=False)

    @classmethod
    def of(cls, values: NDArray[Any]) -> PickTable:
        """Return the parameter of an array. The array must not change afterwards."""
        return cls(blake2b(values.tobytes(), digest_size=16).hexdigest(), values)


@view(moves=True)
def gather_rows(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, picks: PickTable, padding: int, path: Path
) -> None:
    """Gather rows (rows, width) from the inputs.

    picks     (rows, inputs) int32; row r is the float32 mean of row `picks[r, s]` over the inputs s whose pick is not
              −1; zeros if all are −1
    padding   number of rows that follow, each the mean of all rows before

    The dtype is the inputs' own if each row has one input, otherwise F32.
    """
    stop, width, count = start + len(out) // ITEMSIZE[tensor.dtype], math.prod(tensor.shape[1:]), len(picks.values)
    own = partial(_gathered, read, tensor, picks.values)
    first, last = start // width, -(-stop // width)
    rows = own(first, min(last, count))
    if last > count:
        mean = read.once(tensor, lambda: mean_row(own, count, width))
        rows = np.concatenate([rows, np.broadcast_to(mean, (last - max(first, count), width))])
    np.frombuffer(out, rows.dtype)[:] = rows.reshape(-1)[start - first * width : stop - first * width]


def _gathered(read: Read, tensor: Tensor, picks: NDArray[np.int32], first: int, last: int) -> NDArray[Any]:
    picks, width = picks[first : max(first, last)], math.prod(tensor.shape[1:])
    result: NDArray[Any] = np.zeros((len(picks), width), NUMPY[tensor.dtype])
    begun = np.zeros(len(picks), bool)
    for column, source in zip(picks.T, tensor.inputs, strict=True):
        at = np.flatnonzero(column >= 0)
        if at.size:
            values = stored_rows(read, source, column[at], width)
            if source.dtype != tensor.dtype:
                values = widen(values.view(bits_type(source.dtype)), source.dtype)
            more = begun[at]
            result[at[~more]] = values[~more]
            result[at[more]] += values[more]
            begun[at] = True
    counts = (picks >= 0).sum(1)
    several = counts > 1
    if several.any():
        result[several] /= counts[several, None].astype(np.float32)
    return result


def moves_rows(info: Tensor | TensorInfo) -> bool:
    """Tell whether a tensor has other rows than its file, or in another order."""
    tensor = info.tensor.whole
    return tensor.kind == "view" and VIEWS[tensor.function].moves


def gather(own: TensorInfo, sources: Sequence[TensorInfo], picks: NDArray[np.int32], padding: int) -> TensorInfo:
    """Return `own` with the rows that `picks` takes from `sources`, and `padding` more rows.

    It is a plain cut if it only gets shorter.

    InputError: a dtype whose rows cannot be averaged (float8, integers).
    """
    used = [s for s in range(len(sources)) if (picks[:, s] >= 0).any()]
    alone = not padding and [sources[s] for s in used] == [own]
    if alone and np.array_equal(picks[:, used[0]], np.arange(len(picks), dtype=np.int32)):
        return cut(own, 0, len(picks))
    taken = [sources[s] for s in used] or [own]
    picks = np.ascontiguousarray(picks[:, used] if used else np.full((len(picks), 1), -1, np.int32))
    dtypes = {source.dtype for source in taken}
    if unreadable := sorted(dtypes - PLAIN):
        raise InputError(f"rows of {unreadable[0]} cannot be moved to another vocabulary")
    plain = len(dtypes) == 1 and not padding and int((picks >= 0).sum(1).max(initial=0)) <= 1
    dtype = dtypes.pop() if plain else "F32"
    shape = (len(picks) + padding, *own.shape[1:])
    table = PickTable.of(picks)
    return TensorInfo(own.name, viewed(gather_rows, taken, shape, dtype, picks=table, padding=padding, path=own.path))


def cut(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Return rows [start, stop) of a tensor."""
    return tensor.part(start * math.prod(tensor.shape[1:]), (stop - start, *tensor.shape[1:]))


def mean_row(rows: Callable[[int, int], NDArray[Any]], count: int, width: int) -> NDArray[np.float32]:
    """Return the mean (width) of `count` rows, summed in float64 in their order. `rows(first, last)` reads some."""
    total, step = np.zeros(width, np.float64), max(1, CHUNK_ELEMENTS // width)
    for first in range(0, count, step):
        total += rows(first, min(first + step, count)).astype(np.float64).sum(0)
    return (total / count).astype(np.float32)


def stored_rows(read: Read, source: Tensor | TensorInfo, rows: NDArray[np.int32], width: int) -> NDArray[Any]:
    """Return rows of a stored tensor, in the given order."""
    out: NDArray[Any] = np.empty((len(rows), width), NUMPY[source.dtype])
    ends = np.append(np.flatnonzero(np.diff(rows) != 1) + 1, len(rows))
    firsts = np.concatenate([rows[:1], rows[ends[:-1]]]).astype(np.int64)
    read.read_runs(source, firsts * (width * out.itemsize), ends * (width * out.itemsize), out)
    return out
