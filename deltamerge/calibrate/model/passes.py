"""What goes into a pass through a model and what comes of it: weights by name, inputs, outputs, who watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from deltamerge.calibrate.model.head import Head
from deltamerge.calibrate.model.layers import Cut, Linear
from deltamerge.tensors.dtypes import torch_dtype
from deltamerge.tensors.reader import Reader
from deltamerge.tensors.tensor import TensorInfo

Weights = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Checkpoint names -> tensors of any dtype and device. A pass asks for one part of the model at a time."""
Inputs = Mapping[str, Tensor]
COMPARED = "compared"  # of inputs, no argument of a forward: (B, T) whether a place's logits are compared


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """`hidden` (B, T, H): last hidden state of the base model; `scores`: logits (B, C) or (B, T, V), or what they are
    computed from, None without a head."""

    hidden: Tensor
    scores: Tensor | Head | None

    @property
    def logits(self) -> Tensor | None:
        """The logits, computed."""
        return self.scores.logits if isinstance(self.scores, Head) else self.scores


class Watch(Protocol):
    """Observes the inputs of every linear layer, part by part: of the whole layer, or of a cut of stacked ones."""

    def enter(self, layers: Sequence[Linear]) -> None: ...
    def see(self, layer: Linear | Cut, x: Tensor, batch: int) -> None: ...
    def leave(self, layers: Sequence[Linear]) -> bool: ...


def sequences(inputs: Inputs) -> int:
    """How many of them a batch has."""
    return len(next(iter(inputs.values())))


def stored(reader: Reader, info: TensorInfo) -> Tensor:
    """A tensor as it is stored, or made, on the CPU."""
    raw = torch.empty(info.nbytes, dtype=torch.uint8)
    reader.read_into(info, 0, raw.numpy())
    return raw.view(torch_dtype(info.dtype)).view(info.shape)


def from_reader(read: Callable[[str], Tensor]) -> Weights:
    """Weights by name, from a function that reads one tensor."""
    return lambda names: {name: read(name) for name in names}
