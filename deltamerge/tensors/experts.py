"""Experts of a mixture stored one by one in one model and fused in another, as views of one another.

One by one: `….experts.7.gate_proj.weight` (I, H), `up_proj` and `down_proj` (H, I), or `w1`, `w3`, `w2`. Fused:
`….experts.gate_up_proj` (E, 2 I, H), the gate's rows before `up`'s rows, and `….experts.down_proj` (E, H, I), or both
with their last two dimensions exchanged (Qwen3-VL, Llama 4). transformers' `conversion_mapping` has the same order.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate
from typing import Any

from deltamerge.tensors.dtypes import ITEMSIZE, bits_type
from deltamerge.tensors.lazy import NDArray
from deltamerge.tensors.lazy import numpy as np
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed

Layout = Mapping[str, tuple[str, ...]]

WHOLE = 1 << 24  # bytes of a matrix that is read whole to be transposed

# A fused tensor, and the parts of one expert that it has, in order.
LAYOUTS: tuple[Layout, ...] = (
    {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)},
    {"gate_up_proj": ("w1", "w3"), "down_proj": ("w2",)},
    {"up_proj": ("up_proj",), "down_proj": ("down_proj",)},
)
_APART = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)\.weight")
_FUSED = re.compile(r"(.*\bexperts)\.(gate_up_proj|up_proj|down_proj)")


@view(entrywise=True)
def join(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Put the inputs one after another."""
    size, ends = ITEMSIZE[tensor.dtype], _ends(tensor)
    done, count = 0, len(out) // size
    while done < count:
        at = bisect_right(ends, start + done)
        first = ends[at - 1] if at else 0
        stop = min(count, ends[at] - start)
        read.read_into(tensor.inputs[at], start + done - first, out[done * size : stop * size])
        done = stop


@lru_cache(maxsize=64)
def _ends(tensor: Tensor) -> list[int]:
    """Return the element behind each input of a joined tensor."""
    return list(accumulate(part.size for part in tensor.inputs))


def is_joined(tensor: Tensor) -> bool:
    """Tell whether a tensor joins several, one after another."""
    return tensor.function == join.__name__


@view(entrywise=True)
def transpose(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Transpose each matrix of a stack: (E, C, R) is read as (E, R, C)."""
    (source,) = tensor.inputs
    _, columns, rows = source.shape
    target = np.frombuffer(out, bits_type(source.dtype))
    stop = start + len(target)
    at = start
    while at < stop:
        expert, row = divmod(at // columns, rows)
        last = min(rows, -(-(stop - expert * rows * columns) // columns))
        flat = _columns(read, source, expert, row, last).T.reshape(-1)
        low = (expert * rows + row) * columns
        end = min(stop, low + flat.size)
        target[at - start : end - start] = flat[at - low : end - low]
        at = end


def _columns(read: Read, source: Tensor, expert: int, first: int, last: int) -> NDArray[Any]:
    """Return columns [first, last) of one matrix. A small matrix is read whole, a large one run by run."""
    _, rows, columns = source.shape
    dtype = bits_type(source.dtype)
    if rows * columns * ITEMSIZE[source.dtype] <= WHOLE:
        matrix = np.empty((rows, columns), dtype)
        read.read_into(source, expert * rows * columns, matrix)
        return matrix[:, first:last]
    block = np.empty((rows, last - first), dtype)
    done = 0
    while done < rows:
        part, row, count = _part(source, expert * rows + done, rows - done)
        firsts = (np.arange(row, row + count, dtype=np.int64) * columns + first) * block.itemsize
        ends = np.arange(1, count + 1, dtype=np.int64) * ((last - first) * block.itemsize)
        read.read_runs(part, firsts, ends, block[done : done + count])
        done += count
    return block


def _part(source: Tensor, row: int, most: int) -> tuple[Tensor, int, int]:
    """Return the tensor that has a row of the source, the row's number there, and how many of `most` rows follow it."""
    if not is_joined(source):
        return source, row, most
    ends, columns = _ends(source), source.shape[2]
    at = bisect_right(ends, row * columns)
    stop, count = ends[at] // columns, source.inputs[at].shape[0]
    return source.inputs[at], row - (stop - count), min(most, stop - row)


def turned(info: TensorInfo) -> TensorInfo:
    """Return a stack of matrices with its last two dimensions exchanged."""
    experts, rows, columns = info.shape
    return replace(info, tensor=viewed(transpose, [info], (experts, columns, rows), info.dtype))


def is_turned_stack(tensor: Tensor) -> bool:
    """Tell whether a tensor is a stack of matrices that are read transposed."""
    return tensor.function == transpose.__name__


def containers(names: Iterable[str]) -> tuple[set[str], set[str]]:
    """Return the containers of experts stored one by one, and of fused experts."""
    apart, fused = set(), set()
    for name in names:
        if found := _APART.fullmatch(name):
            apart.add(found[1])
        elif found := _FUSED.fullmatch(name):
            fused.add(found[1])
    return apart, fused


def differ(models: Iterable[Iterable[str]]) -> bool:
    """Tell whether some models store experts one by one and others fused."""
    found = [containers(names) for names in models]
    return any(apart for apart, _ in found) and any(fused for _, fused in found)


def fold(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """Return the tensors, with experts stored one by one as fused tensors. Tensors outside a layout stay."""
    apart: dict[str, dict[str, dict[int, TensorInfo]]] = defaultdict(lambda: defaultdict(dict))
    for name, info in tensors.items():
        if found := _APART.fullmatch(name):
            apart[found[1]][found[3]][int(found[2])] = info
    folded: dict[str, TensorInfo] = {}
    gone: dict[str, str] = {}
    for container, parts in apart.items():
        layout = next((one for one in LAYOUTS if {p for own in one.values() for p in own} == parts.keys()), None)
        made = {} if layout is None else {key: _fused(f"{container}.{key}", parts, own) for key, own in layout.items()}
        if made and all(made.values()):
            folded |= {info.name: info for info in made.values() if info is not None}
            gone |= {
                part.name: f"{container}.{key}" for key, own in (layout or {}).items() for p in own
                for part in parts[p].values()
            }  # fmt: skip
    result: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        key = gone.get(info.name)
        result.setdefault(key or name, folded[key] if key is not None else info)
    return result


def _fused(name: str, parts: Mapping[str, Mapping[int, TensorInfo]], own: tuple[str, ...]) -> TensorInfo | None:
    """Return the fused tensor of an expert's parts; None if experts are missing or differ."""
    experts = parts[own[0]].keys()
    if set(experts) != set(range(len(experts))) or any(parts[part].keys() != experts for part in own):
        return None
    members = tuple(parts[part][e] for e in range(len(experts)) for part in own)
    first = members[0]
    if any(len(m.shape) != 2 or (m.shape, m.dtype) != (first.shape, first.dtype) for m in members):
        return None
    shape = (len(experts), len(own) * first.shape[0], first.shape[1])
    return TensorInfo(name, viewed(join, members, shape, first.dtype), first.saved_as)


def layout_of(names: Iterable[str]) -> Layout | None:
    """Return the layout of a model that stores experts one by one; None if it does not."""
    parts = {found[3] for name in names if (found := _APART.fullmatch(name))}
    return next((one for one in LAYOUTS if {p for own in one.values() for p in own} == parts), None)


def unfold(info: TensorInfo, own: tuple[str, ...]) -> dict[str, TensorInfo]:
    """Return the parts `own` of a fused tensor (E, rows, columns) by their inner names, such as "7.up_proj.weight".

    They keep the fused tensor's name.
    """
    experts, rows, columns = info.shape[0], info.shape[1] // len(own), info.shape[2]
    result, joined, shape = {}, info.tensor.inputs if is_joined(info.tensor) else (), (rows, columns)
    for number, (expert, part) in enumerate((e, p) for e in range(experts) for p in own):
        if joined and joined[number].shape == shape:
            one = replace(info, tensor=joined[number])
        else:
            one = info.part(number * rows * columns, shape)
        result[f"{expert}.{part}.weight"] = one
    return result


def is_turned(shapes: Mapping[str, tuple[int, ...]], like: Mapping[str, tuple[int, ...]]) -> bool | None:
    """Tell whether one container's fused tensors are stored transposed to another's. Both are given by inner name.

    None: the shapes agree either way, as all are square.
    """
    told = None
    for key, shape in shapes.items():
        other = like.get(key)
        if other is None or len(shape) != 3 or len(other) != 3 or shape[1] == shape[2]:
            continue
        if shape == other:
            return False
        if shape == (other[0], other[2], other[1]):
            told = True
    return told


def by_container(tensors: Mapping[str, TensorInfo]) -> dict[str, dict[str, TensorInfo]]:
    """Return the fused tensors of every container, by the name inside it."""
    result: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in tensors.items():
        if (found := _FUSED.fullmatch(name)) and len(info.shape) == 3:
            result[found[1]][found[2]] = info
    return dict(result)
