"""Which matrices of parameters a forward multiplies with what, seen from outside: experts stacked in one parameter.

A module of experts takes one matrix of its parameter, or some of its rows, and calls torch's matrix product. The
operand is a view of the parameter, so its address and strides say which entries it has, whatever the module is called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True, slots=True)
class Box:
    """Rows and columns [first, last) of one `matrix` of a parameter `state`; `turned`: its columns are the outputs."""

    state: str
    matrix: int
    rows: tuple[int, int]
    columns: tuple[int, int]
    turned: bool


See = Callable[[Box, Tensor], None]
"""Is given every product: the box, and its inputs (N, n)."""
LINEAR = frozenset({torch.nn.functional.linear})
# function -> the places of the two factors
PRODUCTS: dict[Any, tuple[int, int]] = {
    torch.matmul: (0, 1), torch.mm: (0, 1), torch.bmm: (0, 1), torch.addmm: (1, 2), torch.baddbmm: (1, 2),
    Tensor.matmul: (0, 1), Tensor.mm: (0, 1), Tensor.bmm: (0, 1), Tensor.__matmul__: (0, 1),
    Tensor.addmm: (1, 2), Tensor.baddbmm: (1, 2),
}  # fmt: skip


class Products(TorchFunctionMode):
    """Calls `see` for every product with a part of one of the `watched` parameters."""

    def __init__(self, watched: Mapping[str, Tensor], see: See) -> None:
        super().__init__()
        self.see = see
        self.places: dict[int, list[tuple[str, Tensor]]] = {}
        for state, tensor in watched.items():
            if tensor.is_contiguous() and tensor.dim() > 1:
                self.places.setdefault(tensor.untyped_storage().data_ptr(), []).append((state, tensor))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in LINEAR and len(args) > 1:
            self._product(args[0], args[1].mT if args[1].dim() > 1 else args[1])
        elif func is Tensor.__rmatmul__:
            self._product(args[1], args[0])
        elif (places := PRODUCTS.get(func)) is not None and len(args) > places[1]:
            self._product(args[places[0]], args[places[1]])
        return func(*args, **kwargs)

    def _product(self, left: Tensor, right: Tensor) -> None:
        """X · M of a watched M, or M · X, which is (Xᵀ · Mᵀ)ᵀ."""
        if right.dim() > 1 and left.dim() > 0 and self._near(right):
            self._matrices(left, right)
        elif left.dim() > 1 and right.dim() > 1 and self._near(left):
            self._matrices(right.mT, left.mT)

    def _near(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        return self.places.get(tensor.untyped_storage().data_ptr(), [])

    def _matrices(self, x: Tensor, matrix: Tensor) -> None:
        """See X · M with M (in, out), matrix by matrix of a batch of them."""
        if matrix.dim() == 2:
            self._one(x.reshape(-1, x.shape[-1]), matrix)
        elif matrix.dim() == 3 and x.dim() in (2, 3):
            for e, one in enumerate(matrix):
                self._one(x if x.dim() == 2 else x[e if len(x) > 1 else 0], one)

    def _one(self, x: Tensor, matrix: Tensor) -> None:
        for state, parameter in self._near(matrix):
            box = _box(state, parameter, matrix)
            if box is not None and x.numel():
                self.see(box, x)


def _box(state: str, parameter: Tensor, matrix: Tensor) -> Box | None:
    """Where a matrix (in, out) lies in a contiguous parameter; None: it is no view of rows and columns of it."""
    high, wide = parameter.shape[-2:]
    start = int(matrix.storage_offset() - parameter.storage_offset())
    if not 0 <= start < parameter.numel() or wide == 1 or 0 in matrix.shape:
        return None
    inputs, outputs = matrix.shape
    steps = matrix.stride()
    turned = _steps(steps, (wide, 1), (inputs, outputs))
    if not turned and not _steps(steps, (1, wide), (inputs, outputs)):
        return None
    tall, across = (inputs, outputs) if turned else (outputs, inputs)
    row, column = divmod(start, wide)
    number, row = divmod(row, high)
    if row + tall > high or column + across > wide:
        return None
    return Box(state, number, (row, row + tall), (column, column + across), turned)


def _steps(steps: tuple[int, ...], wanted: tuple[int, int], sides: tuple[int, int]) -> bool:
    """Whether strides are the wanted ones, as far as a side of 1 lets them be told."""
    return all(step == want or side == 1 for step, want, side in zip(steps, wanted, sides, strict=True))
