"""The precision of matrix products and of attention while a model runs, and the order in which attention adds."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from deltamerge.calibrate.spec import Precision

SHORT = 128


def multiplying(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Compute matrix products in that precision, of bfloat16 with sums in float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16, cache_enabled=False)


def same_every_time(device: torch.device, places: int = SHORT + 1) -> AbstractContextManager[Any]:
    """Let the backward pass of attention add in one order. The fused attentions of a GPU do not.

    A CPU's fused attention does, but its backward pass over SHORT `places` or fewer takes longer than plain products.
    """
    return nullcontext() if device.type == "cpu" and places > SHORT else sdpa_kernel(SDPBackend.MATH)


def float_attention(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Compute attention of `dtype` in float32 where that is quicker: bfloat16 takes CPUs three times as long."""
    return _FloatAttention() if dtype == torch.bfloat16 and device.type == "cpu" else nullcontext()


class _FloatAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            kwargs = {**kwargs, "attn_mask": mask.float()}
        with torch.autocast("cpu", enabled=False):
            return func(*(side.float() for side in args[:3]), *args[3:], **kwargs).to(torch.bfloat16)
