"""Integers of compressed-tensors, and that library's `config_groups`.

W = (code − zero) · scale (compressed_tensors, quantization/lifecycle). Integers of 1 to 8 bits are packed into words
(pack-quantized), or have a byte each (int-quantized). `config_groups` state the number of bits and the block of a
scale. Several groups (`mixed-precision`) are distinguished by their targets and by the tensors' shapes. The library's
float8 codes are read in `fp8.py`, four-bit floats in `nvfp4.py` and `mxfp4.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.quantised.coder import BlockCoder, Coding, StoredPart, by_rows
from deltamerge.formats.quantised.codes import EXPONENTS, Integers, ScaleGrid, Shape, words_of
from deltamerge.formats.quantised.detect import HINT
from deltamerge.formats.quantised.scheme import (
    FLOATS,
    OR_QUANTISE,
    Block,
    Scaled,
    StoredWeight,
    check_dtype,
    grid,
    weight,
)
from deltamerge.tensors.patterns import check, finds
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo
from deltamerge.tensors.views import in_memory

WIDTHS = range(1, 9)
# Formats whose codes this file reads; the others are read by other files, or have no codes.
FORMATS = frozenset({
    "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "mxfp8-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense", "fakequant",
})  # fmt: skip
# Of the schemes that are written: bits, the library's format, its type of numbers.
FORM_OF = {
    "fp8": (8, "float-quantized", "float"),
    "int8": (8, "int-quantized", "int"),
    "int4": (4, "pack-quantized", "int"),
    "nvfp4": (4, "nvfp4-pack-quantized", "float"),
    "mxfp4": (4, "mxfp4-pack-quantized", "float"),
}
SCALE_OF = {"nvfp4": ("tensor_group", "torch.float8_e4m3fn"), "mxfp4": ("group", "torch.uint8")}
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


def read(stored: StoredWeight) -> TensorInfo:
    """Return the weight of codes, scales, zeros and an order of columns.

    InputError: the library does not write such codes, or shapes or dtypes of companions do not fit.
    """
    codes = stored.codes

    def one(group: GroupSettings) -> TensorInfo:
        if not codes.name.endswith("weight_packed"):
            if codes.dtype != "I8":
                raise InputError(f"is stored as {codes.dtype} beside scales, which is no form of it", hint=OR_QUANTISE)
            return one_by_one(stored, group)
        if codes.dtype not in ("I32", "U32") or len(codes.shape) < 2:
            what = f"weight_packed is {codes.dtype} {list(codes.shape)}, must be 32-bit words of rows"
            raise InputError(what, hint=OR_QUANTISE)
        return _of_group(stored, _shape(stored), group)

    return of_groups(stored, one)


def _of_group(stored: StoredWeight, shape: Shape | None, group: GroupSettings) -> TensorInfo:
    """Return the weight as a group would pack it. InputError: it would not be packed so."""
    codes, scales = stored.codes, stored.need("weight_scale")
    check_dtype(scales)
    if scales.dtype in EXPONENTS:
        raise InputError(f"{scales.name}: {scales.dtype} is no dtype of the scales of packed integers")
    words = codes.shape[-1]
    if shape is None:
        if group.width is None:
            raise InputError("its bits are stated neither by config.json nor by weight_shape", hint=OR_QUANTISE)
        shape = (*codes.shape[:-1], words * 32 // group.width)
    if shape[:-1] != codes.shape[:-1]:
        raise InputError(f"weight_shape says {list(shape)}, weight_packed has {list(codes.shape)}", hint=OR_QUANTISE)
    width, dense = _packing(shape[-1], words, group.width)
    laid = grid(shape, scales.shape, group.block, whole=group.whole)
    zeros, order = _zeros_of(stored, group), order_of(stored, shape[-1])
    how = (False, True) if zeros is None else _zeros_packing(zeros, scales, laid, shape, width)
    return weight(stored, shape, Scaled(codes, scales, zeros, order, shape[-1], laid, "packed", width, dense, *how))


def _packing(columns: int, words: int, width: int | None) -> tuple[int, bool]:
    """Return the bits of an integer if `columns` take `words` words, and whether it may lie across two words.

    The library packs densely now; older versions put whole integers into words. InputError: no number of bits fits.
    """
    for dense in (True, False):
        fitting = [b for b in ([width] if width else WIDTHS) if words_of(columns, b, dense) == words]
        if len(fitting) == 1:
            return fitting[0], dense
    said = f"{columns} integers of {width} bits" if width else f"{columns} integers"
    raise InputError(f"its rows have {words} words, which {said} do not take", hint=OR_QUANTISE)


def _zeros_packing(
    zeros: TensorInfo, scales: TensorInfo, laid: ScaleGrid, shape: Shape, width: int
) -> tuple[bool, bool]:
    """Return whether the zeros of packed codes are packed too, down their columns, and whether densely."""
    if zeros.dtype == "I8" and zeros.shape == scales.shape:
        return False, True
    for dense in (True, False):
        expected = (words_of(laid.down, width, dense), laid.across)
        if zeros.dtype in ("I32", "U32") and len(shape) == 2 and zeros.shape == expected:
            return True, dense
    raise unfit(zeros, f"{list(scales.shape)}, or packed {[words_of(laid.down, width, True), laid.across]}")


def _shape(stored: StoredWeight) -> Shape | None:
    """Return the shape that `weight_shape` states. None: there is none, or only headers of a hub model are present.

    A row's last word may be filled in part, so words alone do not tell the number of columns.
    """
    info = stored.part("weight_shape")
    if info is None or not info.path.exists():
        return None
    if info.dtype not in ("I64", "I32") or info.shape != (len(stored.codes.shape),):
        raise unfit(info, f"I64 {[len(stored.codes.shape)]}")
    found = np.empty(info.shape, "<i8" if info.dtype == "I64" else "<i4")
    with Reader() as reader:
        reader.read_into(info, 0, found)
    if (found < 0).any() or math.prod(map(int, found)) > 32 * math.prod(stored.codes.shape):
        raise InputError(f"{info.name} says {found.tolist()}", hint=OR_QUANTISE)
    return tuple(map(int, found))


def write_int4(name: str, shape: Shape, group: int, scale: str, path: Path) -> Coding:
    """Return the coding of a matrix with 8 codes in 32 bits and a scale for `group` columns.

    Its shape is stored too; `path` is the file that errors name.
    """
    rows, columns = shape
    module = name.removesuffix("weight")
    codes = StoredPart(f"{module}weight_packed", "I32", (rows, -(-columns // 8)))
    scales = StoredPart(f"{module}weight_scale", scale, (rows, columns // group))
    numbers = memoryview(np.asarray(shape, "<i8").tobytes())
    whole = in_memory(f"{module}weight_shape", "I64", (2,), numbers, path)
    coder = BlockCoder(Integers(4), (1, group), scale, search=True, packing="words")
    return replace(by_rows(shape, coder, codes, scales), copied=(whole,))


def settings_of(scheme: str, by: str, size: int, plain: Sequence[str]) -> dict[str, Any]:
    """Return config.json's settings of weights with a scale a group (of `size`), channel or tensor.

    8 bits round activations token by token, 4 bits leave them plain. Modules `plain` are not coded.
    """
    bits, form, kind = FORM_OF[scheme]
    common = {"num_bits": bits, "type": kind, "symmetric": True}
    weights = {**common, "dynamic": False, "strategy": by, "observer": "minmax"}
    if by == "group":
        weights["group_size"] = size
    if scheme in SCALE_OF:
        strategy, dtype = SCALE_OF[scheme]
        weights |= {"strategy": strategy, "scale_dtype": dtype, "zp_dtype": dtype}
    tokens = {**common, "dynamic": True, "strategy": "token"} if bits == 8 else None
    group = {"targets": ["Linear"], "weights": weights, "input_activations": tokens, "output_activations": None}
    return {
        "config_groups": {"group_0": group},
        "format": form,
        "ignore": list(plain),
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


# Codes that are stored one by one.


def scaled_by(stored: StoredWeight, block: Block | None, *, whole: bool = False) -> TensorInfo:
    """Return the weight of codes that are stored one by one. InputError: scales, zeros or an order do not fit."""
    codes, scales = stored.codes, stored.need("_scale_inv", "_scale", ".scale")
    check_dtype(scales)
    laid = grid(codes.shape, scales.shape, block, whole=whole)
    zeros = stored.part("weight_zero_point")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in ("I8", "U8", "F8_E4M3", "F8_E5M2")):
        raise unfit(zeros, f"{list(scales.shape)} of 8 bits")
    columns = codes.shape[-1] if codes.shape else 1
    form: Any = codes.dtype
    return weight(stored, codes.shape, Scaled(codes, scales, zeros, order_of(stored, columns), columns, laid, form))


def order_of(stored: StoredWeight, columns: int) -> TensorInfo | None:
    """Return the tensor with the group of each column. InputError: it does not fit."""
    order = stored.part("weight_g_idx")
    if order is not None and (order.dtype not in ("I32", "U32") or order.shape != (columns,)):
        raise unfit(order, f"I32 {[columns]}")
    return order


def unfit(info: TensorInfo, expected: str) -> InputError:
    """Return the error for a part of another dtype or shape."""
    return InputError(f"{info.name} is {info.dtype} {list(info.shape)}, must be {expected}", hint=OR_QUANTISE)


def write_rows(name: str, shape: Shape, dtype: str, scale: str) -> Coding:
    """Return the coding of a matrix with a scale a row, as compressed-tensors' float- and int-quantized store it.

    Scales have the dtype of the model, in which transformers reads them.
    """
    coder = BlockCoder(FLOATS.get(dtype) or Integers(), (1, shape[1]), scale)
    return by_rows(shape, coder, StoredPart(name, dtype, shape), StoredPart(f"{name}_scale", scale, (shape[0], 1)))


# The groups of config.json.


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """The settings that config.json has for the weights of a group.

    width        bits; None: not stated
    block        rows and columns that share a scale
    whole        whether blocks must divide the weight
    asymmetric   whether there are zeros
    """

    width: int | None = None
    block: Block | None = None
    whole: bool = False
    asymmetric: bool = False


def one_by_one(stored: StoredWeight, group: GroupSettings) -> TensorInfo:
    """Return the weight of a group whose codes are stored without packing."""
    _zeros_of(stored, group)
    return scaled_by(stored, group.block, whole=group.whole)


def of_groups(stored: StoredWeight, make: Callable[[GroupSettings], TensorInfo]) -> TensorInfo:
    """Return the weight that `make` reads as the first group that fits.

    InputError: an unknown format, no group fits, or groups that do and differ in it.
    """
    form = stored.settings.get("format") or "dense"
    if stored.settings.get("quant_method") == "compressed-tensors" and form not in FORMATS:
        raise InputError(f"its format {str(form)[:80]!r} is not known", hint=HINT)
    made: list[TensorInfo] = []
    failed: list[InputError] = []
    for group in list(_groups(stored)):
        try:
            made.append(make(group))
        except InputError as error:
            failed.append(error)
    if not made:
        raise failed[0]
    if any(one != made[0] for one in made):
        raise InputError("several config_groups fit it, and give it different values", hint="name it in their targets")
    return made[0]


def _zeros_of(stored: StoredWeight, group: GroupSettings) -> TensorInfo | None:
    """Return the zeros beside the codes. InputError: there are none, although config.json says so."""
    return stored.need("weight_zero_point") if group.asymmetric else stored.part("weight_zero_point")


def _groups(stored: StoredWeight) -> Iterator[GroupSettings]:
    """Yield the possible groups of a weight: groups whose targets name it, or groups of classes, or all."""
    groups = stored.settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        yield GroupSettings()
        return
    named: dict[int, list[GroupSettings]] = {0: [], 1: [], 2: []}
    module = stored.name.removesuffix(".weight")
    for name, settings in groups.items():
        with errors.context(f"config_groups.{str(name)[:40]}"):
            if not isinstance(settings, Mapping) or not isinstance(settings.get("weights"), Mapping):
                continue
            targets = settings.get("targets")
            how = _names(module, targets if isinstance(targets, list) else [])
            named[how].append(_group(settings["weights"]))
    found = next((few for few in named.values() if few), [GroupSettings()])
    yield from dict.fromkeys(found)


def _names(module: str, targets: Sequence[Any]) -> int:
    """Return 0: a target names the module; 1: one names a class; 2: none does."""
    how = 2
    for target in map(str, targets):
        pattern = target.removeprefix("re:")
        if pattern != target:
            try:
                check(pattern)
            except ValueError as error:
                raise InputError(f"target {pattern[:80]!r} is no regular expression: {error}") from error
            if finds(rf"\A(?:{pattern})", module):
                return 0
        elif target == module:
            return 0
        elif re.fullmatch(r"[A-Z]\w*", target):
            how = 1
    return how


def _group(weights: Mapping[str, Any]) -> GroupSettings:
    """Return a group's settings, checked."""
    width, size, block = weights.get("num_bits"), weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy")
    if width is not None and (type(width) is not int or width not in WIDTHS):
        raise InputError(f"num_bits must be from 1 to 8, is {str(width)[:80]}")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise InputError(f"group_size must be a positive integer or -1, is {str(size)[:80]}")
    if isinstance(block, str) and re.fullmatch(r"\d+x\d+", block):
        block = [int(side) for side in block.split("x")]
    if block is not None and (
        not isinstance(block, list) or len(block) != 2 or not all(type(x) is int and x > 0 for x in block)
    ):
        raise InputError(f"block_structure must be two positive integers, is {str(block)[:80]}")
    if strategy is not None and strategy not in STRATEGIES:
        raise InputError(f"strategy {str(strategy)[:80]!r} of weights is not known")
    asymmetric = weights.get("symmetric") is False
    if block is not None:
        return GroupSettings(width, (block[0], block[1]), asymmetric=asymmetric)
    if size and size > 0:
        return GroupSettings(width, (1, size), whole=True, asymmetric=asymmetric)
    return GroupSettings(width, asymmetric=asymmetric)
