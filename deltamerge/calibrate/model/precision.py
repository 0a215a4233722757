"""How a forward pass multiplies: in float32, or in bfloat16 where a device is fast at it, and in which order. No torch
on import: plan asks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

Precision = Literal["float32", "bfloat16"]
CPU_INFO = Path("/proc/cpuinfo")
FLAGS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})  # x86's two, and ARM's
LARGE = 50_000_000  # parameters from which products, not the calls around them, take the time


class Sized(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


def chosen(asked: str, device: str, tensors: Iterable[Sized]) -> Precision:
    """Return the precision of `calibration.precision`: `auto` is bfloat16 for large models on a device that is fast at
    it."""
    if asked != "auto":
        return "bfloat16" if asked == "bfloat16" else "float32"
    large = sum(math.prod(tensor.shape) for tensor in tensors) >= LARGE
    return "bfloat16" if large and fast_bfloat16(device) else "float32"


def fast_bfloat16(device: str) -> bool:
    """Tell whether a device multiplies matrices of bfloat16 faster than of float32: GPUs, and CPUs that say so."""
    return device != "cpu" or bool(FLAGS & _flags(CPU_INFO))


def multiplying(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Matrix products in that precision, of bfloat16 with sums in float32."""
    if precision == "float32":
        return nullcontext()
    import torch

    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def same_every_time(device: torch.device) -> AbstractContextManager[Any]:
    """Attention whose backward adds in one order: the fused ones of a GPU do not."""
    if device.type == "cpu":
        return nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH)


@cache
def _flags(path: Path) -> frozenset[str]:
    """Return the flags of the first processor."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    flags = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(flags, "").split())
