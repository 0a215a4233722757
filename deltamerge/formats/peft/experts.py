"""A LoRA on a stack of experts: W_e + s · B_e A_e for every expert e, as PEFT merges one of a parameter of three
dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from deltamerge.errors import InputError
from deltamerge.formats.peft.config import BY_PEFT, DERIVED, scale_of
from deltamerge.formats.peft.lora import pair_of
from deltamerge.tensors.tensor import Read, Tensor, TensorInfo, view, viewed
from deltamerge.tensors.views import Array, base_rows, fill_lines, flat_rows, floats, product

Tensors = Mapping[str, TensorInfo]


@view(entrywise=True)
def expert_updates(read: Read, tensor: Tensor, start: int, out: memoryview, *, scale: float, transposed: bool) -> None:
    """Compute W_e + s · B_e A_e in float32, rounded once to W's dtype.

    Inputs: W (E, out, in), or (E, in, out) if `transposed`; A (E · r, in), expert by expert; B (out, r · E), where
    column k · E + e is expert e's.
    """
    base, a, b = tensor.inputs
    count, rows, columns = tensor.shape
    rank = a.shape[0] // count
    whole = flat_rows(read, b).reshape(-1, rank, count)

    def made(top: int, bottom: int) -> Array:
        parts = []
        for expert in range(top // rows, -(-bottom // rows)):
            low, high = max(top, expert * rows), min(bottom, (expert + 1) * rows)
            own_a, own_b = base_rows(read, a, expert * rank, (expert + 1) * rank), whole[:, :, expert]
            left, right = (own_a.T, own_b.T) if transposed else (own_b, own_a)
            part = product(left[low - expert * rows : high - expert * rows], right)
            part *= np.float32(scale)
            part += floats(read, base, low * columns, (high - low) * columns).reshape(-1, columns)
            parts.append(part)
        return np.concatenate(parts)

    fill_lines(columns, tensor.dtype, start, out, made)


def with_experts(
    info: TensorInfo, factors: Tensors, key: str, config: Mapping[str, Any], transposed: bool | None
) -> TensorInfo:
    """Return a stack of experts' weights with its update; `transposed` decides where shapes do not."""
    a, b = pair_of(factors)
    if not fits(info, factors):
        raise InputError(f"A {list(a.shape)} and B {list(b.shape)} do not fit the base's {list(info.shape)}")
    if config.get("init_lora_weights") in DERIVED or not factors.keys() <= {"A", "B"}:
        raise InputError("only plain LoRA of experts can be read", hint=BY_PEFT)
    straight, turned = _ways(info, factors)
    if straight and turned and transposed is None:
        raise InputError(f"square experts {list(info.shape)} do not tell whether they are transposed", hint=BY_PEFT)
    way = bool(transposed) if straight and turned else turned
    scale = scale_of(config, key, a.shape[0] // info.shape[0])
    update = viewed(expert_updates, [info, a, b], info.shape, info.dtype, scale=scale, transposed=way)
    return replace(info, tensor=update)


def fits(info: TensorInfo, factors: Tensors) -> bool:
    """Tell whether A and B are for the stack of experts `info`."""
    a, _ = pair_of(factors)
    return len(info.shape) == 3 and not a.shape[0] % info.shape[0] and any(_ways(info, factors))


def _ways(info: TensorInfo, factors: Tensors) -> tuple[bool, bool]:
    """Tell whether the experts can be (out, in), and whether they can be (in, out)."""
    a, b = pair_of(factors)
    return info.shape[1:] == (b.shape[0], a.shape[1]), info.shape[1:] == (a.shape[1], b.shape[0])


def stored_transposed(gate_up: TensorInfo | None, down: TensorInfo | None) -> bool | None:
    """Tell by both shapes whether a container's fused experts are (in, out); None if they do not tell."""
    if gate_up is None or down is None or len(gate_up.shape) != 3 or len(down.shape) != 3:
        return None
    (_, p, q), (_, s, t) = gate_up.shape, down.shape
    straight, turned = (p == 2 * t and q == s), (q == 2 * s and p == t)
    return turned if straight != turned else None
