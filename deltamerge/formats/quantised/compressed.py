"""Weights of compressed-tensors: float8 or int8 codes, and integers of 1 to 8 bits packed into words.

W = (code − zero) · scale (compressed_tensors, quantization/lifecycle). `config_groups` say how many bits there are and
what shares a scale; several groups (`mixed-precision`) are told apart by their targets and by the tensors' shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from deltamerge import errors
from deltamerge.errors import InputError
from deltamerge.formats.quantised.detect import HINT
from deltamerge.formats.quantised.grid import EXPONENTS, Block, Grid, Scales, check_dtype, grid
from deltamerge.formats.quantised.scaled import Scaled, Zeros, words_of
from deltamerge.formats.quantised.weight import Stored, weight
from deltamerge.tensors.patterns import check, finds
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

WIDTHS = range(1, 9)
# Formats whose codes lie as `decoded` takes them; what is only named is read by other decoders, or is not there.
FORMATS = frozenset({
    "naive-quantized", "int-quantized", "float-quantized", "pack-quantized", "mxfp8-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized", "dense", "fakequant",
})  # fmt: skip
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")
AGAIN = "download the model again, or quantise it again"


@dataclass(frozen=True, slots=True)
class Group:
    """What config.json says of the weights of a group: their bits (None: nothing), their block, as [rows, columns],
    whether blocks must divide, and whether they have zeros."""

    width: int | None = None
    block: Block | None = None
    whole: bool = False
    asymmetric: bool = False


def decoded(stored: Stored) -> TensorInfo:
    """The weight that codes, scales, zeros and an order of columns store.

    InputError: codes that the library does not write so, or companions whose shapes and dtypes do not fit.
    """
    codes = stored.codes
    form = stored.settings.get("format") or "dense"
    if stored.settings.get("quant_method") == "compressed-tensors" and form not in FORMATS:
        raise InputError(f"its format {str(form)[:80]!r} is not known", hint=HINT)
    groups = list(_groups(stored))
    if codes.name.endswith("weight_packed"):
        return _packed(stored, groups)
    if codes.dtype not in ("I8", "F8_E4M3", "F8_E5M2"):
        raise InputError(f"is stored as {codes.dtype} beside scales, which is no form of it", hint=AGAIN)
    return _first(groups, lambda group: _one_by_one(stored, group))


def _one_by_one(stored: Stored, group: Group) -> TensorInfo:
    _zeros_of(stored, group)
    return scaled_by(stored, group.block, whole=group.whole)


def _zeros_of(stored: Stored, group: Group) -> TensorInfo | None:
    """The zeros that lie beside the codes. InputError: there are none, and config.json says that there are."""
    return stored.need("weight_zero_point") if group.asymmetric else stored.part("weight_zero_point")


def scaled_by(stored: Stored, block: Block | None, *, whole: bool = False) -> TensorInfo:
    """The weight of codes that are stored one by one."""
    codes, scales = stored.codes, stored.need("_scale_inv", "_scale", ".scale")
    check_dtype(scales)
    laid = grid(codes.shape, scales.shape, block, whole=whole)
    zeros = stored.part("weight_zero_point")
    if zeros is not None and (zeros.shape != scales.shape or zeros.dtype not in ("I8", "U8", "F8_E4M3", "F8_E5M2")):
        raise _unfit(zeros, f"{list(scales.shape)} of 8 bits")
    columns = codes.shape[-1] if codes.shape else 1
    made = Scaled(
        codes,
        columns,
        Scales(scales, laid),
        codes.dtype,  # type: ignore[arg-type]  # one of its forms
        zeros=None if zeros is None else Zeros(zeros),
        order=_order(stored, columns),
    )
    return weight(stored, codes.shape, made)


def _packed(stored: Stored, groups: Sequence[Group]) -> TensorInfo:
    codes, shape = stored.codes, _shape(stored)
    if codes.dtype not in ("I32", "U32") or len(codes.shape) < 2:
        raise InputError(
            f"weight_packed is {codes.dtype} {list(codes.shape)}, must be 32-bit words of rows", hint=AGAIN
        )
    return _first(groups, lambda group: _of_group(stored, shape, group))


def _of_group(stored: Stored, shape: tuple[int, ...] | None, group: Group) -> TensorInfo:
    """The weight as a group would pack it. InputError: it would not be packed so."""
    codes, scales = stored.codes, stored.need("weight_scale")
    check_dtype(scales)
    if scales.dtype in EXPONENTS:
        raise InputError(f"{scales.name}: {scales.dtype} is no dtype of the scales of packed integers")
    words = codes.shape[-1]
    if shape is None and group.width is None:
        raise InputError("its bits are stated neither by config.json nor by weight_shape", hint=AGAIN)
    if shape is None:
        assert group.width is not None
        shape = (*codes.shape[:-1], words * 32 // group.width)
    if shape[:-1] != codes.shape[:-1]:
        raise InputError(f"weight_shape says {list(shape)}, weight_packed has {list(codes.shape)}", hint=AGAIN)
    width, dense = _packing(shape[-1], words, group.width)
    laid = grid(shape, scales.shape, group.block, whole=group.whole)
    zeros = _zeros(_zeros_of(stored, group), scales, laid, shape, width)
    made = Scaled(codes, shape[-1], Scales(scales, laid), "packed", width, dense, zeros, _order(stored, shape[-1]))
    return weight(stored, shape, made)


def _packing(columns: int, words: int, width: int | None) -> tuple[int, bool]:
    """The bits of an integer of which `columns` take so many words, and whether it may lie across two of them, as the
    library packs now; older versions put whole integers into words. InputError: none takes so many."""
    for dense in (True, False):
        fitting = [b for b in ([width] if width else WIDTHS) if words_of(columns, b, dense) == words]
        if len(fitting) == 1:
            return fitting[0], dense
    said = f"{columns} integers of {width} bits" if width else f"{columns} integers"
    raise InputError(f"its rows have {words} words, which {said} do not take", hint=AGAIN)


def _zeros(
    zeros: TensorInfo | None, scales: TensorInfo, laid: Grid, shape: tuple[int, ...], width: int
) -> Zeros | None:
    """The zeros of packed codes: packed too, down their columns, or one by one."""
    if zeros is None:
        return None
    if zeros.dtype == "I8" and zeros.shape == scales.shape:
        return Zeros(zeros)
    rows = laid.down
    for dense in (True, False):
        expected = (words_of(rows, width, dense), laid.across)
        if zeros.dtype in ("I32", "U32") and len(shape) == 2 and zeros.shape == expected:
            return Zeros(zeros, width, packed=True, dense=dense)
    raise _unfit(zeros, f"{list(scales.shape)}, or packed {[words_of(rows, width, True), laid.across]}")


def _unfit(info: TensorInfo, expected: str) -> InputError:
    return InputError(f"{info.name} is {info.dtype} {list(info.shape)}, must be {expected}", hint=AGAIN)


def _order(stored: Stored, columns: int) -> TensorInfo | None:
    order = stored.part("weight_g_idx")
    if order is not None and (order.dtype not in ("I32", "U32") or order.shape != (columns,)):
        raise _unfit(order, f"I32 {[columns]}")
    return order


def _shape(stored: Stored) -> tuple[int, ...] | None:
    """What `weight_shape` says; None where there is none, or of the hub only headers are there.

    A row's last word may be filled in part: the words alone do not tell how many columns there are.
    """
    info = stored.part("weight_shape")
    if info is None or not info.path.exists():
        return None
    if info.dtype not in ("I64", "I32") or info.shape != (len(stored.codes.shape),):
        raise _unfit(info, f"I64 {[len(stored.codes.shape)]}")
    found = np.empty(info.shape, "<i8" if info.dtype == "I64" else "<i4")
    with Reader() as reader:
        reader.read_into(info, 0, found)
    if (found < 0).any() or math.prod(map(int, found)) > 32 * math.prod(stored.codes.shape):
        raise InputError(f"{info.name} says {found.tolist()}", hint=AGAIN)
    return tuple(map(int, found))


def _first(groups: Sequence[Group], make: Any) -> TensorInfo:
    """What the first group that fits makes. InputError: none does; groups that do and differ in it."""
    made: list[TensorInfo] = []
    failed: list[InputError] = []
    for group in groups:
        try:
            made.append(make(group))
        except InputError as error:
            failed.append(error)
    if not made:
        raise failed[0]
    if any(one != made[0] for one in made):
        raise InputError("several config_groups fit it, and give it different values", hint="name it in their targets")
    return made[0]


def _groups(stored: Stored) -> Iterator[Group]:
    """The groups that a weight may be of: those whose targets name it, else those of whole classes, else all."""
    groups = stored.settings.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        yield Group()
        return
    named: dict[int, list[Group]] = {0: [], 1: [], 2: []}
    module = stored.name.removesuffix(".weight")
    for name, settings in groups.items():
        with errors.context(f"config_groups.{str(name)[:40]}"):
            if not isinstance(settings, Mapping) or not isinstance(settings.get("weights"), Mapping):
                continue
            targets = settings.get("targets")
            how = _names(module, targets if isinstance(targets, list) else [])
            named[how].append(_group(settings["weights"]))
    found = next((few for few in named.values() if few), [Group()])
    yield from dict.fromkeys(found)


def _names(module: str, targets: Sequence[Any]) -> int:
    """0: a target names the module; 1: one names a class; 2: none does."""
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


def _group(weights: Mapping[str, Any]) -> Group:
    """A group's settings, checked."""
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
        return Group(width, (block[0], block[1]), asymmetric=asymmetric)
    if size and size > 0:
        return Group(width, (1, size), whole=True, asymmetric=asymmetric)
    return Group(width, asymmetric=asymmetric)
