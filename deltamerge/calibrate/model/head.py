"""The logits of a language model in pieces of tokens: those of a whole batch over a large vocabulary are never held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltamerge.calibrate.model.trace import Stop, patched
from deltamerge.errors import InputError

if TYPE_CHECKING:
    from deltamerge.calibrate.model.passes import BlockOutput

PIECE_BYTES = 1 << 24  # of the logits of a piece, of which three are held; larger ones are no faster


@dataclass(frozen=True, slots=True)
class Head:
    """Logits that are not computed yet: those of x (…, H) by a last layer's weight (V, H) and bias (V)."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None

    @property
    def logits(self) -> Tensor:
        """All of them (…, V)."""
        return F.linear(self.x, self.weight, self.bias)

    def at(self, index: Tensor) -> Tensor:
        """(N, k) those of each row of x (N, H) that `index` names."""
        found, start = [], 0
        for x in self.split(index.shape[-1] * self.x.shape[-1]):
            some = index[start : start + len(x)]
            made = torch.bmm(self.weight[some], x.unsqueeze(-1)).squeeze(-1)
            found.append(made if self.bias is None else made + self.bias[some])
            start += len(x)
        return torch.cat(found)

    def split(self, numbers: int) -> tuple[Tensor, ...]:
        """x (N, H) in pieces of rows, each of which takes so many float32 numbers."""
        return torch.split(self.x, max(1, PIECE_BYTES // (4 * numbers)))


def taken(scores: Tensor | Head, take: Callable[[Tensor], Tensor]) -> Tensor | Head:
    """The logits of the tokens that `take` leaves."""
    return replace(scores, x=take(scores.x)) if isinstance(scores, Head) else take(scores)


def pieces(scores: Tensor | Head) -> Iterator[tuple[slice, Tensor]]:
    """Rows of logits (N, V) and what they hold, those of a `Head` computed one piece after the other."""
    if not isinstance(scores, Head):
        yield slice(0, len(scores)), scores
        return
    start = 0
    for x in scores.split(len(scores.weight)):
        yield slice(start, start + len(x)), replace(scores, x=x).logits
        start += len(x)


def at(scores: Tensor | Head, index: Tensor) -> Tensor:
    """The logits (N, k) that an index of each row names."""
    return scores.at(index) if isinstance(scores, Head) else scores.gather(-1, index)


class LastLayer:
    """The linear layer of a model whose product may be its logits, if it has one."""

    def __init__(self, model: Any) -> None:
        found = getattr(model, "get_output_embeddings", lambda: None)()
        self._layers = [found] if type(found) is nn.Linear else []
        self._is_last = bool(self._layers)  # as far as is known

    def stopping(self) -> AbstractContextManager[None]:
        """While this lasts a forward that comes to the layer ends by `Stop`."""

        def stop(x: Tensor) -> Tensor:
            raise Stop

        return patched(self._layers, lambda i: stop)

    def put_off(self, forward: Callable[[], BlockOutput]) -> BlockOutput:
        """What a forward gives; where the layer's product is the logits as it is, it is not computed."""
        if self._is_last:
            products: dict[int, tuple[Tensor, Head]] = {}
            with suppress(InputError), patched(self._layers, lambda i: partial(_put_off, self._layers[i], products)):
                made = forward()
                if id(made.scores) in products:
                    return replace(made, scores=products[id(made.scores)][1])
            self._is_last = False  # the model computes on
        return forward()


def _put_off(layer: nn.Linear, products: dict[int, tuple[Tensor, Head]], x: Tensor) -> Tensor:
    """A stand-in for a layer's product, by whose id it is found."""
    stand_in = x.new_zeros(*x.shape[:-1], 1)
    products[id(stand_in)] = stand_in, Head(x, layer.weight, layer.bias)
    return stand_in
