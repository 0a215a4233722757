"""base + Σ c_k D_k, differentiable in the c: nothing of the size of the weights is kept for the backward pass but
gradients of the sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deltamerge.calibrate.model.candidates import Masked, dense
from deltamerge.tensors.tiles import Kept


def tapped(tensor: Tensor, spark: Tensor, name: str, told: Callable[[str, Tensor], None]) -> Tensor:
    """Return the tensor in float32; `told` is given its name and the whole gradient of each backward pass. `spark` is
    any tensor that has gradients."""
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


def combined(base: Tensor, coefficients: Tensor, deltas: Sequence[Masked]) -> Tensor:
    """Return the sum in float32.

    base          of any dtype
    coefficients  (K), or (K, …) whose entries broadcast to the tensor
    deltas        K of the tensor's shape, dense or `Kept`
    """
    apply: Callable[..., Tensor] = _Sum.apply
    return apply(base, coefficients, deltas)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, coefficients: Tensor, deltas: Sequence[Masked]) -> Tensor:
        ctx.deltas, ctx.shape, ctx.of_one = deltas, base.shape, coefficients.shape[1:]
        total = base.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        single = coefficients.dim() == 1
        for factor, delta in zip(coefficients, deltas, strict=True):
            if isinstance(delta, Kept) and single:
                values = delta.values.to(total.device) * factor
                total.view(-1).index_add_(0, delta.positions.to(total.device), values)
            elif single:
                total.add_(_placed(delta, total), alpha=float(factor))
            else:
                total.addcmul_(_placed(delta, total), factor)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (grad,) = grads
        found = []
        for delta in ctx.deltas:
            if not ctx.of_one and isinstance(delta, Kept):
                at = grad.reshape(-1)[delta.positions.to(grad.device)]
                found.append(torch.dot(at, delta.values.to(grad.device)))
            elif not ctx.of_one:
                found.append(torch.dot(grad.reshape(-1), _placed(delta, grad).reshape(-1)))
            else:
                found.append((grad * _placed(delta, grad)).sum_to_size(ctx.of_one))
        return None, torch.stack(found), None


class Shared:
    """Sums that several backward passes share: each is made once, and its gradients are added up.

    Holds 8 bytes an entry: the sum and its gradient.
    """

    def __init__(self, device: torch.device) -> None:
        self._spark = torch.zeros((), device=device, requires_grad=True)
        self._made: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def sum(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """Return the sum of that name, which `make` computes; its gradients stay here."""
        if name not in self._made:
            with torch.enable_grad():
                self._made[name] = make()
        return tapped(self._made[name].detach(), self._spark, name, self._add)

    def _add(self, name: str, gradient: Tensor) -> None:
        known = self._gradients.get(name)
        self._gradients[name] = gradient.clone() if known is None else known.add_(gradient)

    def descend(self) -> None:
        """Hand the gradients on to the coefficients."""
        names = list(self._gradients)
        torch.autograd.backward([self._made[n] for n in names], [self._gradients[n] for n in names])


def _placed(delta: Masked, like: Tensor) -> Tensor:
    return dense(delta, like.shape).to(like.device)
