"""A pass through a model: weights by name, inputs, outputs, watches, and logits computed in pieces of tokens.

The logits of a whole batch over a large vocabulary are never held.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from deltamerge.calibrate.model.layers import Linear, MatrixCut
from deltamerge.errors import InputError
from deltamerge.tensors.dtypes import torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import Tensor as LazyTensor
from deltamerge.tensors.tensor import TensorInfo

PIECE_BYTES = 1 << 24  # of the logits of a piece, of which three are held; larger ones are no faster


class Stop(Exception):
    """Every block has been recorded."""


@contextmanager
def patched(blocks: Sequence[nn.Module], forward: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Put `forward(i)` in the place of block i's own forward."""
    for i, block in enumerate(blocks):
        block.forward = forward(i)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


@dataclass(frozen=True, slots=True)
class LazyLogits:
    """Logits that are not computed yet: those of x (…, H) by a last layer's weight (V, H) and bias (V)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        """Return all of them (…, V)."""
        return F.linear(self.x, self.weight, self.bias)

    def at(self, index: Tensor) -> Tensor:
        """Return (N, k) those of each row of x (N, H) that `index` names."""
        found, start = [], 0
        for x in self.split(index.shape[-1] * self.x.shape[-1]):
            some = index[start : start + len(x)]
            made = torch.bmm(self.weight[some], x.unsqueeze(-1)).squeeze(-1)
            found.append(made if self.bias is None else made + self.bias[some])
            start += len(x)
        return torch.cat(found)

    def split(self, numbers: int) -> tuple[Tensor, ...]:
        """Return x (N, H) in pieces of rows, each of which takes so many float32 numbers."""
        return torch.split(self.x, max(1, PIECE_BYTES // (4 * numbers)))


def taken(scores: Tensor | LazyLogits, take: Callable[[Tensor], Tensor]) -> Tensor | LazyLogits:
    """Return the logits of the tokens that `take` leaves."""
    return replace(scores, x=take(scores.x)) if isinstance(scores, LazyLogits) else take(scores)


def pieces(scores: Tensor | LazyLogits) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows of logits (N, V) and what they hold, those of a `LazyLogits` computed one piece after the other."""
    if not isinstance(scores, LazyLogits):
        yield slice(0, len(scores)), scores
        return
    start = 0
    for x in scores.split(len(scores.weight)):
        yield slice(start, start + len(x)), replace(scores, x=x).logits
        start += len(x)


def of_pieces(scores: Tensor | LazyLogits, value: Callable[[slice, Tensor], Tensor]) -> list[Tensor]:
    """Return `value` of rows and their logits, piece by piece.

    Where gradients are wanted the logits of a `LazyLogits` are made again in the backward pass, so that no more than a
    piece of them is held.
    """
    if not isinstance(scores, LazyLogits) or not torch.is_grad_enabled():
        return [value(rows, some) for rows, some in pieces(scores)]
    found, start = [], 0
    for x in scores.split(len(scores.weight)):
        rows = slice(start, start + len(x))
        start += len(x)

        def made(x: Tensor, rows: slice = rows) -> Tensor:
            return value(rows, replace(scores, x=x).logits)

        found.append(checkpoint(made, x, use_reentrant=False, preserve_rng_state=False))
    return found


def at(scores: Tensor | LazyLogits, index: Tensor) -> Tensor:
    """Return the logits (N, k) that an index of each row names."""
    return scores.at(index) if isinstance(scores, LazyLogits) else scores.gather(-1, index)


class LastLayer:
    """The linear layer of a model whose product may be its logits, if it has one."""

    def __init__(self, model: Any) -> None:
        found = getattr(model, "get_output_embeddings", lambda: None)()
        self._layers = [found] if type(found) is nn.Linear else []
        self._is_last = bool(self._layers)  # as far as is known

    def stopping(self) -> AbstractContextManager[None]:
        """Let a forward that comes to the layer end by `Stop`."""

        def stop(x: Tensor) -> Tensor:
            raise Stop

        return patched(self._layers, lambda i: stop)

    def put_off(self, forward: Callable[[], BlockOutput]) -> BlockOutput:
        """Return the output of a forward; the layer's product is not computed where it is the logits as it is."""
        if self._is_last:
            products: dict[int, tuple[Tensor, LazyLogits]] = {}
            with suppress(InputError), patched(self._layers, lambda i: partial(_put_off, self._layers[i], products)):
                made = forward()
                if id(made.scores) in products:
                    return replace(made, scores=products[id(made.scores)][1])
            self._is_last = False  # the model computes on
        return forward()


def _put_off(layer: nn.Linear, products: dict[int, tuple[Tensor, LazyLogits]], x: Tensor) -> Tensor:
    """Return a stand-in for a layer's product, by whose id it is found."""
    stand_in = x.new_zeros(*x.shape[:-1], 1)
    products[id(stand_in)] = stand_in, LazyLogits(x, layer.weight, layer.bias)
    return stand_in


Weights = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Checkpoint names -> tensors of any dtype and device. A pass asks for one part of the model at a time."""
Inputs = Mapping[str, Tensor]
COMPARED = "compared"  # of inputs, no argument of a forward: (B, T) whether a place's logits are compared


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """`hidden` (B, T, H): last hidden state of the base model; `scores`: logits (B, C) or (B, T, V), or what they are
    computed from, None without a head."""

    hidden: Tensor
    scores: Tensor | LazyLogits | None

    @property
    def logits(self) -> Tensor | None:
        """Return the logits, computed."""
        return self.scores.logits if isinstance(self.scores, LazyLogits) else self.scores


class Watch(Protocol):
    """Observes the inputs of every linear layer, part by part: of the whole layer, or of a cut of stacked ones."""

    def enter(self, layers: Sequence[Linear]) -> None: ...
    def see(self, layer: Linear | MatrixCut, x: Tensor, batch: int) -> None: ...
    def leave(self, layers: Sequence[Linear]) -> None: ...


def sequences(inputs: Inputs) -> int:
    """Count how many of them a batch has."""
    return len(next(iter(inputs.values())))


def stored(reader: Reader, info: LazyTensor | TensorInfo) -> Tensor:
    """Return a tensor as it is stored, or made, on the CPU."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    reader.read_into(info, 0, raw.numpy())
    return raw.view(torch_dtype(info.dtype)).view(info.shape)


def from_reader(read: Callable[[str], Tensor]) -> Weights:
    """Return the weights by name, from a function that reads one tensor."""
    return lambda names: {name: read(name) for name in names}
