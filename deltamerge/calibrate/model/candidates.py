"""Pruned and merged models: base + masked delta / q, and base + Σ c_k D_k, made part by part from cached tensors.

Both are differentiable in the q's or c's. Nothing of the size of the weights is kept for the backward pass of a sum but
its gradients.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from deltamerge.calibrate.model.passes import Weights
from deltamerge.tensors.tiles import Kept

Q = float | Tensor
"""One number, or a tensor that broadcasts to the weight: (m, 1) for rows of (out, in), (1, m) for Conv1D, and (E, 1, 1)
or (E, m, 1) for stacked experts."""
T = TypeVar("T")
SLAB = 1 << 17  # entries of a delta that are widened to float32 at once: they stay in the cache


@dataclass(frozen=True, slots=True, eq=False)
class ReadDelta:
    """A dense delta that is read where it is used: `read(start, stop)` gives its flat entries in float32."""

    shape: tuple[int, ...]
    read: Callable[[int, int], Tensor]

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        across = math.prod(self.shape[1:])
        return self.read(start * across, stop * across).view(-1, *self.shape[1:])

    def to(self, *how: Any) -> Tensor:
        """Return the whole as a tensor."""
        return self[:].to(*how)


Masked = Tensor | Kept | ReadDelta
"""A tensor's masked, unscaled delta: dense, or `Kept` with flat positions (int32 where they fit) and float32 values."""


class Cache(Generic[T]):
    """A cache of the values of `read`: the first `pinned` bytes for good, and the last `recent` bytes of the rest.

    A walk asks for all names in a circle. A cache of the last used would have lost each name when its turn comes again,
    so the first names are kept. The recent values serve the variants of one part of a walk.
    """

    def __init__(self, read: Callable[[Sequence[str]], Mapping[str, T]], recent: int, pinned: int = 0) -> None:
        self._read, self._room, self._left, self._held = read, recent, pinned, 0
        self._pinned: dict[str, T] = {}
        self._recent: OrderedDict[str, T] = OrderedDict()
        self._pinned_room = pinned

    def __call__(self, name: str) -> T:
        return self.several([name])[name]

    def __contains__(self, name: str) -> bool:
        """Tell whether a value is there."""
        return name in self._pinned or name in self._recent

    def several(self, names: Sequence[str]) -> dict[str, T]:
        """Return the values of names. Missing values are read together."""
        found = {name: self._pinned[name] for name in names if name in self._pinned}
        for name in names:
            if name in self._recent:
                self._recent.move_to_end(name)
                found[name] = self._recent[name]
        missing = [name for name in names if name not in found]
        if missing:
            for name, value in self._read(missing).items():
                found[name] = value
                self._keep(name, value)
        return {name: found[name] for name in names}

    def _keep(self, name: str, value: T) -> None:
        size = _bytes(value)
        if size <= self._left:
            self._pinned[name] = value
            self._left -= size
            return
        self._recent[name] = value
        self._held += size
        while self._held > self._room and len(self._recent) > 1:
            self._held -= _bytes(self._recent.popitem(last=False)[1])

    def clear(self) -> None:
        """Free all values."""
        self._pinned.clear()
        self._recent.clear()
        self._held, self._left = 0, self._pinned_room


def pruned(base: Callable[[str], Tensor], masked: Callable[[str], Masked | None], q: Mapping[str, Q]) -> Weights:
    """Return the weights of base + masked/q; a tensor without a q has q = 1.

        base     reads the tensor that the delta is added to; the fine-tune's own if it is not pruned (the head)
        masked   reads its masked delta, None where there is none

    With `Cache`s for both, candidates of one mask share their reads.
    """

    def weights(names: Sequence[str]) -> dict[str, Tensor]:
        bases, kept = _several(base, names), _several(masked, names)
        return {name: apply(bases[name], kept[name], q.get(name, 1.0)) for name in names}

    return weights


def _several(read: Callable[[str], T], names: Sequence[str]) -> Mapping[str, T]:
    return read.several(names) if isinstance(read, Cache) else {name: read(name) for name in names}


def apply(base: Tensor, masked: Masked | None, q: Q) -> Tensor:
    """Return base + masked/q in float32; gradients flow to q."""
    if masked is None:
        return base
    if isinstance(q, Tensor) and q.dim():
        q = q.to(base.device)
    if isinstance(masked, Kept):
        start = base.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        positions, values = masked.positions.to(start.device), masked.values.to(start.device)
        start.view(-1).index_add_(0, positions, values / _at(q, positions, start.shape))
        return start
    return base.to(torch.float32) + masked.to(base.device, torch.float32) / q


def dense(masked: Masked, shape: Sequence[int]) -> Tensor:
    """Return the masked delta as a float32 tensor of `shape`."""
    if not isinstance(masked, Kept):
        return masked.to(torch.float32).view(*shape)
    flat = torch.zeros(torch.Size(shape).numel(), dtype=torch.float32, device=masked.values.device)
    flat[masked.positions] = masked.values
    return flat.view(*shape)


def _at(q: Q, positions: Tensor, shape: Sequence[int]) -> Q:
    """Return the entry of q for each flat position of a tensor of `shape`; q broadcasts to that shape."""
    if not isinstance(q, Tensor) or q.dim() == 0:
        return q
    index, left = [], positions
    for size, own in zip(reversed(shape), reversed(q.shape), strict=False):
        index.append(left % size if own > 1 else torch.zeros_like(left))
        left = left // size
    return q[tuple(reversed(index))]


def _parts(delta: Masked) -> tuple[Tensor, ...]:
    if isinstance(delta, ReadDelta):
        return ()
    return (delta.positions, delta.values) if isinstance(delta, Kept) else (delta,)


def _bytes(value: object) -> int:
    if isinstance(value, Kept):
        return sum(map(_bytes, _parts(value)))
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


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
    deltas        K of the tensor's shape, dense, `Kept` or a `ReadDelta`
    """
    apply: Callable[..., Tensor] = _Sum.apply
    return apply(base, coefficients, deltas)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, base: Tensor, coefficients: Tensor, deltas: Sequence[Masked]) -> Tensor:
        # checkpoints of activations free saved tensors, and make them again
        ctx.save_for_backward(*(part for delta in deltas for part in _parts(delta)))
        ctx.read = [delta if isinstance(delta, ReadDelta) else None for delta in deltas]
        ctx.kept, ctx.of_one = [isinstance(delta, Kept) for delta in deltas], coefficients.shape[1:]
        total = base.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        single = coefficients.dim() == 1
        for factor, delta in zip(coefficients, deltas, strict=True):
            if isinstance(delta, Kept) and single:
                values = delta.values.to(total.device) * factor
                total.view(-1).index_add_(0, delta.positions.to(total.device), values)
            elif single:
                for rows, part in _slabs(delta, total):
                    total[rows].add_(part, alpha=float(factor))
            else:
                for rows, part in _slabs(delta, total):
                    total[rows].addcmul_(part, factor[rows] if len(factor) == len(total) else factor)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return None, None, None
        (grad,) = grads
        found, saved = [], iter(ctx.saved_tensors)
        for read, kept in zip(ctx.read, ctx.kept, strict=True):
            delta = read or (Kept(next(saved), next(saved)) if kept else next(saved))
            if not ctx.of_one and isinstance(delta, Kept):
                at = grad.reshape(-1)[delta.positions.to(grad.device)]
                found.append(torch.dot(at, delta.values.to(grad.device)))
            elif not ctx.of_one:
                dots = [torch.dot(grad[rows].reshape(-1), part.reshape(-1)) for rows, part in _slabs(delta, grad)]
                found.append(torch.stack(dots).sum() if len(dots) > 1 else dots[0])
            else:
                found.append(_summed(grad, delta, ctx.of_one))
        return None, torch.stack(found), None


def _summed(grad: Tensor, delta: Masked, size: Sequence[int]) -> Tensor:
    """Return grad · delta, summed to the size of the coefficients."""
    of_rows = size[0] == len(grad)
    parts = []
    for rows, part in _slabs(delta, grad):
        some = grad[rows]
        parts.append((some * part).sum_to_size((len(some), *size[1:]) if of_rows else size))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if of_rows else torch.stack(parts).sum(0)


def _slabs(delta: Masked, like: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield a delta in float32 as (rows, values). A large delta is cut into rows, so that little of it is widened at
    once."""
    if isinstance(delta, Kept) or like.dim() < 2 or like.numel() <= SLAB:
        yield slice(None), dense(delta, like.shape).to(like.device)
        return
    step = max(1, SLAB * len(like) // like.numel())
    for start in range(0, len(like), step):
        rows = slice(start, start + step)
        yield rows, delta[rows].to(like.device, torch.float32)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


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
        if name not in self._made:  # its saved tensors are no checkpoint's, which would miss them in its second pass
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                self._made[name] = make()
        return tapped(self._made[name].detach(), self._spark, name, self._add)

    def _add(self, name: str, gradient: Tensor) -> None:
        known = self._gradients.get(name)
        self._gradients[name] = gradient.clone() if known is None else known.add_(gradient)

    def descend(self) -> None:
        """Hand the gradients on to the coefficients."""
        names = list(self._gradients)
        torch.autograd.backward([self._made[n] for n in names], [self._gradients[n] for n in names])
