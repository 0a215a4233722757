"""Merges of LoRAs in their core (Panariello et al., "Accurate and Efficient Low-Rank Model Merging in Core Space").

n updates L_i R_i of a matrix lie in the span U of all L_i and V of all R_iᵀ, of k = Σ r_i directions. A merge that does
not depend on the orthonormal basis is computed on the k × k matrices Uᵀ L_i R_i V. Its result is expanded once, as U ·
merged · Vᵀ. The updates stay exact: nothing is rounded to the base's dtype in between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltamerge.methods.merge.matrices import BLOCK, Tall, multiply
from deltamerge.methods.prune.rescale import share
from deltamerge.tensors.lazy import torch
from deltamerge.tensors.traits import function_of, traits

if TYPE_CHECKING:
    from deltamerge.methods.merge.matrices import Form
    from deltamerge.tensors.tensor import Node
    from deltamerge.tensors.tiles import Whole

    Tensor = torch.Tensor

LARGEST = 0.5  # largest k, as a share of the smaller side, for which the core is less work


@dataclass(frozen=True, slots=True)
class Update:
    """A LoRA's s · B A of a matrix: its rank, s, and whether the matrix is stored (in, out)."""

    rank: int
    scale: float
    turned: bool

    @classmethod
    def of(cls, tensor: Node | None) -> Update | None:
        """Return the update in the view of a LoRA (`formats.peft.lora.low_rank`). None: the node has no such view."""
        if tensor is None:
            return None
        return cls(tensor.inputs[1].shape[0], tensor.parameter("scale"), tensor.parameter("transposed"))


def fits(updates: tuple[Update | None, ...], form: Form) -> bool:
    """Tell whether the updates of one matrix are merged in their core. None stands for a model without an update."""
    size = sum(one.rank for one in updates if one is not None)
    return form[0] == 1 and 0 < size <= LARGEST * min(form[1:])


def needs_of(*, form: Form, updates: tuple[Update | None, ...], **parameters: Any) -> tuple[int, float]:
    """Return (bytes, operations): factors in float64, twice while bases are computed, and some k × k matrices."""
    _, rows, columns = form[:3]
    size = sum(one.rank for one in updates if one is not None)
    held = 4 * rows * columns + 8 * (4 * size * (rows + columns) + 16 * size**2 + 2 * max(BLOCK, rows, columns))
    products = 2.0 * (rows + columns) * size**2 * 3 + 2.0 * rows * columns * size
    return math.ceil(held), products + 30.0 * (2 + len(updates)) * size**3


@traits(needs=needs_of)
def in_core(
    *factors: Whole,
    method: str,
    form: Form,
    updates: tuple[Update | None, ...],
    weights: tuple[float, ...],
    balanced: bool = False,
    **parameters: Any,
) -> Tensor:
    """Return the merge of a matrix's updates by `method`, flat float32.

    factors    A and B of each update, in the order of `updates`
    balanced   whether each update first gets the mean length of all (`balance: norm`)
    """
    _, rows, columns = form[:3]
    lefts, rights, given = [], [], iter(factors)
    for update in updates:
        if update is None:
            continue
        inputs, outputs = (rows, columns) if update.turned else (columns, rows)
        a = _read(next(given), (update.rank, inputs))
        b = _read(next(given), (outputs, update.rank))
        left, right = (a.T, b) if update.turned else (b, a.T)
        lefts.append(left * update.scale)
        rights.append(right)
    left, left_parts = torch.linalg.qr(torch.cat(lefts, 1))
    right, right_parts = torch.linalg.qr(torch.cat(rights, 1))
    size, at = left.shape[1], 0
    cores = []
    for one in updates:
        own = slice(at, at + (0 if one is None else one.rank))
        at = own.stop
        cores.append(left_parts[:, own] @ right_parts[:, own].T)
    if balanced:
        squares = [(core * core).sum().view(1).cpu().numpy() for core in cores]
        cores = [core * share(*squares, number=i) for i, core in enumerate(cores)]
    small = (1, size, size, rows, columns)
    merged = function_of(method)(*map(Held, cores), form=small, weights=weights, **parameters)
    out = torch.empty(rows, columns, dtype=torch.float32, device=left.device)
    core = merged.view(size, size).to(torch.float64)
    if rows < columns:
        multiply(Tall(right), core.T @ left.T, out)
    else:
        multiply(Tall(left), core @ right.T, out)
    return out.view(-1)


def _read(factor: Whole, shape: tuple[int, int]) -> Tensor:
    values = torch.empty(math.prod(shape), dtype=torch.float32, device=factor.device)
    factor.fill(0, values)
    return values.to(torch.float64).view(shape)


@dataclass(frozen=True, slots=True)
class Held:
    """Values in memory, in place of values that are computed at each read."""

    values: Tensor

    @property
    def device(self) -> Any:
        return self.values.device

    def fill(self, start: int, out: Tensor) -> None:
        out.copy_(self.values.view(-1)[start : start + out.numel()])
