"""What goes into a pass through a model and what comes of it: weights by name, inputs, outputs, who watches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from deltamerge.calibrate.layers import Cut, Linear

Weights = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Checkpoint names -> tensors of any dtype and device. A pass asks for one part of the model at a time."""
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class BlockOutput:
    """`hidden` (B, T, H): last hidden state of the base model; `logits` (B, C) or (B, T, V), None without a head."""

    hidden: Tensor
    logits: Tensor | None


class Watch(Protocol):
    """Observes the inputs of every linear layer, part by part: of the whole layer, or of a cut of stacked ones."""

    def enter(self, layers: Sequence[Linear]) -> None: ...
    def see(self, layer: Linear | Cut, x: Tensor, batch: int) -> None: ...
    def leave(self, layers: Sequence[Linear]) -> bool: ...


def from_reader(read: Callable[[str], Tensor]) -> Weights:
    """Weights by name, from a function that reads one tensor."""
    return lambda names: {name: read(name) for name in names}
