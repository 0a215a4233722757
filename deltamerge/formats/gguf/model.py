"""A model in GGUF files as transformers has it: names, shapes, values computed from blocks, and config."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.gguf.config import ARCHITECTURES, GgufNames, config_of
from deltamerge.formats.gguf.file import FACTORS, PLAIN, GgufBlock, GgufHeader, block_of, package, type_name
from deltamerge.formats.quantised.codes import Floats
from deltamerge.formats.quantised.detect import Scheme
from deltamerge.formats.quantised.scheme import kept
from deltamerge.tensors.dtypes import Array
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


@view(keeps=True)
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


# Axes of length one that llama.cpp leaves out.
SQUEEZED = {"ssm_conv1d.weight": 1, "shortconv.conv.weight": 1, "ffn_gate_inp_shexp.weight": 0}


@dataclass(frozen=True, slots=True)
class GgufModel:
    """`tensors` under transformers' names; `config` is {} where the folder has one, `scheme` None of plain floats."""

    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    scheme: Scheme | None


def open_model(headers: Sequence[GgufHeader], *, with_config: bool) -> GgufModel:
    """Return the model in the files of `headers`.

    InputError: an architecture or tensor that transformers does not read.
    """
    header = headers[0]
    known = ARCHITECTURES.get(header.architecture)
    if known is None:
        names = ", ".join(sorted(ARCHITECTURES))
        hint = f"merge the safetensors that it was made of; architectures that are read: {names}"
        raise InputError(f"is GGUF of the architecture {header.architecture[:40]!r}, which is not read", hint=hint)
    count = header.pairs.get("split.count", 1)
    if count not in (0, len(headers)):
        raise InputError(f"is one of {str(count)[:20]} parts", hint="name the first, with all others beside it")
    blocks = [block for part in headers for block in part.blocks]
    stored: dict[str, GgufBlock] = {}
    tensors: dict[str, TensorInfo] = {}
    for block in blocks:
        if block.name in FACTORS:
            continue
        name = known.name(block.name)
        if name is None:
            hint = "merge the safetensors that it was made of"
            raise InputError(f"transformers has no {block.name[:80]} in a {header.architecture}", hint=hint)
        with errors.context(block.name):
            if name in tensors:
                tensors[name] = _joined(stored[name], block, tensors[name])
            else:
                tensors[name] = _undone(header, known, block, name)
                stored[name] = block
    _check_experts(tensors, stored)
    dtype = _dtype(blocks)
    kinds = Counter(type_name(block.kind) for block in blocks if block.kind not in PLAIN)
    scheme = None
    if kinds:
        weights = MappingProxyType({name: (block.name,) for name, block in stored.items()})
        types = MappingProxyType({name: type_name(block.kind) for name, block in stored.items()})
        scheme = Scheme("gguf", kinds.most_common(1)[0][0], weights, types)
    embeddings = next((b.shape[0] for b in blocks if b.name == "token_embd.weight"), 0)
    config = config_of(header, known, {block.name for block in blocks}, embeddings) if with_config else {}
    found = {name: _saved(info, stored[name], dtype) for name, info in tensors.items()}
    return GgufModel(found, config, scheme)


def _undone(header: GgufHeader, known: GgufNames, block: GgufBlock, name: str) -> TensorInfo:
    """Return a tensor as transformers has it."""
    info = tensor_of(block, name)
    rest = re.sub(r"^((enc|dec)\.)?blk\.\d+\.", "", block.name)
    if known.less_one and block.name.endswith("norm.weight"):
        return _viewed(less_one, info)
    if known.halves and rest.startswith(("attn_q.", "attn_k.")):
        heads = _heads(header, "head_count" if rest.startswith("attn_q.") else "head_count_kv")
        return _viewed(head_order, info, head=_head(block, heads, 2), fused=0)
    if known.fused and rest.startswith("attn_qkv."):
        heads = _heads(header, "head_count")
        return _viewed(head_order, info, head=_head(block, 3 * heads, 1), fused=heads)
    if rest.startswith("attn_qkv.") and header.architecture == "falcon" and _heads(header, "head_count_kv") != 1:
        raise InputError("has several heads of keys, in an order of llama.cpp's own, which transformers does not undo")
    if rest in known.transposed:
        return replace(info, tensor=viewed(transposed_blocks, [info], block.shape[::-1], "F32"))
    if rest == "ssm_a":
        return _viewed(log_of_negative, info)
    axis = SQUEEZED.get(rest)
    if axis is not None and len(block.shape) == 1 + axis:
        return info.part(0, (*block.shape[:axis], 1, *block.shape[axis:]))
    return info


def _viewed(function: Callable[..., None], info: TensorInfo, **parameters: Any) -> TensorInfo:
    """Return a tensor of the same shape that a view computes."""
    return replace(info, tensor=viewed(function, [info], info.shape, "F32", **parameters))


def _heads(header: GgufHeader, key: str) -> int:
    pairs, arch = header.pairs, header.architecture
    heads = pairs.get(f"{arch}.attention.{key}", pairs.get(f"{arch}.attention.head_count"))
    if type(heads) is not int or heads < 1:
        raise InputError(f"its {arch}.attention.{key} is {str(heads)[:40]}")
    return heads


def _head(block: GgufBlock, heads: int, parts: int) -> int:
    """Return the rows of a head. InputError: heads or their parts do not divide the rows."""
    if block.shape[0] % (heads * parts):
        raise InputError(f"{block.shape[0]} rows are no {heads} heads")
    return block.shape[0] // heads


def _joined(first: GgufBlock, second: GgufBlock, one: TensorInfo) -> TensorInfo:
    """Return the rows of gate and up of all experts, in this order."""
    other = tensor_of(second, one.name)
    gate, up = (one, other) if "gate" in first.name else (other, one)
    if len(gate.shape) != 3 or gate.shape != up.shape:
        raise InputError(f"has the shape {list(second.shape)}, {first.name} {list(first.shape)}")
    experts, rows, columns = gate.shape
    return replace(one, tensor=viewed(joined_experts, [gate, up], (experts, 2 * rows, columns), "F32"))


def _check_experts(tensors: dict[str, TensorInfo], stored: dict[str, GgufBlock]) -> None:
    for name, block in stored.items():
        if name.endswith("gate_up_proj") and "_exps" in block.name and not is_joined_experts(tensors[name].tensor):
            raise InputError(f"{block.name}: the other half of {name} is missing", hint="download the model again")


def _dtype(blocks: Sequence[GgufBlock]) -> str:
    """Return the dtype of outputs: the most frequent among elements of matrices, bfloat16 for blocks."""
    counts: Counter[str] = Counter()
    for block in blocks:
        if len(block.shape) > 1:
            counts[PLAIN.get(block.kind, "BF16")] += math.prod(block.shape)
    return counts.most_common(1)[0][0] if counts else "F32"


def _saved(info: TensorInfo, block: GgufBlock, dtype: str) -> TensorInfo:
    """Return a tensor that is read directly if it is stored in the outputs' dtype, and computed otherwise."""
    if PLAIN.get(block.kind) == dtype and info.tensor.whole.function == ggml_blocks.__name__:
        return TensorInfo(info.name, stored(block.path, block.begin, info.shape, dtype, info.name))
    return replace(info, saved_as=dtype)
