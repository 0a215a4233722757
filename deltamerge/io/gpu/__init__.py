"""Loops on a GPU, written in Triton: what the compiled loops of `io/kernels` do, bit for bit.

Triton comes with torch's CUDA wheels and is imported where a GPU computes. TRITON_INTERPRET=1 runs the same loops on
the CPU, slowly, for tests.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from typing import Any

from deltamerge.io.lazy import torch

INTERPRETED = "TRITON_INTERPRET"


@cache
def installed() -> bool:
    """Whether Triton is there; nothing is imported."""
    return importlib.util.find_spec("triton") is not None


def available(device: torch.device) -> bool:
    """Whether the loops run on tensors of this device."""
    return installed() and (device.type == "cuda" or (device.type == "cpu" and os.environ.get(INTERPRETED) == "1"))


def launch(
    kernel: Any, grid: tuple[int, ...], written: Sequence[Any], read: Sequence[Any], *numbers: Any, **constants: Any
) -> None:
    """Start a loop on the current stream: its arguments are tensors that it writes, tensors that it reads, numbers."""
    from deltamerge.io.gpu.functions import OPTIONS

    if all(grid):
        kernel[grid](*written, *read, *numbers, **constants, **OPTIONS)
