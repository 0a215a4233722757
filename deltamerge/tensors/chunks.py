"""Tensors that are stored in chunks, put together as they are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deltamerge.tensors.dtypes import ITEMSIZE
from deltamerge.tensors.tensor import Read, Tensor, view

Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a chunk."""
AT_ONCE = 1 << 18  # elements


@view()
def from_chunks(
    read: Read, tensor: Tensor, start: int, out: memoryview, *, offsets: tuple[tuple[int, ...], ...], path: Path
) -> None:
    """Put the inputs together, each from its offsets on."""
    size = ITEMSIZE[tensor.dtype]
    stop = start + len(out) // size
    for offset, chunk in zip(offsets, tensor.inputs, strict=True):
        for first in range(start, stop, AT_ONCE):
            last = min(stop, first + AT_ONCE)
            begins, ends, sources = _runs(tensor.shape, offset, chunk.shape, first, last)
            if len(begins) == 0:
                continue
            if len(begins) == 1:
                begin, end = int(begins[0]), int(ends[0])
                read.read_into(chunk, int(sources[0]), out[(begin - start) * size : (end - start) * size])
                continue
            lengths = np.cumsum(ends - begins) * size
            held = memoryview(bytearray(int(lengths[-1])))
            read.read_runs(chunk, sources * size, lengths, held)
            done = 0
            for begin, end in zip(((begins - start) * size).tolist(), ((ends - start) * size).tolist(), strict=True):
                out[begin:end] = held[done : done + end - begin]
                done += end - begin


def _runs(
    shape: tuple[int, ...], offsets: tuple[int, ...], sizes: tuple[int, ...], first: int, last: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the elements [first, last) of a tensor that a chunk has, as runs.

    Of each run: where it begins and ends in the tensor, and where it begins in the chunk.
    """
    outer = len(sizes)
    while outer > 0 and sizes[outer - 1] == shape[outer - 1]:
        outer -= 1
    inner = max(outer - 1, 0)  # dimensions before it are walked, the rest of a chunk is contiguous in both
    length = math.prod(sizes[inner:])
    starts = np.zeros(1, np.int64)
    numbers = np.zeros(1, np.int64)
    for at in range(inner):
        stride, rows = math.prod(shape[at + 1 :]), np.arange(sizes[at], dtype=np.int64)
        if at == 0:  # only rows that the range touches
            low, high = first // stride - offsets[0], -(-last // stride) - offsets[0]
            rows = rows[max(0, low) : max(0, high)]
        starts = (starts[:, None] + (rows + offsets[at]) * stride).reshape(-1)
        numbers = (numbers[:, None] * sizes[at] + rows).reshape(-1)
    if shape:
        starts = starts + offsets[inner] * math.prod(shape[inner + 1 :])
    begins, ends = np.maximum(starts, first), np.minimum(starts + length, last)
    some = begins < ends
    return begins[some], ends[some], (numbers * length + begins - starts)[some]


def covers(shape: Sequence[int], chunks: Sequence[Place]) -> bool:
    """Tell whether chunks make up a tensor of that shape, without holes and overlaps."""
    if sum(math.prod(sizes) for _, sizes in chunks) != math.prod(shape):
        return False
    inside = all(o + s <= n for offsets, sizes in chunks for o, s, n in zip(offsets, sizes, shape, strict=True))
    return inside and not any(_overlapping([chunk for chunk in chunks if math.prod(chunk[1])]))


def _overlapping(chunks: Sequence[Place]) -> Iterator[bool]:
    """Tell of each chunk whether it overlaps: its neighbour if chunks are rows, else any that begins before it ends."""
    ordered = sorted(chunks)
    if all(offsets[1:] == (0,) * len(offsets[1:]) for offsets, _ in ordered):
        yield from (a[0] + sizes[0] > b[0] if a else True for (a, sizes), (b, _) in pairwise(ordered))
        return
    begins, ends = (np.array(x, np.int64) for x in ([o for o, _ in ordered],
                    [[a + b for a, b in zip(o, s, strict=True)] for o, s in ordered]))  # fmt: skip
    for i in range(len(ordered)):
        yield bool(((begins[i + 1 :] < ends[i]) & (ends[i + 1 :] > begins[i])).all(1).any())
