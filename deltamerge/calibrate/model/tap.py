"""A tensor whose gradient is handed on as it is made, and kept nowhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def tapped(tensor: Tensor, spark: Tensor, name: str, told: Callable[[str, Tensor], None]) -> Tensor:
    """The tensor in float32; `told` is given its name and the whole gradient of each backward pass. `spark` is any
    tensor that has gradients."""
    apply: Callable[..., Tensor] = _Tap.apply
    return apply(tensor, spark, name, told)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, spark: Tensor, name: str, told: Callable[[str, Tensor], None]) -> Tensor:
        ctx.name, ctx.told = name, told
        return tensor.to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None, None]:
        ctx.told(ctx.name, grads[0])
        return None, None, None, None
