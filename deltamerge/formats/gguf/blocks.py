"""Values of GGUF tensors, row by row: blocks as float32 by the gguf package, llama.cpp's conversions undone."""

from __future__ import annotations

import math

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.gguf.header import GgufBlock, block_of, package
from deltamerge.formats.quantised.scheme import Array, Floats, kept
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, stored, view, viewed
from deltamerge.tensors.views import fill_lines


@view()
def ggml_blocks(read: Read, tensor: Tensor, start: int, out: memoryview, *, kind: int) -> None:
    """Turn blocks, which lie along rows, into numbers. The input has their bytes."""
    gguf, (source,), columns = package(), tensor.inputs, tensor.shape[-1]
    elements, nbytes = block_of(kind)
    width = columns // elements * nbytes

    def rows(top: int, bottom: int) -> Floats:
        raw = np.empty((bottom - top, width), np.uint8)
        read.read_into(source, top * width, raw)
        with np.errstate(all="ignore"):
            values = gguf.dequantize(raw, gguf.GGMLQuantizationType(kind))
        return np.asarray(values, np.float32)

    fill_lines(columns, "F32", start, out, rows)


@view()
def head_order(read: Read, tensor: Tensor, start: int, out: memoryview, *, head: int, fused: int) -> None:
    """Put rows in transformers' order, a head of `head` rows at a time.

    llama.cpp has the rows of a head of q and k side by side that its rotary embedding pairs, transformers half a head
    apart. With `fused` = h the heads of q, of k and of v lie interleaved instead (q₀ k₀ v₀ q₁ …), in the file one after
    the other, h of each (Bloom).
    """
    (source,), columns = tensor.inputs, tensor.shape[-1] if len(tensor.shape) > 1 else 1

    def rows(top: int, bottom: int) -> Floats:
        first, last = top // head, -(-bottom // head)
        values = np.empty((last - first, head, columns), np.float32)
        for unit in range(first, last):
            begin = unit % 3 * fused + unit // 3 if fused else unit
            read.read_into(source, begin * head * columns, values[unit - first])
        if not fused:
            pairs = values.reshape(last - first, head // 2, 2, columns)
            values = np.ascontiguousarray(pairs.swapaxes(1, 2))
        return values.reshape(-1, columns)[top - first * head : bottom - first * head]

    fill_lines(columns, "F32", start, out, rows)


@view()
def less_one(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Subtract 1 from norms that are stored as w + 1."""
    values = np.frombuffer(out, np.float32)
    read.read_into(tensor.inputs[0], start, values)
    values -= np.float32(1)


@view()
def log_of_negative(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Compute log(−x), Mamba's A. InputError: x is not below 0."""
    values, (source,) = np.frombuffer(out, np.float32), tensor.inputs
    read.read_into(source, start, values)
    if not (values < 0).all():
        raise InputError(f"{source.name}: is not below 0 everywhere", hint="download it again")
    np.log(-values, out=values)


@view(keeps=lambda _: True)
def transposed_blocks(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Transpose a matrix (rows, columns), as GPT-2's Conv1D has its weights."""
    (source,) = tensor.inputs
    rows, columns = source.shape

    def numbers() -> Array:
        values = np.empty((rows, columns), np.float32)
        read.read_into(source, 0, values)
        return values

    values = kept(read, source, numbers)
    fill_lines(rows, "F32", start, out, lambda top, bottom: np.ascontiguousarray(values[:, top:bottom].T))


@view()
def joined_experts(read: Read, tensor: Tensor, start: int, out: memoryview) -> None:
    """Put the rows of two stacks of experts (E, r, columns) together, expert by expert."""
    values, done = np.frombuffer(out, np.float32), 0
    sizes = [math.prod(source.shape[1:]) for source in tensor.inputs]
    while done < len(values):
        expert, inner = divmod(start + done, sum(sizes))
        part = int(inner >= sizes[0])
        inner -= sizes[0] * part
        count = min(sizes[part] - inner, len(values) - done)
        read.read_into(tensor.inputs[part], expert * sizes[part] + inner, values[done : done + count])
        done += count


def tensor_of(block: GgufBlock, name: str) -> TensorInfo:
    """Return the float32 tensor of a block's values under `name`."""
    source = stored(block.path, block.begin, (block.nbytes,), "U8", block.name)
    return TensorInfo(name, viewed(ggml_blocks, [source], block.shape, "F32", kind=block.kind))


def is_joined_experts(tensor: Tensor) -> bool:
    """Return whether a tensor has both halves of its experts."""
    return tensor.function == joined_experts.__name__
